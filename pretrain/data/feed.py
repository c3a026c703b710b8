"""The rows of every step, on this rank's device and agreed upon by all ranks before the step begins.

While one step runs, the next one's rows are copied to the device on a stream of their own, and their targets are
counted over all ranks: a step waits neither for a copy nor for another rank's count.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch
from torch import Tensor

from pretrain.data.damage import Damage, TooMuchDamageError, describe
from pretrain.data.row_reader import Batch
from pretrain.data.stream import StepRows, TokenStream
from pretrain.errors import LonghaulError
from pretrain.ranks.distributed import PendingSum, Ranks
from pretrain.ranks.sequence_parallel import ALONE, SequenceGroup

logger = logging.getLogger("longhaul")


@dataclass(frozen=True)
class StepInput:
    """What this rank computes in one step.

    Args:
        micro_batches: on the device, each in the order of `Transformer.forward`.
        num_targets: scored targets of all ranks.
        num_damaged: places of all ranks' rows that are masked, because their documents cannot be read; of rows that
            ranks share, as often as there are such ranks.
        damage: names of the documents among them that were not met before, and a sum of all there are, if there are any
            new ones; the same on every rank.
    """

    micro_batches: list[tuple[Tensor, ...]]
    num_targets: int
    num_damaged: int
    damage: list[str]


@dataclass(frozen=True)
class _Prepared:
    """A step whose rows are read; its copies and its sums over ranks are under way."""

    rows: StepRows
    micro_batches: list[tuple[Tensor, ...]]
    copied: torch.cuda.Event | None
    # targets; masked places; of them of new documents; ranks that could not read, must stop, know a save to have ended
    sums: PendingSum
    failure: LonghaulError | None


class Feed:
    """The steps of a `TokenStream`, one after the other; all ranks call the same methods in the same order."""

    def __init__(self, stream: TokenStream, ranks: Ranks, group: SequenceGroup = ALONE) -> None:
        """Feed this rank; nothing is read before the first step is prepared.

        Args:
            stream: of rows, the same on ranks that share them.
            ranks: all.
            group: the ranks that share rows, each of which gets its part of every row.
        """
        self._stream, self._ranks, self._group = stream, ranks, group
        self._copies = torch.cuda.Stream(ranks.device) if ranks.device.type == "cuda" else None
        self._next: _Prepared | None = None

    def prepare(self, stop: bool, save_ended: bool = False) -> None:
        """Read the next step's rows and start to copy and to count them; an error waits for `take`.

        Args:
            stop: whether this rank was asked to stop, which `stop_requested` tells all ranks.
            save_ended: whether this rank knows a save to have ended, which `save_ended` tells all ranks.
        """
        rows, failure = StepRows([], 0, []), None
        try:
            rows = self._stream.read_step()
        except LonghaulError as error:
            failure = error
        parts = [batch.part(self._group.own(batch.tokens_BT.shape[1])) for batch in rows.micro_batches]
        micro_batches = [_tensors(batch) for batch in parts]
        copied = None
        if self._copies is not None:
            with torch.cuda.stream(self._copies):
                micro_batches = [
                    tuple(tensor.pin_memory().to(self._ranks.device, non_blocking=True) for tensor in tensors)
                    for tensors in micro_batches
                ]
                copied = torch.cuda.Event()
                copied.record(self._copies)
        num_new = len(self._new_damage(rows))
        num_targets = rows.num_targets if self._group.size == 1 else sum(batch.count_targets() for batch in parts)
        counts = [num_targets, len(rows.damaged), num_new, failure is not None, stop, save_ended]
        sums = self._ranks.start_sum(counts)
        self._next = _Prepared(rows, micro_batches, copied, sums, failure)

    def discard(self) -> None:
        """Forget a step that is prepared and will not be taken."""
        if self._next is not None:
            self._next.sums.result()
            self._next = None

    def stop_requested(self) -> bool:
        """Whether any rank was asked to stop when it prepared the next step; False if none is prepared."""
        return self._next is not None and self._next.sums.result()[4] > 0

    def save_ended(self) -> bool:
        """Whether a save had ended, or failed on any rank, when the next step was prepared."""
        return self._next is not None and self._next.sums.result()[5] > 0

    def take(self) -> StepInput:
        """Return the next step's rows, which count as consumed from now on; prepare them now if nobody has.

        Raises:
            LonghaulError: on all ranks, if any rank could not read its rows.
            TooMuchDamageError: on all ranks, if too many documents cannot be read; it has the names of those that were
                not met before. The step does not count.
        """
        if self._next is None:
            self.prepare(stop=False)
        assert self._next is not None
        prepared, self._next = self._next, None
        num_targets, num_damaged, num_new, num_failed, *_ = prepared.sums.result()
        if num_failed:
            self._ranks.agree(lambda: _raise(prepared.failure))
        damage = self._count_damage(prepared.rows) if num_new else []
        try:
            if num_new:
                self._stream.damage.check()
            if num_damaged:
                self._stream.damage.check_step(int(num_targets))
        except TooMuchDamageError as error:
            error.damage = damage
            raise
        self._stream.advance()
        if prepared.copied is not None:
            consumer = torch.cuda.current_stream()
            consumer.wait_event(prepared.copied)
            for tensors in prepared.micro_batches:
                for tensor in tensors:
                    tensor.record_stream(consumer)  # else its memory could be copied over while it is read
        return StepInput(prepared.micro_batches, int(num_targets), int(num_damaged), damage)

    def _new_damage(self, rows: StepRows) -> list[Damage]:
        return [one for one in rows.damaged if not self._stream.damage.is_known(one)]

    def _count_damage(self, rows: StepRows) -> list[str]:
        """Have all ranks know what any of them could not read, and rank 0 name it."""
        ledger = self._stream.damage
        new = ledger.add(one for part in self._ranks.gather(self._new_damage(rows)) for one in part)
        lines = list(describe(new, ledger))
        if self._ranks.is_first:
            for line in lines:
                logger.warning(line)
        return lines


def _tensors(batch: Batch) -> tuple[Tensor, ...]:
    return batch.tokens_BT, batch.targets_BT, batch.doc_start_BT, batch.row_ids_B


def _raise(error: Exception | None) -> None:
    if error is not None:
        raise error
