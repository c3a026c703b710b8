"""A sample of a source, read in seconds, and what it says of the whole.

It is spread over a source's files, and inside large ones: JSON lines from random places, tables by their row groups or
record batches. Compressed files and .csv are read from their beginnings, since nothing else is possible. A source that
is small is read as a whole, and then nothing is estimated.
"""

from __future__ import annotations

import io
import itertools
import os
import random
import time
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from pretrain.data.decoding import MAX_DOCUMENT_BYTES
from pretrain.data.examples import plain_text
from pretrain.data.source_files import TokenFormat, is_compressed, kind_of
from pretrain.options.config import DataSection, SourceSection
from pretrain.preparing.filters import needs_work, refiner
from pretrain.preparing.json_lines import json_lines
from pretrain.preparing.sources import (
    Document,
    ReadLog,
    decode_value,
    document_digest,
    judge_documents,
    read_documents,
    read_files,
    read_token_documents,
    strip_ids,
)
from pretrain.preparing.table_files import Values, skim_column
from pretrain.preparing.token_files import MegatronIndex, map_flat_ids
from pretrain.tokenizers.tokenizer import Tokenizer

_WHOLE_FILES = ("text", "imdb")  # kinds of one document a file
_LIKELY_RATIO = 5  # text bytes in a byte of a compressed file, to guess whether it can be read as a whole
_MIN_PREFIX_BYTES = 1 << 20
_WINDOW_BYTES = 1 << 16
_NUM_TABLE_PARTS = 32
_NUM_TOKEN_DOCUMENTS = 2000
_NUM_TOKEN_WINDOWS, _TOKEN_WINDOW = 64, 1 << 14


@dataclass
class Sample:
    """What was read of some files.

    Attributes:
        stored_bytes: bytes of the files that it is from.
        num_read: documents read, those too that are left out.
        texts: documents that are kept.
        text_bytes: UTF-8 bytes of them.
        is_whole: nothing was left unread.
    """

    stored_bytes: int = 0
    num_read: int = 0
    texts: list[str] = field(default_factory=list)
    text_bytes: int = 0
    is_whole: bool = False

    def add(self, document: Document, source: SourceSection) -> None:
        """Take in a document that is kept."""
        text = plain_text(document.text) if source.examples else document.text
        self.texts.append(text)
        self.text_bytes += len(text.encode())


@dataclass
class Estimate:
    """What a source, or its files of one kind, holds by a sample of it.

    Attributes:
        num_documents: documents that are kept; duplicates count where the sample is not the whole.
        text_bytes: UTF-8 bytes of them.
        num_tokens: their ids without bos and eos, for a source of ids; else None.
        texts: documents of the sample.
        lengths: ids of documents of the sample, for a source of ids.
        seconds_per_byte: what reading took, per byte of text.
        is_exact: everything was read.
    """

    num_documents: float
    text_bytes: float
    num_tokens: float | None
    texts: list[str]
    lengths: list[int]
    seconds_per_byte: float
    is_exact: bool


class _Limit:
    """How much may be read, and how long."""

    def __init__(self, text_bytes: float, seconds: float) -> None:
        self.text_bytes = text_bytes
        self._end_seconds = time.monotonic() + seconds

    def is_reached(self, sample: Sample) -> bool:
        return sample.text_bytes >= self.text_bytes or time.monotonic() >= self._end_seconds


def estimate_texts(
    files: Sequence[Path], source: SourceSection, data: DataSection, limit_bytes: float, seconds: float, seed: int,
    log: ReadLog, loses_u2581: bool = True,
) -> list[Estimate]:  # fmt: skip
    """Estimate the text of files of documents, by their kinds, each compressed or not.

    Args:
        files: as `list_files` gives them.
        source, data: say how they are read.
        limit_bytes: of text to read, about.
        seconds: to read for, about.
        seed: of the choice.
        log: counts what was read and skipped.
        loses_u2581: as for `read_documents`.

    Raises:
        DataError: as `read_documents`, for what the sample meets.
    """
    needs_work(files, source, data)
    kinds: dict[tuple[str, bool], list[Path]] = {}
    for file in files:
        kinds.setdefault((kind_of(file, source.format), is_compressed(file)), []).append(file)
    total = sum(os.path.getsize(file) for file in files)
    estimates = []
    for (kind, compressed), part in sorted(kinds.items()):
        size = sum(os.path.getsize(file) for file in part)
        share = max(size / max(total, 1), 0.1)
        limit = _Limit(limit_bytes * share, seconds * share)
        begin = time.monotonic()
        reader = _Reader(part, source, data, limit, random.Random(seed), log, loses_u2581)
        sample, num_documents, text_bytes = reader.estimate(kind, compressed)
        per_byte = (time.monotonic() - begin) / max(sample.text_bytes, 1)
        estimates.append(Estimate(num_documents, text_bytes, None, sample.texts, [], per_byte, sample.is_whole))
    if data.drop_duplicates and all(estimate.is_exact for estimate in estimates):
        _drop_duplicates(estimates, log)
    return estimates


