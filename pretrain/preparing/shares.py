"""The first pass of `prepare`: the documents of a source, or of a share of it, filtered, tokenized, sorted into spills.

This process reads, hashes and writes; others tokenize batches, whose results are taken in order. A share that was
stopped, in whatever way, reads its files again from the start, but tokenizes only what its complete spills do not hold.
Many machines make a share each; the second pass (`corpus.py`) is the same for one share as for many.
"""

from __future__ import annotations

import hashlib
import re
import time
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from pretrain.console import LiveLine, counted, format_bytes, format_duration
from pretrain.data import examples
from pretrain.data.shards import JOURNAL_NAME, MANIFEST_NAME, PREPARE_COMMAND
from pretrain.data.source_files import files_identity, list_files, published_formats, token_format
from pretrain.data.text_index import INDEX_KEY
from pretrain.errors import ConfigError, DataError
from pretrain.options.config import Config, DataSection, SourceSection
from pretrain.options.phases import val_fraction_of
from pretrain.preparing import filters
from pretrain.preparing.journal import (
    LOCK_NAME,
    ORDER,
    ORDER_KEY,
    Recipe,
    append_line,
    check_recipe,
    file_lock,
    read_lines,
    write_lines,
)
from pretrain.preparing.json_lines import is_divisible
from pretrain.preparing.paraphrases import identity, read_paraphrases
from pretrain.preparing.refining import open_refiner
from pretrain.preparing.sources import Document, ReadLog, document_digest, read_documents, read_token_documents
from pretrain.preparing.spills import Spill, SpillWriter, spill_size
from pretrain.preparing.workers import Batch, QueuedDocument, encode_batches, num_processes
from pretrain.tokenizers.tokenizer import Tokenizer

RECIPE_VERSION = 1  # of the rules that turn text into shards: hash, split
BATCH_CHARACTERS = 1 << 18  # tokenized at once by one process: about 50 ms of work
NUM_RECENT = 1 << 17  # documents before, of which equal ones are dropped untokenized: about 15 MB
SPILL_SECONDS = 300.0  # after which a spill is written, however small: what a killed run loses at most
SHARE_FOLDERS = "share-*-of-*"  # in the folder of the shards
LIVE_SECONDS, PLAIN_SECONDS = 0.2, 10.0  # between updates on a terminal, and between lines elsewhere

_LEFT_OVER = re.compile(r"spill-\d{6,}|\.spill-\d{6,}\.tmp|\.prepare\.jsonl\.tmp")
_LATER = (
    "data.val_fraction",
    "data.shard_bytes",
    "the longest example, in tokens",
)  # what only the second pass depends on


def parse_share(text: str) -> tuple[int, int]:
    """Read `K/N`: the share, from 1, and how many there are.

    Raises:
        ConfigError: it is something else.
    """
    number, _, count = text.partition("/")
    if number.isdigit() and count.isdigit() and 1 <= int(number) <= int(count):
        return int(number), int(count)
    raise ConfigError(f"--share is {text}; expected K/N with K from 1 to N, such as 3/16. Correct it.")


def files_of_share(
    files: Sequence[Path], source_format: str, number: int, count: int
) -> tuple[list[Path], dict[Path, range]]:
    """The K-th of N equal parts of the bytes of files.

    Files that can be divided are; of the others, a share has those whose middles are in its part.

    Returns:
        The share's files, in their order, and of those that it does not have as a whole the bytes.
    """
    sizes = [file.stat().st_size for file in files]
    total, begin = max(sum(sizes), 1), 0
    first, end = total * (number - 1) // count, total * number // count
    chosen: list[Path] = []
    parts: dict[Path, range] = {}
    places: dict[Path, int] = {}  # a .bin and its .idx stay together
    for file, size in zip(files, sizes, strict=True):
        if size and is_divisible(file, source_format):
            part = range(max(first - begin, 0), min(end - begin, size))
            is_chosen = len(part) > 0
            if 0 < len(part) < size:
                parts[file] = part
        else:
            place = min(2 * begin + size, 2 * total - 1) * count // (2 * total)
            if places.setdefault(file.with_suffix(""), place) != place and file.suffix == ".idx":
                place = places[file.with_suffix("")]
            is_chosen = place == number - 1
        chosen += [file] if is_chosen else []
        begin += size
    return chosen, parts


