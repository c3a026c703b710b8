"""One source on its way into its shards folder.

This process reads, hashes and writes; others tokenize batches, whose results are taken in order, so the bytes do not
depend on the number of processes. A run that was stopped, in whatever way, reads its source again from the start, but
tokenizes only what its complete shards do not hold. Memory holds 16 bytes of hash a document, about 100 as Python
stores them, to find duplicates.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Generator, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pretrain import filters
from pretrain.config import Config, SourceSection
from pretrain.console import LiveLine, format_bytes, format_duration
from pretrain.errors import DataError
from pretrain.journal import LOCK_NAME, SPLITS, Journal, Recipe, check_recipe, file_lock, read_recipe
from pretrain.near_duplicates import NearDuplicates
from pretrain.refining import open_refiner
from pretrain.row_table import RowTable, build_row_tables, table_folder
from pretrain.shard_reader import check_shards
from pretrain.shards import MANIFEST_NAME, MANIFEST_VERSION, Manifest, Shard, ShardWriter
from pretrain.source_files import files_identity, list_files, published_formats, token_format
from pretrain.sources import (
    ReadLog,
    document_digest,
    is_validation,
    read_documents,
    read_token_documents,
)
from pretrain.tokenizer import Tokenizer
from pretrain.workers import Batch, encode_batches, num_processes

RECIPE_VERSION = 1  # of the rules that turn text into shards: hash, split, order
BATCH_CHARACTERS = 1 << 18  # tokenized at once by one process: about 50 ms of work
LIVE_SECONDS, PLAIN_SECONDS = 0.2, 10.0  # between updates on a terminal, and between lines elsewhere


@dataclass(frozen=True)
class Item:
    """A document on its way.

    Attributes:
        origin: where it is from.
        digest: identifies it.
        bands: what near-duplicates have in common, if they are looked for.
        num_bytes: of its text.
        text: it, if it is to be tokenized.
        ids: it, if it is not; with bos and eos.
    """

    origin: str
    digest: bytes
    bands: bytes
    num_bytes: int
    text: str | None
    ids: np.ndarray | None


class Corpus:
    """One source and its shards folder.

    Args:
        source: the source; it has `paths`.
        config: the whole config.
        tokenizer: the config's tokenizer.
        line: where progress is shown.
    """

    def __init__(self, source: SourceSection, config: Config, tokenizer: Tokenizer, line: LiveLine) -> None:
        self.source, self.config, self.tokenizer, self.line = source, config, tokenizer, line
        self.folder = Path(source.shards)
        self.log = ReadLog()
        self.text_bytes = dict.fromkeys(SPLITS, 0)
        self.num_documents = dict.fromkeys(SPLITS, 0)
        self.chains = {split: hashlib.blake2b(digest_size=16) for split in SPLITS}  # over the digests, in order
        self.new_bytes = 0  # of text that is tokenized now
        self.begin_seconds, self.begin_position = time.monotonic(), 0  # when the first of it was read, and where
        self.shown_seconds = self.begin_seconds

    def prepare(self) -> None:
        """Make the corpus complete, or see that it is."""
        if not (self.folder / MANIFEST_NAME).exists():
            with file_lock(self.folder / LOCK_NAME, str(self.folder)):
                if not (self.folder / MANIFEST_NAME).exists():
                    manifest = self._make()
                    self._pack(manifest)
                    manifest.save(self.folder)
                    self._summarize(manifest)
                    return
        manifest = Manifest.load(self.folder)
        self._check_complete(manifest)
        new = self._add_rows(manifest)
        rest = f"added its rows of {' and '.join(map(str, new))} tokens" if new else "nothing to do"
        self.line.say(f"{self.source.name}: {self.folder} is complete; {rest}")

    def files(self) -> list[Path]:
        """What is read."""
        return list_files(self.source)

    def _add_rows(self, manifest: Manifest) -> list[int]:
        data = self.config.data
        return [seq_len for seq_len in data.seq_lens if add_rows(self.folder, manifest, seq_len, data.packing)]

    def _pack(self, manifest: Manifest) -> None:
        for seq_len in self.config.data.seq_lens:
            build_row_tables(self.folder, manifest, seq_len, self.config.data.packing)

    def _recipe(self, files: list[Path]) -> Recipe:
        """Everything that the shards' bytes depend on, under the names that an error shows."""
        data = self.config.data
        recipe: Recipe = {
            "version": RECIPE_VERSION,
            "data.sources[].name": self.source.name,
            "data.sources[].text_field": self.source.text_field,
            "data.val_fraction": data.val_fraction,
            "data.drop_duplicates": data.drop_duplicates,
            "data.shard_bytes": data.shard_bytes,
            "the tokenizer": self.tokenizer.fingerprint,
            "data.filters": filters.identity(filters.filters_of(self.source, data)),
            "what --index made": None,
        }
        if files:
            if held := token_format(files) or published_formats(files, self.source.format):
                recipe["data.sources[].format"] = held
            identity = files_identity(files)
            recipe |= {
                "the number of source files": identity["num_files"],
                "their bytes": identity["num_bytes"],
                "the hash of their names and sizes": identity["sha256"],
            }
        return recipe

    def _check_complete(self, manifest: Manifest) -> None:
        """Check that a finished corpus is still there, and is what the config describes."""
        check_shards(self.folder, manifest.train + manifest.val)
        try:
            recipe = self._recipe(self.files())
        except DataError as error:  # the raw text may be gone once its shards exist
            recipe = self._recipe([])
            self.line.say(f"{self.source.name}: cannot compare {self.folder} with its sources: {error}")
        old = read_recipe(self.folder)
        if old is None:
            old = {"data.sources[].name": manifest.corpus, "the tokenizer": manifest.tokenizer_fingerprint}
            recipe = {key: recipe[key] for key in old} | {"the hash of all settings": _hash(recipe)}
            old["the hash of all settings"] = manifest.source_fingerprint
        check_recipe(self.folder, recipe, old)

    def _make(self) -> Manifest:
        """Write all shards that are not there yet."""
        files = self.files()
        recipe = self._recipe(files)
        journal = Journal(self.folder, recipe)
        data = self.config.data
        dtype = self.tokenizer.id_dtype.name
        writers = {
            split: ShardWriter(self.folder, split, dtype, data.shard_bytes, len(journal.shards[split]))
            for split in SPLITS
        }

        def note(split: str, shard: Shard | None) -> None:
            if shard is not None:
                journal.add(split, shard, self.chains[split].hexdigest())

        try:
            with closing(self._encoded(self._batches(files, journal), files)) as encoded:
                for batch, documents in encoded:
                    for split, digest, ids in zip(batch.splits, batch.digests, documents, strict=True):
                        self.chains[split].update(digest)
                        note(split, writers[split].add(ids))
            self._check_not_empty()
            for split in SPLITS:
                note(split, writers[split].close())
        finally:
            for writer in writers.values():
                writer.abort()
        return Manifest(
            version=MANIFEST_VERSION,
            corpus=self.source.name,
            dtype=dtype,
            tokenizer_fingerprint=self.tokenizer.fingerprint,
            vocab_size=self.tokenizer.vocab_size,
            train=tuple(journal.shards["train"]),
            val=tuple(journal.shards["val"]),
            text_bytes=dict(self.text_bytes),
            counts=dict(sorted(self.log.counts.items())),
            source_fingerprint=_hash(recipe),
        )

    def _check_not_empty(self) -> None:
        if not self.num_documents["train"]:
            raise no_documents(self.source, self.log, self.num_documents["val"])

    def _encoded(
        self, batches: Iterator[Batch], files: list[Path]
    ) -> Generator[tuple[Batch, list[np.ndarray]], None, None]:
        """Batches with their documents' ids, bos and eos included."""
        if token_format(files) is None:
            yield from encode_batches(batches, self.config.tokenizer, self.tokenizer, num_processes(self.config.data))
        else:
            yield from ((batch, batch.ids) for batch in batches)

    def _documents(self, files: list[Path]) -> Iterator[Item]:
        """The source's documents."""
        data, held = self.config.data, token_format(files)
        if held is None:
            refine = open_refiner(files, self.source, data)
            policy = data.on_bad_document, data.on_bad_file, self.log, self.tokenizer.loses_u2581, refine
            for document in read_documents(files, self.source, *policy):
                content = document.text.encode()
                digest = document_digest(content)
                yield Item(document.origin, digest, document.bands, len(content), document.text, None)
            return
        token_bytes = self.tokenizer.token_bytes()
        ends = np.array([self.tokenizer.bos_id]), np.array([self.tokenizer.eos_id])
        for tokens in read_token_documents(
            files, held, self.tokenizer, data.on_bad_document, data.on_bad_file, self.log
        ):
            digest = document_digest(tokens.ids.astype("<u4").tobytes())
            ids = np.concatenate([ends[0], tokens.ids, ends[1]]).astype(self.tokenizer.id_dtype)
            yield Item(tokens.origin, digest, b"", int(token_bytes[tokens.ids].sum()), None, ids)

    def _is_new(self, item: Item, digests: set[bytes], near_duplicates: NearDuplicates) -> bool:
        """Whether no document before is equal, or nearly equal, to this one; counts it if one is."""
        if self.config.data.drop_duplicates:
            if item.digest in digests:
                self.log.skip("duplicates", f"{item.origin}: it is equal to an earlier document")
                return False
            digests.add(item.digest)
        if item.bands and not near_duplicates.is_new(item.bands):
            self.log.skip("near_duplicates", f"{item.origin}: it is nearly equal to an earlier document")
            return False
        return True

    def _batches(self, files: list[Path], journal: Journal) -> Iterator[Batch]:
        """The documents that complete shards do not hold; those that they hold are compared by their hashes."""
        data = self.config.data
        num_done = {split: sum(shard.num_documents for shard in journal.shards[split]) for split in SPLITS}
        total_bytes = sum(file.stat().st_size for file in files)
        digests: set[bytes] = set()
        near_duplicates = NearDuplicates()
        batch = Batch()
        for item in self._documents(files):
            if not self._is_new(item, digests, near_duplicates):
                continue
            digest, num_bytes = item.digest, item.num_bytes
            split = "val" if is_validation(digest, data.val_fraction) else "train"
            self.num_documents[split] += 1
            self.text_bytes[split] += num_bytes
            self._show(total_bytes)
            if self.num_documents[split] <= num_done[split]:
                self.chains[split].update(digest)
                if self.num_documents[split] == num_done[split]:
                    self._check_chain(self.chains[split].hexdigest() == journal.chains[split])
                continue
            if not self.new_bytes:
                self.begin_seconds, self.begin_position = time.monotonic(), self.log.position_bytes()
            self.new_bytes += num_bytes
            batch.splits.append(split)
            batch.digests.append(digest)
            batch.add(item.text, item.ids)
            if batch.size >= BATCH_CHARACTERS:
                yield batch
                batch = Batch()
        self._check_chain(all(self.num_documents[split] >= num_done[split] for split in SPLITS))
        if batch.size:
            yield batch

    def _check_chain(self, is_equal: bool) -> None:
        if not is_equal:
            raise DataError(
                f"{self.folder}: the source's documents are not those that its complete shards hold; expected the same "
                "text as when `prepare` began. Restore the text, or delete this folder to prepare it again."
            )

    def _show(self, total_bytes: int) -> None:
        """Show progress, if it is time to."""
        now = time.monotonic()
        if now - self.shown_seconds < (LIVE_SECONDS if self.line.is_terminal else PLAIN_SECONDS):
            return
        self.shown_seconds = now
        position = self.log.position_bytes()
        text = (
            f"{self.source.name}: {position / max(total_bytes, 1):.0%} of {format_bytes(total_bytes)}, "
            f"{sum(self.num_documents.values()):,} documents"
        )
        if self.new_bytes and position > self.begin_position and now > self.begin_seconds:
            elapsed = now - self.begin_seconds
            left = elapsed * (total_bytes - position) / (position - self.begin_position)
            text += f", {format_bytes(self.new_bytes / elapsed)}/s, {format_duration(left)} left"
        self.line.show(text, plain=True)

    def _summarize(self, manifest: Manifest) -> None:
        """Say what was made, and what was left out and why."""
        name, data = self.source.name, self.config.data
        for split in SPLITS:
            shards, num_bytes = manifest.shards(split), manifest.text_bytes[split]
            num_tokens = sum(shard.num_tokens for shard in shards)
            self.line.say(
                f"{name}: {split}: {self.num_documents[split]:,} documents, {format_bytes(num_bytes)} of text, "
                f"{num_tokens:,} tokens ({num_bytes / max(num_tokens, 1):.2f} bytes each) in {self.folder} "
                f"(shards: {len(shards)})"
            )
        for reason, example in sorted(self.log.examples.items()):
            self.line.say(f"{name}: {manifest.counts[reason]:,} {reason.replace('_', ' ')}; the first: {example}")
        if data.val_fraction and not manifest.val:
            self.line.say(
                f"warning: {name}: none of its {self.num_documents['train']:,} documents is held out "
                f"(data.val_fraction is {data.val_fraction}), so its loss cannot be evaluated. Raise that fraction, "
                "or give more documents."
            )


