"""What a step gets: rows copied and counted ahead, which count as consumed only once they are taken."""

from __future__ import annotations

import pytest
import torch

from pretrain.data.damage import DamageLedger
from pretrain.data.feed import Feed
from pretrain.data.row_reader import Batch
from pretrain.data.stream import StepRows
from pretrain.errors import DataError
from pretrain.ranks.distributed import Ranks
from pretrain.ranks.sequence_parallel import SequenceGroup

RANKS = Ranks(0, 0, 1, torch.device("cpu"))


class Stream:
    """Steps of one micro-batch whose tokens are the step's number; step 3 cannot be read."""

    def __init__(self) -> None:
        self.num_read = self.num_counted = 0
        self.damage = DamageLedger([], 0.0)

    def read_step(self) -> StepRows:
        self.num_read += 1
        if self.num_read == 3:
            raise DataError("shard-3.tar: cannot be read")
        row = torch.full((1, 4), self.num_read)
        return StepRows([Batch(row, row + 1, row * 0, row[:, 0])], num_targets=4 * self.num_read, damaged=[])

    def advance(self) -> None:
        self.num_counted += 1


def test_a_step_counts_when_it_is_taken():
    stream = Stream()
    feed = Feed(stream, RANKS)
    first = feed.take()
    assert (first.num_targets, first.num_damaged, stream.num_counted) == (4, 0, 1)
    feed.prepare(stop=False)
    assert (stream.num_read, stream.num_counted) == (2, 1)  # a checkpoint now begins with step 2
    second = feed.take()
    assert [tensor.flatten().tolist() for tensor in second.micro_batches[0]] == [[2] * 4, [3] * 4, [0] * 4, [2]]
    assert stream.num_counted == 2


@pytest.mark.parametrize(("index", "tokens", "targets"), [(0, [1, 1], [2, 2]), (1, [1, 1], [2, -100])])
def test_ranks_that_share_rows_get_their_slots_and_all_starts_of_documents(index, tokens, targets):
    stream = Stream()
    read = stream.read_step

    def read_step():
        rows = read()
        rows.micro_batches[0].targets_BT[:, 3] = -100  # the padding of a row
        rows.num_targets = 3
        return rows

    stream.read_step = read_step
    step = Feed(stream, RANKS, SequenceGroup(2, index, "unused")).take()
    found = [tensor.flatten().tolist() for tensor in step.micro_batches[0]]
    assert found == [tokens, targets, [0] * 4, [1]]
    assert step.num_targets == sum(target >= 0 for target in targets)  # here of this rank alone: all are summed


def test_rows_that_cannot_be_read_fail_the_step_that_needs_them(monkeypatch):
    stream = Stream()
    feed = Feed(stream, RANKS)
    monkeypatch.setattr(Ranks, "agree", lambda self, action: action())
    feed.take()
    feed.take()
    feed.prepare(stop=False)  # while step 2 runs: not its problem
    assert stream.num_counted == 2
    with pytest.raises(DataError, match="shard-3.tar: cannot be read"):
        feed.take()
    assert stream.num_counted == 2


def test_a_stop_is_told_with_the_next_steps_rows():
    feed = Feed(Stream(), RANKS)
    assert not feed.stop_requested()
    feed.take()
    feed.prepare(stop=False)
    assert not feed.stop_requested()
    feed.take()
    feed._stream.num_read = 0
    feed.prepare(stop=True)
    assert feed.stop_requested()