def _drop_duplicates(estimates: list[Estimate], log: ReadLog) -> None:
    digests: set[bytes] = set()
    for estimate in estimates:
        kept = []
        for text in estimate.texts:
            digest = document_digest(text.encode())
            if digest not in digests:
                digests.add(digest)
                kept.append(text)
            else:
                log.skip("duplicates", f"{text[:40]!r}… is equal to an earlier document")
        estimate.texts, estimate.num_documents = kept, len(kept)
        estimate.text_bytes = sum(len(text.encode()) for text in kept)


class _Reader:
    """Files of one kind of a source, from which a sample is read."""

    def __init__(
        self, files: Sequence[Path], source: SourceSection, data: DataSection, limit: _Limit, rng: random.Random,
        log: ReadLog, loses_u2581: bool,
    ) -> None:  # fmt: skip
        self._log, self._loses_u2581, self._refine = log, loses_u2581, refiner(source, data)
        self._sizes = {file: os.path.getsize(file) for file in files}
        self._source, self._data, self._limit, self._rng = source, data, limit, rng
        self._sample = Sample()
        self._total = sum(self._sizes.values())

    def estimate(self, kind: str, compressed: bool) -> tuple[Sample, float, float]:
        """Read the sample; returns it, and the documents and text bytes of all files."""
        sample = self._sample
        fits = self._total * (_LIKELY_RATIO if compressed else 1) <= self._limit.text_bytes
        if kind in ("parquet", "arrow") and not fits:
            num_rows, column_bytes = self._read_tables()
            scale = num_rows / max(sample.num_read, 1)
            text_bytes = sample.text_bytes * scale
            # What the files say is nearer, unless equal values are stored once.
            is_said = text_bytes / 2 < column_bytes < text_bytes * 2
            return sample, len(sample.texts) * scale, column_bytes if is_said else text_bytes
        if kind == "jsonl" and not compressed and not fits:
            self._read_windows()
        else:
            num_files = self._read_beginnings(compressed, fits)
        scale = self._total / max(sample.stored_bytes, 1)
        if kind not in _WHOLE_FILES or sample.is_whole:
            return sample, len(sample.texts) * scale, sample.text_bytes * scale
        num_with_text = sum(size > 0 for size in self._sizes.values())  # one document a file, whatever its size
        return sample, len(sample.texts) * num_with_text / max(num_files, 1), sample.text_bytes * scale

    def _read_beginnings(self, compressed: bool, fits: bool) -> int:
        """Read files as far as the limit lets, in a random order, large ones sooner; returns how many had text."""
        sample, limit = self._sample, self._limit
        prefix_bytes = float("inf") if fits else max(_MIN_PREFIX_BYTES, limit.text_bytes / len(self._sizes))
        files = [file for file, size in self._sizes.items() if size]
        is_text = bool(files) and kind_of(files[0], self._source.format) in _WHOLE_FILES
        files.sort(key=lambda file: self._rng.expovariate(1.0 if is_text else self._sizes[file]))
        num_files = 0
        for file in files:
            if limit.is_reached(sample):
                return num_files
            self._read_beginning(file, prefix_bytes)
            num_files += 1
        sample.is_whole = sample.stored_bytes == self._total
        return num_files

    def _read_beginning(self, file: Path, prefix_bytes: float) -> None:
        """Read a file up to a number of text bytes.

        Files are read ahead, so how much of one its documents are from is known only when more of it is read: all that
        came before is then used up.
        """
        sample, log = self._sample, ReadLog()
        begin = sample.text_bytes
        position: int | None = None
        used: tuple[int, int, int, int] | None = None  # stored bytes; then documents read, kept, and their bytes
        policy = self._data.on_bad_document, self._data.on_bad_file, log, self._loses_u2581, self._refine
        before = 0, len(sample.texts), sample.text_bytes
        for document in read_documents([file], self._source, *policy):
            if position is not None and log.position_bytes() != position:
                used = (position, *before)
            position = log.position_bytes()
            sample.add(document, self._source)
            before = log.counts["documents_read"], len(sample.texts), sample.text_bytes
            if sample.text_bytes - begin >= prefix_bytes and used is not None:
                stored, num_read, num_kept, sample.text_bytes = used
                del sample.texts[num_kept:]
                break
        else:
            stored, num_read = self._sizes[file], log.counts["documents_read"]
        sample.stored_bytes += stored
        sample.num_read += num_read
        self._log.add_all(log.counts, log.examples)

    def _read_windows(self) -> None:
        """Read whole lines of JSON lines from random places.

        The line after a random place is as long as any other, and so are those that follow until enough is read.
        """
        files = list(self._sizes)
        ends = list(itertools.accumulate(self._sizes.values()))
        while not self._limit.is_reached(self._sample) and self._sample.stored_bytes < self._total:
            place = self._rng.randrange(self._total)
            number = bisect_right(ends, place)
            file = files[number]
            with open(file, "rb") as content:
                content.seek(place - ends[number] + self._sizes[file])
                content.readline(MAX_DOCUMENT_BYTES)
                lines = content.readlines(_WINDOW_BYTES)
                if not lines:  # the place was in the last line
                    content.seek(0)
                    lines = content.readlines(_WINDOW_BYTES)
            window, log = b"".join(lines), ReadLog()
            contents = json_lines(io.BytesIO(window), file, self._source.examples or self._source.text_field)
            for document in judge_documents(self._refine(contents), self._data.on_bad_document, log, self._loses_u2581):
                self._sample.add(document, self._source)
            self._sample.stored_bytes += len(window)
            self._sample.num_read += log.counts["documents_read"]
            self._log.add_all(log.counts, log.examples)

    def _read_tables(self) -> tuple[float, float]:
        """Read the first rows of random row groups or record batches; returns rows and the column's bytes of all."""
        column, sample = self._source.text_field, self._sample
        files = list(self._sizes)
        self._rng.shuffle(files)
        parts: list[tuple[Path, int]] = []
        num_rows = num_bytes = stored_bytes = 0
        for file in files:
            for number, (part_rows, part_bytes, _) in enumerate(self._skim(file, column, frozenset())):
                parts += [(file, number)] if part_rows else []
                num_rows, num_bytes = num_rows + part_rows, num_bytes + part_bytes
            stored_bytes += self._sizes[file]
            if self._limit.is_reached(sample):
                break
        chosen: dict[Path, set[int]] = {}
        for file, number in self._rng.sample(parts, min(len(parts), _NUM_TABLE_PARTS)):
            chosen.setdefault(file, set()).add(number)
        limit_bytes = self._limit.text_bytes / max(min(len(parts), _NUM_TABLE_PARTS), 1)
        for file, numbers in chosen.items():
            for _, _, values in self._skim(file, column, frozenset(numbers)):
                self._read_values(file, values, limit_bytes)
        scale = self._total / max(stored_bytes, 1)
        return num_rows * scale, num_bytes * scale

    def _skim(self, file: Path, column: str, numbers: frozenset[int]) -> Iterator[tuple[int, int, Values]]:
        def contents(path: Path) -> Iterator[tuple[int, int, Values]]:
            return skim_column(path, column, numbers.__contains__)

        return read_files([file], self._data.on_bad_file, ReadLog() if numbers else self._log, contents)

    def _read_values(self, file: Path, values: Values, limit_bytes: float) -> None:
        log, sample = ReadLog(), self._sample
        end = sample.text_bytes + limit_bytes
        contents = ((str(file), decode_value(value, self._source.text_field)) for value in values)
        for document in judge_documents(self._refine(contents), self._data.on_bad_document, log, self._loses_u2581):
            sample.add(document, self._source)
            if sample.text_bytes >= end:
                break
        sample.num_read += log.counts["documents_read"]
        self._log.add_all(log.counts, log.examples)


