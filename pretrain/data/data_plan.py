"""The rows of a run: a pure function of the plan and the row number.

`DataPlan.locate(t)` says which row of which corpus is row t of the run. It depends on the corpora's row
counts, their names and shares, the phases and the seed; not on ranks, workers, restarts or the run's length, and row
10^8 costs what row 0 costs. A run's position in its data is therefore one integer.
"""

from __future__ import annotations

import hashlib
import json
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from pretrain.data import augment
from pretrain.data.mixture import Mixture, Part
from pretrain.data.packing import PACKING_VERSIONS
from pretrain.data.remote_corpus import RemoteCorpus, min_cache_bytes, open_remote
from pretrain.data.row_order import MIXTURE_PERIOD, ORDER_VERSION, CorpusOrder
from pretrain.data.row_table import RowTable
from pretrain.data.shard_reader import ShardReader, check_shards
from pretrain.data.shards import PREPARE_COMMAND, Manifest, Shard
from pretrain.data.text_shards import text_opener
from pretrain.errors import ConfigError, DataError
from pretrain.options.config import Config
from pretrain.options.phases import Phase, phases_of
from pretrain.tokenizers.tokenizer import Tokenizer
from pretrain.tokenizers.tokenizer_files import open_tokenizer

_PHASES, _FROM_ROW = "data.phases", "its first row"  # names among a plan's pieces
Pieces = dict[str, Any]


