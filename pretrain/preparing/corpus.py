"""The second pass of `prepare`: the documents of a source's shares, in the order of their hashes, into its shards.

Equal documents lie beside each other there, so that finding them takes no memory. Documents are read in buckets, and a
run that was stopped, in whatever way, goes on after its complete shards.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from pretrain.console import LiveLine, counted, format_bytes
from pretrain.data.examples import context_bit, example_dtype
from pretrain.data.row_table import RowTable, build_row_tables, table_folder
from pretrain.data.shard_reader import check_shards
from pretrain.data.shards import EXAMPLES_VERSION, MANIFEST_NAME, MANIFEST_VERSION, Manifest, Shard, ShardWriter
from pretrain.data.source_files import list_files
from pretrain.errors import DataError
from pretrain.options.config import Config, DataSection, SourceSection
from pretrain.options.phases import val_fraction_of
from pretrain.preparing.filters import REASONS
from pretrain.preparing.journal import (
    LOCK_NAME,
    ORDER_KEY,
    SPLITS,
    Journal,
    Recipe,
    check_recipe,
    file_lock,
    read_recipe,
)
from pretrain.preparing.near_duplicates import NearDuplicates
from pretrain.preparing.shares import LIVE_SECONDS, PLAIN_SECONDS, SHARE_FOLDERS, Share, other_documents, recipe_of
from pretrain.preparing.sources import ReadLog, validation_limit
from pretrain.preparing.spills import Bucket, read_buckets, spill_size
from pretrain.tokenizers.tokenizer import Tokenizer


class Corpus:
    """One source and its shards folder.

    Args:
        source: the source; it has `paths`.
        config: the whole config.
        tokenizer: the config's tokenizer.
        line: where progress is shown.
        num_shares: merge so many shares, which are there; 0 makes the one share that is the whole source, too.
    """

    def __init__(
        self, source: SourceSection, config: Config, tokenizer: Tokenizer, line: LiveLine, num_shares: int = 0
    ) -> None:
        self.source, self.config, self.tokenizer, self.line = source, config, tokenizer, line
        self.folder = Path(source.shards)
        self.shares = [
            Share(source, config, tokenizer, line, number, num_shares or 1)
            for number in range(1, (num_shares or 1) + 1)
        ]
        self.makes_shares = num_shares == 0
        self.log = ReadLog()
        self.text_bytes = dict.fromkeys(SPLITS, 0)
        self.num_documents = dict.fromkeys(SPLITS, 0)
        self._near_duplicates = NearDuplicates()
        self._num_seen = 0  # documents, duplicates too
        self._shown_seconds = time.monotonic()

    def prepare(self) -> None:
        """Make the corpus complete, or see that it is."""
        data = self.config.data
        made = make_once(self.folder, data, self._make, self._remove_shares)
        if made is not None:
            self._summarize(made)
            return
        manifest = Manifest.load(self.folder)
        self.check_complete(manifest)
        if any(self.folder.glob(SHARE_FOLDERS)):  # it was stopped while it deleted them
            with file_lock(self.folder / LOCK_NAME, str(self.folder)):
                self._remove_shares()
        new = [seq_len for seq_len in data.seq_lens if add_rows(self.folder, manifest, seq_len, data.packing)]
        rest = f"added its rows of {' and '.join(map(str, new))} tokens" if new else "nothing to do"
        self.line.say(f"{self.source.name}: {self.folder} is complete; {rest}")

    def _remove_shares(self) -> None:
        """Delete all shares, those too that were given up: nothing needs them once there is a manifest."""
        for folder in self.folder.glob(SHARE_FOLDERS):
            shutil.rmtree(folder)

    def _recipe(self, files: Sequence[Path]) -> Recipe:
        return recipe_of(files, self.source, self.config.data, self.tokenizer)

    def check_complete(self, manifest: Manifest) -> None:
        """Check that a finished corpus is still there, and is what the config describes.

        One from before documents were shuffled is what it is: its order is good enough to train on, and said.

        Raises:
            ConfigError: it was prepared otherwise.
            DataError: something of it is missing.
        """
        check_shards(self.folder, manifest.train + manifest.val)
        try:
            recipe = self._recipe(list_files(self.source))
        except DataError as error:  # the raw text may be gone once its shards exist
            recipe = self._recipe([])
            self.line.say(f"{self.source.name}: cannot compare {self.folder} with its sources: {error}")
        former = recipe | {ORDER_KEY: None}
        old = read_recipe(self.folder)
        is_former = old is not None and ORDER_KEY not in old
        if old is None:
            is_former = manifest.source_fingerprint == _hash(former)
            old = {"data.sources[].name": manifest.corpus, "the tokenizer": manifest.tokenizer_fingerprint}
            recipe = {key: recipe[key] for key in old} | {
                "the hash of all settings": _hash(former if is_former else recipe)
            }
            old["the hash of all settings"] = manifest.source_fingerprint
        elif is_former:
            del recipe[ORDER_KEY]
        check_recipe(self.folder, recipe, old)
        if is_former:
            self.line.say(
                f"{self.source.name}: {self.folder} is of a version that kept documents in the order of the files; "
                "prepare it into another `shards` folder to have them shuffled"
            )

    def _make(self) -> Manifest:
        """Write all shards that are not there yet."""
        files = list_files(self.source)
        recipe, data = self._recipe(files), self.config.data
        journal = Journal(self.folder, recipe)
        if self.makes_shares:
            self.shares[0].prepare()
        results = [share.result(files) for share in self.shares]
        for result in results:
            self.log.add_all(result.counts, result.examples)
        documents = f"{sum(result.documents for result in results):x}"
        if journal.documents not in ("", documents):
            raise other_documents(self.folder, "shards")
        dtype = id_dtype_of(self.source, self.tokenizer)
        spills = [
            (share.folder, spill) for share, result in zip(self.shares, results, strict=True) for spill in result.spills
        ]
        max_bytes = spill_size(data.shard_bytes, sum(file.stat().st_size for file in files))
        num_spilled = sum(spill.num_documents for _, spill in spills)
        writers = {
            split: ShardWriter(self.folder, split, dtype.name, data.shard_bytes, len(journal.shards[split]))
            for split in SPLITS
        }

        def note(split: str, shard: Shard | None) -> None:
            if shard is not None:
                journal.add(split, shard, documents)

        num_done = {split: sum(shard.num_documents for shard in journal.shards[split]) for split in SPLITS}
        try:
            for bucket in read_buckets(spills, dtype, max_bytes):
                places, is_val = self._choose(bucket, num_done)
                for place, goes_to_val in zip(places.tolist(), is_val.tolist(), strict=True):
                    split = SPLITS[goes_to_val]
                    note(split, writers[split].add(bucket.ids(place)))
                self._num_seen += len(bucket.table)
                self._show(num_spilled)
            is_all_held_out = val_fraction_of(self.source, data) == 1
            if not self.num_documents["val" if is_all_held_out else "train"]:
                raise self._no_documents()
            for split in SPLITS:
                note(split, writers[split].close())
        finally:
            for writer in writers.values():
                writer.abort()
        return self._manifest(journal, recipe)

    def _choose(self, bucket: Bucket, num_done: dict[str, int]) -> tuple[np.ndarray, np.ndarray]:
        """Decide about duplicates and splits, and count.

        Args:
            bucket: the documents.
            num_done: documents in complete shards, by split.

        Returns:
            Places in the bucket of the documents that are to be written, in their order, and which are held out.
        """
        places, copies = bucket.in_order(self.config.data.drop_duplicates)
        if len(copies):
            origin = "" if "duplicates" in self.log.examples else bucket.origin(int(copies[0]))
            self.log.skip("duplicates", f"{origin}: it is equal to another document", len(copies))
        if bucket.table["bands_bytes"].any():
            places = places[[self._is_new(bucket, place) for place in places.tolist()]]
        if self.source.examples is not None:
            places = self._of_a_row(bucket, places)
        chosen = bucket.table[places]
        is_val = chosen["head"] < np.uint64(validation_limit(val_fraction_of(self.source, self.config.data)))
        is_left = np.ones(len(places), bool)
        for number, split in enumerate(SPLITS):
            of_split = np.flatnonzero(is_val == bool(number))
            is_left[of_split[: max(num_done[split] - self.num_documents[split], 0)]] = False
            self.num_documents[split] += len(of_split)
            self.text_bytes[split] += int(chosen["text_bytes"][of_split].sum(dtype=np.uint64))
        return places[is_left], is_val[is_left]

    def _of_a_row(self, bucket: Bucket, places: np.ndarray) -> np.ndarray:
        """The places of examples that fit a row: part of one would be an answer to nothing, or one without its end."""
        most = self.config.data.seq_lens[0]
        fits = bucket.table["num_tokens"][places] <= most + 1  # the last token is only a target
        if len(long := places[~fits]):
            origin = "" if "skipped_longer_than_a_row" in self.log.examples else bucket.origin(int(long[0]))
            message = f"{origin}: it has {bucket.table['num_tokens'][long[0]] - 1} tokens, and a row {most}"
            self.log.skip("skipped_longer_than_a_row", message, len(long))
        return places[fits]

    def _is_new(self, bucket: Bucket, place: int) -> bool:
        """Whether no document before is nearly equal to this one; counts it if one is."""
        bands = bucket.bands(place)
        if bands and not self._near_duplicates.is_new(bands):
            self.log.skip("near_duplicates", f"{bucket.origin(place)}: it is nearly equal to another document")
            return False
        return True

    def _no_documents(self) -> DataError:
        """The error for nothing to train on; what was read of it is of no use, and in the way of other settings."""
        if self.makes_shares:
            shutil.rmtree(self.shares[0].folder)
        return no_documents(self.source, self.log, self.num_documents["val"])

    def _manifest(self, journal: Journal, recipe: Recipe) -> Manifest:
        return Manifest(
            version=MANIFEST_VERSION if self.source.examples is None else EXAMPLES_VERSION,
            corpus=self.source.name,
            dtype=id_dtype_of(self.source, self.tokenizer).name,
            tokenizer_fingerprint=self.tokenizer.fingerprint,
            vocab_size=self.tokenizer.vocab_size,
            train=tuple(journal.shards["train"]),
            val=tuple(journal.shards["val"]),
            text_bytes=dict(self.text_bytes),
            counts=dict(sorted(self.log.counts.items())),
            source_fingerprint=_hash(recipe),
            context_bit=None if self.source.examples is None else context_bit(self.tokenizer),
        )

    def _show(self, num_documents: int) -> None:
        """Show progress, if it is time to."""
        now = time.monotonic()
        if now - self._shown_seconds >= (LIVE_SECONDS if self.line.is_terminal else PLAIN_SECONDS):
            self._shown_seconds = now
            done = self._num_seen / max(num_documents, 1)
            self.line.show(
                f"{self.source.name}: shards: {done:.0%} of {counted(num_documents, 'document')}", plain=True
            )

    def _summarize(self, manifest: Manifest) -> None:
        """Say what was made, and what was left out and why."""
        name, data = self.source.name, self.config.data
        for split in SPLITS:
            shards, num_bytes = manifest.shards(split), manifest.text_bytes[split]
            num_tokens = sum(shard.num_tokens for shard in shards)
            self.line.say(
                f"{name}: {split}: {counted(self.num_documents[split], 'document')}, {format_bytes(num_bytes)} of "
                f"text, {num_tokens:,} tokens ({num_bytes / max(num_tokens, 1):.2f} bytes each) in {self.folder} "
                f"(shards: {len(shards)})"
            )
        for reason, example in sorted(self.log.examples.items()):
            self.line.say(f"{name}: {manifest.counts[reason]:,} {reason.replace('_', ' ')}; the first: {example}")
        if (fraction := val_fraction_of(self.source, data)) and not manifest.val:
            self.line.say(
                f"warning: {name}: none of its {self.num_documents['train']:,} documents is held out "
                f"(data.val_fraction is {fraction}), so its loss cannot be evaluated. Raise that fraction, "
                "or give more documents, and set another `shards` folder."
            )


def id_dtype_of(source: SourceSection, tokenizer: Tokenizer) -> np.dtype:
    """Of the ids in a source's shards, little-endian."""
    return tokenizer.id_dtype if source.examples is None else example_dtype(tokenizer)