def recipe_of(files: Sequence[Path], source: SourceSection, data: DataSection, tokenizer: Tokenizer) -> Recipe:
    """Everything that the bytes of a source's shards depend on, under the names that an error shows.

    Args:
        files: all of the source; none if they are gone.
        source, data, tokenizer: what they are prepared with.
    """
    recipe: Recipe = {
        "version": RECIPE_VERSION,
        ORDER_KEY: ORDER,
        "data.sources[].name": source.name,
        "data.sources[].text_field": source.text_field,
        "data.val_fraction": val_fraction_of(source, data),
        "data.drop_duplicates": data.drop_duplicates,
        "data.shard_bytes": data.shard_bytes,
        "the tokenizer": tokenizer.fingerprint,
        "data.filters": filters.identity(filters.filters_of(source, data)),
        INDEX_KEY: None,
        "data.sources[].examples": examples.identity(source.examples, tokenizer) if source.examples else None,
        "the longest example, in tokens": data.seq_lens[0] if source.examples else None,
    }
    if files:
        if held := token_format(files) or published_formats(files, source.format):
            recipe["data.sources[].format"] = held
        recipe |= files_identity(files)
        if source.augment.back_translation:
            recipe["data.sources[].augment.back_translation"] = identity(source, data)
    return recipe


@dataclass(frozen=True)
class ShareResult:
    """What a complete share holds.

    Attributes:
        spills: in order.
        counts: of documents read, skipped and masked, by reason.
        examples: the first of each reason.
        documents: the sum of the digests of all documents, duplicates too, which identifies them in any order.
    """

    spills: list[Spill]
    counts: dict[str, int]
    examples: dict[str, str]
    documents: int


class ShareJournal:
    """What a share has done: its recipe, a line a complete spill, and a last one when all is read.

    Opening it deletes what an interrupted run left half-written.

    Args:
        folder: of the share; its lock must be held.
        recipe: what the spills are made of.

    Attributes:
        spills: the complete ones.
        chain: the hash over the digests of their documents, in the order in which they were read.
        is_complete: whether all is read.

    Raises:
        ConfigError: the folder was begun with another recipe.
    """

    def __init__(self, folder: Path, recipe: Recipe) -> None:
        self._folder = folder
        self.spills: list[Spill] = []
        self.chain, self.is_complete = "", False
        lines: list[dict] = [{"recipe": recipe}]
        old = read_lines(folder / JOURNAL_NAME)
        if len(old) > 1 and ("spill" in old[1] or old[0]["recipe"] == recipe):
            check_recipe(folder, recipe, old[0]["recipe"])
            for line in old[1:]:
                if "spill" in line:
                    spill = Spill(**line["spill"])
                    if not spill.is_whole(folder):
                        break
                    self.spills.append(spill)
                    self.chain = line["chain"]
                self.is_complete = "counts" in line
                lines.append(line)
        write_lines(folder / JOURNAL_NAME, lines)
        known = {spill.name for spill in self.spills}
        for path in folder.iterdir():
            if path.name not in known and _LEFT_OVER.fullmatch(path.name):
                path.unlink()

    def add(self, spill: Spill, chain: str) -> None:
        """Note a spill that is complete on disk."""
        append_line(self._folder / JOURNAL_NAME, {"spill": asdict(spill), "chain": chain})

    def complete(self, log: ReadLog, documents: int) -> None:
        """Note that all is read."""
        counts = dict(sorted(log.counts.items()))
        append_line(
            self._folder / JOURNAL_NAME, {"counts": counts, "examples": log.examples, "documents": f"{documents:x}"}
        )


