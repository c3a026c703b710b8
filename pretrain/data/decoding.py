"""A document's bytes to its text, or why there is none."""

from __future__ import annotations

import json
from typing import Any

from pretrain.data.source_files import Bad

MAX_DOCUMENT_BYTES = 2**28  # a document is held in memory in one piece, several at a time
TOO_LONG = Bad("too_long", f"it is longer than {MAX_DOCUMENT_BYTES:,} bytes")
SURROGATE = "it holds half of a surrogate pair, which UTF-8 cannot express"


def decode_text(data: bytes, encoding: str = "utf-8-sig") -> str | Bad:
    """The text of UTF-8, by default without a byte order mark."""
    try:
        return data.decode(encoding)
    except UnicodeDecodeError as error:
        return Bad("not_utf8", f"it is not UTF-8 ({error.reason} at byte {error.start:,})")


def parse_record(data: bytes) -> dict[str, Any] | Bad:
    """A JSON object."""
    decoded = decode_text(data)
    if isinstance(decoded, Bad):
        return decoded
    try:
        record = json.loads(decoded)
    except (ValueError, RecursionError) as error:
        return Bad("bad_json", f"it is not JSON ({error})")
    if not isinstance(record, dict):
        return Bad("no_text", f"it is a JSON {type(record).__name__}, not an object")
    return record


def parse_json(data: bytes, text_field: str) -> str | Bad:
    """The text of a JSON object: the value of its field `text_field`."""
    record = parse_record(data)
    return record if isinstance(record, Bad) else text_of(record, text_field)


def text_of(record: dict[str, Any], text_field: str) -> str | Bad:
    """The text in a field of a record."""
    text = record.get(text_field)
    if not isinstance(text, str):
        has = f"is {type(text).__name__}, not a string" if text_field in record else "is missing"
        return Bad("no_text", f"its field {text_field!r} {has} (it has: {', '.join(sorted(record)[:8])})")
    return checked_text(text, SURROGATE)


def checked_text(text: str, otherwise: str) -> str | Bad:
    """The text, if UTF-8 can express it; else a bad document of which `otherwise` is said."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return Bad("not_utf8", otherwise)
    return text
