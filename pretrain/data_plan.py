"""The order of training rows: a pure function of the plan and the row number.

`DataPlan.locate(t)` says which row of which corpus is row t of the run. It depends on the corpora's row
counts, their names and weights and the seed; not on ranks, workers, restarts or the run's length, and row
10^8 costs what row 0 costs. A run's position in its data is therefore one integer.

Each corpus is shuffled on its own: per epoch its blocks (shards) are permuted and taken in windows of
`window_shards`, whose rows are permuted together. The permutations come from the raw output of Philox, which
numpy never changes, and not from `Generator.permutation`, whose stream may change between versions.
"""

from __future__ import annotations

import hashlib
import json
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from pretrain.config import Config
from pretrain.errors import ConfigError, DataError
from pretrain.packing import PACKING_VERSION
from pretrain.remote_corpus import RemoteCorpus, min_cache_bytes, open_remote
from pretrain.row_table import RowTable
from pretrain.shard_reader import check_shards
from pretrain.shards import PREPARE_COMMAND, Manifest, Shard

ORDER_VERSION = "windowed-philox-1"  # part of the plan's identity: change it with the algorithms below
MIXTURE_PERIOD = 4096
_CACHED_WINDOWS = 4
_T = TypeVar("_T")


def permutation(size: int, *key: Hashable) -> np.ndarray:
    """A permutation of 0 to size - 1 that depends on its size and key alone, int64 [size].

    Random bits above, the index below, sorted: one sort of unique integers, and any sort gives the same. The
    random part has at least 24 bits up to 2^40 items, so that ties, which keep the order, do not matter.
    """
    digest = hashlib.sha256(json.dumps(key).encode()).digest()
    random = np.random.Philox(key=int.from_bytes(digest[:16], "little")).random_raw(size)
    num_index_bits = max(size - 1, 1).bit_length()
    mask = np.uint64((1 << num_index_bits) - 1)
    return (np.sort((random & ~mask) | np.arange(size, dtype=np.uint64)) & mask).astype(np.int64)


def mixture_slots(weights: Sequence[float], period: int = MIXTURE_PERIOD) -> np.ndarray:
    """Divide `period` slots by weight, largest remainders first, int64 [num_corpora]."""
    shares = np.asarray(weights, dtype=np.float64) / np.sum(weights, dtype=np.float64) * period
    slots = np.floor(shares).astype(np.int64)
    remainders = np.argsort(slots - shares, kind="stable")
    slots[remainders[: period - int(slots.sum())]] += 1
    return slots


def spread_slots(slots: np.ndarray) -> np.ndarray:
    """Order one period of the mixture so that every prefix has each corpus's share to within one row.

    At each place, of the corpora that are far enough behind, the one with the nearest deadline comes.

    Args:
        slots: Slots of each corpus in a period, int64 [num_corpora], each at least 1.

    Returns:
        The corpus of each slot, int64 [period].

    Source: R. Tijdeman, The chairman assignment problem, Discrete Mathematics 32 (1980); its bound on the
    difference is 1 - 1 / (2 num_corpora - 2).
    """
    period, scale = int(slots.sum()), max(2 * len(slots) - 2, 1)
    pattern = np.empty(period, dtype=np.int64)
    counts = np.zeros(len(slots), dtype=np.int64)
    for place in range(period):
        behind = scale * (slots * (place + 1) - period * counts)  # rows behind, times scale * period
        deadline = np.where(behind >= period, (period * (scale - 1) - behind) / slots, np.inf)
        pattern[place] = chosen = int(np.argmin(deadline))
        counts[chosen] += 1
    return pattern


