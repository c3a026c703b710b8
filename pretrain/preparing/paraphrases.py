"""Other wordings of a source's documents, made elsewhere: by translating them there and back, for instance.

A file of them has lines of two objects, `{"original": …, "paraphrase": …}`, each as a line of the source has it: with
the field of the text, or with prompt and response. A paraphrase is trained on beside its original, and of what is held
out none is.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pretrain.data.decoding import MAX_DOCUMENT_BYTES, TOO_LONG, parse_record, text_of
from pretrain.data.examples import example_of
from pretrain.data.shards import file_sha256
from pretrain.data.source_files import Bad, decompressed
from pretrain.errors import DataError
from pretrain.options.config import DataSection, SourceSection
from pretrain.options.phases import val_fraction_of
from pretrain.preparing.filters import Filtered, Refine
from pretrain.preparing.sources import Document, ReadLog, document_digest, is_validation, judge_documents, read_files

_MAX_LINE_BYTES = 2 * MAX_DOCUMENT_BYTES
_Pair = tuple[str, str | Bad, str | Bad]  # where it is, original, paraphrase


def identity(source: SourceSection, data: DataSection) -> str:
    """What the documents of the first pass depend on, as a text for the recipe.

    Raises:
        DataError: there is no such file.
    """
    path = Path(source.augment.back_translation)
    if not path.is_file():
        raise DataError(
            f"data.sources[{source.name}].augment.back_translation is {path}, which is no file; expected one of JSON "
            "lines with `original` and `paraphrase`. Correct the path, or leave the option out."
        )
    return f"sha256 {file_sha256(path)}, of which {val_fraction_of(source, data)} are held out"


def read_paraphrases(
    source: SourceSection, data: DataSection, refine: Refine, log: ReadLog, loses_u2581: bool
) -> Iterator[tuple[Document, bytes]]:
    """Read a source's paraphrases, each with what decides its split: half of it is of the original.

    Args:
        source: names the file, and where a line's text is.
        data: what happens to bad lines, and which share is held out.
        refine: renders markup and filters, originals too: they are what the source's documents became.
        log: counts `held_out_paraphrases` and what else is left out.
        loses_u2581: whether the tokenizer does.

    Raises:
        DataError: a bad line or file, where the config says `error`.
    """
    path = Path(source.augment.back_translation)
    pairs = read_files([path], data.on_bad_file, log, lambda path: _pairs(path, source))
    refined = refine((where, content) for where, *both in pairs for content in both)
    for origin, original in refined:
        _, paraphrase = next(refined)
        if isinstance(original.content, Bad):
            paraphrase = Filtered(original.content)  # of what is left out there is no other wording
        for document in judge_documents([(origin, paraphrase)], data.on_bad_document, log, loses_u2581):
            assert isinstance(original.content, str)
            digest = document_digest(original.content.encode())
            if is_validation(digest, val_fraction_of(source, data)):
                log.skip("held_out_paraphrases", f"{origin}: its original is held out")
            else:
                yield document, digest[:8] + document_digest(document.text.encode())[8:]


def _pairs(path: Path, source: SourceSection) -> Iterator[_Pair]:
    with open(path, "rb") as raw, decompressed(raw, path, os.path.getsize(path)) as file:
        number = 0
        while line := file.readline(_MAX_LINE_BYTES):
            number += 1
            if line.strip():
                yield f"{path}:{number}", *_pair(line, source)


def _pair(line: bytes, source: SourceSection) -> tuple[str | Bad, str | Bad]:
    if len(line) == _MAX_LINE_BYTES:
        return TOO_LONG, TOO_LONG
    record = parse_record(line)
    if isinstance(record, Bad):
        return record, record
    return _content(record, "original", source), _content(record, "paraphrase", source)


def _content(record: dict[str, Any], name: str, source: SourceSection) -> str | Bad:
    part = record.get(name)
    if not isinstance(part, dict):
        return Bad("no_paraphrase", f"its field {name!r} is {type(part).__name__}; expected an object")
    return example_of(part, source.examples) if source.examples else text_of(part, source.text_field)
