"""Raw text: which files a source names, and the documents in them.

A text file is one document, and so is each line of a `.jsonl` file. What cannot be read is an error or a counted
skip, as the config says; nothing is lost without being counted.
"""

from __future__ import annotations

import glob
import gzip
import hashlib
import io
import json
import os
import sysconfig
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, Literal, cast

import zstandard

from pretrain.config import SourceSection
from pretrain.errors import DataError

STDLIB = "python-stdlib:"
MAX_DOCUMENT_BYTES = 2**28  # a document is held in memory in one piece, several at a time
_NOT_TEXT = (".parquet", ".arrow", ".tar", ".tgz", ".zip", ".7z", ".bz2", ".xz", ".rar", ".pdf", ".npy", ".bin")
_COMPRESSED = (".gz", ".zst")
_READ_BYTES = 1 << 18
_BROKEN = (OSError, EOFError, zlib.error, zstandard.ZstdError)

OnBad = Literal["skip", "error"]


@dataclass(frozen=True)
class Document:
    """A text and where it is from: its file, and its line if it has one (`path:line`)."""

    text: str
    origin: str


@dataclass
class ReadLog:
    """What reading met: counts by reason, the first example of each kind of skip, and how far it is.

    Attributes:
        counts: `files_read`, `files_unreadable`, `documents_read` (skipped ones too) and `skipped_<reason>`.
        examples: for each reason, the message about the first one skipped.
    """

    counts: Counter[str] = field(default_factory=Counter)
    examples: dict[str, str] = field(default_factory=dict)
    _finished_bytes: int = 0
    _file: BinaryIO | None = None

    def skip(self, reason: str, message: str) -> None:
        """Count one skip and keep its message if it is the first for its reason."""
        self.counts[reason] += 1
        self.examples.setdefault(reason, message)

    def position_bytes(self) -> int:
        """Bytes of the source files, as stored, that were read so far."""
        return self._finished_bytes + (self._file.tell() if self._file else 0)


def document_digest(data: bytes) -> bytes:
    """16 bytes that identify a document: they decide its split and find its duplicates.

    Args:
        data: the document in UTF-8.
    """
    return hashlib.blake2b(data, digest_size=16).digest()


def is_validation(digest: bytes, val_fraction: float) -> bool:
    """Whether a document is held out: by its content alone, so equal texts are on the same side in every corpus."""
    return int.from_bytes(digest[:8], "big") < int(val_fraction * 2**64)


def list_files(source: SourceSection) -> list[Path]:
    """List the files that a source names, sorted by path, each once.

    Folders are searched to any depth, without hidden names; `python-stdlib:` gives the `.py` files of this Python's
    standard library.

    Raises:
        DataError: a path names nothing, or a file of a kind that is not read.
    """
    files: set[str] = set()
    for pattern in source.paths:
        found = set(_expand(pattern))
        if not found:
            where = f" (from {os.getcwd()})" if not os.path.isabs(os.path.expanduser(pattern)) else ""
            raise DataError(
                f"data.sources[{source.name}].paths: {pattern!r} names no file{where}; expected files, folders or "
                "globs of text, or `python-stdlib:`. Correct the path."
            )
        files |= found
    unfit = sorted(name for name in files if _bare_name(name).endswith(_NOT_TEXT))
    if unfit:
        raise DataError(
            f"data.sources[{source.name}].paths: {unfit[0]} is one of {len(unfit)} files that are not text; expected "
            "text or .jsonl files, either .gz or .zst too. Unpack or convert them, or name the text files with a glob "
            "such as 'corpus/**/*.txt'."
        )
    by_real_path: dict[str, str] = {}  # links may lead to one file in several ways, or in circles
    for name in sorted(files):
        by_real_path.setdefault(os.path.realpath(name), name)
    return [Path(name) for name in by_real_path.values()]


def _expand(pattern: str) -> Iterator[str]:
    if pattern == STDLIB:
        yield from (name for name in _walk(sysconfig.get_paths()["stdlib"]) if name.endswith(".py"))
        return
    pattern = os.path.expanduser(pattern)
    for name in [pattern] if os.path.lexists(pattern) else glob.glob(pattern, recursive=True):
        if os.path.isdir(name):
            yield from _walk(name)
        elif os.path.isfile(name):
            yield os.path.normpath(name)


