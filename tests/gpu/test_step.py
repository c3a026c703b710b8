"""What of a step only a GPU shows: what the host waits for, and which stream does what."""

from __future__ import annotations

import pytest
import torch

from pretrain.data.feed import Feed
from pretrain.ranks.distributed import Ranks
from pretrain.ranks.profiling import PhaseClock
from tests.data.test_feed import Stream

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: torch.cuda is not available"),
]

CYCLES = 400_000_000  # a fifth of a second and more


@pytest.fixture
def ranks() -> Ranks:
    ranks = Ranks(0, 0, 1, torch.device("cuda", 0))
    ranks.sum([0.0])  # the stream and the pinned memory exist
    torch.cuda.synchronize()
    return ranks


def busy() -> torch.cuda.Event:
    """Keep the device busy, and return the event that ends it."""
    torch.cuda._sleep(CYCLES)
    end = torch.cuda.Event()
    end.record()
    return end


def test_a_sum_of_numbers_does_not_wait_for_the_step(ranks):
    end = busy()
    assert ranks.sum([1.5, 2.0**40 + 1]) == [1.5, 2.0**40 + 1]
    assert not end.query(), "the host waited for what the device was given before"
    torch.cuda.synchronize()


def test_a_sum_of_a_tensor_waits_for_the_tensor(ranks):
    addend = torch.tensor([1.0, 2.0, 3.0], device=ranks.device)
    values = torch.zeros_like(addend)
    torch.cuda.synchronize()
    end = busy()
    values += addend
    pending = ranks.start_sum(values)
    assert not pending.is_ready() and not end.query()
    assert pending.result() == [1.0, 2.0, 3.0]
    assert end.query()


def test_rows_arrive_while_the_step_runs(ranks):
    feed = Feed(Stream(), ranks)
    feed.take()
    torch.cuda.synchronize()
    end = busy()
    feed.prepare(stop=True)
    assert feed.stop_requested() and not end.query()
    rows = feed.take()
    assert not end.query()
    tokens_BT = rows.micro_batches[0][0]
    assert tokens_BT.device == ranks.device and tokens_BT.tolist() == [[2] * 4]
    assert end.query()


def test_phases_are_those_of_the_device(ranks):
    torch.cuda._sleep(1000)
    torch.cuda.synchronize()
    clock = PhaseClock(ranks.device)
    clock.begin("forward")
    torch.cuda._sleep(CYCLES)
    clock.begin("backward")
    torch.cuda._sleep(CYCLES)
    with clock.within("communication"):
        torch.cuda._sleep(2 * CYCLES)
    with torch.cuda.stream(torch.cuda.Stream()), clock.within("communication"):
        torch.cuda._sleep(1000)  # beside the step: not counted
    clock.end()
    torch.cuda.synchronize()
    seconds = clock.seconds()
    assert seconds["backward"] == pytest.approx(seconds["forward"], rel=0.2)
    assert seconds["communication"] == pytest.approx(2 * seconds["forward"], rel=0.2)
