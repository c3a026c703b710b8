"""Best-fit packing of documents into rows, from their lengths alone."""

from __future__ import annotations

from bisect import bisect_left, insort

import numpy as np

PACKING_VERSION = "best-fit-decreasing-1"  # part of the data plan's identity: change it with the algorithm
SEGMENT_DTYPE = np.dtype([("document", "<u4"), ("start", "<u4"), ("length", "<u4")])


def pack(num_slots: np.ndarray, seq_len: int) -> tuple[np.ndarray, np.ndarray]:
    """Pack documents into rows of at most `seq_len` slots.

    A document of n tokens has n - 1 slots: slot i shows token i and asks for token i + 1. A document of more
    than `seq_len` slots fills whole rows with its beginning; its rest is packed like any other document, so
    that no document which fits a row is cut. The number of rows depends on the multiset of lengths only.

    Args:
        num_slots: Slots per document, integers; documents of 0 slots appear in no row.
        seq_len: Slots in a row.

    Returns:
        Segments of `SEGMENT_DTYPE` ordered by row, and row offsets uint64 [num_rows + 1]: row r holds
        segments[offsets[r]:offsets[r + 1]].

    Source: Ding et al., Fewer Truncations Improve Language Modeling, arXiv 2404.10830.
    """
    segments = _cut_into_segments(np.asarray(num_slots, dtype=np.int64), seq_len)
    # Longest first; equal ones in the order of the documents.
    segments = segments[np.argsort(-segments["length"].astype(np.int64), kind="stable")]
    rows = _best_fit(segments["length"].tolist(), seq_len)
    segments = segments[np.argsort(rows, kind="stable")]
    num_rows = int(rows.max()) + 1 if len(rows) else 0
    offsets = np.zeros(num_rows + 1, dtype=np.uint64)
    np.cumsum(np.bincount(rows, minlength=num_rows), out=offsets[1:])
    return segments, offsets


def _cut_into_segments(num_slots: np.ndarray, seq_len: int) -> np.ndarray:
    """Cut each document into pieces of `seq_len` slots and a rest."""
    num_pieces = -(-num_slots // seq_len)
    segments = np.empty(int(num_pieces.sum()), dtype=SEGMENT_DTYPE)
    document = np.repeat(np.arange(len(num_slots)), num_pieces)
    first_piece = np.cumsum(num_pieces) - num_pieces
    start = (np.arange(len(segments)) - first_piece[document]) * seq_len
    segments["document"] = document
    segments["start"] = start
    segments["length"] = np.minimum(num_slots[document] - start, seq_len)
    return segments


def _best_fit(lengths: list[int], seq_len: int) -> np.ndarray:
    """Give each length, longest first, the row with the least free space that still holds it."""
    rows = np.empty(len(lengths), dtype=np.int64)
    rows_by_space: dict[int, list[int]] = {}
    spaces: list[int] = []  # keys of rows_by_space in order
    num_rows = 0
    for segment, length in enumerate(lengths):
        i = bisect_left(spaces, length)
        if i < len(spaces):
            space = spaces[i]
            candidates = rows_by_space[space]
            row = candidates.pop()
            if not candidates:
                del rows_by_space[space], spaces[i]
        else:
            space, row = seq_len, num_rows
            num_rows += 1
        rows[segment] = row
        space -= length
        if space:
            if space in rows_by_space:
                rows_by_space[space].append(row)
            else:
                rows_by_space[space] = [row]
                insort(spaces, space)
    return rows