def _walk(folder: str) -> Iterator[str]:
    """All files below a folder but hidden ones, installed packages and compiled Python; links are followed once."""
    visited: set[str] = set()
    for parent, folders, names in os.walk(folder, followlinks=True):
        folders[:] = [
            name
            for name in folders
            if not name.startswith(".") and name not in ("__pycache__", "site-packages", "dist-packages")
        ]
        real = os.path.realpath(parent)
        if real in visited:
            folders.clear()
            continue
        visited.add(real)
        for name in names:
            path = os.path.normpath(os.path.join(parent, name))
            if not name.startswith(".") and os.path.isfile(path):
                yield path


def _bare_name(path: str | Path) -> str:
    """The file's name in lower case, without the suffix of its compression."""
    name = os.path.basename(path).lower()
    return name[: name.rindex(".")] if name.endswith(_COMPRESSED) else name


def files_identity(files: Sequence[Path]) -> dict[str, int | str]:
    """Number, total size and fingerprint of files: names below their common folder, and sizes.

    A corpus that is moved or copied as a whole keeps its identity.
    """
    common = os.path.commonpath([file.parent for file in files])
    sizes = [os.path.getsize(file) for file in files]
    names = [os.path.relpath(file, common) for file in files]
    digest = hashlib.sha256(json.dumps(list(zip(names, sizes, strict=True))).encode()).hexdigest()
    return {"num_files": len(files), "num_bytes": sum(sizes), "sha256": digest}


def read_documents(
    files: Iterable[Path], source: SourceSection, on_bad_document: OnBad, on_bad_file: OnBad, log: ReadLog,
    loses_u2581: bool = True,
) -> Iterator[Document]:  # fmt: skip
    """Read the documents of files in order.

    A byte order mark at a file's start is dropped, as it is not text; line ends stay as they are. Empty documents are
    always counted skips. Of a file that breaks off, the documents before the break are kept.

    Args:
        files: text files, or JSON lines if named `.jsonl`; gzip or Zstandard if `.gz` or `.zst` follows.
        source: names the field of a JSON line that holds the text.
        on_bad_document: `error` raises for a document that is not UTF-8, not JSON, lacks the text, is longer than
            `MAX_DOCUMENT_BYTES` or holds U+2581 that the tokenizer loses.
        on_bad_file: `error` raises for a file that cannot be read to its end.
        log: counts what was read and skipped.
        loses_u2581: whether the tokenizer does; documents with it are bad ones then.

    Raises:
        DataError: a bad document or file, where the config says `error`.
    """
    for path in files:
        size = 0
        try:
            size = os.path.getsize(path)
            with open(path, "rb") as raw, _decompressed(raw, path, size) as file:
                log._file = raw
                lines = _json_lines if _bare_name(path).endswith(".jsonl") else _whole_file
                for origin, content in lines(file, path, source.text_field):
                    log.counts["documents_read"] += 1
                    text = _judge(content, origin, on_bad_document, log, loses_u2581)
                    if text is not None:
                        yield Document(text, origin)
            log.counts["files_read"] += 1
        except _BROKEN as error:
            message = f"{path}: the file cannot be read to its end ({_reason(error)})"
            if on_bad_file == "error":
                raise DataError(
                    f"{message}; expected a whole file. Fetch it again, or set data.on_bad_file=skip to go on with the "
                    "documents before the break."
                ) from None
            log.skip("files_unreadable", message)
        finally:
            log._file = None
            log._finished_bytes += size


def _reason(error: Exception) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or str(error) or type(error).__name__


def _decompressed(raw: BinaryIO, path: Path, size: int) -> BinaryIO:
    """The file's content as a stream that raises where the compressed data ends too early."""
    name = path.name.lower()
    if not name.endswith(_COMPRESSED):
        return raw
    if size == 0:
        raise EOFError("it is empty, which no compressed file is")
    if name.endswith(".gz"):
        return cast(BinaryIO, io.BufferedReader(gzip.GzipFile(fileobj=raw), _READ_BYTES))
    return cast(BinaryIO, io.BufferedReader(_ZstdStream(raw), _READ_BYTES))


