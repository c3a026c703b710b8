"""Packing of documents into rows, from their lengths alone.

A document of n tokens has n - 1 slots: slot i shows token i and asks for token i + 1. However documents are packed,
each of their slots is in one row, and what continues a document in another row is a document of its own there.
"""

from __future__ import annotations

from bisect import bisect_left, insort

import numpy as np

# Part of the data plan's identity: change them with the algorithms.
PACKING_VERSIONS = {"best_fit": "best-fit-decreasing-1", "concat": "concatenated-1", "document": "one-document-1"}
SEGMENT_DTYPE = np.dtype([("document", "<u4"), ("start", "<u4"), ("length", "<u4")])


def pack(num_slots: np.ndarray, seq_len: int, packing: str = "best_fit") -> tuple[np.ndarray, np.ndarray]:
    """Pack documents into rows of at most `seq_len` slots. The number of rows depends on the multiset of lengths only.

    - `best_fit`: a document of more than `seq_len` slots fills whole rows with its beginning; its rest is packed
      like any other document, so that no document which fits a row is cut.
    - `concat`: documents follow each other and are cut where rows end; all rows but the last are full.
    - `document`: a row holds one document, or a piece of one of more than `seq_len` slots.

    Args:
        num_slots: Slots per document, integers; documents of 0 slots appear in no row.
        seq_len: Slots in a row.
        packing: One of `PACKING_VERSIONS`.

    Returns:
        Segments of `SEGMENT_DTYPE` ordered by row, and row offsets uint64 [num_rows + 1]: row r holds
        segments[offsets[r]:offsets[r + 1]].

    Source: best_fit: Ding et al., Fewer Truncations Improve Language Modeling, arXiv 2404.10830.
    """
    num_slots = np.asarray(num_slots, dtype=np.int64)
    if packing == "concat":
        return _concatenate(num_slots, seq_len)
    segments = _cut_into_segments(num_slots, seq_len)
    if packing == "document":
        return segments, np.arange(len(segments) + 1, dtype=np.uint64)
    # Longest first; equal ones in the order of the documents.
    segments = segments[np.argsort(-segments["length"].astype(np.int64), kind="stable")]
    rows = _best_fit(segments["length"].tolist(), seq_len)
    segments = segments[np.argsort(rows, kind="stable")]
    num_rows = int(rows.max()) + 1 if len(rows) else 0
    offsets = np.zeros(num_rows + 1, dtype=np.uint64)
    np.cumsum(np.bincount(rows, minlength=num_rows), out=offsets[1:])
    return segments, offsets


def count_segments(num_slots: np.ndarray, seq_len: int, packing: str = "best_fit") -> int:
    """Return how many segments `pack` makes of these documents, without packing them."""
    if packing == "concat":
        return len(_cuts(np.asarray(num_slots, dtype=np.int64), seq_len))
    return int((-(-np.asarray(num_slots, dtype=np.int64) // seq_len)).sum())


def _cuts(num_slots: np.ndarray, seq_len: int) -> np.ndarray:
    """Where segments begin if documents follow each other: with each document and each row, int64 [num_segments]."""
    begins = np.cumsum(num_slots) - num_slots
    return np.union1d(begins[num_slots > 0], np.arange(0, int(num_slots.sum()), seq_len))


def _concatenate(num_slots: np.ndarray, seq_len: int) -> tuple[np.ndarray, np.ndarray]:
    """Put documents back to back, and cut them where rows end."""
    begins, ends, total = _cuts(num_slots, seq_len), np.cumsum(num_slots), int(num_slots.sum())
    segments = np.empty(len(begins), dtype=SEGMENT_DTYPE)
    document = np.searchsorted(ends, begins, side="right")  # passes by documents without a slot
    segments["document"] = document
    segments["start"] = begins - (ends - num_slots)[document]
    segments["length"] = np.diff(begins, append=total)
    rows = np.arange(-(-total // seq_len) + 1) * seq_len
    return segments, np.searchsorted(begins, rows).astype(np.uint64)


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