class DataPlan:
    """Which row of which corpus comes at each place of a run.

    Attributes:
        names: Names of the corpora.
        pieces: What the order depends on, by name; JSON.
        hash: sha256 of `pieces`.
    """

    def __init__(self, mixtures: Sequence[Mixture], seed: int, window_shards: int) -> None:
        """Build the mixture tables; permutations are made when they are needed.

        Args:
            mixtures: What the rows are of, the first from row 0 on, each up to the next one's first row.
            seed: Seed of the order.
            window_shards: Blocks whose rows are shuffled together.

        Raises:
            ConfigError: Two corpora have one name, or a share is too small for the mixture table.
            DataError: A corpus has no rows.
        """
        self.names = list(dict.fromkeys(name for mixture in mixtures for name, _, _ in mixture.corpora))
        orders: dict[tuple[str, int], CorpusOrder] = {}
        self._parts: list[Part] = []
        for mixture in mixtures:
            names = [name for name, _, _ in mixture.corpora]
            for name, rows, _ in mixture.corpora:
                if names.count(name) > 1:
                    raise ConfigError(f"data.sources: name is {name} twice; expected distinct names. Rename one.")
                order = orders.setdefault((name, mixture.seq_len), CorpusOrder(name, rows, seed, window_shards))
                if not order.num_rows:
                    raise DataError(
                        f"data.sources[{name}]: training rows are 0; expected at least one. "
                        "Give it more text, or lower data.val_fraction, and prepare it again."
                    )
            numbers = [self.names.index(name) for name in names]
            part = Part(mixture, [orders[name, mixture.seq_len] for name in names], numbers)
            part.follow(self._parts[-1] if self._parts else None, len(self.names))
            self._parts.append(part)
        self.first_rows = [part.first_row for part in self._parts]
        self.pieces: Pieces = {"order": ORDER_VERSION, "run.seed": seed, "data.shuffle_window_shards": window_shards}
        self.pieces |= self._pieces_of(0, mixtures[0])
        if later := mixtures[1:]:
            self.pieces[_PHASES] = [
                {_FROM_ROW: mixture.first_row, "data.seq_len": mixture.seq_len, **self._pieces_of(number, mixture)}
                for number, mixture in enumerate(later, 1)
            ]
        canonical = json.dumps(self.pieces, sort_keys=True, separators=(",", ":"))
        self.hash = hashlib.sha256(canonical.encode()).hexdigest()

    def _pieces_of(self, number: int, mixture: Mixture) -> Pieces:
        part = self._parts[number]
        return {
            "data.sources": ", ".join(order.name for order in part.orders),
            **{f"rows of {order.name}": order.num_rows for order in part.orders},
            **{f"share of {order.name}": f"{slots}/{MIXTURE_PERIOD}"
               for order, slots in zip(part.orders, part.slots, strict=True)},
            **mixture.identity,
        }  # fmt: skip

    def _part(self, t: int) -> Part:
        return self._parts[bisect_right(self.first_rows, t) - 1]

    def locate(self, t: int) -> tuple[int, int, int, int]:
        """Return (number of the corpus, its epoch, block, row in the block) of the run's row t."""
        return self._part(t).locate(t)

    def coming_blocks(self, t: int, num_windows: int) -> list[tuple[int, int]]:
        """Return (number of the corpus, block) of what is read from the run's row t on, the soonest first.

        Args:
            t: The row.
            num_windows: How many windows of each corpus: that of its next row and those after it, as far as they are
                read before the phase ends; and those of a later phase if it begins soon.
        """
        first = bisect_right(self.first_rows, t) - 1
        ends = [*self.first_rows[first + 1 :], None]
        coming: dict[tuple[int, tuple[int, int]], tuple[int, list[int]]] = {}
        num_found = [0] * len(self.names)
        for part, end in zip(self._parts[first:], ends, strict=True):
            for row, corpus, window in part.coming_windows(t, end, num_windows):
                if (corpus, window.number) not in coming and num_found[corpus] < num_windows:
                    coming[corpus, window.number] = row, window.blocks
                    num_found[corpus] += 1
        soonest = sorted((row, corpus, blocks) for (corpus, _), (row, blocks) in coming.items())
        return list(dict.fromkeys((corpus, block) for _, corpus, blocks in soonest for block in blocks))

    def seq_len_at(self, t: int) -> int:
        """Slots in the run's row t."""
        return self._part(t).seq_len

    def shares_at(self, t: int) -> dict[str, float]:
        """Share of each corpus in the rows about row t, by name; only those that are there."""
        part = self._part(t)
        return {order.name: int(slots) / MIXTURE_PERIOD for order, slots in zip(part.orders, part.slots, strict=True)}

    def epoch_rows_at(self, t: int) -> dict[str, int]:
        """Rows in an epoch of each corpus that is in the rows about row t, by name."""
        return {order.name: order.num_rows for order in self._part(t).orders}

    def rows_per_corpus(self, t: int) -> dict[str, int]:
        """Rows of each corpus among the run's first t rows, by name."""
        return dict(zip(self.names, self._part(t).totals_at(t)[0].tolist(), strict=True))

    def tokens_per_corpus(self, t: int) -> dict[str, int]:
        """Slots of these rows, padding included."""
        return dict(zip(self.names, self._part(t).totals_at(t)[1].tolist(), strict=True))

    def epochs(self, t: int) -> dict[str, float]:
        """How often each corpus has been gone through in the run's first t rows, by name."""
        places = self._part(t).places_at(t)
        reached = {number: round(k / order.num_rows, 4) for number, (order, k) in places.items()}
        return {name: reached.get(number, 0.0) for number, name in enumerate(self.names)}

    def explain_difference(self, pieces: Pieces, t: int | None = None) -> str:
        """Say what differs between the pieces of another plan and this one's, one clause a difference.

        Args:
            pieces: Of the other plan.
            t: Compare only what the run's first t rows depend on; None compares all.
        """
        before, after = _flatten(pieces, t), _flatten(self.pieces, t)
        names = sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))
        return "; ".join(
            f"{name} was {_shorten(before.get(name))} and is {_shorten(after.get(name))}" for name in names
        )


def _flatten(pieces: Pieces, t: int | None) -> Pieces:
    """Pieces by one name each, without phases that begin at row t or later."""
    flat = {name: value for name, value in pieces.items() if name != _PHASES}
    for number, phase in enumerate(pieces.get(_PHASES, ())):
        if t is None or phase[_FROM_ROW] < t:
            flat |= {f"{_PHASES}.{number}: {name}": value for name, value in phase.items()}
    return flat


def _shorten(value: object) -> str:
    """A hash's first digits; anything else whole."""
    text = "absent" if value is None else str(value)
    return text[:12] + "…" if len(text) == 64 and " " not in text else text


