"""The first pass over tars that are indexed: what is to be known of each document, and of each tar.

This process reads and hashes; others tokenize batches, whose results are taken in order, so that nothing depends on the
number of processes.
"""

from __future__ import annotations

import hashlib
import os
import zlib
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import BinaryIO, cast

import numpy as np

from pretrain.data.source_files import READ_BYTES
from pretrain.data.text_index import PIECE_DTYPE, TEXT_INDEX_DTYPE
from pretrain.data.text_shards import tokenize_pieces
from pretrain.errors import DataError
from pretrain.options.config import Config, SourceSection, TokenizerSection
from pretrain.options.phases import val_fraction_of
from pretrain.preparing.filters import RawText
from pretrain.preparing.refining import open_refiner
from pretrain.preparing.sources import (
    Document,
    ReadLog,
    document_digest,
    is_validation,
    judge_documents,
    read_files,
    read_tar,
)
from pretrain.preparing.workers import num_processes, ordered_map
from pretrain.storage.whole_file import sync_folder
from pretrain.tokenizers.tokenizer import Tokenizer
from pretrain.tokenizers.tokenizer_files import open_tokenizer

# Of a document: what the index has of it, its digest as two numbers, the bytes of its text, and of its bands.
DOCUMENT_DTYPE = np.dtype(
    [*TEXT_INDEX_DTYPE.descr, ("head", "<u8"), ("tail", "<u8"), ("text_bytes", "<u4"), ("bands_bytes", "<u4")]
)
_BATCH_CHARACTERS = 1 << 18  # tokenized at once by one process
_DIGESTS_AT_ONCE = 1 << 23  # compared in memory
_Task = list[tuple[str, bool]]  # texts, and whether each is held out
_Result = list[tuple[int, bytes, bytes]]  # number of ids; pieces, or of a text that is held out its ids


@dataclass(frozen=True)
class TarNote:
    """What is to be known of a tar.

    Attributes:
        name: by which the corpus knows it.
        num_bytes, sha256: of the file.
        counts, examples: what was read and skipped, as in a `ReadLog`.
    """

    name: str
    num_bytes: int
    sha256: str
    counts: dict[str, int]
    examples: dict[str, str]


@dataclass(frozen=True)
class TarDocuments:
    """The documents of a tar, before duplicates are dropped.

    Attributes:
        table: of `DOCUMENT_DTYPE`, in the order of the tar.
        pieces: of those that are trained on, one after the other (`PIECE_DTYPE`).
        ids: of those that are held out, likewise.
        bands: of all, likewise, in bytes.
    """

    table: np.ndarray
    pieces: np.ndarray
    ids: np.ndarray
    bands: np.ndarray

    def save(self, path: Path) -> None:
        """Write a file, complete or not at all."""
        temporary = path.with_name(f"{path.name}.tmp")
        with open(temporary, "wb") as file:
            for array in (self.table, self.pieces, self.ids, self.bands):
                np.lib.format.write_array(file, array, allow_pickle=False)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync_folder(path.parent)

    @staticmethod
    def load(path: Path) -> TarDocuments:
        """Read such a file."""
        with open(path, "rb") as file:
            return TarDocuments(*(np.lib.format.read_array(file, allow_pickle=False) for _ in range(4)))


def measure_tars(
    tars: Sequence[tuple[str, Path]], source: SourceSection, config: Config, tokenizer: Tokenizer,
    show: Callable[[int], object],
) -> Generator[tuple[TarNote, TarDocuments], None, None]:  # fmt: skip
    """Read tars, one after the other.

    Args:
        tars: name and place of each.
        source, config: say how they are read.
        tokenizer: the config's.
        show: is told now and then how many bytes of the tars were read.

    Raises:
        DataError: a bad document or file, where the config says `error`; a process was killed.
    """
    reading = _Reading(source, config, tokenizer.loses_u2581)
    batches = _batches(reading.read(tars), val_fraction_of(source, config.data))
    collected = _Collected()
    with closing(_measured(batches, config, tokenizer)) as results:
        for batch, measured in results:
            collected.add(batch, measured)
            if batch.end is not None:
                yield batch.end, collected.arrays(tokenizer.id_dtype)
                collected = _Collected()
            show(reading.position())


