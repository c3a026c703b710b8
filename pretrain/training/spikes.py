"""Steps that stand out from those before, and when to go back for them.

A step is *bad* if its loss, or the logarithm of its gradient norm, lies more than `guard.spike_sigmas` deviations above
the median of the last good steps. Median and median absolute deviation are moved little by outliers, and values of bad
steps never enter the window: a mean over all values would take the first spike for the new normal, and one NaN would
poison it for as long as the window is. Every rank has the same numbers and comes to the same conclusion by itself.

Source: going back and leaving out the batches around a spike is section 5.1 of the PaLM paper (arXiv:2204.02311), which
went back 100 steps and left out 200 to 500.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pretrain.options.run_options import GuardSection

WINDOW = 128  # good steps that the next one is compared with; as many must be there
_SIGMA = 1.4826  # of a normal distribution, in median absolute deviations
# Least deviation that counts: a smooth curve must not make ripples into spikes.
_LEAST_LOSS = 0.01  # of the median
_LEAST_LOG_NORM = 0.05


@dataclass(frozen=True)
class Observation:
    """What is known of a step.

    Args:
        step: number of the update, from 1.
        begin, end: its rows in the run.
        loss: nats per scored token.
        grad_norm: before clipping; NaN where the update was skipped.
        starts_phase: rows of another mixture or length begin with it.
    """

    step: int
    begin: int
    end: int
    loss: float
    grad_norm: float
    starts_phase: bool


@dataclass(frozen=True)
class Spike:
    """Bad steps in a row for which the run goes back.

    Args:
        first_step, last_step: the bad steps.
        go_back_to: updates done, at most, at the checkpoint to go back to.
        begin, end: rows to be left out: those of the bad steps and of `guard.rollback_steps` before them.
        losses: of the bad steps.
    """

    first_step: int
    last_step: int
    go_back_to: int
    begin: int
    end: int
    losses: tuple[float, ...]


class SpikeGuard:
    """Judges every step; its state is part of the checkpoint, so that a resumed run judges alike.

    Attributes:
        num_rollbacks: how often the run went back, since `WINDOW` steps without need.
    """

    def __init__(self, section: GuardSection) -> None:
        """Begin with an empty window."""
        self._section = section
        self._new: list[Observation] = []
        self._losses: deque[float] = deque(maxlen=WINDOW)
        self._log_norms: deque[float] = deque(maxlen=WINDOW)
        self._steps: deque[tuple[int, int, int]] = deque(maxlen=section.rollback_steps + section.spike_steps + 2)
        self._bad: list[Observation] = []  # in a row
        self.num_rollbacks = 0
        self._went_back_from = 0
        self._repeated: Spike | None = None  # a spike whose steps are computed a second time

    def record(self, observation: Observation) -> None:
        """Take down a step, to be judged later."""
        self._new.append(observation)

    def judge(self, up_to_step: int) -> list[tuple[str, str]]:
        """Judge the steps that were recorded, up to a step that is the same on all ranks.

        What comes after a spike is not judged: it is done again, unless `forgive` is called. Else a save, which judges
        the newest step, would have that one end a spike for which a run that does not save at it goes back.

        Returns:
            Events and their messages.
        """
        events = []
        while self._new and self._new[0].step <= up_to_step and not self.spike():
            one = self._new.pop(0)
            if not self._section.spike_sigmas:
                continue
            if one.starts_phase:  # other data has another loss
                self._clear()
            self._steps.append((one.step, one.begin, one.end))
            if not math.isfinite(one.loss) or not math.isfinite(one.grad_norm):
                continue  # it moved nothing, and is SkipGuard's
            if reason := self._what_stands_out(one):
                self._bad.append(one)
                events.append(("spike", f"step {one.step}: {reason}"))
            else:
                self._bad.clear()
                self._losses.append(one.loss)
                self._log_norms.append(_log(one.grad_norm))
                if one.step >= self._went_back_from + WINDOW:
                    self.num_rollbacks = 0
            if (before := self._repeated) and one.step == before.last_step and not self.spike():
                self._repeated = None
                events.append((
                    "transient_fault", f"steps {before.first_step} to {before.last_step}, computed again from the same "
                    "state and rows, are as they should be: a machine computed them wrongly before",
                ))  # fmt: skip
        return events

    def _what_stands_out(self, one: Observation) -> str:
        if len(self._losses) < WINDOW:
            return ""
        for name, value, shown, window, least in (
            ("loss", one.loss, one.loss, self._losses, _LEAST_LOSS * abs(statistics.median(self._losses))),
            ("gradient norm", _log(one.grad_norm), one.grad_norm, self._log_norms, _LEAST_LOG_NORM),
        ):
            middle = statistics.median(window)
            sigma = max(_SIGMA * statistics.median(abs(other - middle) for other in window), least, 1e-12)
            if value > middle + self._section.spike_sigmas * sigma:
                usual = middle if name == "loss" else math.exp(middle)
                return (
                    f"the {name} is {shown:.4g}, {(value - middle) / sigma:.0f} deviations above {usual:.4g}, the "
                    f"median of the last {WINDOW} good steps"
                )
        return ""

    def spike(self) -> Spike | None:
        """The bad steps for which the run must go back, if there are as many in a row as `guard.spike_steps`."""
        needed = self._section.spike_steps
        if len(self._bad) < needed:
            return None
        bad = self._bad[:needed]  # whatever was done before this was asked: so it does not depend on when
        first = bad[0].step
        go_back_to = max(0, first - 1 - self._section.rollback_steps)
        begins = [begin for step, begin, _ in self._steps if step > go_back_to]
        losses = tuple(one.loss for one in bad)
        return Spike(first, bad[-1].step, go_back_to, min([*begins, bad[0].begin]), bad[-1].end, losses)

    def must_repeat(self, spike: Spike) -> bool:
        """Whether a spike's steps are to be computed again before rows are left out, as `guard.rerun` says."""
        again = self._section.rerun and (self._repeated is None or self._repeated.first_step != spike.first_step)
        self._repeated = spike if again else None
        return again

    def went_back(self, state: dict[str, Any], spike: Spike) -> None:
        """Take up the state of the checkpoint that the run went back to."""
        number = self.num_rollbacks
        self.load_state(state)
        self.num_rollbacks, self._went_back_from = number + 1, spike.last_step

    def forgive(self) -> None:
        """Take what is bad for the new normal, since there is nothing to go back to."""
        self._clear()

    def _clear(self) -> None:
        for window in (self._losses, self._log_norms, self._bad):
            window.clear()

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps, JSON; every step up to a spike must have been judged."""
        return {
            "losses": list(self._losses), "log_norms": list(self._log_norms), "steps": list(map(list, self._steps)),
            "bad": [[one.step, one.begin, one.end, one.loss, one.grad_norm] for one in self._bad],
            "new": [[one.step, one.begin, one.end, _finite(one.loss), _finite(one.grad_norm), one.starts_phase]
                    for one in self._new],
            "num_rollbacks": self.num_rollbacks, "went_back_from": self._went_back_from,
        }  # fmt: skip

    def load_state(self, state: dict[str, Any]) -> None:
        """Restore what `state` returned; of an earlier version's checkpoint, begin with an empty window."""
        self._clear()
        self._steps.clear()
        self._new = [
            Observation(step, begin, end, _or_nan(loss), _or_nan(grad_norm), starts_phase)
            for step, begin, end, loss, grad_norm, starts_phase in state.get("new", ())
        ]
        self._losses.extend(state.get("losses", ()))
        self._log_norms.extend(state.get("log_norms", ()))
        self._steps.extend((step, begin, end) for step, begin, end in state.get("steps", ()))
        self._bad.extend(
            Observation(step, begin, end, loss, grad_norm, False)
            for step, begin, end, loss, grad_norm in state.get("bad", ())
        )
        self.num_rollbacks = state.get("num_rollbacks", 0)
        self._went_back_from = state.get("went_back_from", 0)


def describe_ranges(ranges: Sequence[tuple[int, int]]) -> str:
    """Write ranges of rows for people: `4,096 to 8,191 and 12,288 to 16,383`."""
    return " and ".join(f"{begin:,} to {end - 1:,}" for begin, end in ranges)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _or_nan(value: float | None) -> float:
    return math.nan if value is None else value


def _log(norm: float) -> float:
    return math.log(max(norm, 1e-30))
