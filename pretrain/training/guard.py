"""Stopping on request, and what to do about updates that had to be skipped."""

from __future__ import annotations

import os
import signal
import sys
import threading
from types import FrameType

from pretrain.console import write_patiently
from pretrain.errors import EXIT_STOPPED, TrainingError


class StopRequest:
    """Remembers SIGTERM, SIGINT and SIGUSR1, so that the loop can finish its step, save and exit 75.

    Ctrl-C reaches a rank twice (from the terminal, and as SIGTERM from the launcher), so repeats change nothing.

    Attributes:
        received: name of the first signal.
        ends_process: there is nothing to finish and nobody to agree with yet: a signal ends the process at once.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)

    def __init__(self, ends_process: bool = False, speaks: bool = True) -> None:
        """Begin with `ends_process`; `speaks`: whether this rank says so when a signal has ended it."""
        self.received: str | None = None
        self.ends_process, self._speaks = ends_process, speaks
        self._previous: dict[int, object] = {}

    def __enter__(self) -> StopRequest:
        reader, self._writer = os.pipe()
        os.set_blocking(self._writer, False)
        # Python runs handlers between bytecodes only, and ranks that wait for a late one do so in C++ for half an hour.
        self._previous_writer = signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        threading.Thread(target=self._hear, args=(reader,), name="longhaul-signals", daemon=True).start()
        for number in self.SIGNALS:
            self._previous[number] = signal.signal(number, self._remember)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        signal.set_wakeup_fd(self._previous_writer)
        os.close(self._writer)

    def _hear(self, reader: int) -> None:
        is_first = True
        while numbers := os.read(reader, 64):
            if not (found := [number for number in numbers if number in self.SIGNALS]):
                continue
            name = signal.Signals(found[0]).name
            if self.ends_process:
                self._say(f"stopped by {name} before training began; nothing is lost.")
                os._exit(EXIT_STOPPED)
            if is_first:
                self._say(f"{name}: what was begun is finished and saved, then this ends; once more changes nothing.")
            is_first = False
        os.close(reader)

    def _say(self, text: str) -> None:
        if self._speaks:
            write_patiently(sys.stderr, f"{text}\n")

    def _remember(self, number: int, _frame: FrameType | None) -> None:
        self.received = self.received or signal.Signals(number).name


class SkipGuard:
    """Counts updates skipped for non-finite gradients and stops the run when they do not end."""

    def __init__(self, max_skipped_steps: int, num_skipped: int = 0) -> None:
        self.max_skipped_steps = max_skipped_steps
        self.num_skipped = num_skipped
        self._in_a_row = 0

    def restart(self, num_skipped: int) -> None:
        """Go on from a checkpoint before which so many updates were skipped."""
        self.num_skipped, self._in_a_row = num_skipped, 0

    def record(self, applied: bool, step: int, rows: tuple[int, int]) -> None:
        """Count one step's outcome.

        Args:
            applied: whether the weights moved.
            step: the update's number, from 1.
            rows: first and one past the last row of the step, for the message.
        Raises:
            TrainingError: on all ranks, more than `guard.max_skipped_steps` updates in a row were skipped.
        """
        if applied:
            self._in_a_row = 0
            return
        self.num_skipped += 1
        self._in_a_row += 1
        if self._in_a_row > self.max_skipped_steps:
            error = TrainingError(
                f"step {step}: gradients are not finite for {self._in_a_row} steps in a row (rows {rows[0]} to "
                f"{rows[1] - 1} last); expected at most guard.max_skipped_steps ({self.max_skipped_steps}). The "
                "weights, and what was saved, are untouched by them. Lower optim.lr, raise schedule.warmup_steps, or "
                "compute in more digits (train.precision bf16 rather than fp16, or fp32)."
            )
            error.agreed = True
            raise error
