"""Token ids that other trainers prepared: Megatron's `.bin` with `.idx`, and nanoGPT's and llm.c's `.bin`.

Files are memory-mapped, so their size does not matter; what they say of themselves is checked before they are read.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from pretrain.data.source_files import BrokenFile, TokenFormat

_MEGATRON_MAGIC, _MEGATRON_VERSION, _MEGATRON_HEADER_BYTES = b"MMIDIDX\x00\x00", 1, 34
_MEGATRON_DTYPES = {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}
_MEGATRON_FLOATS = (6, 7)
_LLMC_HEADER_BYTES = 1024
_LLMC_DTYPES = {20240520: "<u2", 20240801: "<u4"}  # by magic
_CHUNK_IDS = 1 << 22  # looked through at once


def read_ids(path: Path, token_format: TokenFormat, eos_id: int) -> Iterator[tuple[str, np.ndarray, int]]:
    """Yield the documents of a `.bin` file, in order, as the file holds them.

    Args:
        path: the file.
        token_format: megatron needs the `.idx` beside it.
        eos_id: the id that ends a document in a file of nanoGPT's, or stands before each.

    Returns:
        (place in the file, ids, bytes of the file that are done by then). The place is the number of the document,
        from 1, in Megatron's files, else the number of its first id, from 0.

    Raises:
        BrokenFile: the file or its index is damaged, or they do not belong together.
        OSError: likewise, from the system.
    """
    if token_format == "megatron":
        index = MegatronIndex(path)
        for number in range(index.num_documents):
            ids, end = index.document(number)
            yield str(number + 1), ids, end
        return
    ids, header_bytes = map_flat_ids(path)
    for begin, end in _spans(ids, eos_id):
        yield str(begin), ids[begin:end], header_bytes + end * ids.itemsize


class MegatronIndex:
    """The `.idx` of a pair of Megatron's files, and the ids of the `.bin`.

    Args:
        path: the `.bin` file.

    Attributes:
        num_documents: documents in the pair.
        num_tokens: ids in the pair.

    Raises:
        BrokenFile: the index is damaged, or it is not that of the `.bin`.

    Source: the file format of megatron/core/datasets/indexed_dataset.py: magic, version u64, dtype code u8, number of
        sequences u64, number of document bounds u64; then the sequences' sizes i32, their byte offsets i64, and the
        sequence with which each document begins i64, with the number of sequences as the last.
    """

    def __init__(self, path: Path) -> None:
        index_path = path.with_suffix(".idx")
        content = _map(index_path, "u1")
        header = content[:_MEGATRON_HEADER_BYTES].tobytes()
        if not header.startswith(_MEGATRON_MAGIC):
            raise BrokenFile(f"its index {index_path.name} begins with {header[:9]!r}, not {_MEGATRON_MAGIC!r}")
        if len(header) < _MEGATRON_HEADER_BYTES:
            raise BrokenFile(f"its index {index_path.name} has {len(header)} bytes, less than its header")
        version, code = int.from_bytes(header[9:17], "little"), header[17]
        num_sequences, num_bounds = (int.from_bytes(header[start : start + 8], "little") for start in (18, 26))
        if version != _MEGATRON_VERSION:
            raise BrokenFile(f"its index {index_path.name} is of version {version}, not {_MEGATRON_VERSION}")
        if code not in _MEGATRON_DTYPES:
            what = "floats, not token ids" if code in _MEGATRON_FLOATS else "ids of an unknown type"
            raise BrokenFile(f"its index {index_path.name} has the dtype code {code}: {what}")
        expected = _MEGATRON_HEADER_BYTES + 12 * num_sequences + 8 * num_bounds
        if len(content) != expected:
            raise BrokenFile(
                f"its index {index_path.name} has {len(content):,} bytes, not the {expected:,} of {num_sequences:,} "
                f"sequences and {num_bounds:,} document bounds"
            )
        offsets_at, bounds_at = (_MEGATRON_HEADER_BYTES + width * num_sequences for width in (4, 12))
        self._sizes = content[_MEGATRON_HEADER_BYTES:offsets_at].view("<i4")
        self._offsets = content[offsets_at:bounds_at].view("<i8")
        self._bounds = content[bounds_at:].view("<i8")
        self._bytes = _map(path, "u1")
        self._dtype = np.dtype(_MEGATRON_DTYPES[code])
        self.num_documents = max(num_bounds - 1, 0)
        self._check(index_path.name)
        self.num_tokens = sum(int(part.sum(dtype=np.int64)) for part in _chunks(self._sizes))

    def _check(self, name: str) -> None:
        """Check the sequences against the `.bin`, and the documents against the sequences."""
        end_bytes = 0
        for sizes, offsets in zip(_chunks(self._sizes), _chunks(self._offsets), strict=True):
            if len(sizes) and (sizes.min() < 0 or offsets.min() < 0):
                raise BrokenFile(f"its index {name} holds a negative size or offset")
            end_bytes = max(end_bytes, int((offsets + sizes.astype(np.int64) * self._dtype.itemsize).max(initial=0)))
        if end_bytes != len(self._bytes):
            raise BrokenFile(f"it has {len(self._bytes):,} bytes, not the {end_bytes:,} that its index {name} lists")
        bounds = self._bounds
        first, last = (int(bounds[0]), int(bounds[-1])) if len(bounds) else (0, 0)
        if (first, last) != (0, len(self._sizes)):
            raise BrokenFile(
                f"the documents of its index {name} cover the sequences {first} to {last}, not 0 to {len(self._sizes)}"
            )
        for begin in range(0, len(bounds) - 1, _CHUNK_IDS):
            if (np.diff(bounds[begin : begin + _CHUNK_IDS + 1]) < 0).any():
                raise BrokenFile(f"the documents of its index {name} are not in order")

    def document(self, number: int) -> tuple[np.ndarray, int]:
        """The ids of a document, and the byte of the `.bin` after it."""
        parts, end = [], 0
        for sequence in range(int(self._bounds[number]), int(self._bounds[number + 1])):
            begin = int(self._offsets[sequence])
            end = begin + int(self._sizes[sequence]) * self._dtype.itemsize
            parts.append(self._bytes[begin:end].view(self._dtype))
        return parts[0] if len(parts) == 1 else np.concatenate([*parts, np.empty(0, self._dtype)]), end


def map_flat_ids(path: Path) -> tuple[np.ndarray, int]:
    """Map a file of bare ids, as nanoGPT writes it, or with llm.c's header.

    Returns:
        The ids, uint16 or uint32, and the size of the header in bytes.

    Raises:
        BrokenFile: the file's size does not fit.

    Source: nanoGPT data/openwebtext/prepare.py; llm.c dev/data/data_common.py.
    """
    content = _map(path, "u1")
    if not len(content):
        raise BrokenFile("it is empty")
    header = content[:_LLMC_HEADER_BYTES]
    if len(header) == _LLMC_HEADER_BYTES:
        magic, _, num_ids = (int(value) for value in header.view("<i4")[:3])
        if magic in _LLMC_DTYPES:
            dtype = np.dtype(_LLMC_DTYPES[magic])
            expected = _LLMC_HEADER_BYTES + num_ids * dtype.itemsize
            if len(content) != expected:
                raise BrokenFile(f"it has {len(content):,} bytes, not the {expected:,} of the ids that its header says")
            return content[_LLMC_HEADER_BYTES:].view(dtype), _LLMC_HEADER_BYTES
    if len(content) % 2:
        raise BrokenFile(f"it has {len(content):,} bytes, which is no whole number of uint16 ids")
    return content.view("<u2"), 0


def _spans(ids: np.ndarray, eos_id: int) -> Iterator[tuple[int, int]]:
    """Where documents begin and end, their eos included; an eos at the very start only announces the first one."""
    begin = 0
    for offset in range(0, len(ids), _CHUNK_IDS):
        ends = np.flatnonzero(ids[offset : offset + _CHUNK_IDS] == eos_id) + offset + 1
        for end in ends.tolist():
            if end > 1:
                yield begin, end
            begin = end
    if begin < len(ids):
        yield begin, len(ids)


def _map(path: Path, dtype: str) -> np.ndarray:
    if os.path.getsize(path) == 0:  # which cannot be mapped
        return np.empty(0, dtype)
    return np.memmap(path, dtype, "r").view(np.ndarray)


def _chunks(array: np.ndarray) -> Iterator[np.ndarray]:
    for begin in range(0, len(array), _CHUNK_IDS):
        yield array[begin : begin + _CHUNK_IDS]
