"""Raw text to a tokenizer and shards of token ids: `launch/prepare.py`.

This process reads, hashes and writes; others tokenize batches, whose results are taken in order, so the bytes do not
depend on the number of processes. A run that was stopped, in whatever way, reads its sources again from the start, but
tokenizes only what its complete shards do not hold. Memory holds 16 bytes of hash a document, about 100 as Python
stores them, to find duplicates.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

from pretrain.config import Config, SourceSection
from pretrain.console import LiveLine, format_duration
from pretrain.errors import DataError
from pretrain.hf_tokenizer import check_ids
from pretrain.journal import LOCK_NAME, SPLITS, Journal, Recipe, check_recipe, file_lock, read_recipe
from pretrain.row_table import RowTable, build_row_tables
from pretrain.sentencepiece_tokenizer import SentencePieceTokenizer, choose_sample, fit, report
from pretrain.shard_reader import check_shards
from pretrain.shards import MANIFEST_NAME, MANIFEST_VERSION, Manifest, Shard, ShardWriter
from pretrain.sources import ReadLog, document_digest, files_identity, is_validation, list_files, read_documents
from pretrain.tokenizer import Tokenizer, check_round_trip, save_file
from pretrain.tokenizer_files import main_file, open_tokenizer
from pretrain.tokenizer_trial import try_out
from pretrain.varied_texts import varied_texts
from pretrain.workers import Batch, encode_batches, fit_in_process, num_usable_cores

RECIPE_VERSION = 1  # of the rules that turn text into shards: hash, split, order
READ_MULTIPLE = 10  # the tokenizer's sample is chosen from at most this many times its size
HELD_OUT_BYTES = 4_000_000  # of documents that a new tokenizer is checked on
BATCH_CHARACTERS = 1 << 18  # tokenized at once by one process: about 50 ms of work
LIVE_SECONDS, PLAIN_SECONDS = 0.2, 10.0  # between updates on a terminal, and between lines elsewhere


def prepare(config: Config) -> None:
    """Train the tokenizer if its file does not exist, then turn every source with `paths` into indexed shards.

    A source without `paths` gets its row table for `data.seq_len` only.

    Raises:
        ConfigError: the config does not fit what was prepared before, or another run is writing the same folder.
        DataError: a source gives nothing, something cannot be read, or the disk is full.
        KeyboardInterrupt: passed on; what is complete stays, and the next run goes on after it.
    """
    line = LiveLine()
    sources = config.data.sources
    try:
        if any(source.paths for source in sources):
            tokenizer = _open_tokenizer(config, line)
        for source in sources:
            if source.paths:
                _Corpus(source, config, tokenizer, line).prepare()
            else:
                _add_rows(Path(source.shards), Manifest.load(source.shards), config.data.seq_len)
                line.say(f"{source.name}: {source.shards} has rows of {config.data.seq_len} tokens")
    except OSError as error:
        raise DataError(
            f"{error.filename or 'prepare'}: {error.strerror or error}. What is complete is kept: mend this (free some "
            "space, or set the permissions) and run again."
        ) from error
    finally:
        line.end()


def _num_processes(config: Config) -> int:
    return config.data.prepare_processes or num_usable_cores()


def _open_tokenizer(config: Config, line: LiveLine) -> Tokenizer:
    """The tokenizer of the config, trained now if its file does not exist."""
    path = main_file(config.tokenizer.model)
    if not path.exists():
        with file_lock(path.with_name(f".{path.name}.lock"), str(path)):
            if not path.exists():
                _train_tokenizer(config, path, line)
    tokenizer = open_tokenizer(config.tokenizer)
    is_needed = any(source.paths and not Path(source.shards, MANIFEST_NAME).exists() for source in config.data.sources)
    if is_needed and not tokenizer.is_exact:
        for text in try_out(tokenizer, _training_texts(config, []), config.run.seed):
            line.say(f"tokenizer: {text}")
    return tokenizer


def _train_tokenizer(config: Config, path: Path, line: LiveLine) -> None:
    """Train the tokenizer, check it, and only then give it its name."""
    section = config.tokenizer
    held_out: list[str] = []
    line.say(f"tokenizer: reading a sample of {_size(section.sample_bytes)}")
    sample = choose_sample(_training_texts(config, held_out), section.sample_bytes, config.run.seed)
    begin = time.monotonic()
    line.say(f"tokenizer: training {section.vocab_size:,} pieces on {_size(sum(map(len, sample)))} of text")
    model = fit(sample, section) if _num_processes(config) == 1 else fit_in_process(sample, section)
    unchecked = path.with_name(path.name + ".unchecked")
    save_file(unchecked, model)
    tokenizer = SentencePieceTokenizer(unchecked, section.bos, section.eos)
    kind = "held-out" if held_out else "sampled"
    judged_on = held_out or [chunk.decode() for chunk in sample[:500]]
    texts = judged_on + varied_texts(500, config.run.seed, judged_on)
    for fault, different in (
        ("do not come back from their ids", check_round_trip(tokenizer, texts)),
        ("get other ids from the exported tokenizer", check_ids(tokenizer, texts)),
    ):
        if different:
            raise DataError(
                f"{unchecked}: {len(different)} of {len(texts)} texts {fault}, such as {different[0][:80]!r}; expected "
                "none. Please report this with the file."
            )
    os.replace(unchecked, path)
    line.say(
        f"tokenizer: wrote {path} after {format_duration(time.monotonic() - begin)}; {len(texts):,} "
        f"{kind} and made-up texts come back exactly, with the same ids in the export"
    )
    for text in report(tokenizer, judged_on, kind).splitlines():
        line.say(f"tokenizer: {text}")


def _training_texts(config: Config, held_out: list[str]) -> Iterator[str]:
    """Training documents of all sources, by weight where there is more than is read; some others go to `held_out`."""
    sources = [source for source in config.data.sources if source.paths]
    total_weight = sum(source.weight for source in sources)
    held_out_bytes = 0

    def by_seeded_hash(file: Path) -> bytes:
        return hashlib.sha256(f"{config.run.seed} {file.name}".encode()).digest()

    for source in sources:
        limit = READ_MULTIPLE * config.tokenizer.sample_bytes * source.weight / total_weight
        read_bytes = 0
        files = sorted(list_files(source), key=by_seeded_hash)
        log = ReadLog()
        for document in read_documents(files, source, config.data.on_bad_document, config.data.on_bad_file, log):
            data = document.text.encode()
            read_bytes += len(data)
            if not is_validation(document_digest(data), config.data.val_fraction):
                yield document.text
            elif held_out_bytes < HELD_OUT_BYTES:
                held_out.append(document.text[:100_000])
                held_out_bytes += len(data)
            if read_bytes >= limit:
                break
        if not log.counts["documents_read"]:
            raise _no_documents(source, log)


class _Corpus:
    """One source on its way into its shards folder."""

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
        seq_len = self.config.data.seq_len
        if not (self.folder / MANIFEST_NAME).exists():
            with file_lock(self.folder / LOCK_NAME, str(self.folder)):
                if not (self.folder / MANIFEST_NAME).exists():
                    manifest = self._make()
                    build_row_tables(self.folder, manifest, seq_len)
                    manifest.save(self.folder)
                    self._summarize(manifest)
                    return
        manifest = Manifest.load(self.folder)
        self._check_complete(manifest)
        is_new = _add_rows(self.folder, manifest, seq_len)
        rest = f"added its rows of {seq_len} tokens" if is_new else "nothing to do"
        self.line.say(f"{self.source.name}: {self.folder} is complete; {rest}")

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
        }
        if files:
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
            recipe = self._recipe(list_files(self.source))
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
        files = list_files(self.source)
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

        batches = self._batches(files, journal)
        section = self.config.tokenizer
        try:
            with closing(encode_batches(batches, section, self.tokenizer, _num_processes(self.config))) as encoded:
                for batch, documents in encoded:
                    for split, digest, ids in zip(batch.splits, batch.digests, documents, strict=True):
                        self.chains[split].update(digest)
                        note(split, writers[split].add(ids))
            if not self.num_documents["train"]:
                raise _no_documents(self.source, self.log, self.num_documents["val"])
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

    def _batches(self, files: list[Path], journal: Journal) -> Iterator[Batch]:
        """The documents that complete shards do not hold; those that they hold are compared by their hashes."""
        data = self.config.data
        num_done = {split: sum(shard.num_documents for shard in journal.shards[split]) for split in SPLITS}
        total_bytes = sum(file.stat().st_size for file in files)
        digests: set[bytes] = set()
        batch, num_characters = Batch(), 0
        policy = data.on_bad_document, data.on_bad_file, self.log, self.tokenizer.loses_u2581
        for document in read_documents(files, self.source, *policy):
            content = document.text.encode()
            digest = document_digest(content)
            if data.drop_duplicates:
                if digest in digests:
                    self.log.skip("duplicates", f"{document.origin}: it is equal to an earlier document")
                    continue
                digests.add(digest)
            split = "val" if is_validation(digest, data.val_fraction) else "train"
            self.num_documents[split] += 1
            self.text_bytes[split] += len(content)
            self._show(total_bytes)
            if self.num_documents[split] <= num_done[split]:
                self.chains[split].update(digest)
                if self.num_documents[split] == num_done[split]:
                    self._check_chain(self.chains[split].hexdigest() == journal.chains[split])
                continue
            if not self.new_bytes:
                self.begin_seconds, self.begin_position = time.monotonic(), self.log.position_bytes()
            self.new_bytes += len(content)
            batch.splits.append(split)
            batch.digests.append(digest)
            batch.texts.append(document.text)
            num_characters += len(document.text)
            if num_characters >= BATCH_CHARACTERS:
                yield batch
                batch, num_characters = Batch(), 0
        self._check_chain(all(self.num_documents[split] >= num_done[split] for split in SPLITS))
        if batch.texts:
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
            f"{self.source.name}: {position / max(total_bytes, 1):.0%} of {_size(total_bytes)}, "
            f"{sum(self.num_documents.values()):,} documents"
        )
        if self.new_bytes and position > self.begin_position and now > self.begin_seconds:
            elapsed = now - self.begin_seconds
            left = elapsed * (total_bytes - position) / (position - self.begin_position)
            text += f", {_size(self.new_bytes / elapsed)}/s, {format_duration(left)} left"
        self.line.show(text, plain=True)

    def _summarize(self, manifest: Manifest) -> None:
        """Say what was made, and what was left out and why."""
        name, data = self.source.name, self.config.data
        for split in SPLITS:
            shards, num_bytes = manifest.shards(split), manifest.text_bytes[split]
            num_tokens = sum(shard.num_tokens for shard in shards)
            self.line.say(
                f"{name}: {split}: {self.num_documents[split]:,} documents, {_size(num_bytes)} of text, {num_tokens:,} "
                f"tokens ({num_bytes / max(num_tokens, 1):.2f} bytes each) in {self.folder} (shards: {len(shards)})"
            )
        for reason, example in sorted(self.log.examples.items()):
            self.line.say(f"{name}: {manifest.counts[reason]:,} {reason.replace('_', ' ')}; the first: {example}")
        if data.val_fraction and not manifest.val:
            self.line.say(
                f"warning: {name}: none of its {self.num_documents['train']:,} documents is held out "
                f"(data.val_fraction is {data.val_fraction}), so its loss cannot be evaluated. Raise that fraction, "
                "or give more documents."
            )


def _add_rows(folder: Path, manifest: Manifest, seq_len: int) -> bool:
    """Build a complete corpus's row table if it has none that can be used; a read-only folder that has one will do."""
    try:
        for split in SPLITS:
            RowTable.open(folder, manifest, split, seq_len)
        return False
    except DataError:
        with file_lock(folder / LOCK_NAME, str(folder)):
            shutil.rmtree(folder / f"rows-{seq_len}", ignore_errors=True)
            build_row_tables(folder, manifest, seq_len)
        return True


def _no_documents(source: SourceSection, log: ReadLog, num_val: int = 0) -> DataError:
    """The error for a source that has nothing to train on."""
    counts = "; ".join(f"{count:,} {reason.replace('_', ' ')}" for reason, count in sorted(log.counts.items()))
    first = "".join(f" First {reason.replace('_', ' ')}: {text}." for reason, text in sorted(log.examples.items()))
    held_out = f"; all of its {num_val} documents are held out by data.val_fraction" if num_val else ""
    return DataError(
        f"data.sources[{source.name}].paths: they give no document to train on ({counts}{held_out}); expected at least "
        f"one. Correct the paths or data.sources[].text_field.{first}"
    )


def _hash(recipe: Recipe) -> str:
    return hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()


def _size(num_bytes: float) -> str:
    for limit, unit in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if num_bytes >= limit:
            return f"{num_bytes / limit:.1f} {unit}"
    return f"{num_bytes:.0f} B"