def estimate_tokens(
    files: Sequence[Path], held: TokenFormat, tokenizer: Tokenizer, data: DataSection, limit_tokens: int, seed: int,
    log: ReadLog,
) -> Estimate:  # fmt: skip
    """Estimate files of token ids, of which much is known without reading them.

    Args:
        files: as `list_files` gives them.
        held: their format.
        tokenizer: whose ids they hold.
        data: says what happens to bad documents and files.
        limit_tokens: files of more ids in all are not read as a whole.
        seed: of the choice.
        log: counts what was read and skipped.

    Raises:
        DataError: as `read_token_documents`, for what the sample meets.
    """
    begin = time.monotonic()
    bins = [file for file in files if file.suffix == ".bin"]
    is_exact = sum(os.path.getsize(file) for file in bins) <= 2 * limit_tokens
    if is_exact:
        seen: dict[bytes, np.ndarray] = {}
        documents = read_token_documents(files, held, tokenizer, data.on_bad_document, data.on_bad_file, log)
        for number, document in enumerate(documents):
            digest = document_digest(document.ids.astype("<u4").tobytes())
            if data.drop_duplicates and digest in seen:
                log.skip("duplicates", f"{document.origin}: it is equal to an earlier document")
            seen.setdefault(digest if data.drop_duplicates else number.to_bytes(8, "little"), document.ids)
        raw = kept = list(seen.values())
        num_documents, num_ids = float(len(raw)), float(sum(map(len, raw)))
    else:
        rng = random.Random(seed)
        if held == "megatron":
            indexes = list(read_files(bins, data.on_bad_file, log, _one_index))
            num_documents, num_ids, raw = _choose_documents(indexes, rng)
        else:
            arrays = list(read_files(bins, data.on_bad_file, log, _one_array))
            num_documents, num_ids, raw = _choose_windows(arrays, tokenizer.eos_id, rng)
        kept = [strip_ids(ids, f"a document of {bins[0].parent}", tokenizer) for ids in raw]
    num_read, num_kept = sum(map(len, raw)), sum(map(len, kept))
    num_tokens = num_ids * num_kept / max(num_read, 1)
    token_bytes = tokenizer.token_bytes()
    num_bytes = sum(int(token_bytes[ids].sum()) for ids in kept)
    per_byte = (time.monotonic() - begin) / max(num_bytes, 1)
    lengths = [len(ids) for ids in kept if len(ids)]
    return Estimate(
        num_documents, num_tokens * num_bytes / max(num_kept, 1), num_tokens, [], lengths, per_byte, is_exact
    )


