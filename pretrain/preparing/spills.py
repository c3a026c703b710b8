"""Tokenized documents on their way into shards: spills, which are files sorted by the hash of their documents.

The first pass of `prepare` collects documents in memory and writes them, sorted, as a spill whenever they reach a size.
The second pass reads one range of hashes, a bucket, from all spills at a time: documents in the order of their hashes,
which is a random one, and equal documents beside each other. This is an external merge sort, whose result does not
depend on which documents were in which spill.

A spill is a header, a table with a `RECORD` a document, and per document its ids, bands and origin, back to back.
"""

from __future__ import annotations

import math
import os
import struct
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pretrain.data.shards import PREPARE_COMMAND
from pretrain.errors import DataError
from pretrain.storage.whole_file import sync_folder

# `head` and `order` are the two halves of a document's digest: the first decides its split, the second its place.
RECORD = np.dtype(
    [("order", "<u8"), ("head", "<u8"), ("offset", "<u8"), ("text_bytes", "<u8"), ("num_tokens", "<u4"),
     ("crc32", "<u4"), ("bands_bytes", "<u2"), ("origin_bytes", "<u2")]
)  # fmt: skip
MAX_ORIGIN_BYTES = 1000
_PACK_RECORD = struct.Struct("<QQQQIIHH").pack
_HEADER = struct.Struct("<8sQQI4x")  # magic, documents, bytes after the table, crc32 of the table
_MAGIC = b"spill-1\n"
# Copies that stay have their places in buckets of this size: another one is another version of the recipe (shares.py).
_SPILL_BYTES, _MAX_SPILL_BYTES, _MAX_SPILLS = 1 << 25, 1 << 30, 1 << 10


