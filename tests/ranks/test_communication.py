"""What a step waits for its collectives, taken out of the phase that they happen in."""

from __future__ import annotations

import time

import torch

from pretrain.ranks.communication import CommunicationTimer
from pretrain.ranks.profiling import PhaseClock


class Work:
    def wait(self) -> str:
        time.sleep(0.02)
        return "done"

    def is_completed(self) -> bool:
        return False


class Backend:
    def all_reduce(self, seconds: float) -> None:
        time.sleep(seconds)

    def all_gather_into_tensor(self) -> Work:
        return Work()

    def all_gather_coalesced(self, seconds: float) -> None:
        self.all_reduce(seconds)  # one that others make up
        time.sleep(seconds)


def test_collectives_are_a_phase_of_their_own():
    backend, timer = Backend(), CommunicationTimer()
    timer.watch(backend)
    timer.watch(backend)  # again: still timed once
    backend.all_reduce(0.0)  # outside of a step: nothing to count
    timer.clock = clock = PhaseClock(torch.device("cpu"), timer.heartbeat)
    clock.begin("forward")
    time.sleep(0.01)
    clock.begin("backward")
    backend.all_reduce(0.03)
    work = backend.all_gather_into_tensor()
    assert work.wait() == "done" and not work.is_completed()
    time.sleep(0.01)
    clock.begin("optimizer")
    backend.all_gather_coalesced(0.02)
    clock.end()
    backend.all_reduce(0.01)  # after the last phase: none has it
    seconds = clock.seconds()
    assert list(seconds) == ["forward", "backward", "optimizer", "communication"]
    assert 0.0899 < seconds["communication"] < 0.15  # 0.03 + 0.02 + 0.04, and what a busy machine sleeps longer
    assert 0.0099 < seconds["forward"] < 0.025
    assert 0.0099 < seconds["backward"] < 0.025
    assert 0 <= seconds["optimizer"] < 0.008
