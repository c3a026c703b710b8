"""Cuts attention into pieces, for a CPU: runs of queries, each with the keys that any of them sees.

What packed documents, causal order and sliding windows hide is then mostly left out instead of computed and masked.
"""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

# Measured on one core of an AMD EPYC with AVX2, forward and backward, fp32, 4 and 8 heads of 64. Causal documents in
# chunks take 0.87 of the time of one call with 256 tokens, 0.7 with 512, 0.88 with 1024, and with 2048 as long.
_SHORT_ROW = 192  # rows up to this are cut all in the same places: calls for each would cost what they save
_CHUNK = 64  # queries of a piece, unless a document is shorter and its neighbours long: a call costs 0.1 ms
_LARGEST_CHUNK = 256  # where each query sees many keys
_CHUNKS_OF_SPAN = 8  # how many times the chunk a query's keys should be, between those two
_MOST = 0.8  # of a run's scores are seen: it is not cut
_LONG_DOCUMENT = 1536  # from here on one call with `is_causal`, which leaves out whole blocks of 512 keys


@dataclass(frozen=True)
class Piece:
    """Queries that attend to one run of keys.

    Args:
        rows: of the batch.
        queries: of each row.
        keys: of each row; those outside are seen by none of the queries.
        is_causal: the first query sees the first key, and each later one a key more.
        bias_B1TS: 0 where a query sees a key and -inf elsewhere; None: by `is_causal`, or all see all.
    """

    rows: slice
    queries: slice
    keys: slice
    is_causal: bool = False
    bias_B1TS: Tensor | None = None

    def is_whole(self, num_rows: int, num_queries: int, num_keys: int) -> bool:
        """Say whether this is all of an attention of this size."""
        return (self.rows, self.queries, self.keys) == (slice(0, num_rows), slice(0, num_queries), slice(0, num_keys))


@cache
def has_bf16_units() -> bool:
    """Say whether this CPU multiplies bf16 numbers by itself."""
    return torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()


def cut(first_BT: Tensor, end_BT: Tensor, dtype: torch.dtype) -> list[Piece]:
    """Cut the attention of a batch into pieces. Queries that are in none of them see nothing.

    Args:
        first_BT: int32 on the CPU, the first key that each query sees; does not go down along T.
        end_BT: int32, the key after the last one that it sees; likewise.
        dtype: of queries, keys and values.
    """
    B, T = first_BT.shape
    (lowest, highest), (nearest, furthest) = (tuple(map(int, x.aminmax())) for x in (first_BT, end_BT))
    rows, queries, keys = slice(0, B), slice(0, T), slice(max(lowest, 0), furthest)
    if keys.start >= keys.stop:
        return []
    if highest <= keys.start and nearest == keys.stop:  # all see all, as in generation, token by token
        return [Piece(rows, queries, keys)]
    # With AMX, 1024 tokens in bf16 take 11.2 ms in rows of 128 and 9.0 in rows of 256: small pieces are slow there.
    smallest = _LARGEST_CHUNK if dtype == torch.bfloat16 and has_bf16_units() else _CHUNK
    # PyTorch's CPU kernel takes an fp32 bias with bf16 scores.
    bias_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    if T <= smallest:
        mask = _mask(first_BT - keys.start, end_BT - keys.start, keys.stop - keys.start, bias_dtype)
        return [Piece(rows, queries, keys, *mask)]
    if T <= _SHORT_ROW:
        seen = [(list(range(B)), first_BT.amin(0), end_BT.amax(0))]  # by all rows, as one
    else:
        seen = [([row], first_BT[row], end_BT[row]) for row in range(B)]
    rows_of: dict[tuple[int, int, int, int], list[int]] = defaultdict(list)  # by queries and keys, begin and end
    for numbers, first_T, end_T in seen:
        for begin, end in _cut_row(first_T, end_T, smallest):
            rows_of[begin, end, max(int(first_T[begin]), 0), int(end_T[end - 1])] += numbers
    pieces = []
    masks: dict[tuple[object, ...], tuple[bool, Tensor | None]] = {}
    for (begin, end, first_key, end_key), numbers in rows_of.items():
        if first_key >= end_key:
            continue
        for rows in _runs(numbers):
            firsts_BT, ends_BT = (x[rows, begin:end] - first_key for x in (first_BT, end_BT))
            # Chunks in the same place of their documents see alike, and so do those inside a window.
            place = (firsts_BT.shape, end_key - first_key, *(x.numpy().tobytes() for x in (firsts_BT, ends_BT)))
            if place not in masks:
                masks[place] = _mask(firsts_BT, ends_BT, end_key - first_key, bias_dtype)
            pieces.append(Piece(rows, slice(begin, end), slice(first_key, end_key), *masks[place]))
    return pieces


