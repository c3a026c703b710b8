"""Checkpoints and run folders: written, found, verified, read."""
