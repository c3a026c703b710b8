"""Tables of `.csv` and `.tsv`: quotes as spreadsheets write them, the columns' names in the first row."""

from __future__ import annotations

import csv
import io
from collections.abc import Generator, Iterator
from contextlib import closing
from pathlib import Path
from typing import BinaryIO

from pretrain.data.decoding import MAX_DOCUMENT_BYTES, checked_text
from pretrain.data.source_files import Bad, BrokenFile, bare_name
from pretrain.errors import DataError

_NOT_UTF8 = "it is not UTF-8"


def csv_column(file: BinaryIO, path: Path, text_field: str) -> Iterator[tuple[str, str | Bad]]:
    """One column of a table, a row at a time.

    Raises:
        DataError: the first row does not name the column once.
        BrokenFile: the quotes do not match.
    """
    with closing(_rows(file, path)) as rows:
        header = next(rows, [])
        if header.count(text_field) != 1:
            raise DataError(
                f"{path}: its first row names {header.count(text_field) or 'no'} column {text_field!r}; expected one "
                f"(data.sources[].text_field) of: {', '.join(header[:20]) or 'nothing'}. Set text_field to the one "
                "that holds the text; a file without such a row needs one."
            )
        column = header.index(text_field)
        for number, row in enumerate(rows, 1):
            bad = _odd_length(row, header)
            yield f"{path}:{number}", bad or (checked_text(row[column], _NOT_UTF8) if row else "")


def csv_records(file: BinaryIO, path: Path) -> Iterator[tuple[str, dict[str, str] | Bad]]:
    """All columns of a table by their names, a row at a time; empty rows have none.

    Raises:
        BrokenFile: the quotes do not match.
    """
    with closing(_rows(file, path)) as rows:
        header = next(rows, [])
        for number, row in enumerate(rows, 1):
            bad = _odd_length(row, header)
            if bad is None and isinstance(checked_text("".join(row), _NOT_UTF8), Bad):
                bad = Bad("not_utf8", _NOT_UTF8)
            yield f"{path}:{number}", bad or dict(zip(header, row, strict=False))


def _rows(file: BinaryIO, path: Path) -> Generator[list[str], None, None]:
    lines = io.TextIOWrapper(file, "utf-8-sig", errors="surrogateescape", newline="")
    previous_limit = csv.field_size_limit(MAX_DOCUMENT_BYTES)  # of the whole process: others read csv too
    reader = csv.reader(lines, delimiter="\t" if bare_name(path).endswith(".tsv") else ",", strict=True)
    try:
        yield from reader
    except csv.Error as error:
        raise BrokenFile(f"{error}, in line {reader.line_num:,}") from None
    finally:
        csv.field_size_limit(previous_limit)
        lines.detach()


def _odd_length(row: list[str], header: list[str]) -> Bad | None:
    if row and len(row) != len(header):
        return Bad("bad_row", f"it has {len(row)} fields, and the first row {len(header)}")
    return None
