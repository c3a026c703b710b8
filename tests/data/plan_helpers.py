"""Random plans of several corpora and phases, for tests of what holds for all of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache

import numpy as np
from hypothesis import strategies as st

from pretrain.data.data_plan import DataPlan
from pretrain.data.mixture import Mixture
from pretrain.data.row_order import spread_slots

NAMES = ("web", "code", "books", "maths")
SEQ_LENS = (16, 32, 64)


@dataclass(frozen=True)
class Part:
    """One phase: its rows, their length, and how much there is of which corpus."""

    num_rows: int
    seq_len: int
    amounts: tuple[tuple[str, float], ...]
    by_epochs: bool


@dataclass(frozen=True)
class Recipe:
    """What a plan is made of; `slots` are those of each block, by corpus."""

    slots: tuple[tuple[int, ...], ...]
    parts: tuple[Part, ...]
    seed: int
    window_shards: int

    def build(self, num_parts: int | None = None) -> DataPlan:
        """The plan of the first parts; every plan is a fresh one."""
        first_row, mixtures = 0, []
        for part in self.parts[:num_parts]:
            corpora = [(name, self.rows_per_block(name, part.seq_len), amount) for name, amount in part.amounts]
            identity = {f"manifest of {name}": f"{self.slots[NAMES.index(name)]}" for name, _ in part.amounts}
            mixtures.append(Mixture(first_row, part.seq_len, corpora, part.by_epochs, identity=identity))
            first_row += part.num_rows
        return DataPlan(mixtures, self.seed, self.window_shards)

    def rows_per_block(self, name: str, seq_len: int) -> np.ndarray:
        """Rows of each block of a corpus, full but for its last one."""
        return -(-np.array(self.slots[NAMES.index(name)]) // seq_len)

    @property
    def first_rows(self) -> list[int]:
        """Where each part begins."""
        return [0, *np.cumsum([part.num_rows for part in self.parts])[:-1].tolist()]

    @property
    def num_rows(self) -> int:
        """Rows of all parts."""
        return sum(part.num_rows for part in self.parts)

    def of_one_length(self) -> Recipe:
        """The same with rows of one length."""
        return replace(self, parts=tuple(replace(part, seq_len=32) for part in self.parts))


@st.composite
def recipes(draw: st.DrawFn, min_parts: int = 1, max_parts: int = 3) -> Recipe:
    """Plans of one to four small corpora."""
    blocks = st.lists(st.integers(1, 600), min_size=1, max_size=6).map(tuple)
    slots = draw(st.lists(blocks, min_size=1, max_size=4).map(tuple))
    names = NAMES[: len(slots)]
    parts = []
    for _ in range(draw(st.integers(min_parts, max_parts))):
        chosen = draw(st.lists(st.sampled_from(names), min_size=1, unique=True))
        amounts = tuple((name, draw(st.sampled_from([1.0, 2.0, 5.0]))) for name in sorted(chosen, key=names.index))
        parts.append(Part(draw(st.integers(1, 150)), draw(st.sampled_from(SEQ_LENS)), amounts, draw(st.booleans())))
    return Recipe(slots, tuple(parts), draw(st.integers(0, 2**32 - 1)), draw(st.integers(1, 4)))


@cache
def _spread(slots: tuple[int, ...]) -> np.ndarray:
    return spread_slots(np.array(slots))


def spread_quickly(slots: Sequence[int]) -> np.ndarray:
    """`spread_slots`, each table once: it takes most of the time of a small plan."""
    return _spread(tuple(int(number) for number in slots))