@dataclass(frozen=True)
class Corpus:
    """One split of a prepared corpus, opened.

    Attributes:
        name: Its name in the config.
        folder: Its folder; of a corpus from elsewhere the one in the node's cache.
        manifest: What the folder holds.
        split: `train` or `val`.
        rows: Its row table for each length of rows that is asked for.
        remote: Where its files come from, if not from a local folder.
        open_shard: Opens a shard as `ShardReader` does.
    """

    name: str
    folder: Path
    manifest: Manifest
    split: str
    rows: dict[int, RowTable]
    remote: RemoteCorpus | None = None
    open_shard: Callable[..., ShardReader] = ShardReader

    @cached_property
    def shards(self) -> tuple[Shard, ...]:
        """The split's shards, which are the blocks of its rows."""
        return self.manifest.shards(self.split)

    @property
    def place(self) -> str:
        """Where it lies, as messages say it."""
        return str(self.remote or self.folder)

    def stop_downloads(self) -> None:
        """End what is being downloaded; nothing more is."""
        if self.remote:
            self.remote.store.close()

    def close(self) -> None:
        """Let go of what it keeps in the node's cache."""
        if self.remote:
            self.remote.close()


def open_corpora(
    config: Config, tokenizer_fingerprint: str, split: str, seq_lens: Mapping[str, Sequence[int]], is_new: bool = True
) -> list[Corpus]:
    """Open a split of sources, in the config's order, and check that they fit each other.

    Args:
        config: Uses `data.sources` and `data.packing`; `tokenizer` if a corpus holds text.
        tokenizer_fingerprint: sha256 of the model file that the run uses.
        split: `train` or `val`.
        seq_lens: Lengths of rows that are wanted of each source, by name; sources without any are left out.
        is_new: Check that every local shard is there and of its size; a run that goes on has
            `data.max_damaged_fraction` for that.

    Raises:
        DataError: A corpus is not prepared, not for these lengths, with another tokenizer, or damaged; or where it
            lies cannot be read.
    """
    corpora = []
    tokenizer: Tokenizer | None = None  # opened if a corpus holds text
    for source in config.data.sources:
        if not seq_lens.get(source.name):
            continue
        remote = open_remote(source.shards, config.data)
        folder = remote.folder if remote else Path(source.shards)
        if not folder.is_dir():
            raise DataError(
                f"data.sources[{source.name}].shards is {folder}, which does not exist; expected the folder of a "
                f"prepared corpus. Run: {PREPARE_COMMAND}"
            )
        manifest = Manifest.load(folder)
        if manifest.tokenizer_fingerprint != tokenizer_fingerprint:
            raise DataError(
                f"{remote or folder}: it was prepared with tokenizer {manifest.tokenizer_fingerprint[:12]}…; expected "
                f"that of {config.tokenizer.model}, {tokenizer_fingerprint[:12]}…. Use the tokenizer that the corpus "
                f"was prepared with, or prepare it into a new folder: {PREPARE_COMMAND}"
            )
        if is_new and not remote:
            check_shards(folder, manifest.shards(split))
        rows = {}
        for seq_len in seq_lens[source.name]:
            table = remote.fetch_rows(manifest, split, seq_len, config.data.packing) if remote else folder
            rows[seq_len] = RowTable.open(table, manifest, split, seq_len, config.data.packing)
        open_shard: Callable[..., ShardReader] = ShardReader
        if split == "train" and manifest.text is not None:
            tokenizer = tokenizer or open_tokenizer(config.tokenizer)
            open_shard = text_opener(manifest, tokenizer)
        corpora.append(Corpus(source.name, folder, manifest, split, rows, remote, open_shard))
    return corpora