def make_once(
    folder: Path, data: DataSection, make: Callable[[], Manifest], clean_up: Callable[[], None]
) -> Manifest | None:
    """Make a corpus with its rows if it is not complete, by one process at a time.

    Args:
        folder: of the corpus; its manifest is written last.
        data: names the lengths of rows.
        make: makes all but rows and manifest.
        clean_up: removes what nothing needs once there is a manifest.

    Returns:
        The manifest; None if it was there.
    """
    if (folder / MANIFEST_NAME).exists():
        return None
    with file_lock(folder / LOCK_NAME, str(folder)):
        if (folder / MANIFEST_NAME).exists():  # another process made it meanwhile
            return None
        manifest = make()
        for seq_len in data.seq_lens:
            build_row_tables(folder, manifest, seq_len, data.packing)
        manifest.save(folder)
        clean_up()
        return manifest


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
        f"one. {advice_for_none(source.name, log.counts)}{first}"
    )


def advice_for_none(name: str, counts: Mapping[str, int]) -> str:
    """The sentence that says what to correct where a source gives no document, by what was skipped."""
    dropped = [reason.replace("_", " ") for reason in REASONS if counts.get(f"skipped_{reason}")]
    correct = f"Correct data.sources[{name}].paths, or the fields that it names (text_field, examples)."
    if not dropped:
        return correct
    is_all = counts.get("documents_read") == sum(counts.get(f"skipped_{reason}", 0) for reason in REASONS)
    relax = f"Relax data.filters ({', '.join(dropped)}), or set filter: false for this source."
    return relax if is_all else f"{relax} {correct}"


def _hash(recipe: Recipe) -> str:
    recipe = {key: value for key, value in recipe.items() if value is not None}
    return hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()