class _ZstdStream(io.RawIOBase):
    """Zstandard frames one after another; zstandard's own reader takes a cut frame for the end of the file."""

    def __init__(self, raw: BinaryIO) -> None:
        self._raw = raw
        self._frame: zstandard.ZstdDecompressionObj | None = None
        self._input = b""
        self._output = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        while not self._output:
            self._input = self._input or self._raw.read(1 << 16)
            if not self._input:
                if self._frame is not None:
                    raise EOFError("its last Zstandard frame is cut short")
                return 0
            if self._frame is None:
                # `zstd --long` writes windows of up to 2 GiB, which the library refuses unless told.
                self._frame = zstandard.ZstdDecompressor(max_window_size=2**31).decompressobj()
            self._output = memoryview(self._frame.decompress(self._input))
            self._input = b""
            if self._frame.eof:
                self._input, self._frame = self._frame.unused_data, None
        length = min(len(buffer), len(self._output))
        buffer[:length] = self._output[:length]
        self._output = self._output[length:]
        return length


@dataclass(frozen=True)
class _Bad:
    """Why there is no document: a reason to count, and what to say."""

    reason: str
    message: str


_TOO_LONG = _Bad("too_long", f"it is longer than {MAX_DOCUMENT_BYTES:,} bytes")


def _whole_file(file: BinaryIO, path: Path, text_field: str) -> Iterator[tuple[str, str | _Bad]]:
    """A text file's one document."""
    data = file.read(MAX_DOCUMENT_BYTES + 1)
    yield str(path), _TOO_LONG if len(data) > MAX_DOCUMENT_BYTES else _decode(data)


def _json_lines(file: BinaryIO, path: Path, text_field: str) -> Iterator[tuple[str, str | _Bad]]:
    """A JSON lines file's documents."""
    number = 0
    while line := file.readline(MAX_DOCUMENT_BYTES + 1):
        number += 1
        if len(line) > MAX_DOCUMENT_BYTES:
            while line and not line.endswith(b"\n"):
                line = file.readline(_READ_BYTES)
            yield f"{path}:{number}", _TOO_LONG
        elif line.strip():
            yield f"{path}:{number}", _parse(line, text_field)
        else:
            yield f"{path}:{number}", ""


def _decode(data: bytes) -> str | _Bad:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        return _Bad("not_utf8", f"it is not UTF-8 ({error.reason} at byte {error.start:,})")


def _parse(line: bytes, text_field: str) -> str | _Bad:
    """The text of one JSON line."""
    decoded = _decode(line)
    if isinstance(decoded, _Bad):
        return decoded
    try:
        record = json.loads(decoded)
    except (ValueError, RecursionError) as error:
        return _Bad("bad_json", f"it is not JSON ({error})")
    if not isinstance(record, dict):
        return _Bad("no_text", f"it is a JSON {type(record).__name__}, not an object")
    text = record.get(text_field)
    if not isinstance(text, str):
        has = f"is {type(text).__name__}, not a string" if text_field in record else "is missing"
        return _Bad("no_text", f"its field {text_field!r} {has} (it has: {', '.join(sorted(record)[:8])})")
    try:
        text.encode()
    except UnicodeEncodeError:
        return _Bad("not_utf8", "it holds half of a surrogate pair, which UTF-8 cannot express")
    return text


def _judge(content: str | _Bad, origin: str, on_bad_document: OnBad, log: ReadLog, loses_u2581: bool) -> str | None:
    """The text of a document that is to be used; otherwise count or raise."""
    if content == "":
        log.skip("skipped_empty", f"{origin}: it is empty")
        return None
    if loses_u2581 and isinstance(content, str) and "\u2581" in content:
        content = _Bad("u2581", "it holds the character U+2581, which the tokenizer would give back as a space")
    if isinstance(content, str):
        return content
    if on_bad_document == "error":
        raise DataError(
            f"{origin}: the document cannot be used: {content.message}. Mend it, or set data.on_bad_document=skip to "
            "count and skip such documents."
        )
    log.skip(f"skipped_{content.reason}", f"{origin}: {content.message}")
    return None
