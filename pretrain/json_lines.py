"""Documents in JSON lines, of a whole file or of a part of it; and the checks that any text has to pass."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from pretrain.source_files import READ_BYTES, Bad, is_compressed, kind_of

MAX_DOCUMENT_BYTES = 2**28  # a document is held in memory in one piece, several at a time
SURROGATE = "it holds half of a surrogate pair, which UTF-8 cannot express"
TOO_LONG = Bad("too_long", f"it is longer than {MAX_DOCUMENT_BYTES:,} bytes")


def is_divisible(path: Path, source_format: str) -> bool:
    """Whether parts of a file can be read: it is one of JSON lines, which no compression hides."""
    return kind_of(path, source_format) == "jsonl" and not is_compressed(path)


def json_lines(file: BinaryIO, path: Path, text_field: str) -> Iterator[tuple[str, str | Bad]]:
    """A JSON lines file's documents."""
    number = 0
    while line := file.readline(MAX_DOCUMENT_BYTES + 1):
        number += 1
        yield f"{path}:{number}", _content_of_line(line, file, text_field)


def lines_of_part(file: BinaryIO, path: Path, text_field: str, part: range) -> Iterator[tuple[str, str | Bad]]:
    """The documents of the lines that begin in a part of a file; those before it are not counted: bytes say where."""
    if part.start:
        file.seek(part.start - 1)
        _skip_line(file, file.readline(READ_BYTES))
    begin = file.tell()
    while begin < part.stop and (line := file.readline(MAX_DOCUMENT_BYTES + 1)):
        yield f"{path}:byte {begin:,}", _content_of_line(line, file, text_field)
        begin = file.tell()


def _content_of_line(line: bytes, file: BinaryIO, text_field: str) -> str | Bad:
    """The document of a line; of one that is too long the rest is read, and nothing of it kept."""
    if len(line) > MAX_DOCUMENT_BYTES:
        _skip_line(file, line)
        return TOO_LONG
    return _parse(line, text_field) if line.strip() else ""


def _skip_line(file: BinaryIO, line: bytes) -> None:
    """Read on to the end of a line, of which the beginning was read."""
    while line and not line.endswith(b"\n"):
        line = file.readline(READ_BYTES)


def _parse(line: bytes, text_field: str) -> str | Bad:
    """The text of one JSON line."""
    decoded = decode_text(line)
    if isinstance(decoded, Bad):
        return decoded
    try:
        record = json.loads(decoded)
    except (ValueError, RecursionError) as error:
        return Bad("bad_json", f"it is not JSON ({error})")
    if not isinstance(record, dict):
        return Bad("no_text", f"it is a JSON {type(record).__name__}, not an object")
    text = record.get(text_field)
    if not isinstance(text, str):
        has = f"is {type(text).__name__}, not a string" if text_field in record else "is missing"
        return Bad("no_text", f"its field {text_field!r} {has} (it has: {', '.join(sorted(record)[:8])})")
    return checked_text(text, SURROGATE)


def decode_text(data: bytes, encoding: str = "utf-8-sig") -> str | Bad:
    """The text that some bytes are; a byte order mark at its start is dropped."""
    try:
        return data.decode(encoding)
    except UnicodeDecodeError as error:
        return Bad("not_utf8", f"it is not UTF-8 ({error.reason} at byte {error.start:,})")


def checked_text(text: str, otherwise: str) -> str | Bad:
    """The text, if UTF-8 can express it."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return Bad("not_utf8", otherwise)
    return text
