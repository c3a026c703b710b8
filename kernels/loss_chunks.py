"""How many tokens of the output layer have logits at a time. Without torch: a planner asks it too."""

from __future__ import annotations

CHUNK_ELEMENTS = 2**28  # 1 GiB of logits: 2092 tokens of 128k classes
CHUNK_ROWS = 4096  # each chunk passes over the gradient of the weights: fewer, larger chunks where memory allows


def chunk_rows(num_tokens: int, num_classes: int) -> int:
    """Choose how many tokens have logits at a time: as many as 1 GiB holds, or a quarter, up to 4096, if that is more.

    Unfused, logits take 12 bytes an element (fp32 log-probabilities and two gradients of that size) against 4 here: a
    quarter of the tokens is a twelfth, to which the fp32 gradient of the weights comes.
    """
    most = max(CHUNK_ELEMENTS // num_classes, min(CHUNK_ROWS, num_tokens // 4), 1)
    num_chunks = -(-num_tokens // most)
    return -(-num_tokens // max(num_chunks, 1))  # chunks of one size: a short last one would idle most of the GPU
