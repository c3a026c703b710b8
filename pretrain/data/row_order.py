"""The order of one corpus's rows, and the table by which corpora are mixed.

Each corpus is shuffled on its own: per epoch its blocks (shards) are permuted and taken in windows of
`window_shards`, whose rows are permuted together. The permutations come from the raw output of Philox, which
numpy never changes, and not from `Generator.permutation`, whose stream may change between versions.
"""

from __future__ import annotations

import hashlib
import json
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

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


@dataclass(frozen=True)
class _Place:
    """A window of an epoch.

    Attributes:
        begin, end: The corpus's rows of the run that are in it.
        number: Its epoch.
        epoch: The order of the epoch's blocks.
        first_row: Rows of the epoch before it.
        order: The permutation of its rows.
    """

    begin: int
    end: int
    number: int
    epoch: _Epoch
    first_row: int
    order: np.ndarray


@dataclass(frozen=True)
class Window:
    """Blocks of a corpus whose rows are shuffled together.

    Attributes:
        number: The epoch, and the window's number in it.
        begin: Rows of the corpus in the run before it.
        blocks: Its blocks.
    """

    number: tuple[int, int]
    begin: int
    blocks: list[int]


class CorpusOrder:
    """The order of one corpus's rows over all epochs; other corpora do not matter to it.

    Attributes:
        name: The corpus's name.
        num_rows: Rows in an epoch.
        max_window_rows: Rows in a window at most.
    """

    def __init__(self, name: str, rows_per_block: np.ndarray, seed: int, window_shards: int) -> None:
        """Take the corpus's name, which keys its permutations, and its rows per block, [num_blocks]."""
        self.name = name
        self.num_rows = int(np.sum(rows_per_block))
        self._rows_per_block = np.asarray(rows_per_block, dtype=np.int64)
        self._seed, self._window_shards = seed, window_shards
        self.max_window_rows = int(np.sort(self._rows_per_block)[-window_shards:].sum())
        self._epochs, self._windows = _Cache(2), _Cache(_CACHED_WINDOWS)
        self._last: _Place | None = None  # most rows are in the window of the one before

    def locate(self, k: int) -> tuple[int, int, int]:
        """Return (epoch, block, row in the block) of the corpus's k-th row of the run."""
        last = self._last
        if last is None or not last.begin <= k < last.end:
            last = self._last = self._place_of(k)
        row = last.first_row + int(last.order[k - last.begin])
        place = bisect_right(last.epoch.block_begins, row) - 1
        return last.number, last.epoch.blocks[place], row - last.epoch.block_begins[place]

    def _place_of(self, k: int) -> _Place:
        """The window that holds the corpus's k-th row of the run."""
        number, row = divmod(k, self.num_rows)
        epoch = self._epoch(number)
        window = bisect_right(epoch.window_begins, row) - 1
        first_row, end = epoch.window_begins[window : window + 2]
        order = self._windows.get(
            (number, window), lambda: permutation(end - first_row, self._seed, self.name, number, window)
        )
        begin_of_epoch = k - row
        return _Place(begin_of_epoch + first_row, begin_of_epoch + end, number, epoch, first_row, order)

    def coming_windows(self, k: int, num_windows: int) -> list[Window]:
        """Return the window that holds the corpus's k-th row, and those after it."""
        number, row = divmod(k, self.num_rows)
        window = bisect_right(self._epoch(number).window_begins, row) - 1
        windows = []
        for _ in range(num_windows):
            if window == len(self._epoch(number).window_begins) - 1:
                number, window = number + 1, 0
            epoch = self._epoch(number)
            begin = number * self.num_rows + epoch.window_begins[window]
            blocks = epoch.blocks[window * self._window_shards : (window + 1) * self._window_shards]
            windows.append(Window((number, window), begin, blocks))
            window += 1
        return windows

    def continue_from(self, other: CorpusOrder, k: int) -> int:
        """Return the row at which this order goes on where another one, of the same blocks in other rows, is at row k.

        It is in the same epoch and window, and as far in the window: what other windows hold comes as if nothing had
        changed, and only of the documents of this one may some come twice and as many not at all.
        """
        number, k = divmod(k, other.num_rows)
        old, new = other._order_blocks(number), self._order_blocks(number)
        window = bisect_right(old.window_begins, k) - 1
        begin, end = old.window_begins[window : window + 2]
        new_begin, new_end = new.window_begins[window : window + 2]
        return number * self.num_rows + new_begin + (k - begin) * (new_end - new_begin) // (end - begin)

    def _epoch(self, number: int) -> _Epoch:
        return self._epochs.get(number, lambda: self._order_blocks(number))

    def _order_blocks(self, epoch: int) -> _Epoch:
        blocks = permutation(len(self._rows_per_block), self._seed, self.name, epoch)
        begins = np.zeros(len(blocks) + 1, dtype=np.int64)
        np.cumsum(self._rows_per_block[blocks], out=begins[1:])
        window_begins = np.append(begins[: -1 : self._window_shards], begins[-1])
        return _Epoch(blocks.tolist(), begins.tolist(), window_begins.tolist())
