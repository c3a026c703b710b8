"""Raw text of any kind to shards: what `launch/prepare.py` does."""