def add_rows(folder: Path, manifest: Manifest, seq_len: int, packing: str) -> bool:
    """Build a complete corpus's row table if it has none that can be used; a read-only folder that has one will do."""
    try:
        for split in SPLITS:
            RowTable.open(folder, manifest, split, seq_len, packing)
        return False
    except DataError:
        with file_lock(folder / LOCK_NAME, str(folder)):
            shutil.rmtree(table_folder(folder, seq_len, packing), ignore_errors=True)
            build_row_tables(folder, manifest, seq_len, packing)
        return True


def no_documents(source: SourceSection, log: ReadLog, num_val: int = 0) -> DataError:
    """The error for a source that has nothing to train on."""
    counts = "; ".join(f"{count:,} {reason.replace('_', ' ')}" for reason, count in sorted(log.counts.items()))
    first = "".join(f" First {reason.replace('_', ' ')}: {text}." for reason, text in sorted(log.examples.items()))
    held_out = f"; all of its {num_val} documents are held out by data.val_fraction" if num_val else ""
    return DataError(
        f"data.sources[{source.name}].paths: they give no document to train on ({counts}{held_out}); expected at least "
        f"one. Correct the paths or data.sources[].text_field.{first}"
    )


def _hash(recipe: Recipe) -> str:
    recipe = {key: value for key, value in recipe.items() if value is not None}
    return hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()
