"""What this rank's main thread is doing, written down where the watchdog's thread sees it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass(frozen=True)
class Beat:
    """What a rank was doing at one moment.

    Attributes:
        step: that it is at, from 1; 0 in the start of the run.
        phase: of the step, of the start, or between steps.
        position: phases begun since the start, in an order that is the same on all ranks: who has fewer is behind.
        num_beats: signs of life so far; more of them is progress.
        is_waiting: in a collective, for other ranks.
        is_patient: it may take as long as a start without another sign of life, as a disk may.
        num_steps, own_seconds: steps that were timed, and what they took without waiting for other ranks.
    """

    step: int = 0
    phase: str = "process group"
    position: int = 0
    num_beats: int = 0
    is_waiting: bool = False
    is_patient: bool = False
    num_steps: int = 0
    own_seconds: float = 0.0


class Heartbeat:
    """Written by the main thread, a few assignments at a time, and read by the watchdog's.

    Attributes:
        step: that is worked at, from 1; 0 in the start.
        is_starting: the first step is not over.
    """

    def __init__(self) -> None:
        """Begin, in the start of a run."""
        self.step, self.is_starting = 0, True
        self._phase, self._position, self._num_beats = "process group", 0, 0
        self._is_waiting = self._is_patient = self._is_held = False
        self._num_steps, self._own_seconds = 0, 0.0

    def enter(self, phase: str, is_patient: bool = False) -> None:
        """Say what begins now; all ranks say so in the same order.

        Args:
            phase: in a word or two.
            is_patient: it may take as long as a start without a sign of life, as a disk may.
        """
        self._phase, self._is_patient = phase, is_patient
        self._position += 1
        self._num_beats += 1

    def beat(self) -> None:
        """Give a sign of life within a phase that may be long."""
        self._num_beats += 1

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Enclose a collective: who is in one only waits for others. Its end is a sign of life."""
        before, self._is_waiting = self._is_waiting, True
        try:
            yield
        finally:
            self._is_waiting = before
            if not self._is_held:
                self._num_beats += 1

    @contextmanager
    def held(self) -> Iterator[None]:
        """Enclose collectives that are no signs of life: they only ask whether what is waited for is done."""
        self._is_held = True
        try:
            yield
        finally:
            self._is_held = False

    def count_step(self, own_seconds: float) -> None:
        """Count a step that this rank worked at for so long, without waiting for others."""
        self._own_seconds += own_seconds
        self._num_steps += 1

    def read(self) -> Beat:
        """Return what is done now."""
        return Beat(self.step, self._phase, self._position, self._num_beats, self._is_waiting,
                    self._is_patient, self._num_steps, self._own_seconds)  # fmt: skip
