"""Prepared shards to the rows of a step: a pure function of the config and the step."""
