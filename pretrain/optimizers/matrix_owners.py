"""Which rank works on which whole matrix. Without torch: a planner asks it too."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Matrix:
    """Rows of a parameter that are worked on as one matrix; what comes back is multiplied by `scale`."""

    parameter: str
    start: int  # first flat element within the parameter
    rows: int
    cols: int
    scale: float = 1.0

    @property
    def numel(self) -> int:
        """Number of elements."""
        return self.rows * self.cols

    @property
    def cost(self) -> int:
        """Multiplications of a Newton-Schulz iteration, which work is balanced by."""
        short, long = sorted((self.rows, self.cols))
        return 2 * short * short * long + short**3


def assign_owners(matrices: Sequence[Matrix], holders: Sequence[set[int]], num_ranks: int) -> list[int]:
    """Return for each matrix the rank that works on it: its only holder, else, largest first, the least busy rank."""
    load = [0] * num_ranks
    owners = [next(iter(ranks)) if len(ranks) == 1 else -1 for ranks in holders]
    for matrix, owner in zip(matrices, owners, strict=True):
        if owner >= 0:
            load[owner] += matrix.cost
    least_busy = [(busy, rank) for rank, busy in enumerate(load)]
    heapq.heapify(least_busy)
    divided = [index for index, owner in enumerate(owners) if owner < 0]
    for index in sorted(divided, key=lambda index: (-matrices[index].cost, index)):
        busy, owners[index] = least_busy[0]
        heapq.heapreplace(least_busy, (busy + matrices[index].cost, owners[index]))
    return owners