class _Cache:
    """Keeps the few results used last."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._results: OrderedDict[Hashable, Any] = OrderedDict()

    def get(self, key: Hashable, compute: Callable[[], _T]) -> _T:
        if key not in self._results:
            self._results[key] = compute()
            if len(self._results) > self._capacity:
                self._results.popitem(last=False)
        self._results.move_to_end(key)
        return self._results[key]


@dataclass(frozen=True)
class _Epoch:
    """One corpus's blocks in the order of one epoch.

    Attributes:
        blocks: Block at each place, [num_blocks].
        block_begins: Rows before each place, [num_blocks + 1].
        window_begins: Rows before each window, [num_windows + 1].
    """

    blocks: list[int]
    block_begins: list[int]
    window_begins: list[int]


class CorpusOrder:
    """The order of one corpus's rows over all epochs; other corpora do not matter to it."""

    def __init__(self, name: str, rows_per_block: np.ndarray, seed: int, window_shards: int) -> None:
        """Take the corpus's name, which keys its permutations, and its rows per block, [num_blocks]."""
        self.name = name
        self.num_rows = int(np.sum(rows_per_block))
        self._rows_per_block = np.asarray(rows_per_block, dtype=np.int64)
        self._seed, self._window_shards = seed, window_shards
        self._epochs, self._windows = _Cache(2), _Cache(_CACHED_WINDOWS)

    def locate(self, k: int) -> tuple[int, int, int]:
        """Return (epoch, block, row in the block) of the corpus's k-th row of the run."""
        number, k = divmod(k, self.num_rows)
        epoch = self._epoch(number)
        window = bisect_right(epoch.window_begins, k) - 1
        begin, end = epoch.window_begins[window : window + 2]
        order = self._windows.get(
            (number, window), lambda: permutation(end - begin, self._seed, self.name, number, window)
        )
        row = begin + int(order[k - begin])
        place = bisect_right(epoch.block_begins, row) - 1
        return number, epoch.blocks[place], row - epoch.block_begins[place]

    def coming_blocks(self, k: int, num_windows: int) -> Iterator[list[int]]:
        """Yield the blocks of the window that holds the corpus's k-th row, and those of the windows after it."""
        number, k = divmod(k, self.num_rows)
        epoch = self._epoch(number)
        window = bisect_right(epoch.window_begins, k) - 1
        for _ in range(num_windows):
            if window == len(epoch.window_begins) - 1:
                number, window = number + 1, 0
                epoch = self._epoch(number)
            yield epoch.blocks[window * self._window_shards : (window + 1) * self._window_shards]
            window += 1

    def _epoch(self, number: int) -> _Epoch:
        return self._epochs.get(number, lambda: self._order_blocks(number))

    def _order_blocks(self, epoch: int) -> _Epoch:
        blocks = permutation(len(self._rows_per_block), self._seed, self.name, epoch)
        begins = np.zeros(len(blocks) + 1, dtype=np.int64)
        np.cumsum(self._rows_per_block[blocks], out=begins[1:])
        window_begins = np.append(begins[: -1 : self._window_shards], begins[-1])
        return _Epoch(blocks.tolist(), begins.tolist(), window_begins.tolist())


