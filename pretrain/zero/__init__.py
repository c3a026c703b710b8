"""DeepSpeed's ZeRO, and all there is to know of it."""
