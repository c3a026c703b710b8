"""Documents of sources: of text, or of token ids that were made before.

A text file is one document, and so is each line of a `.jsonl` file, each row of a table and each text in a tar. What
cannot be read is an error or a counted skip, as the config says; nothing is lost without being counted.
"""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import BinaryIO, Literal, TypeVar

import numpy as np

from pretrain.data.decoding import MAX_DOCUMENT_BYTES, SURROGATE, TOO_LONG, checked_text, decode_text, parse_json
from pretrain.data.source_files import BROKEN, Bad, TokenFormat, decompressed, kind_of
from pretrain.errors import DataError
from pretrain.options.config import SourceSection
from pretrain.preparing.csv_files import csv_column
from pretrain.preparing.dataset_files import imdb_text, squad_documents
from pretrain.preparing.example_files import read_examples
from pretrain.preparing.filters import Filtered, RawText, Refine, filter_all
from pretrain.preparing.json_lines import json_lines, lines_of_part
from pretrain.preparing.table_files import read_column
from pretrain.preparing.tar_files import Member, read_texts
from pretrain.preparing.token_files import read_ids
from pretrain.preparing.wikipedia import read_pages
from pretrain.tokenizers.tokenizer import Tokenizer

MAX_DOCUMENT_TOKENS = 2**26

OnBad = Literal["skip", "error"]
Content = TypeVar("Content", str, np.ndarray)
Item = TypeVar("Item")


@dataclass(frozen=True)
class Document:
    """A text and where it is from: its file, and its line, row, member or title if it has one (`path:line`).

    `bands` are what near-duplicates have in common (`near_duplicates.bands_of`), if they are looked for.
    """

    text: str
    origin: str
    bands: bytes = b""


@dataclass(frozen=True)
class TokenDocument:
    """A document that came as ids, without bos and eos, and where it is from."""

    ids: np.ndarray
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
    _position: Callable[[], int] | None = None

    def skip(self, reason: str, message: str, count: int = 1) -> None:
        """Count a skip, or several, and keep its message if it is the first for its reason."""
        self.counts[reason] += count
        self.examples.setdefault(reason, message)

    def add(self, counts: Mapping[str, int], origin: str) -> None:
        """Add to counts of what was done to a document that is kept."""
        for reason, count in counts.items():
            self.counts[reason] += count
            self.examples.setdefault(reason, f"{origin}: {count}")

    def add_all(self, counts: Mapping[str, int], examples: Mapping[str, str]) -> None:
        """Add what another log has."""
        self.counts.update(counts)
        self.examples = dict(examples) | self.examples

    def position_bytes(self) -> int:
        """Bytes of the source files, as stored, that were read so far."""
        return self._finished_bytes + (self._position() if self._position else 0)


def document_digest(data: bytes) -> bytes:
    """16 bytes that identify a document: they decide its split and find its duplicates.

    Args:
        data: the document in UTF-8.
    """
    return hashlib.blake2b(data, digest_size=16).digest()


def is_validation(digest: bytes, val_fraction: float) -> bool:
    """Whether a document is held out: by its content alone, so equal texts are on the same side in every corpus."""
    return int.from_bytes(digest[:8], "big") < validation_limit(val_fraction)


def validation_limit(val_fraction: float) -> int:
    """What the first 8 bytes of a digest are below if its document is held out."""
    return min(int(val_fraction * 2**64), 2**64 - 1)  # what a uint64 holds


def read_documents(
    files: Iterable[Path], source: SourceSection, on_bad_document: OnBad, on_bad_file: OnBad, log: ReadLog,
    loses_u2581: bool = True, refine: Refine = filter_all, parts: Mapping[Path, range] = MappingProxyType({}),
) -> Iterator[Document]:  # fmt: skip
    """Read the documents of files in order.

    A byte order mark at a file's start is dropped, as it is not text; line ends stay as they are. Empty documents are
    always counted skips. Of a file that breaks off, the documents before the break are kept.

    Args:
        files: of documents, as `source_files.list_files` gives them.
        source: names the field of JSON, or the column of a table, that holds the text.
        on_bad_document: `error` raises for a document that is not UTF-8, not JSON, lacks the text, is longer than
            `MAX_DOCUMENT_BYTES` or holds U+2581 that the tokenizer loses, and for a row of another length than the
            first.
        on_bad_file: `error` raises for a file that cannot be read to its end.
        log: counts what was read and skipped.
        loses_u2581: whether the tokenizer does; documents with it are bad ones then.
        refine: renders markup and filters what was read.
        parts: of JSON lines files that are not read as a whole, the bytes in which a line begins that is.

    Raises:
        DataError: a table has no such column; a bad document or file, where the config says `error`.
    """
    contents = read_files(files, on_bad_file, log, lambda path: _contents(path, source, log, parts.get(path)), parts)
    yield from judge_documents(refine(contents), on_bad_document, log, loses_u2581)