def open_plan(config: Config, tokenizer_fingerprint: str, is_new: bool = True) -> tuple[DataPlan, list[Corpus]]:
    """Open the training splits and the plan of their order; corpora are in the order of the plan's names.

    Args:
        config: Uses `data` and `run.seed`.
        tokenizer_fingerprint: sha256 of the model file that the run uses.
        is_new: As for `open_corpora`.

    Raises:
        DataError: As `open_corpora`; or a corpus has no training rows.
        ConfigError: A share is too small, or the node's cache is.
    """
    phases = phases_of(config)
    seq_lens = {
        source.name: sorted({phase.seq_len for phase in phases if source.name in phase.amounts})
        for source in config.data.sources
    }
    opened = open_corpora(config, tokenizer_fingerprint, "train", seq_lens, is_new)
    corpora = {corpus.name: corpus for corpus in opened}
    identity: dict[str, str | int | float] = {
        "packing": PACKING_VERSIONS[config.data.packing],
        "data.seq_len": config.data.seq_len,
        "tokenizer": tokenizer_fingerprint,
    }
    fingerprints = {name: corpus.manifest.fingerprint() for name, corpus in corpora.items()}
    noise = {source.name: source.augment for source in config.data.sources if augment.is_on(source.augment)}
    members = [[corpus for name, corpus in corpora.items() if name in phase.amounts] for phase in phases]
    _check_cache(config, members)
    mixtures = [
        Mixture(
            first_row=phase.first_row,
            seq_len=phase.seq_len,
            corpora=[
                (corpus.name, corpus.rows[phase.seq_len].rows_per_block, phase.amounts[corpus.name])
                for corpus in members[number]
            ],
            by_epochs=phase.kind == "epochs",
            option=phase.option,
            identity=({} if number else identity)
            | {f"manifest of {corpus.name}": fingerprints[corpus.name] for corpus in members[number]}
            | {
                f"augment of {corpus.name}": augment.identity(noise[corpus.name])
                for corpus in members[number]
                if corpus.name in noise
            },
        )
        for number, phase in enumerate(phases)
    ]  # fmt: skip
    plan = DataPlan(mixtures, config.run.seed, config.data.shuffle_window_shards)
    return plan, [corpora[name] for name in plan.names]


def _check_cache(config: Config, members: Sequence[Sequence[Corpus]]) -> None:
    """Refuse a cache in which the shards of a window would drive each other out, in whatever phase needs most."""
    data = config.data
    least = max(
        sum(min_cache_bytes(one.shards, data.shuffle_window_shards) for one in corpora if one.remote)
        for corpora in members
    )
    if least > data.cache_bytes:
        raise ConfigError(
            f"data.cache_bytes is {data.cache_bytes}; expected at least {least}: the data.shuffle_window_shards "
            f"({data.shuffle_window_shards}) largest shards of every source from elsewhere, whose rows are read in one "
            "another's midst. Raise it."
        )


def describe_phases(plan: DataPlan, phases: Sequence[Phase], num_steps: int) -> list[str]:
    """Say of each phase of a run which steps and rows it has, and the share and epochs of each corpus in it.

    Args:
        plan: Of the rows.
        phases: Of the config.
        num_steps: Of the whole run.
    """
    lines: list[str] = []
    ends = [*(phase.first_step for phase in phases[1:]), num_steps]
    for phase, end in zip(phases, ends, strict=True):
        end_row = phase.first_row + max(end - phase.first_step, 0) * phase.rows_per_step
        begin_epochs, end_epochs = plan.epochs(phase.first_row), plan.epochs(end_row)
        shares = plan.shares_at(phase.first_row)
        each = ", ".join(
            f"{name} {share:.2%} ({end_epochs[name] - begin_epochs[name]:.2f} epochs)" for name, share in shares.items()
        )
        own = not lines or phase.option != phases[len(lines) - 1].option
        asked = _steps_asked_for(plan, phase) if own and phase.kind != "weights" else None
        if asked is not None and abs(asked - (end - phase.first_step)) > 0.01 * asked:
            each += f"; the {phase.kind} that it asks for take {asked:.0f} steps, and it has {end - phase.first_step}"
        lines.append(f"steps {phase.first_step + 1} to {end}, rows of {phase.seq_len} tokens: {each}")
    return lines


def _steps_asked_for(plan: DataPlan, phase: Phase) -> float:
    """Steps in which a phase has exactly the epochs, or tokens, that it gives."""
    sizes = plan.epoch_rows_at(phase.first_row) if phase.kind == "epochs" else {}
    rows = sum(amount * sizes.get(name, 1 / phase.seq_len) for name, amount in phase.amounts.items())
    return rows / phase.rows_per_step
