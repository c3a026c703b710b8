"""Processes that train together: collectives, links, GPUs, what ranks wait for and which one hangs."""