def _cut_row(first_T: Tensor, end_T: Tensor, smallest: int) -> list[tuple[int, int]]:
    """Return begin and end of each run of queries: short documents together, long ones in chunks."""
    T = len(first_T)
    # A query that sees none of the keys before it begins a document, or stands as if it did.
    begins = [0, *((first_T[1:] >= end_T[:-1]).nonzero()[:, 0] + 1).tolist(), T]
    runs: list[tuple[int, int]] = []
    for begin, end in zip(begins, begins[1:], strict=False):
        if runs and end - runs[-1][0] <= smallest:
            runs[-1] = runs[-1][0], end
        else:
            runs.append((begin, end))
    return [chunk for begin, end in runs for chunk in _chunks(begin, end, first_T, end_T, smallest)]


def _chunks(begin: int, end: int, first_T: Tensor, end_T: Tensor, smallest: int) -> list[tuple[int, int]]:
    """Divide a run of queries, unless most see most of the keys, or one call knows how to leave out the others."""
    firsts_T, ends_T = first_T[begin:end].clamp(min=0), end_T[begin:end]
    num_seen_T = ends_T - firsts_T
    if int(num_seen_T.sum()) > _MOST * (end - begin) * int(ends_T[-1] - firsts_T[0]):
        return [(begin, end)]
    if end - begin > _LONG_DOCUMENT and _is_causal(firsts_T - firsts_T[0], ends_T - firsts_T[0]):
        return [(begin, end)]
    size = int(num_seen_T.max()) // _CHUNKS_OF_SPAN // _CHUNK * _CHUNK
    size = min(max(size, smallest), _LARGEST_CHUNK)
    # What is left over goes to the last chunk if it is less than half of one.
    edges = [*range(begin, max(end - size // 2, begin + 1), size), end]
    return list(zip(edges, edges[1:], strict=False))


def _is_causal(first_T: Tensor, end_T: Tensor) -> bool:
    return not first_T.any() and torch.equal(end_T, torch.arange(1, len(end_T) + 1, dtype=end_T.dtype))


def _runs(numbers: list[int]) -> list[slice]:
    """Write ascending numbers as slices."""
    slices: list[slice] = []
    for number in numbers:
        if slices and slices[-1].stop == number:
            slices[-1] = slice(slices[-1].start, number + 1)
        else:
            slices.append(slice(number, number + 1))
    return slices


def _mask(first_BT: Tensor, end_BT: Tensor, num_keys: int, dtype: torch.dtype) -> tuple[bool, Tensor | None]:
    """Return `is_causal` and the bias of a piece whose keys are counted from its first."""
    if (first_BT <= 0).all() and (end_BT >= num_keys).all():
        return False, None
    if (first_BT == first_BT[0]).all() and (end_BT == end_BT[0]).all():
        first_BT, end_BT = first_BT[:1], end_BT[:1]
        if _is_causal(first_BT[0], end_BT[0]):
            return True, None
    key_S = torch.arange(num_keys)
    seen_BTS = (key_S >= first_BT[..., None]) & (key_S < end_BT[..., None])
    return False, torch.zeros(seen_BTS.shape, dtype=dtype).masked_fill_(~seen_BTS, -math.inf)[:, None]
