"""Tiny writers of other trainers' files, from the descriptions of the formats."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from pathlib import Path

import numpy as np

MEGATRON_CODES = {"uint8": 1, "int8": 2, "int16": 3, "int32": 4, "int64": 5, "uint16": 8}
LLMC_MAGICS = {"uint16": (20240520, 1), "uint32": (20240801, 7)}


def write_megatron(
    stem: Path, documents: Sequence[Sequence[int]], dtype: str = "uint16", sequences_each: int = 1
) -> Path:
    """Write `stem`.bin and `stem`.idx; a document is cut into `sequences_each` sequences.

    Returns:
        The `.bin`.
    """
    sequences = [part for ids in documents for part in np.array_split(np.array(ids, dtype), sequences_each)]
    sizes = np.array([len(sequence) for sequence in sequences], "<i4")
    offsets = np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)[:-1]]) * np.dtype(dtype).itemsize
    bounds = np.arange(len(documents) + 1, dtype="<i8") * sequences_each
    stem.parent.mkdir(parents=True, exist_ok=True)
    binary = stem.with_name(stem.name + ".bin")
    binary.write_bytes(b"".join(sequence.tobytes() for sequence in sequences))
    header = struct.pack("<9sQBQQ", b"MMIDIDX\x00\x00", 1, MEGATRON_CODES[dtype], len(sizes), len(bounds))
    arrays = sizes.tobytes() + offsets[: len(sizes)].astype("<i8").tobytes() + bounds.tobytes()
    stem.with_name(stem.name + ".idx").write_bytes(header + arrays)
    return binary


def write_nanogpt(path: Path, documents: Sequence[Sequence[int]], eos_id: int) -> Path:
    """Write bare uint16 ids, an eos after each document."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(np.array([token for ids in documents for token in [*ids, eos_id]], "<u2").tobytes())
    return path


def write_llmc(path: Path, documents: Sequence[Sequence[int]], eos_id: int, dtype: str = "uint16") -> Path:
    """Write llm.c's header and ids, an eos before each document."""
    ids = np.array([token for ids in documents for token in [eos_id, *ids]], dtype)
    header = np.zeros(256, "<i4")
    header[:3] = (*LLMC_MAGICS[dtype], len(ids))
    path.write_bytes(header.tobytes() + ids.tobytes())
    return path