def judge_documents(
    contents: Iterable[tuple[str, Filtered]], on_bad_document: OnBad, log: ReadLog, loses_u2581: bool = True
) -> Iterator[Document]:
    """Yield the documents that are to be used, of (origin, content); count them all."""
    for origin, filtered in contents:
        log.counts["documents_read"] += 1
        text = _judge(filtered.content, origin, on_bad_document, log, loses_u2581)
        if text is not None:
            log.add(filtered.masked, origin)
            yield Document(text, origin, filtered.bands)


def read_token_documents(
    files: Sequence[Path],
    token_format: TokenFormat,
    tokenizer: Tokenizer,
    on_bad_document: OnBad,
    on_bad_file: OnBad,
    log: ReadLog,
) -> Iterator[TokenDocument]:
    """Read the documents of files of token ids in order, without the bos and eos that they may have.

    Args:
        files: `.bin` files, and Megatron's `.idx`.
        token_format: what they are.
        tokenizer: whose ids they hold.
        on_bad_document, on_bad_file, log: as for `read_documents`.

    Raises:
        DataError: an id is none of the tokenizer's; a bad document or file, where the config says `error`.
    """

    def contents(path: Path) -> Iterator[tuple[str, np.ndarray | Bad]]:
        if path.suffix != ".bin":
            return
        for place, ids, position_bytes in read_ids(path, token_format, tokenizer.eos_id):
            log._position = partial(int, position_bytes)
            yield f"{path}:{place}", ids if len(ids) < MAX_DOCUMENT_TOKENS else _TOO_MANY_IDS

    for origin, content in read_files(files, on_bad_file, log, contents):
        log.counts["documents_read"] += 1
        if not isinstance(content, Bad):
            content = strip_ids(content, origin, tokenizer)
        ids = _judge(content, origin, on_bad_document, log)
        if ids is not None:
            yield TokenDocument(ids, origin)


def strip_ids(ids: np.ndarray, origin: str, tokenizer: Tokenizer) -> np.ndarray:
    """Drop a leading bos and a trailing eos.

    Raises:
        DataError: an id is none of the tokenizer's.
    """
    if len(ids) and not 0 <= ids.min() <= ids.max() < tokenizer.vocab_size:
        position = int(np.flatnonzero((ids < 0) | (ids >= tokenizer.vocab_size))[0])
        raise DataError(
            f"{origin}: id number {position} of the document is {ids[position]}; expected 0 to "
            f"{tokenizer.vocab_size - 1}, the ids of the tokenizer (tokenizer.model). Use the tokenizer that these "
            "files were made with."
        )
    ids = ids[1:] if len(ids) and ids[0] == tokenizer.bos_id else ids
    return ids[:-1] if len(ids) and ids[-1] == tokenizer.eos_id else ids


def read_files(
    files: Iterable[Path],
    on_bad_file: OnBad,
    log: ReadLog,
    contents: Callable[[Path], Iterator[Item]],
    parts: Mapping[Path, range] = MappingProxyType({}),
) -> Iterator[Item]:
    """Yield what `contents` gives of each file; a file that breaks off is an error or counted, as the config says.

    A file of which parts are read in several places is counted by its first.
    """
    for path in files:
        size = 0
        try:
            part = parts.get(path) or range(os.path.getsize(path))
            size = len(part)
            yield from contents(path)
            log.counts["files_read"] += part.start == 0
        except BROKEN as error:
            message = f"{path}: the file cannot be read to its end ({_reason(error)})"
            if on_bad_file == "error":
                is_denied = isinstance(error, PermissionError)
                fix = "one that you may read. Set its permissions" if is_denied else "a whole file. Fetch it again"
                raise DataError(
                    f"{message}; expected {fix}, or set data.on_bad_file=skip to go on with the "
                    "documents before the break."
                ) from None
            log.skip("files_unreadable", message)
        finally:
            log._position = None
            log._finished_bytes += size


def _contents(
    path: Path, source: SourceSection, log: ReadLog, part: range | None = None
) -> Iterator[tuple[str, RawText]]:
    """A file's documents, or those of a part, each with its origin."""
    kind, text_field = kind_of(path, source.format), source.text_field
    if part is not None:
        with open(path, "rb") as file:
            log._position = lambda: file.tell() - part.start
            yield from lines_of_part(file, path, source.examples or text_field, part)
        return
    if kind in ("parquet", "arrow"):
        row = 0
        for values, position_bytes in read_column(path, text_field):
            log._position = partial(int, position_bytes)
            for value in values:
                row += 1
                yield f"{path}:{row}", decode_value(value, text_field)
        return
    with open(path, "rb") as raw, decompressed(raw, path, os.path.getsize(path)) as file:
        log._position = raw.tell
        if kind == "tar":
            texts = read_tar(file, path, text_field, log)
            yield from ((f"{path}:{member.name}", content) for member, content, _ in texts)
        elif source.examples is not None:
            # a paraphrase is known to be of a held-out question by the answer that its line has
            yield from read_examples(kind, file, path, source.examples, not source.augment.back_translation)
        else:
            yield from _READERS[kind](file, path, text_field)


