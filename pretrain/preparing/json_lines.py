"""Documents in JSON lines, of a whole file or of a part of it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from pretrain.data.decoding import MAX_DOCUMENT_BYTES, TOO_LONG, parse_json
from pretrain.data.examples import parse_example
from pretrain.data.source_files import READ_BYTES, Bad, is_compressed, kind_of
from pretrain.options.config import ExamplesSection

Wanted = str | ExamplesSection  # of a line: the field that holds its text, or where an example's parts are


def is_divisible(path: Path, source_format: str) -> bool:
    """Whether parts of a file can be read: it is one of JSON lines, which no compression hides."""
    return kind_of(path, source_format) == "jsonl" and not is_compressed(path)


def json_lines(file: BinaryIO, path: Path, wanted: Wanted) -> Iterator[tuple[str, str | Bad]]:
    """A JSON lines file's documents."""
    number = 0
    while line := file.readline(MAX_DOCUMENT_BYTES + 1):
        number += 1
        yield f"{path}:{number}", _content_of_line(line, file, wanted)


def lines_of_part(file: BinaryIO, path: Path, wanted: Wanted, part: range) -> Iterator[tuple[str, str | Bad]]:
    """The documents of the lines that begin in a part of a file; those before it are not counted: bytes say where."""
    if part.start:
        file.seek(part.start - 1)
        _skip_line(file, file.readline(READ_BYTES))
    begin = file.tell()
    while begin < part.stop and (line := file.readline(MAX_DOCUMENT_BYTES + 1)):
        yield f"{path}:byte {begin:,}", _content_of_line(line, file, wanted)
        begin = file.tell()


def _content_of_line(line: bytes, file: BinaryIO, wanted: Wanted) -> str | Bad:
    """The document of a line; of one that is too long the rest is read, and nothing of it kept."""
    if len(line) > MAX_DOCUMENT_BYTES:
        _skip_line(file, line)
        return TOO_LONG
    if not line.strip():
        return ""
    return parse_json(line, wanted) if isinstance(wanted, str) else parse_example(line, wanted)


def _skip_line(file: BinaryIO, line: bytes) -> None:
    """Read on to the end of a line, of which the beginning was read."""
    while line and not line.endswith(b"\n"):
        line = file.readline(READ_BYTES)
