"""Longhaul's library: settings, data, model, training, checkpoints, export."""

__version__ = "0.1.0"