def read_tar(
    file: BinaryIO, path: Path, text_field: str, log: ReadLog
) -> Iterator[tuple[Member, str | Bad, bytes | None]]:
    """Read the documents of a tar: its `.txt` members, and its `.json` ones where the sample has no `.txt`.

    Args:
        file: the tar, decompressed.
        path: its name, for messages.
        text_field: the field of JSON that holds the text.
        log: counts the other members, by their extensions.

    Returns:
        Each with its member, its text, and the bytes that hold it.

    Raises:
        BrokenFile: the tar cannot be read to its end.
    """

    def ignore(reason: str, member: Member) -> None:
        log.skip(f"ignored_{reason}", f"{path}:{member.name}")

    for member, data in read_texts(file, MAX_DOCUMENT_BYTES, ignore):
        if data is None:
            yield member, TOO_LONG, None
        else:
            yield member, parse_json(data, text_field) if member.is_json else decode_text(data), data


def _reason(error: Exception) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or str(error) or type(error).__name__


_NO_ARTICLE = {
    "redirect": "it is a redirect",
    "not_an_article": "it is in a namespace beside the articles'",
    "not_wikitext": "it is written in something else than wiki markup",
}
_TOO_MANY_IDS = Bad("too_long", f"it has {MAX_DOCUMENT_TOKENS:,} ids or more; is the tokenizer's eos in the file?")


def _whole_file(file: BinaryIO, path: Path, text_field: str) -> Iterator[tuple[str, str | Bad]]:
    """A text file's one document."""
    data = file.read(MAX_DOCUMENT_BYTES + 1)
    yield str(path), TOO_LONG if len(data) > MAX_DOCUMENT_BYTES else decode_text(data)


def _review(file: BinaryIO, path: Path, text_field: str) -> Iterator[tuple[str, str | Bad]]:
    """A review of IMDB."""
    for origin, content in _whole_file(file, path, text_field):
        yield origin, content if isinstance(content, Bad) else imdb_text(content)


def _paragraphs(file: BinaryIO, path: Path, text_field: str) -> Iterator[tuple[str, str | Bad]]:
    """The paragraphs of SQuAD, with their questions; the file of 42 MB is held in memory."""
    for number, content in enumerate(squad_documents(file.read()), 1):
        yield f"{path}:{number}", content if isinstance(content, Bad) else checked_text(content, SURROGATE)


def _articles(file: BinaryIO, path: Path, text_field: str) -> Iterator[tuple[str, RawText]]:
    """The articles of a dump of Wikipedia, as markup."""
    for title, page in read_pages(file):
        yield f"{path}:{title}", Bad(page, _NO_ARTICLE[page], False) if isinstance(page, str) else page


def decode_value(value: bytes | None, text_field: str) -> str | Bad:
    """The text of one row of a table."""
    if value is None:
        return Bad("no_text", f"its column {text_field!r} is null")
    return TOO_LONG if len(value) > MAX_DOCUMENT_BYTES else decode_text(value, "utf-8")


def _judge(
    content: Content | Bad, origin: str, on_bad_document: OnBad, log: ReadLog, loses_u2581: bool = False
) -> Content | None:
    """The content of a document that is to be used; otherwise count or raise."""
    if not isinstance(content, Bad) and len(content) == 0:
        log.skip("skipped_empty", f"{origin}: it is empty")
        return None
    if loses_u2581 and isinstance(content, str) and "\u2581" in content:
        content = Bad("u2581", "it holds the character U+2581, which the tokenizer would give back as a space")
    if not isinstance(content, Bad):
        return content
    if on_bad_document == "error" and content.is_fault:
        raise DataError(
            f"{origin}: the document cannot be used: {content.message}. Mend it, or set data.on_bad_document=skip to "
            "count and skip such documents."
        )
    log.skip(f"skipped_{content.reason}", f"{origin}: {content.message}")
    return None


_READERS: dict[str, Callable[[BinaryIO, Path, str], Iterator[tuple[str, RawText]]]] = {
    "text": _whole_file,
    "jsonl": json_lines,
    "csv": csv_column,
    "wikipedia": _articles,
    "squad": _paragraphs,
    "imdb": _review,
}