def spill_size(shard_bytes: int, source_bytes: int) -> int:
    """Bytes at which a spill is written, and of a bucket at most: 32 MiB, and more beyond 32 GiB of source.

    The second pass reads from each spill once a bucket. With a fixed size these reads would become more and smaller as
    the square of the source.
    """
    return max(min(shard_bytes, _SPILL_BYTES), min(source_bytes // _MAX_SPILLS, _MAX_SPILL_BYTES))


@dataclass(frozen=True)
class Spill:
    """A spill as it was written.

    Attributes:
        name: of the file.
        num_documents: in it.
        num_tokens: in it, bos and eos included.
        num_bytes: size of the file.
        crc32: of its table.
    """

    name: str
    num_documents: int
    num_tokens: int
    num_bytes: int
    crc32: int

    def is_whole(self, folder: Path) -> bool:
        """Whether the file is there and has its size."""
        path = folder / self.name
        return path.is_file() and path.stat().st_size == self.num_bytes


class SpillWriter:
    """Collects documents and writes them as spills.

    Args:
        folder: where the spills go; it exists.
        max_bytes: that are collected.
        first_spill: number of the first spill, to go on after complete ones.
    """

    def __init__(self, folder: Path, max_bytes: int, first_spill: int = 0) -> None:
        self._folder, self._max_bytes, self._next_spill = folder, max_bytes, first_spill
        self._table, self._payload = bytearray(), bytearray()

    @property
    def num_documents(self) -> int:
        """Documents that are not in a spill yet."""
        return len(self._table) // RECORD.itemsize

    def add(self, digest: bytes, text_bytes: int, bands: bytes, origin: str, ids: np.ndarray) -> bool:
        """Take in a document.

        Args:
            digest: 16 bytes.
            text_bytes: of its text.
            bands: what near-duplicates have in common, or nothing.
            origin: where it is from, for messages.
            ids: its ids, little-endian, bos and eos included.

        Returns:
            Whether it is time to `write`.
        """
        place = origin.encode("utf-8", "surrogateescape")[:MAX_ORIGIN_BYTES]
        content = b"".join((ids.tobytes(), bands, place))
        self._table += _PACK_RECORD(
            int.from_bytes(digest[8:], "big"), int.from_bytes(digest[:8], "big"), len(self._payload), text_bytes,
            len(ids), zlib.crc32(content), len(bands), len(place),
        )  # fmt: skip
        self._payload += content
        return len(self._table) + len(self._payload) >= self._max_bytes

    def write(self) -> Spill:
        """Write what was collected as the next spill, complete or not at all.

        Raises:
            DataError: it cannot be written, for example because the disk is full.
        """
        table = np.frombuffer(self._table, RECORD)
        places = np.lexsort((table["head"], table["order"]))
        begins = table["offset"]
        ends = np.append(begins[1:], np.uint64(len(self._payload)))
        table = table[places]
        table["offset"] = np.cumsum(ends[places] - begins[places]) - (ends[places] - begins[places])
        content = table.tobytes()
        path = self._folder / f"spill-{self._next_spill:06d}"
        temporary = path.with_name(f".{path.name}.tmp")
        spill = Spill(path.name, len(table), int(table["num_tokens"].sum(dtype=np.uint64)),
                      _HEADER.size + len(content) + len(self._payload), zlib.crc32(content))  # fmt: skip
        try:
            with open(temporary, "wb", buffering=1 << 20) as file, memoryview(self._payload) as payload:
                file.write(_HEADER.pack(_MAGIC, len(table), len(payload), spill.crc32))
                file.write(content)
                for begin, end in zip(begins[places].tolist(), ends[places].tolist(), strict=True):
                    file.write(payload[begin:end])
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
            sync_folder(self._folder)
        except OSError as error:
            raise DataError(
                f"{path} cannot be written: {error.strerror or error}. Spills before it are kept. Mend this (free some "
                f"space) and run again: {PREPARE_COMMAND}"
            ) from error
        finally:
            temporary.unlink(missing_ok=True)
        self._table, self._payload = bytearray(), bytearray()
        self._next_spill += 1
        return spill


@dataclass
class _Piece:
    """What of a bucket lies in one spill.

    Attributes:
        path: the spill.
        begin, num_bytes: of its documents' content in the file.
        first: place of its first document in the bucket's table.
    """

    path: Path
    begin: int
    num_bytes: int
    first: int


class Bucket:
    """The documents of one range of hashes, from all spills.

    Attributes:
        table: their records, in the order of the spills; `offset` is that in the bucket.
    """

    def __init__(self, number: int, num_bits: int, dtype: np.dtype) -> None:
        self._number, self._num_bits, self._dtype = number, num_bits, dtype
        self._pieces: list[_Piece] = []
        self._content: memoryview | None = None
        self.table = np.empty(0, RECORD)

    def read_table(self, parts: Sequence[tuple[Path, int, int, int]]) -> None:
        """Read the records of the documents: path, first and end, and number of documents of each spill."""
        tables, first, position = [], 0, 0
        for path, begin, end, num_documents in parts:
            data = bytearray((end - begin) * RECORD.itemsize)
            _read_into(path, memoryview(data), _HEADER.size + begin * RECORD.itemsize)
            table = np.frombuffer(data, RECORD)
            last = table[-1:]
            file_begin = int(table["offset"][0])
            num_bytes = int(last["offset"][0] + _sizes(last, self._dtype)[0]) - file_begin
            table["offset"] = table["offset"] - np.uint64(file_begin) + np.uint64(position)
            content_begin = _HEADER.size + num_documents * RECORD.itemsize + file_begin
            self._pieces.append(_Piece(path, content_begin, num_bytes, first))
            tables.append(table)
            first, position = first + len(table), position + num_bytes
        if tables:
            self.table = np.concatenate(tables)

    def in_order(self, drop_duplicates: bool) -> tuple[np.ndarray, np.ndarray]:
        """The documents in their order, and of those that are equal all but one.

        If they stay, copies get places of their own in the bucket: beside each other they would share rows.

        Returns:
            Places in the table of the documents that stay, and of those that are dropped.
        """
        head, order = self.table["head"], self.table["order"]
        places = np.lexsort((head, order))
        is_copy = np.zeros(len(places), bool)
        is_copy[1:] = (np.diff(order[places]) == 0) & (np.diff(head[places]) == 0)
        if drop_duplicates or not is_copy.any():
            return places[~is_copy], places[is_copy]
        numbers = np.arange(len(places), dtype=np.uint64)
        copies = numbers - np.maximum.accumulate(np.where(is_copy, np.uint64(0), numbers))
        moved = _mix(head[places] ^ (copies * np.uint64(0x9E3779B97F4A7C15))) >> np.uint64(self._num_bits)
        if self._num_bits:
            moved |= np.uint64(self._number << (64 - self._num_bits))
        keys = np.where(is_copy, moved, order[places])
        return places[np.lexsort((copies, head[places], keys))], np.empty(0, np.int64)

    def ids(self, place: int) -> np.ndarray:
        """The ids of a document, bos and eos included.

        Raises:
            DataError: it is damaged.
        """
        content, bands_begin, _ = self._document(place)
        return np.frombuffer(content[:bands_begin], self._dtype)

    def bands(self, place: int) -> bytes:
        """What near-duplicates of a document have in common; raises as `ids`."""
        content, bands_begin, origin_begin = self._document(place)
        return bytes(content[bands_begin:origin_begin])

    def origin(self, place: int) -> str:
        """Where a document is from; raises as `ids`."""
        content, _, origin_begin = self._document(place)
        return bytes(content[origin_begin:]).decode("utf-8", "surrogateescape")

    def _document(self, place: int) -> tuple[memoryview, int, int]:
        """A document, and where in it its bands and its origin begin; the first call reads the bucket."""
        if self._content is None:
            self._content = memoryview(bytearray(sum(piece.num_bytes for piece in self._pieces)))
            position = 0
            for piece in self._pieces:
                _read_into(piece.path, self._content[position : position + piece.num_bytes], piece.begin)
                position += piece.num_bytes
        _, _, begin, _, num_tokens, crc32, bands_bytes, origin_bytes = self.table[place].item()
        bands_begin = num_tokens * self._dtype.itemsize
        origin_begin = bands_begin + bands_bytes
        content = self._content[begin : begin + origin_begin + origin_bytes]
        if zlib.crc32(content) != crc32:
            path = next(piece.path for piece in reversed(self._pieces) if piece.first <= place)
            raise _damaged(path, "a document has another crc32 than its table says")
        return content, bands_begin, origin_begin


def read_buckets(spills: Sequence[tuple[Path, Spill]], dtype: np.dtype, max_bytes: int) -> Iterator[Bucket]:
    """Read all documents of spills, bucket by bucket, in the order of their hashes.

    Args:
        spills: the folder of each, and it.
        dtype: of the ids.
        max_bytes: of a bucket; it has some more where hashes are unevenly spread, or one document is larger.

    Raises:
        DataError: a spill is missing or damaged.
    """
    dtype = dtype.newbyteorder("<")
    num_bytes = sum(
        spill.num_tokens * dtype.itemsize + spill.num_documents * RECORD.itemsize for _, spill in spills
    )  # of what does not depend on the spills: copies of a document get their places in its bucket
    num_bits = max(math.ceil(math.log2(max(num_bytes, 1) / max_bytes)), 0)
    limits = np.arange(1, 1 << num_bits, dtype=np.uint64) << np.uint64(64 - num_bits)
    bounds = []
    for folder, spill in spills:
        table = _read_table(folder / spill.name, spill)
        bounds.append([0, *np.searchsorted(table["order"], limits).tolist(), spill.num_documents])
        del table
    for number in range(1 << num_bits):
        bucket = Bucket(number, num_bits, dtype)
        bucket.read_table(
            [
                (folder / spill.name, bound[number], bound[number + 1], spill.num_documents)
                for (folder, spill), bound in zip(spills, bounds, strict=True)
                if bound[number] < bound[number + 1]
            ]
        )
        yield bucket


def _read_table(path: Path, spill: Spill) -> np.ndarray:
    """The table of a spill, checked."""
    data = bytearray(_HEADER.size + spill.num_documents * RECORD.itemsize)
    _read_into(path, memoryview(data), 0)
    magic, num_documents, num_bytes, crc32 = _HEADER.unpack_from(data)
    if magic != _MAGIC or num_documents != spill.num_documents or len(data) + num_bytes != spill.num_bytes:
        raise _damaged(path, "its header is not the one that was written")
    if zlib.crc32(memoryview(data)[_HEADER.size :]) != crc32 or crc32 != spill.crc32:
        raise _damaged(path, "its table has another crc32 than when it was written")
    return np.frombuffer(data, RECORD, offset=_HEADER.size)


def _read_into(path: Path, buffer: memoryview, position: int) -> None:
    """Fill a buffer from a place in a file."""
    try:
        with open(path, "rb", buffering=0) as file:
            file.seek(position)
            while buffer:
                num_read = file.readinto(buffer)
                if not num_read:
                    raise _damaged(path, "it ends too early")
                buffer = buffer[num_read:]
    except OSError as error:
        raise _damaged(path, error.strerror or str(error)) from error


def _sizes(table: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Bytes of the content of each document."""
    return (
        table["num_tokens"].astype(np.uint64) * np.uint64(dtype.itemsize) + table["bands_bytes"] + table["origin_bytes"]
    )


def _mix(values: np.ndarray) -> np.ndarray:
    """Spread 64-bit values evenly, as splitmix64 does: Steele, Lea and Flood 2014."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def _damaged(path: Path, what: str) -> DataError:
    share = path.parent.name.removeprefix("share-").replace("-of-", "/")
    option = "" if share == "1/1" else f" --share {share}"
    return DataError(
        f"{path} cannot be used: {what}; expected the file as `prepare` wrote it. Delete it and run: {PREPARE_COMMAND}"
        f"{option}: the spills before it are kept."
    )
