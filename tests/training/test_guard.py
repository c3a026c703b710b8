"""Stop requests and skipped updates."""

from __future__ import annotations

import os
import signal

import pytest

from pretrain.errors import TrainingError
from pretrain.training.guard import SkipGuard, StopRequest


@pytest.mark.parametrize("number", StopRequest.SIGNALS)
def test_a_signal_is_remembered_and_handlers_are_restored(number):
    before = signal.getsignal(number)
    with StopRequest() as stop:
        assert stop.received is None
        os.kill(os.getpid(), number)
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.received == signal.Signals(number).name
    assert signal.getsignal(number) == before


def test_skips_in_a_row_end_the_run_and_good_steps_forgive():
    guard = SkipGuard(2)
    for step, applied in enumerate([False, False, True, False, False], start=1):
        guard.record(applied, step, (0, 8))
    assert guard.num_skipped == 4
    with pytest.raises(
        TrainingError, match=r"step 6: gradients are not finite for 3 steps in a row \(rows 40 to 47"
    ) as caught:
        guard.record(False, 6, (40, 48))
    assert caught.value.agreed  # rank 0 alone says it