@dataclass
class _Place:
    """Where a document is from: its bytes in the tar, and the log of that."""

    offset: int
    num_bytes: int
    crc32: int
    is_json: bool
    log: ReadLog


@dataclass
class _Batch:
    """Documents of one tar that are tokenized together; `end` is there if they are its last ones."""

    task: _Task = field(default_factory=list)
    rows: list[list[int]] = field(default_factory=list)  # what is known of a document before it is tokenized
    bands: list[bytes] = field(default_factory=list)
    size: int = 0
    end: TarNote | None = None


class _HashedFile:
    """A file that is hashed while it is read from its beginning to its end."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._sha256, self.num_bytes = file, hashlib.sha256(), 0

    def read(self, num_bytes: int) -> bytes:
        data = self._file.read(num_bytes)
        self._sha256.update(data)
        self.num_bytes += len(data)
        return data

    def finish(self) -> str:
        """Read what is left, and return the sha256 of all."""
        while self.read(READ_BYTES):
            pass
        return self._sha256.hexdigest()


class _Reading:
    """The documents of tars in order; the end of each tar comes after its documents."""

    def __init__(self, source: SourceSection, config: Config, loses_u2581: bool) -> None:
        self._source, self._data, self._loses_u2581 = source, config.data, loses_u2581
        self._waiting: deque[_Place | TarNote] = deque()  # of what was read and not yet filtered
        self._finished_bytes = 0
        self._file: _HashedFile | None = None

    def position(self) -> int:
        """Bytes that were read."""
        return self._finished_bytes + (self._file.num_bytes if self._file else 0)

    def read(self, tars: Sequence[tuple[str, Path]]) -> Iterator[tuple[_Place, Document] | TarNote]:
        refine = open_refiner([path for _, path in tars], self._source, self._data)
        for item in refine(self._contents(tars)):
            while isinstance(place := self._waiting.popleft(), TarNote):
                yield _completed(place)
            for document in judge_documents([item], self._data.on_bad_document, place.log, self._loses_u2581):
                yield place, document
        for note in self._waiting:
            assert isinstance(note, TarNote)
            yield _completed(note)

    def _contents(self, tars: Sequence[tuple[str, Path]]) -> Iterator[tuple[str, RawText]]:
        for name, path in tars:
            log = ReadLog()
            with open(path, "rb") as raw:
                file = self._file = _HashedFile(raw)
                yield from read_files([path], self._data.on_bad_file, log, partial(self._members, file, log))
                sha256 = file.finish()
            self._finished_bytes, self._file = self._finished_bytes + file.num_bytes, None
            # The log is still written to, while documents of the tar are filtered.
            self._waiting.append(TarNote(name, file.num_bytes, sha256, log.counts, log.examples))

    def _members(self, file: _HashedFile, log: ReadLog, path: Path) -> Iterator[tuple[str, RawText]]:
        for member, content, data in read_tar(cast(BinaryIO, file), path, self._source.text_field, log):
            data = data or b""
            self._waiting.append(_Place(member.offset, len(data), zlib.crc32(data), member.is_json, log))
            yield f"{path}:{member.name}", content


def _completed(note: TarNote) -> TarNote:
    """A tar's note once all its documents were filtered, which its log has counted."""
    return replace(note, counts=dict(sorted(note.counts.items())), examples=dict(sorted(note.examples.items())))


def _batches(events: Iterator[tuple[_Place, Document] | TarNote], val_fraction: float) -> Iterator[_Batch]:
    batch = _Batch()
    for event in events:
        if isinstance(event, TarNote):
            batch.end = event
            yield batch
            batch = _Batch()
            continue
        place, document = event
        content = document.text.encode()
        digest = document_digest(content)
        head, tail = int.from_bytes(digest[:8], "big"), int.from_bytes(digest[8:], "big")
        batch.task.append((document.text, is_validation(digest, val_fraction)))
        batch.rows.append([place.offset, place.crc32, place.num_bytes, place.is_json, head, tail, len(content)])
        batch.bands.append(document.bands)
        batch.size += len(document.text)
        if batch.size >= _BATCH_CHARACTERS:
            yield batch
            batch = _Batch()


