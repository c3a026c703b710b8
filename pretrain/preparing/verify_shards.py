"""Whether prepared shards are what their manifest says, read to the last byte: `launch/prepare.py --verify`.

Three things must agree: the sha256 of every file with the manifest, the crc32 of every document with the index, and
every byte between documents with what a tar file has there. The first finds any damage, the others name it.
"""

from __future__ import annotations

import hashlib
import time
import zlib
from collections.abc import Iterator
from contextlib import closing
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from pretrain.console import LiveLine, counted, format_bytes, format_duration
from pretrain.data.row_table import damaged_tables
from pretrain.data.shard_reader import link_target
from pretrain.data.shards import PREPARE_COMMAND, Manifest, Shard, file_sha256, index_path, load_index
from pretrain.data.source_files import BrokenFile
from pretrain.data.text_index import by_bytes
from pretrain.errors import DataError
from pretrain.preparing.tar_files import read_members
from pretrain.preparing.workers import num_usable_cores, ordered_map
from pretrain.storage.stores import is_remote

_READ_BYTES = 1 << 20  # of 256 kB to 4 MB the quickest, as it stays in the cache
_HEADER_BYTES = 512
_CHECKSUM_FIELD = slice(148, 156)  # of a tar header


@dataclass(frozen=True)
class Problem:
    """Something that is wrong.

    Attributes:
        file: name of the file.
        text: what is wrong with it.
        first_document, last_document: documents that it is about; None if none.
        begin_byte, end_byte: bytes of the file that it is about, the end excluded; None if all.
    """

    file: str
    text: str
    first_document: int | None = None
    last_document: int | None = None
    begin_byte: int | None = None
    end_byte: int | None = None

    def __str__(self) -> str:
        place = ""
        if self.first_document is not None:
            is_one = self.first_document == self.last_document
            place = f"document {self.first_document}" if is_one else (
                f"documents {self.first_document} to {self.last_document}"
            )  # fmt: skip
        if self.begin_byte is not None:
            extent = f"bytes {self.begin_byte} to {self.end_byte}"
            place = f"{place} ({extent})" if place else extent
        return f"{self.file}: {place + ': ' if place else ''}{self.text}"


@dataclass
class _Findings:
    """Problems of one shard; neighbouring documents with the same one are named together."""

    file: str
    problems: list[Problem] = field(default_factory=list)

    def add(self, text: str, begin: int | None = None, end: int | None = None) -> None:
        self.problems.append(Problem(self.file, text, None, None, begin, end))

    def add_document(self, text: str, number: int, begin: int, end: int) -> None:
        last = self.problems[-1] if self.problems else None
        if last and last.text == text and last.last_document == number - 1:
            self.problems[-1] = Problem(self.file, text, last.first_document, number, last.begin_byte, end)
        else:
            self.problems.append(Problem(self.file, text, number, number, begin, end))


