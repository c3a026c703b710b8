"""What the rows of a run are of, from one row on: corpora by their shares, each in its own order."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from pretrain.data.row_order import MIXTURE_PERIOD, CorpusOrder, Window, mixture_slots, spread_slots
from pretrain.errors import ConfigError


@dataclass(frozen=True)
class Mixture:
    """What the rows are of from one row of the run on.

    Attributes:
        first_row: That row; 0 for the first mixture.
        seq_len: Slots in a row.
        corpora: (name, rows per block, amount) of each corpus.
        by_epochs: Amounts are epochs, and not shares of rows.
        option: The option that gives the amounts, with `{}` for the corpus.
        identity: What else fixes the rows, by name, such as the manifests' fingerprints.
    """

    first_row: int
    seq_len: int
    corpora: Sequence[tuple[str, np.ndarray, float]]
    by_epochs: bool = False
    option: str = "data.sources[{}].weight"
    identity: Mapping[str, str | int | float] = field(default_factory=dict)


class Part:
    """A mixture with its table, and where each corpus stands when it begins.

    Attributes:
        first_row: The mixture's.
        seq_len: The mixture's.
        orders: Of each of its corpora.
        numbers: Of each of its corpora among those of the run.
        slots: Rows of each of its corpora in a period of the table, int64.
        places: Of all corpora so far, by number: the order that each is in and its row there, where the part begins.
    """

    def __init__(self, mixture: Mixture, orders: list[CorpusOrder], numbers: list[int]) -> None:
        """Make the table; call `follow` before anything else.

        Raises:
            ConfigError: A share is too small for the table.
        """
        self.first_row, self.seq_len, self.orders, self.numbers = mixture.first_row, mixture.seq_len, orders, numbers
        amounts = [amount for _, _, amount in mixture.corpora]
        weights = [amount * order.num_rows for amount, order in zip(amounts, orders, strict=True)]
        self.slots = mixture_slots(weights if mixture.by_epochs else amounts)
        if not self.slots.all():
            first = int(np.argmin(self.slots))
            raise ConfigError(
                f"{mixture.option.format(orders[first].name)} is {amounts[first]:g}, which gives it no row in "
                f"{MIXTURE_PERIOD}; expected a share of at least 1/{MIXTURE_PERIOD}. Raise it or drop the source."
            )
        self._pattern = spread_slots(self.slots)
        taken = self._pattern[:, None] == np.arange(len(orders))
        self._before = np.cumsum(taken, axis=0) - taken  # rows of each corpus before each slot of a period
        # Of each slot its corpus, the rows of that in a period, and those before the slot, as Python's integers.
        own = self._before[np.arange(MIXTURE_PERIOD), self._pattern]
        self._slot_places = list(
            zip(self._pattern.tolist(), self.slots[self._pattern].tolist(), own.tolist(), strict=True)
        )
        self.places: dict[int, tuple[CorpusOrder, int]] = {}
        self._rows: np.ndarray = np.zeros(0, np.int64)  # of all corpora, where this part begins: rows and tokens so far
        self._tokens: np.ndarray = np.zeros(0, np.int64)

    def follow(self, before: Part | None, num_corpora: int) -> None:
        """Begin where the part before ends, and corpora that are new at their beginning."""
        self._rows = self._tokens = np.zeros(num_corpora, np.int64)
        if before is not None:
            self.places = before.places_at(self.first_row)
            self._rows, self._tokens = before.totals_at(self.first_row)
        for number, order in zip(self.numbers, self.orders, strict=True):
            old, k = self.places.get(number, (order, 0))
            self.places[number] = order, k if old is order else order.continue_from(old, k)

    def locate(self, t: int) -> tuple[int, int, int, int]:
        """Return (number of the corpus, its epoch, block, row in the block) of the run's row t."""
        period, slot = divmod(t - self.first_row, MIXTURE_PERIOD)
        i, slots, before = self._slot_places[slot]
        number = self.numbers[i]
        order, k = self.places[number]
        return number, *order.locate(k + period * slots + before)

    def places_at(self, t: int) -> dict[int, tuple[CorpusOrder, int]]:
        """Where each corpus stands before row t of the run."""
        places = dict(self.places)
        for number, count in zip(self.numbers, self._counts(t).tolist(), strict=True):
            order, k = places[number]
            places[number] = order, k + count
        return places

    def totals_at(self, t: int) -> tuple[np.ndarray, np.ndarray]:
        """Rows and tokens of each corpus among the run's first t rows."""
        added = np.zeros_like(self._rows)
        added[self.numbers] = self._counts(t)
        return self._rows + added, self._tokens + added * self.seq_len

    def coming_windows(self, t: int, end: int | None, num_windows: int) -> Iterator[tuple[int, int, Window]]:
        """Yield the windows that are read from row t of the run on, up to `num_windows` of each corpus.

        A part that has not begun at row t gives those of a corpus only as long before as it can take to read them.

        Args:
            t: The row.
            end: The first row of the next part, if there is one.
            num_windows: Windows of each corpus at most.

        Yields:
            About which row of the run is the first one of the window, the number of the corpus, and the window.
        """
        begin = max(t, self.first_row)
        places, ends = self.places_at(begin), {} if end is None else self.places_at(end)
        for number, slots in zip(self.numbers, self.slots.tolist(), strict=True):
            order, k = places[number]
            if begin - t > num_windows * order.max_window_rows * MIXTURE_PERIOD // slots:
                continue
            for window in order.coming_windows(k, num_windows):
                if end is None or max(window.begin, k) < ends[number][1]:
                    yield begin + max(window.begin - k, 0) * MIXTURE_PERIOD // slots, number, window

    def _counts(self, t: int) -> np.ndarray:
        """Rows of each of the part's corpora from its beginning to row t of the run, int64."""
        period, slot = divmod(t - self.first_row, MIXTURE_PERIOD)
        return period * self.slots + self._before[slot]