def _one_index(path: Path) -> Iterator[MegatronIndex]:
    yield MegatronIndex(path)


def _one_array(path: Path) -> Iterator[np.ndarray]:
    yield map_flat_ids(path)[0]


def _choose_documents(indexes: Sequence[MegatronIndex], rng: random.Random) -> tuple[float, float, list[np.ndarray]]:
    """Random documents of Megatron's files, with the numbers of all documents and all ids, which the indexes say."""
    ends = list(itertools.accumulate(index.num_documents for index in indexes))
    chosen = []
    for _ in range(_NUM_TOKEN_DOCUMENTS if ends and ends[-1] else 0):
        place = rng.randrange(ends[-1])
        number = bisect_right(ends, place)
        chosen.append(indexes[number].document(place - ends[number] + indexes[number].num_documents)[0])
    share = sum(len(ids) > 0 for ids in chosen) / max(len(chosen), 1)
    return share * sum(index.num_documents for index in indexes), sum(index.num_tokens for index in indexes), chosen


def _choose_windows(
    arrays: Sequence[np.ndarray], eos_id: int, rng: random.Random
) -> tuple[float, float, list[np.ndarray]]:
    """Pieces of documents in random windows of bare ids, with the number of documents by the eos in these windows."""
    ends = list(itertools.accumulate(map(len, arrays)))
    num_read = num_eos = 0
    pieces = []
    for _ in range(_NUM_TOKEN_WINDOWS):
        place = rng.randrange(ends[-1])
        number = bisect_right(ends, place)
        begin = place - ends[number] + len(arrays[number])
        window = arrays[number][begin : begin + _TOKEN_WINDOW]
        cuts = np.flatnonzero(window == eos_id) + 1
        pieces += np.split(window, cuts)
        num_read, num_eos = num_read + len(window), num_eos + len(cuts)
    return max(ends[-1] * num_eos / max(num_read, 1), len(arrays)), ends[-1], pieces
