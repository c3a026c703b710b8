"""Examples for tuning in the files that hold them: JSON lines, tables, SQuAD and IMDB as they are published."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from pretrain.data.decoding import MAX_DOCUMENT_BYTES, TOO_LONG, decode_text
from pretrain.data.examples import example_of
from pretrain.data.source_files import Bad, Kind
from pretrain.options.config import ExamplesSection
from pretrain.preparing.csv_files import csv_records
from pretrain.preparing.dataset_files import imdb_record, squad_records
from pretrain.preparing.json_lines import json_lines

Record = dict[str, Any]


def read_examples(
    kind: Kind, file: BinaryIO, path: Path, section: ExamplesSection, with_references: bool = True
) -> Iterator[tuple[str, str | Bad]]:
    """A file's examples, as `examples.encode_example` reads them, each with its origin.

    A row of a table is a record of its columns, a question of SQuAD and a review of IMDB are records of what their
    `dataset_files` functions say; `section` puts prompts and responses together from their fields.

    Args:
        kind: of the file.
        file: open.
        path: where it lies.
        section: what a prompt and a response are made of.
        with_references: keep all right answers of a question of SQuAD, if its response is the answer.
    """
    if kind == "jsonl":
        yield from json_lines(file, path, section)
        return
    for origin, record in _records(kind, file, path):
        if isinstance(record, Bad):
            yield origin, record
        else:
            references = record.pop("references", ()) if kind == "squad" else ()
            has_several = with_references and section.response == "response"
            yield origin, example_of(record, section, references if has_several else ()) if record else ""


def _records(kind: Kind, file: BinaryIO, path: Path) -> Iterator[tuple[str, Record | Bad]]:
    if kind == "csv":
        yield from csv_records(file, path)
    elif kind == "squad":
        for number, record in enumerate(squad_records(file.read()), 1):
            yield f"{path}:{number}", record
    else:
        data = file.read(MAX_DOCUMENT_BYTES + 1)
        text = TOO_LONG if len(data) > MAX_DOCUMENT_BYTES else decode_text(data)
        yield str(path), text if isinstance(text, Bad) else imdb_record(text, path)
