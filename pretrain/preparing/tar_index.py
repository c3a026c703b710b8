"""Tars that others made become a corpus as they are, where they are: `launch/prepare.py --index`.

The first pass reads each tar, tokenizes its documents and notes what an index needs; a run that was stopped, in
whatever way, goes on after the tars that are noted. The second pass knows all documents: it drops duplicates, writes
the indexes, and copies held-out documents, as ids, into shards of their own: an evaluation need not read all tars.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import asdict
from functools import partial
from pathlib import Path

import numpy as np

from pretrain.console import LiveLine, counted, format_bytes, format_duration
from pretrain.data.shard_reader import check_shards
from pretrain.data.shards import JOURNAL_NAME, MANIFEST_NAME, MANIFEST_VERSION, Manifest, Shard, ShardWriter, index_path
from pretrain.data.source_files import files_identity
from pretrain.data.text_index import INDEX_KEY, select_documents, text_index_bytes
from pretrain.data.text_shards import PIECE_CHARACTERS, content_of
from pretrain.errors import ConfigError, DataError
from pretrain.options.config import Config, SourceSection
from pretrain.options.phases import val_fraction_of
from pretrain.preparing import filters
from pretrain.preparing.corpus import add_rows, make_once, no_documents
from pretrain.preparing.journal import (
    SPLITS,
    Recipe,
    append_line,
    check_recipe,
    read_lines,
    read_recipe,
    write_lines,
)
from pretrain.preparing.near_duplicates import NearDuplicates
from pretrain.preparing.sources import ReadLog, validation_limit
from pretrain.preparing.tar_documents import TarDocuments, TarNote, first_of_equals, measure_tars
from pretrain.preparing.tar_folder import VAL_FILE, VAL_NAME, link_tars, list_originals, name_tars, tars_of
from pretrain.storage.whole_file import write_atomically
from pretrain.tokenizers.tokenizer import Tokenizer

RECIPE_VERSION = 1  # of the rules that make an index of tars
_SHOWN_SECONDS = 0.2, 10.0  # between updates on a terminal, and between lines elsewhere
_WORTH_SAYING = 1.2  # tokens that training tokenizes for one that it uses


class TarIndex:
    """A source of tars, and the folder that makes a corpus of them.

    Args:
        source: the source.
        config: the whole config.
        tokenizer: the config's tokenizer.
        line: where progress is shown.
    """

    def __init__(self, source: SourceSection, config: Config, tokenizer: Tokenizer, line: LiveLine) -> None:
        self.source, self.config, self.tokenizer, self.line = source, config, tokenizer, line
        self.folder = Path(source.shards)
        self.log = ReadLog()
        self.num_documents = dict.fromkeys(SPLITS, 0)
        self.text_bytes = dict.fromkeys(SPLITS, 0)
        self._near_duplicates = NearDuplicates()
        self._num_tokenized = 0  # tokens that an epoch tokenizes, for the rows of `data.seq_len`
        self._begin_seconds = self._shown_seconds = time.monotonic()

    def prepare(self) -> None:
        """Make the corpus complete, or see that it is.

        Raises:
            ConfigError: the folder, the tars or the filters do not allow it.
            DataError: the tars hold nothing to train on, or cannot be read.
        """
        data = self.config.data
        made = make_once(self.folder, data, self._make, self._remove_notes)
        if made is not None:
            self._summarize(made)
            return
        manifest = Manifest.load(self.folder)
        self.check_complete(manifest)
        self._remove_notes()
        new = [seq_len for seq_len in data.seq_lens if add_rows(self.folder, manifest, seq_len, data.packing)]
        rest = f"added its rows of {' and '.join(map(str, new))} tokens" if new else "nothing to do"
        self.line.say(f"{self.source.name}: the index in {self.folder} is complete; {rest}")

    def _recipe(self, files: Sequence[Path]) -> Recipe:
        """Everything that the index depends on, under the names that an error shows."""
        data = self.config.data
        recipe: Recipe = {
            INDEX_KEY: f"an index of tars, version {RECIPE_VERSION}",
            "data.sources[].name": self.source.name,
            "data.sources[].text_field": self.source.text_field,
            "data.val_fraction": val_fraction_of(self.source, data),
            "data.drop_duplicates": data.drop_duplicates,
            "data.shard_bytes": data.shard_bytes,
            "the tokenizer": self.tokenizer.fingerprint,
            "data.filters": filters.identity(filters.filters_of(self.source, data)),
        }
        if files:
            recipe |= files_identity(files)
        return recipe

    def check_complete(self, manifest: Manifest) -> None:
        """Check that a finished index and its tars are still there, and what the config describes.

        Raises:
            ConfigError: it was made otherwise.
            DataError: something of it is missing.
        """
        check_shards(self.folder, manifest.train + manifest.val)
        try:
            recipe = self._recipe(list_originals(self.source))
        except DataError as error:  # the paths may be gone where the tars themselves lie in the folder
            recipe = self._recipe([])
            self.line.say(f"{self.source.name}: cannot compare {self.folder} with its sources: {error}")
        old = read_recipe(self.folder)
        if old is None:
            old = {"data.sources[].name": manifest.corpus, "the tokenizer": manifest.tokenizer_fingerprint}
            recipe = {key: recipe[key] for key in old} | {"the hash of all settings": _hash(recipe)}
            old["the hash of all settings"] = manifest.source_fingerprint
        check_recipe(self.folder, recipe, old, holds_tars=True)

    def _make(self) -> Manifest:
        self._check_filters()
        files = tars_of(self.source)
        recipe = self._recipe(files)
        self.folder.mkdir(parents=True, exist_ok=True)
        names = name_tars(self.source, files)
        notes = self._restore(recipe, names)
        try:
            link_tars(self.source, names, files)
        except ConfigError:
            if not notes:
                (self.folder / JOURNAL_NAME).unlink()
            raise
        total = sum(file.stat().st_size for file in files)
        done = sum(note.num_bytes for note in notes)
        left = list(zip(names, files, strict=True))[len(notes) :]
        show = partial(self._show, done, total)
        with closing(measure_tars(left, self.source, self.config, self.tokenizer, show)) as measured:
            for note, documents in measured:
                documents.save(self._notes_path(note.name))
                append_line(self.folder / JOURNAL_NAME, {"tar": asdict(note)})
                notes.append(note)
        return self._finish(notes, recipe)

    def _check_filters(self) -> None:
        section = filters.filters_of(self.source, self.config.data)
        for name in ("secrets", "personal_data"):
            if getattr(section, name) == "mask":
                raise ConfigError(
                    f"data.filters.{name} is mask; expected keep or drop, because the tars of "
                    f"{self.source.name} are read as they are. Drop such documents, set filter: false for this source, "
                    "or run without --index, which writes shards of ids."
                )

    def _restore(self, recipe: Recipe, names: Sequence[str]) -> list[TarNote]:
        """The tars that an interrupted run has noted, up to the first of which something is missing."""
        path = self.folder / JOURNAL_NAME
        old = read_lines(path)
        if len(old) > 1:
            check_recipe(self.folder, recipe, old[0]["recipe"], holds_tars=True)
        elif not old and (self.folder / index_path(Path(), names[0]).name).exists():
            raise ConfigError(
                f"{self.folder} holds {index_path(Path(), names[0]).name}, but neither {MANIFEST_NAME} nor "
                f"{JOURNAL_NAME}; expected a folder that `prepare` has not begun, or its journal. Set another `shards` "
                "folder, or delete that file."
            )
        notes = []
        for name, entry in zip(names, old[1:], strict=False):
            if "tar" not in entry or entry["tar"]["name"] != name or not self._notes_path(name).is_file():
                break
            notes.append(TarNote(**entry["tar"]))
        write_lines(path, [{"recipe": recipe}, *({"tar": asdict(note)} for note in notes)])
        return notes

    def _notes_path(self, name: str) -> Path:
        return self.folder / f".{name}.documents"

    def _remove_notes(self) -> None:
        """Delete what only a run that goes on needs."""
        for path in self.folder.glob(".*.documents*"):
            path.unlink()

    def _finish(self, notes: Sequence[TarNote], recipe: Recipe) -> Manifest:
        """The second pass: write the indexes and the held-out documents."""
        for note in notes:
            self.log.counts += Counter(note.counts)
            self.log.examples = note.examples | self.log.examples
        for path in self.folder.iterdir():  # of a second pass that was stopped
            if VAL_FILE.fullmatch(path.name):
                path.unlink()
        writer = ShardWriter(self.folder, VAL_NAME, self.tokenizer.id_dtype.name, self.config.data.shard_bytes)
        train: list[Shard] = []
        val: list[Shard | None] = []
        try:
            paths = [self._notes_path(note.name) for note in notes]
            for note, path, is_first in zip(notes, paths, first_of_equals(paths), strict=True):
                documents = TarDocuments.load(path)
                is_kept = self._choose(note, documents, is_first)
                is_val = documents.table["head"] < np.uint64(
                    validation_limit(val_fraction_of(self.source, self.config.data))
                )
                self._count(documents.table, is_kept, is_val)
                train += self._write_index(note, documents, is_kept & ~is_val)
                val += [writer.add(ids) for ids in _held_out(documents, is_kept, is_val)]
            val.append(writer.close())
        finally:
            writer.abort()
        if not train:
            raise no_documents(self.source, self.log, self.num_documents["val"])
        return Manifest(
            version=MANIFEST_VERSION,
            corpus=self.source.name,
            dtype=self.tokenizer.id_dtype.name,
            tokenizer_fingerprint=self.tokenizer.fingerprint,
            vocab_size=self.tokenizer.vocab_size,
            train=tuple(train),
            val=tuple(shard for shard in val if shard is not None),
            text_bytes=dict(self.text_bytes),
            counts=dict(sorted(self.log.counts.items())),
            source_fingerprint=_hash(recipe),
            text=content_of(self.source.text_field, self.tokenizer),
        )

    def _choose(self, note: TarNote, documents: TarDocuments, is_first: np.ndarray) -> np.ndarray:
        """Which documents of a tar are kept; counts the duplicates."""
        is_kept = is_first if self.config.data.drop_duplicates else np.ones(len(is_first), bool)
        offsets = documents.table["offset"]
        for document in np.flatnonzero(~is_kept).tolist():
            self.log.skip("duplicates", f"{self._where(note, offsets[document])}: it is equal to an earlier document")
        ends = np.cumsum(documents.table["bands_bytes"], dtype=np.int64)
        for document in np.flatnonzero(is_kept & (documents.table["bands_bytes"] > 0)).tolist():
            bands = documents.bands[ends[document] - documents.table["bands_bytes"][document] : ends[document]]
            if not self._near_duplicates.is_new(bands.tobytes()):
                is_kept[document] = False
                where = self._where(note, offsets[document])
                self.log.skip("near_duplicates", f"{where}: it is nearly equal to an earlier document")
        return is_kept

    def _where(self, note: TarNote, offset: int) -> str:
        return f"{self.folder / note.name}.tar: the document at byte {offset:,}"

    def _count(self, table: np.ndarray, is_kept: np.ndarray, is_val: np.ndarray) -> None:
        for split, is_chosen in (("train", is_kept & ~is_val), ("val", is_kept & is_val)):
            self.num_documents[split] += int(np.count_nonzero(is_chosen))
            self.text_bytes[split] += int(table["text_bytes"][is_chosen].sum(dtype=np.uint64))

    def _write_index(self, note: TarNote, documents: TarDocuments, is_chosen: np.ndarray) -> list[Shard]:
        """Write the index of a tar, unless nothing of it is trained on."""
        if not is_chosen.any():
            return []
        index, pieces = select_documents(documents.table, documents.pieces, is_chosen)
        content = text_index_bytes(index, pieces)
        write_atomically(index_path(self.folder, note.name), content)
        num_tokens = index["num_tokens"].astype(np.int64)
        is_cut = np.diff(np.append(index["first_piece"], len(pieces))) > 1
        num_rows = np.where(is_cut, 1, -(-(num_tokens - 1) // self.config.data.seq_len))
        self._num_tokenized += int((num_tokens * num_rows).sum())
        return [Shard(note.name, note.num_bytes, len(index), int(num_tokens.sum()), note.sha256,
                      hashlib.sha256(content).hexdigest())]  # fmt: skip

    def _show(self, done: int, total: int, position: int) -> None:
        """Show progress, if it is time to; `done` bytes were read by a run before this one."""
        now = time.monotonic()
        if now - self._shown_seconds < _SHOWN_SECONDS[not self.line.is_terminal]:
            return
        self._shown_seconds = now
        speed = position / (now - self._begin_seconds)
        left = format_duration((total - done - position) / speed) if speed else "?"
        text = f"{(done + position) / max(total, 1):.0%} of {format_bytes(total)}, {format_bytes(speed)}/s, {left} left"
        self.line.show(f"{self.source.name}: {text}", plain=True)

    def _summarize(self, manifest: Manifest) -> None:
        """Say what was made, and what was left out and why."""
        name = self.source.name
        num_tokens = {split: sum(shard.num_tokens for shard in manifest.shards(split)) for split in SPLITS}
        for split, what in (("train", "tars"), ("val", "shards of ids")):
            self.line.say(
                f"{name}: {split}: {counted(self.num_documents[split], 'document')}, "
                f"{format_bytes(self.text_bytes[split])} of text, "
                f"{num_tokens[split]:,} tokens in {self.folder} ({what}: {len(manifest.shards(split))})"
            )
        for reason, example in sorted(self.log.examples.items()):
            self.line.say(f"{name}: {manifest.counts[reason]:,} {reason.replace('_', ' ')}; the first: {example}")
        if (fraction := val_fraction_of(self.source, self.config.data)) and not manifest.val:
            self.line.say(
                f"warning: {name}: none of its {self.num_documents['train']:,} documents is held out "
                f"(data.val_fraction is {fraction}), so its loss cannot be evaluated. Raise that fraction, "
                "or give more documents, and set another `shards` folder."
            )
        ratio = self._num_tokenized / max(num_tokens["train"], 1)
        if ratio > _WORTH_SAYING:
            self.line.say(
                f"warning: {name}: training will tokenize {ratio:.1f} tokens for each one that it uses: documents that "
                f"are longer than data.seq_len ({self.config.data.seq_len}) and of one piece (shorter than "
                f"{PIECE_CHARACTERS:,} characters, or without a place where this tokenizer can begin) are tokenized "
                "as a whole for each row that has a part of them. Where that is too slow, run without --index into "
                "another folder."
            )


def _held_out(documents: TarDocuments, is_kept: np.ndarray, is_val: np.ndarray) -> Iterator[np.ndarray]:
    """The ids of a tar's held-out documents that are kept."""
    ends = np.cumsum(documents.table["num_tokens"][is_val], dtype=np.int64)
    for end, length, kept in zip(ends, documents.table["num_tokens"][is_val], is_kept[is_val], strict=True):
        if kept:
            yield documents.ids[end - length : end]


def _hash(recipe: Recipe) -> str:
    return hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()