class Share:
    """A share of a source, on its way into spills in `<shards>/share-K-of-N`.

    Args:
        source: the source; it has `paths`.
        config: the whole config.
        tokenizer: the config's tokenizer.
        line: where progress is shown.
        number, count: the share, from 1, and how many there are.
    """

    def __init__(
        self, source: SourceSection, config: Config, tokenizer: Tokenizer, line: LiveLine, number: int, count: int
    ) -> None:
        self.source, self.config, self.tokenizer, self.line = source, config, tokenizer, line
        self.number, self.count = number, count
        self.folder = Path(source.shards) / f"share-{number}-of-{count}"
        self.log = ReadLog()
        self._num_documents = 0  # read so far, but duplicates
        self._documents = 0  # the sum of the digests of all that were read
        self._chain = hashlib.blake2b(digest_size=16)  # over the digests of documents in spills, in order
        self._new_bytes = 0  # of text that is tokenized now
        self._begin_seconds, self._begin_position = time.monotonic(), 0  # when the first of it was read, and where
        self._shown_seconds = self._begin_seconds

    def recipe(self, files: Sequence[Path]) -> Recipe:
        """What the share is made of, of all files of the source."""
        recipe = recipe_of(files, self.source, self.config.data, self.tokenizer)
        return {key: value for key, value in recipe.items() if key not in _LATER} | {
            "the share": f"{self.number}/{self.count}"
        }

    def prepare(self) -> None:
        """Make the share complete, or see that it is, or that nothing needs it any more."""
        if (self.folder.parent / MANIFEST_NAME).exists():
            self.line.say(f"{self.source.name}: {self.folder.parent} is complete; nothing to do")
            return
        with file_lock(self.folder / LOCK_NAME, str(self.folder)):
            files = list_files(self.source)
            if self.source.examples is not None:
                examples.check_examples(self.source.examples)
            journal = ShareJournal(self.folder, self.recipe(files))
            if journal.is_complete:
                self.line.say(f"{self.source.name}: {self.folder} is complete")
            else:
                self._make(files, journal)

    def result(self, files: Sequence[Path]) -> ShareResult:
        """What the share holds.

        Raises:
            ConfigError: it was made otherwise.
            DataError: it is not complete.
        """
        lines = read_lines(self.folder / JOURNAL_NAME)
        if lines:
            check_recipe(self.folder, self.recipe(files), lines[0]["recipe"])
        spills = [Spill(**line["spill"]) for line in lines if "spill" in line]
        if not lines or "counts" not in lines[-1] or not all(spill.is_whole(self.folder) for spill in spills):
            raise DataError(
                f"{self.folder} is not complete; expected every share before they are merged. Run: {PREPARE_COMMAND} "
                f"--share {self.number}/{self.count}"
            )
        last = lines[-1]
        return ShareResult(spills, last["counts"], last["examples"], int(last["documents"], 16))

    def _make(self, files: list[Path], journal: ShareJournal) -> None:
        """Write all spills that are not there yet."""
        data = self.config.data
        max_bytes = spill_size(data.shard_bytes, sum(file.stat().st_size for file in files))
        writer = SpillWriter(self.folder, max_bytes, len(journal.spills))
        chosen, parts = files_of_share(files, self.source.format, self.number, self.count)
        num_done = sum(spill.num_documents for spill in journal.spills)
        batches = self._batches(self._read(chosen, parts), chosen, parts, num_done, journal.chain)
        written_seconds = time.monotonic()
        with closing(self._encoded(batches, chosen)) as encoded:
            for batch, documents in encoded:
                is_time = time.monotonic() - written_seconds >= SPILL_SECONDS
                for document, ids in zip(batch, documents, strict=True):
                    self._chain.update(document.digest)
                    is_full = writer.add(document.digest, document.text_bytes, document.bands, document.origin, ids)
                    if is_full or is_time:
                        journal.add(writer.write(), self._chain.hexdigest())
                        written_seconds, is_time = time.monotonic(), False
        if writer.num_documents:
            journal.add(writer.write(), self._chain.hexdigest())
        journal.complete(self.log, self._documents)

    def _encoded(
        self, batches: Iterator[Batch], files: Sequence[Path]
    ) -> Generator[tuple[Batch, list[np.ndarray]], None, None]:
        """Batches with their documents' ids, bos and eos included."""
        if token_format(files) is None:
            yield from encode_batches(
                batches, self.config.tokenizer, self.tokenizer, num_processes(self.config.data),
                self.source.examples is not None,
            )  # fmt: skip
        else:
            yield from ((batch, [document.ids for document in batch if document.ids is not None]) for batch in batches)

    def _read(self, files: Sequence[Path], parts: dict[Path, range]) -> Iterator[QueuedDocument]:
        """The documents of some files."""
        data, held = self.config.data, token_format(files)
        if held is None:
            refine = open_refiner(files, self.source, data)
            policy = data.on_bad_document, data.on_bad_file, self.log, self.tokenizer.loses_u2581, refine, parts
            for document in read_documents(files, self.source, *policy):
                yield self._queued(document, document_digest(document.text.encode()))
            if self.source.augment.back_translation and self.number == 1:
                found = read_paraphrases(self.source, data, refine, self.log, self.tokenizer.loses_u2581)
                yield from (self._queued(*one) for one in found)
            return
        token_bytes = self.tokenizer.token_bytes()
        ends = np.array([self.tokenizer.bos_id]), np.array([self.tokenizer.eos_id])
        for tokens in read_token_documents(
            files, held, self.tokenizer, data.on_bad_document, data.on_bad_file, self.log
        ):
            digest = document_digest(tokens.ids.astype("<u4").tobytes())
            ids = np.concatenate([ends[0], tokens.ids, ends[1]]).astype(self.tokenizer.id_dtype)
            yield QueuedDocument(tokens.origin, digest, b"", int(token_bytes[tokens.ids].sum()), None, ids)

    def _queued(self, document: Document, digest: bytes) -> QueuedDocument:
        text = examples.plain_text(document.text) if self.source.examples else document.text
        return QueuedDocument(document.origin, digest, document.bands, len(text.encode()), document.text)

    def _batches(
        self, documents: Iterable[QueuedDocument], files: Sequence[Path], parts: dict[Path, range], num_done: int,
        chain: str,
    ) -> Iterator[Batch]:  # fmt: skip
        """The documents that complete spills do not hold; those that they hold are compared by their hashes."""
        total_bytes = sum(len(parts.get(file) or range(file.stat().st_size)) for file in files)
        recent: set[bytes] = set()
        batch: Batch = []
        size = 0
        for document in documents:
            self._documents += int.from_bytes(document.digest, "big")
            if self.config.data.drop_duplicates:
                if document.digest in recent:
                    self.log.skip("duplicates", f"{document.origin}: it is equal to an earlier document")
                    continue
                if len(recent) == NUM_RECENT:  # those that are met later are dropped by the second pass
                    recent.clear()
                recent.add(document.digest)
            self._num_documents += 1
            self._show(total_bytes)
            if self._num_documents <= num_done:
                self._chain.update(document.digest)
                if self._num_documents == num_done:
                    self._check_chain(self._chain.hexdigest() == chain)
                continue
            if not self._new_bytes:
                self._begin_seconds, self._begin_position = time.monotonic(), self.log.position_bytes()
            self._new_bytes += document.text_bytes
            batch.append(document)
            size += len(document.text or ()) + (0 if document.ids is None else len(document.ids))
            if size >= BATCH_CHARACTERS:
                yield batch
                batch, size = [], 0
        self._check_chain(self._num_documents >= num_done)
        if batch:
            yield batch

    def _check_chain(self, is_equal: bool) -> None:
        if not is_equal:
            raise other_documents(self.folder, "spills")

    def _show(self, total_bytes: int) -> None:
        """Show progress, if it is time to."""
        now = time.monotonic()
        if now - self._shown_seconds < (LIVE_SECONDS if self.line.is_terminal else PLAIN_SECONDS):
            return
        self._shown_seconds = now
        position = self.log.position_bytes()
        text = (
            f"{self.source.name}: {position / max(total_bytes, 1):.0%} of {format_bytes(total_bytes)}, "
            f"{counted(self._num_documents, 'document')}"
        )
        if self._new_bytes and position > self._begin_position and now > self._begin_seconds:
            elapsed = now - self._begin_seconds
            left = elapsed * (total_bytes - position) / (position - self._begin_position)
            text += f", {format_bytes(self._new_bytes / elapsed)}/s, {format_duration(left)} left"
        self.line.show(text, plain=True)


def other_documents(folder: Path, what: str) -> DataError:
    """The error for a source whose text changed, though its files have the same names and sizes."""
    return DataError(
        f"{folder}: the source's documents are not those that its complete {what} hold; expected the same text as when "
        "`prepare` began. Restore the text, or delete this folder to prepare it again."
    )
