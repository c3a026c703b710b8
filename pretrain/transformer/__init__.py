"""The Transformer, its adapters, and what its blocks keep in memory."""