def verify(folder: str | Path, num_processes: int = 0) -> dict[str, Any]:
    """Read a prepared corpus and compare it with its manifest and indexes; shows progress, writes nothing.

    Args:
        folder: of the shards.
        num_processes: that read, a shard each; 0: one per core.

    Returns:
        `folder`, `corpus`, `is_index` (of tars that others made), `num_shards`, `num_documents` (by the manifest),
        `num_bytes` (read), `seconds`, `num_processes` and `problems`, a list of `Problem` as mappings.

    Raises:
        DataError: there is no manifest, or it cannot be read; a process was killed.
    """
    folder, line = Path(folder), LiveLine()
    manifest = Manifest.load(folder)
    shards = manifest.train + manifest.val
    num_processes = min(num_processes or num_usable_cores(), max(len(shards), 1))
    begin, num_bytes, problems = time.monotonic(), 0, manifest_problems(manifest)
    try:
        for number, (shard, (read, found)) in enumerate(_checked(folder, manifest, num_processes), 1):
            num_bytes += read
            problems += found
            elapsed = max(time.monotonic() - begin, 1e-9)
            is_due = number % max(len(shards) // 20, 1) == 0
            text = f"{shard.name}: {number:,} of {counted(len(shards), 'shard')}, {format_bytes(num_bytes / elapsed)}/s"
            line.show(f"{text}, problems: {len(problems):,}", plain=is_due)
        problems += [Problem(*found) for found in damaged_tables(folder, manifest)]
    finally:
        line.end()
    return {
        "folder": str(folder),
        "corpus": manifest.corpus,
        "is_index": manifest.text is not None,
        "num_shards": len(shards),
        "num_documents": sum(shard.num_documents for shard in shards),
        "num_bytes": num_bytes,
        "seconds": time.monotonic() - begin,
        "num_processes": num_processes,
        "problems": [asdict(problem) for problem in problems],
    }


def render(content: dict[str, Any]) -> str:
    """Write what `verify` found: the problems, and how much was read how quickly."""
    problems = [Problem(**problem) for problem in content["problems"]]
    seconds = content["seconds"]
    read = (
        f"{content['corpus']}: read {counted(content['num_shards'], 'shard')} with "
        f"{counted(content['num_documents'], 'document')}, {format_bytes(content['num_bytes'])}, in "
        f"{format_duration(seconds)} by {counted(content['num_processes'], 'process')} "
        f"({format_bytes(content['num_bytes'] / max(seconds, 1e-9))}/s)"
    )
    if not problems:
        return f"{read}: every checksum is right, and every id below the vocabulary size"
    where = content["folder"]
    otherwise = (
        "index the tars into another folder" if content.get("is_index") else f"delete {where} and prepare it again"
    )
    advice = f"Restore these files from a copy, or {otherwise}."
    rows = sorted({problem.file.partition("/")[0] for problem in problems if problem.file.startswith("rows-")})
    if rows:
        rebuild = f"Delete {' and '.join(f'{where}/{name}' for name in rows)} and run: {PREPARE_COMMAND}"
        advice = rebuild if all(problem.file.startswith("rows-") for problem in problems) else f"{advice} {rebuild}"
    if is_remote(where):
        advice = (
            f"Upload these files to {where} again; --verify of the folder that they come from says if they are sound."
        )
    return "\n".join(
        [*(f"problem: {problem}" for problem in problems), f"{read}: {counted(len(problems), 'problem')}. {advice}"]
    )


def _checked(folder: Path, manifest: Manifest, num_processes: int) -> Iterator[tuple[Shard, tuple[int, list[Problem]]]]:
    check = partial(_check, folder, manifest.dtype, manifest.vocab_size, manifest.context_bit)
    of_text = set() if manifest.text is None else {shard.name for shard in manifest.train}
    tasks = [(shard, shard.name in of_text) for shard in manifest.train + manifest.val]
    if num_processes == 1:
        yield from ((task[0], check(task)) for task in tasks)
        return
    with closing(ordered_map(check, tasks, _itself, num_processes, "--processes")) as results:
        yield from ((task[0], result) for task, result in results)


def _itself(task: tuple[Shard, bool]) -> tuple[Shard, bool]:
    return task


def manifest_problems(manifest: Manifest) -> list[Problem]:
    """What the manifest says twice must agree."""
    names = [shard.name for shard in manifest.train + manifest.val]
    found = [Problem("manifest.json", f"it lists {name} twice") for name in sorted(set(names)) if names.count(name) > 1]
    bits = 16 if manifest.vocab_size <= 1 << (16 if manifest.context_bit is None else 15) else 32
    expected = f"uint{bits}"
    if manifest.context_bit not in (None, bits - 1):
        found.append(Problem("manifest.json", f"its context_bit is {manifest.context_bit}, and not the {bits - 1}th"))
    if manifest.dtype != expected:
        text = f"its dtype is {manifest.dtype}, and not the {expected} of a vocabulary of {manifest.vocab_size:,}"
        found.append(Problem("manifest.json", text))
    return found


def _check(
    folder: Path, dtype: str, vocab_size: int, context_bit: int | None, task: tuple[Shard, bool]
) -> tuple[int, list[Problem]]:
    return check_shard(folder, dtype, vocab_size, *task, context_bit)


def check_shard(
    folder: Path, dtype: str, vocab_size: int, shard: Shard, is_text: bool = False, context_bit: int | None = None
) -> tuple[int, list[Problem]]:
    """Check one tar and its index.

    Args:
        folder: of the corpus.
        dtype: of its ids.
        vocab_size: every id must be below it.
        shard: as the manifest lists it.
        is_text: it is a tar of text, which somebody else made.
        context_bit: as in the manifest.

    Returns:
        Bytes that were read, and the problems.
    """
    num_bytes, index, problems = _check_index(folder, shard)
    findings = _Findings(f"{shard.name}.tar")
    path = folder / findings.file
    try:
        size = path.stat().st_size
        if size != shard.num_bytes:
            findings.add(size_text(size, shard), size if size < shard.num_bytes else shard.num_bytes,
                         max(size, shard.num_bytes))  # fmt: skip
        with open(path, "rb") as file:
            id_dtype = np.dtype(dtype).newbyteorder("<")
            reading = (
                _TextCheck(file, index, findings)
                if is_text
                else _TarCheck(file, index, id_dtype, vocab_size, findings, context_bit)
            )
            sha256 = reading.run(size)
        num_bytes += size
        if is_text and sha256 != shard.sha256:
            _check_members(path, findings)
        if sha256 != shard.sha256 and not findings.problems:
            findings.add("its sha256 is not the manifest's, though its documents fit the index")
        spans = [(one.first_document, one.last_document) for one in findings.problems]
        damaged = sum(last - first + 1 for first, last in spans if first is not None and last is not None)
        if index is not None and len(index) > 1 and damaged * 2 > len(index) and size == shard.num_bytes:
            findings.add(f"{damaged:,} of {len(index):,} documents are wrong: it is another shard's file, most likely")
    except FileNotFoundError:
        findings.add(f"it is missing{link_target(path)}")
    except OSError as error:
        findings.add(f"it cannot be read ({error.strerror or error})")
    return num_bytes, problems + findings.problems


def size_text(size: int, shard: Shard) -> str:
    """Say what is wrong with a tar of another size than the manifest has."""
    state = "empty" if not size else "cut short" if size < shard.num_bytes else "longer than it should be"
    return f"it is {state}: it has {size:,} bytes, not {shard.num_bytes:,}"


def _check_index(folder: Path, shard: Shard) -> tuple[int, np.ndarray | None, list[Problem]]:
    """Bytes of the index, the index if it is the manifest's, and what is wrong with it."""
    path = index_path(folder, shard.name)
    try:
        if file_sha256(path) != shard.index_sha256:
            text = "its sha256 is not the manifest's, so documents of this shard cannot be checked one by one"
            return path.stat().st_size, None, [Problem(path.name, text)]
        return path.stat().st_size, np.asarray(load_index(folder, shard)), []
    except FileNotFoundError:
        return 0, None, [Problem(path.name, "it is missing")]
    except OSError as error:
        return 0, None, [Problem(path.name, f"it cannot be read ({error.strerror or error})")]
    except DataError as error:
        return path.stat().st_size, None, [Problem(path.name, str(error).partition(": ")[2])]


class _TarCheck:
    """One pass over a tar: its sha256, its documents, and what lies between them."""

    what = "ids"  # of a document

    def __init__(
        self, file: BinaryIO, index: np.ndarray | None, dtype: np.dtype, vocab_size: int, findings: _Findings,
        context_bit: int | None = None,
    ) -> None:  # fmt: skip
        self._file, self._dtype, self._vocab_size, self._findings = file, dtype, vocab_size, findings
        empty = np.zeros(0, np.uint64)
        offsets = empty if index is None else index["offset"]
        lengths = empty if index is None else index["num_tokens"] * np.uint64(dtype.itemsize)
        self._begins, self._ends = offsets.tolist(), (offsets + lengths).tolist()
        self._crcs = [] if index is None else index["crc32"].tolist()
        self._has_index = index is not None
        num_bits = 8 * dtype.itemsize if context_bit is None else context_bit
        self._mask, self._can_exceed = dtype.type((1 << num_bits) - 1), vocab_size < 1 << num_bits

    def run(self, size: int) -> str:
        """Check what there is; returns the sha256 of all of it."""
        sha256 = hashlib.sha256()
        data, base, position, number = b"", 0, 0, 0  # `data` lies at byte `base`; all before `position` is checked
        while block := self._file.read(_READ_BYTES):
            sha256.update(block)
            data, base = data[position - base :] + block, position
            if self._has_index:
                number, position = self._check_documents(data, base, number, position)
            else:
                position = base + len(data)
        if number < len(self._ends):
            self._name_lost(number, size)
        elif self._has_index:
            self._check_zeros(data, base, position, base + len(data))
        return sha256.hexdigest()

    def _name_lost(self, number: int, size: int) -> None:
        """Name the documents from `number` on, which a file of this size does not hold."""
        if self._begins[number] < size:
            self._findings.add_document("it is cut off", number, self._begins[number], self._ends[number])
            number += 1
        if number < len(self._ends):
            last, bounds = len(self._ends) - 1, (self._begins[number], self._ends[-1])
            self._findings.problems.append(Problem(self._findings.file, "missing", number, last, *bounds))

    def _check_documents(self, data: bytes, base: int, number: int, position: int) -> tuple[int, int]:
        """Check the documents that are in `data` to their ends; returns the next one and how far all is checked."""
        begins, ends, crcs, view = self._begins, self._ends, self._crcs, memoryview(data)
        end_of_data = base + len(data)
        run_begin = position  # of documents back to back, whose ids are looked at together
        first = number
        while number < len(ends) and ends[number] <= end_of_data:
            begin, end = begins[number], ends[number]
            if begin != position:
                self._check_ids(view, base, run_begin, position, first, number)
                self._check_gap(data, base, position, begin)
                run_begin, first = begin, number
            if zlib.crc32(view[begin - base : end - base]) != crcs[number]:
                self._findings.add_document(f"its {self.what} have another crc32 than in the index", number, begin, end)
            position, number = end, number + 1
        self._check_ids(view, base, run_begin, position, first, number)
        return number, position

    def _check_ids(self, view: memoryview, base: int, begin: int, end: int, first: int, last: int) -> None:
        """Check that ids of the documents `first` to `last` (excluded), which fill these bytes, are in range."""
        if not self._can_exceed or begin >= end:
            return
        if (np.frombuffer(view[begin - base : end - base], self._dtype) & self._mask).max() < self._vocab_size:
            return
        for number in range(first, last):
            ids = np.frombuffer(view[self._begins[number] - base : self._ends[number] - base], self._dtype)
            ids = ids & self._mask
            if len(ids) and int(ids.max()) >= self._vocab_size:
                text = f"it holds ids that are not below the vocabulary size {self._vocab_size}"
                self._findings.add_document(text, number, self._begins[number], self._ends[number])

    def _check_gap(self, data: bytes, base: int, begin: int, end: int) -> None:
        """Check what lies between two documents: zeros up to a block's end, and the header of the next member."""
        header_begin = end - _HEADER_BYTES
        if begin > header_begin:
            self._findings.add("documents overlap, or lie in no member", begin, end)
            return
        self._check_zeros(data, base, begin, header_begin)
        header = data[header_begin - base : end - base]
        said = header[_CHECKSUM_FIELD].split(b"\0")[0].strip()
        counted = sum(header) - sum(header[_CHECKSUM_FIELD]) + 8 * ord(" ")
        if said != b"%06o" % counted:
            self._findings.add("a header of the tar is damaged; the documents after it are not", header_begin, end)

    def _check_zeros(self, data: bytes, base: int, begin: int, end: int) -> None:
        if data[begin - base : end - base].strip(b"\0"):
            self._findings.add("it is not zeros, as it should be between members and at the end", begin, end)


class _TextCheck(_TarCheck):
    """The same for a tar that somebody else made: what lies between its documents is not ours."""

    what = "bytes"

    def __init__(self, file: BinaryIO, index: np.ndarray | None, findings: _Findings) -> None:
        super().__init__(file, None if index is None else by_bytes(index), np.dtype("u1"), 1 << 8, findings)

    def _check_documents(self, data: bytes, base: int, number: int, position: int) -> tuple[int, int]:
        number, position = super()._check_documents(data, base, number, position)
        next_begin = self._begins[number] if number < len(self._begins) else base + len(data)
        return number, max(position, min(next_begin, base + len(data)))

    def _check_gap(self, data: bytes, base: int, begin: int, end: int) -> None:
        pass

    def _check_zeros(self, data: bytes, base: int, begin: int, end: int) -> None:
        pass


def _check_members(path: Path, findings: _Findings) -> None:
    """Find the damage in a tar's headers and at its end, which other readers pass over."""
    with open(path, "rb") as file:
        try:
            for _ in read_members(file, lambda name: False, 0):
                pass
        except BrokenFile as error:
            findings.add(str(error))