class DataPlan:
    """Which row of which corpus comes at each place of a run.

    Attributes:
        names: Names of the corpora.
        pieces: What the order depends on, by name; JSON.
        hash: sha256 of `pieces`.
    """

    def __init__(
        self,
        corpora: Sequence[tuple[str, np.ndarray, float]],
        seed: int,
        window_shards: int,
        identity: dict[str, str | int | float],
    ) -> None:
        """Build the mixture table; permutations are made when they are needed.

        Args:
            corpora: (name, rows per block, weight) of each corpus.
            seed: Seed of the order.
            window_shards: Blocks whose rows are shuffled together.
            identity: What else fixes the rows, by name, such as the manifests' fingerprints.

        Raises:
            ConfigError: Two corpora have one name, or a weight is too small for the mixture table.
            DataError: A corpus has no rows.
        """
        self.names = [name for name, _, _ in corpora]
        for name in self.names:
            if self.names.count(name) > 1:
                raise ConfigError(f"data.sources: name is {name} twice; expected distinct names. Rename one.")
        self._orders = [CorpusOrder(name, rows, seed, window_shards) for name, rows, _ in corpora]
        for order in self._orders:
            if not order.num_rows:
                raise DataError(
                    f"data.sources[{order.name}]: training rows are 0; expected at least one. "
                    "Give it more text, or lower data.val_fraction, and prepare it again."
                )
        self._slots = mixture_slots([weight for _, _, weight in corpora])
        if not self._slots.all():
            first = int(np.argmin(self._slots))
            raise ConfigError(
                f"data.sources[{self.names[first]}].weight is {corpora[first][2]:g}, which gives it no row in "
                f"{MIXTURE_PERIOD}; expected a share of at least 1/{MIXTURE_PERIOD}. Raise it or drop the source."
            )
        self._pattern = spread_slots(self._slots)
        taken = self._pattern[:, None] == np.arange(len(corpora))
        self._before = np.cumsum(taken, axis=0) - taken  # rows of each corpus before each slot of a period
        self.pieces: dict[str, str | int | float] = {
            "order": ORDER_VERSION, "run.seed": seed, "data.shuffle_window_shards": window_shards,
            "data.sources": ", ".join(self.names),
            **{f"rows of {order.name}": order.num_rows for order in self._orders},
            **{f"share of {name}": f"{n}/{MIXTURE_PERIOD}" for name, n in zip(self.names, self._slots, strict=True)},
            **identity,
        }  # fmt: skip
        canonical = json.dumps(self.pieces, sort_keys=True, separators=(",", ":"))
        self.hash = hashlib.sha256(canonical.encode()).hexdigest()

    def locate(self, t: int) -> tuple[int, int, int, int]:
        """Return (number of the corpus, its epoch, block, row in the block) of the run's row t."""
        period, slot = divmod(t, MIXTURE_PERIOD)
        corpus = int(self._pattern[slot])
        k = period * int(self._slots[corpus]) + int(self._before[slot, corpus])
        return corpus, *self._orders[corpus].locate(k)

    def coming_blocks(self, t: int, num_windows: int) -> list[tuple[int, int]]:
        """Return (number of the corpus, block) of what is needed from the run's row t on, the nearest windows first."""
        counts = self.rows_per_corpus(t)
        ways = [order.coming_blocks(counts[order.name], num_windows) for order in self._orders]
        return [
            (corpus, block)
            for windows in zip(*ways, strict=True)
            for corpus, blocks in enumerate(windows)
            for block in blocks
        ]

    def rows_per_corpus(self, t: int) -> dict[str, int]:
        """Rows of each corpus among the run's first t rows, by name."""
        period, slot = divmod(t, MIXTURE_PERIOD)
        counts = period * self._slots + self._before[slot]
        return dict(zip(self.names, counts.tolist(), strict=True))

    def epochs(self, t: int) -> dict[str, float]:
        """How often each corpus has been gone through in the run's first t rows, by name."""
        counts = self.rows_per_corpus(t)
        return {order.name: round(counts[order.name] / order.num_rows, 4) for order in self._orders}

    def explain_difference(self, pieces: dict[str, Any]) -> str:
        """Say what differs between the pieces of another plan and this one's, one clause a difference."""
        names = sorted(name for name in pieces.keys() | self.pieces.keys() if pieces.get(name) != self.pieces.get(name))
        return "; ".join(
            f"{name} was {_shorten(pieces.get(name))} and is {_shorten(self.pieces.get(name))}" for name in names
        )


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
        rows: Its row table for the config's `seq_len`.
        weight: Its weight in the config.
        remote: Where its files come from, if not from a local folder.
    """

    name: str
    folder: Path
    manifest: Manifest
    split: str
    rows: RowTable
    weight: float
    remote: RemoteCorpus | None = None

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


def open_corpora(config: Config, tokenizer_fingerprint: str, split: str) -> list[Corpus]:
    """Open a split of every source, in the config's order, and check that they fit each other.

    Args:
        config: Uses `data.sources` and `data.seq_len`.
        tokenizer_fingerprint: sha256 of the model file that the run uses.
        split: `train` or `val`.

    Raises:
        DataError: A corpus is not prepared, not for this `seq_len`, with another tokenizer, or damaged.
    """
    corpora = []
    for source in config.data.sources:
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
        if remote:
            rows = RowTable.open(remote.fetch_rows(manifest, split, config.data.seq_len), manifest, split,
                                 config.data.seq_len)  # fmt: skip
        else:
            check_shards(folder, manifest.shards(split))
            rows = RowTable.open(folder, manifest, split, config.data.seq_len)
        corpora.append(Corpus(source.name, folder, manifest, split, rows, source.weight, remote))
    return corpora


def open_plan(config: Config, tokenizer_fingerprint: str) -> tuple[DataPlan, list[Corpus]]:
    """Open the training splits and the plan of their order.

    Raises:
        DataError: As `open_corpora`; or a corpus has no training rows.
        ConfigError: A weight is too small.
    """
    corpora = open_corpora(config, tokenizer_fingerprint, "train")
    _check_cache(config, corpora)
    identity: dict[str, str | int | float] = {
        "packing": PACKING_VERSION,
        "data.seq_len": config.data.seq_len,
        "tokenizer": tokenizer_fingerprint,
        **{f"manifest of {corpus.name}": corpus.manifest.fingerprint() for corpus in corpora},
    }
    plan = DataPlan(
        [(corpus.name, corpus.rows.rows_per_block, corpus.weight) for corpus in corpora],
        config.run.seed,
        config.data.shuffle_window_shards,
        identity,
    )
    return plan, corpora


def _check_cache(config: Config, corpora: list[Corpus]) -> None:
    """Refuse a cache in which the shards of a window would drive each other out."""
    data = config.data
    least = sum(min_cache_bytes(one.shards, data.shuffle_window_shards) for one in corpora if one.remote)
    if least > data.cache_bytes:
        raise ConfigError(
            f"data.cache_bytes is {data.cache_bytes}; expected at least {least}: the data.shuffle_window_shards "
            f"({data.shuffle_window_shards}) largest shards of every source from elsewhere, whose rows are read in one "
            "another's midst. Raise it."
        )