def _measured(
    batches: Iterator[_Batch], config: Config, tokenizer: Tokenizer
) -> Generator[tuple[_Batch, _Result], None, None]:
    if num_processes(config.data) == 1:
        for batch in batches:
            yield batch, _measure_with(tokenizer, batch.task)
        return
    function = partial(_measure, config.tokenizer, tokenizer.fingerprint)
    with closing(ordered_map(function, batches, _task_of, num_processes(config.data))) as results:
        yield from results


def _task_of(batch: _Batch) -> _Task:
    return batch.task


def _measure(section: TokenizerSection, fingerprint: str, task: _Task) -> _Result:
    """Tokenize in another process, which opens the tokenizer once."""
    tokenizer = _open(section)
    if tokenizer.fingerprint != fingerprint:
        raise DataError("tokenizer.model was replaced while documents were tokenized; expected one model. Run again.")
    return _measure_with(tokenizer, task)


@lru_cache(1)
def _open(section: TokenizerSection) -> Tokenizer:
    return open_tokenizer(section)


def _measure_with(tokenizer: Tokenizer, task: _Task) -> _Result:
    result = []
    for text, is_val in task:
        ids, pieces = tokenize_pieces(tokenizer, text)
        result.append((len(ids), b"" if is_val else pieces.tobytes(), ids.tobytes() if is_val else b""))
    return result


class _Collected:
    """What is known of a tar's documents so far."""

    def __init__(self) -> None:
        self._rows: list[tuple[int, ...]] = []
        self._pieces, self._ids, self._bands = bytearray(), bytearray(), bytearray()

    def add(self, batch: _Batch, measured: _Result) -> None:
        for row, bands, (num_tokens, pieces, ids) in zip(batch.rows, batch.bands, measured, strict=True):
            offset, crc32, num_bytes, is_json, head, tail, text_bytes = row
            first_piece = len(self._pieces) // PIECE_DTYPE.itemsize
            self._rows.append(
                (offset, num_tokens, crc32, num_bytes, first_piece, is_json, head, tail, text_bytes, len(bands))
            )
            self._pieces += pieces
            self._ids += ids
            self._bands += bands

    def arrays(self, id_dtype: np.dtype) -> TarDocuments:
        return TarDocuments(
            np.array(self._rows, DOCUMENT_DTYPE),
            np.frombuffer(bytes(self._pieces), PIECE_DTYPE),
            np.frombuffer(bytes(self._ids), id_dtype),
            np.frombuffer(bytes(self._bands), np.uint8),
        )


def first_of_equals(paths: Sequence[Path]) -> list[np.ndarray]:
    """Which documents of several tars equal none before them, by their digests.

    Memory is one byte a document, and that of `_DIGESTS_AT_ONCE` digests.

    Args:
        paths: where `TarDocuments` were saved, in the order of the tars.

    Returns:
        For each tar, bool [documents].
    """
    ends = np.cumsum([0, *(len(_map_table(path)) for path in paths)])
    is_first = np.zeros(ends[-1], bool)
    num_parts = int(ends[-1]) // _DIGESTS_AT_ONCE + 1
    for part in range(num_parts):
        keys, places = [], []
        for path, begin in zip(paths, ends, strict=False):
            table = _map_table(path)
            chosen = np.flatnonzero(table["head"] % num_parts == part)
            keys.append(np.stack([table["head"][chosen], table["tail"][chosen]], 1))
            places.append(chosen + begin)
        keys_N2, places_N = np.concatenate(keys), np.concatenate(places)
        order = np.lexsort(keys_N2.T)  # stable: of equal ones the first stays first
        is_new = np.ones(len(order), bool)
        is_new[1:] = (np.diff(keys_N2[order], axis=0) != 0).any(1)
        is_first[places_N[order[is_new]]] = True
    return np.split(is_first, ends[1:-1])


def _map_table(path: Path) -> np.ndarray:
    return np.load(path, mmap_mode="r", allow_pickle=False)
