"""Who keeps a run from going on, and who slows it down: found from the beats of all ranks. No clocks, no sockets."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from pretrain.errors import EXIT_RETRY, PeerError
from pretrain.ranks.heartbeat import Beat

GO_ON = "The same command goes on from the newest checkpoint, or begins again if there is none."
_SLOW_RATIO = 1.5  # of a rank's seconds a step to the median rank's
_READINGS = 3  # in a row that agree before a rank is named, or no longer is
_STEPS = 5  # that all ranks must have timed for a reading


@dataclass(frozen=True)
class Verdict:
    """Why the run cannot go on.

    Attributes:
        reason: what is wrong and what to do.
        exit_status: that all ranks end with.
        step: that the run was at.
        lost: the rank whose process has ended, and whose end other ranks are about to notice by themselves; None if
            nobody's has, so that main threads may wait for ever.
    """

    reason: str
    exit_status: int = EXIT_RETRY
    step: int = 0
    lost: int | None = None

    @property
    def num_done(self) -> int:
        """Steps that the run had done."""
        return max(self.step - 1, 0)

    def error(self, is_shown: bool) -> PeerError:
        """The same as an error; `is_shown`: this rank is the one to show it."""
        error = PeerError(self.reason)
        error.exit_status, error.agreed = self.exit_status, not is_shown
        return error


@dataclass
class _Seen:
    """What is known of a rank."""

    host: str
    beat: Beat = field(default_factory=Beat)
    silent_seconds: float = 0.0  # since it was heard
    idle_seconds: float = 0.0  # since it was heard to get on
    has_left: bool = False


class Judge:
    """Knows the newest beat of every rank, and for how long there was none.

    Time is what the caller says has passed while it was running itself: neither a clock that is set nor a process that
    was stopped with all others (Ctrl-Z, a laptop that sleeps) makes a rank look stalled.

    Attributes:
        step: that the run is at, from 1; 0 in its start.
        is_starting: the first step is not over.
    """

    def __init__(self, hosts: Sequence[str], timeout_seconds: float, start_timeout_seconds: float) -> None:
        """Know the ranks.

        Args:
            hosts: of the ranks, in their order.
            timeout_seconds: how long a rank may stay without a sign of life.
            start_timeout_seconds: the same in the start and in phases that are patient.
        """
        self._seen = [_Seen(host) for host in hosts]
        self.step, self.is_starting = 0, True
        self._limits = {False: timeout_seconds, True: max(timeout_seconds, start_timeout_seconds)}

    def end_start(self) -> None:
        """Let the shorter limit hold from now on: what passed before does not count."""
        self.is_starting = False
        for seen in self._seen:
            seen.silent_seconds = seen.idle_seconds = 0.0

    def hear(self, rank: int, beat: Beat) -> None:
        """Take note of a rank's beat."""
        seen = self._seen[rank]
        seen.silent_seconds = 0.0
        if beat.num_beats != seen.beat.num_beats:
            seen.idle_seconds = 0.0
        seen.beat = beat

    def leave(self, rank: int) -> None:
        """Take note that a rank has done all that there was to do."""
        self._seen[rank].has_left = True

    def pass_time(self, seconds: float) -> None:
        """Count time for all ranks."""
        for seen in self._seen:
            seen.silent_seconds += seconds
            seen.idle_seconds += seconds

    def beats(self) -> list[Beat]:
        """The newest beat of each rank."""
        return [seen.beat for seen in self._seen]

    def name(self, rank: int) -> str:
        """A rank and where it runs."""
        return f"rank {rank} on {self._seen[rank].host}"

    def silent(self) -> Verdict | None:
        """Say who has not been heard of for longer than any rank may stay without a sign of life."""
        limit = self._limits[self.is_starting]
        silent = [rank for rank, seen in self._staying() if seen.silent_seconds >= limit]
        return self._silent(silent) if silent else None

    def stalled(self, silent_after_seconds: float) -> Verdict | None:
        """Say who does not get on, if anybody has not for longer than it may; who waits for another is not blamed.

        Args:
            silent_after_seconds: from when on a rank is not busy with one thing but silent, which `silent` will say.
        """
        staying = list(self._staying())
        if any(seen.silent_seconds >= silent_after_seconds for _, seen in staying):
            return None
        behind = min((seen.beat.position for _, seen in staying), default=0)
        overdue = [rank for rank, seen in staying if seen.idle_seconds >= self._limit_of(seen)]
        stuck = [r for r in overdue if self._seen[r].beat.position == behind and not self._seen[r].beat.is_waiting]
        if stuck:
            return self._stuck(stuck)
        return self._stuck(overdue) if len(overdue) == len(staying) > 0 else None

    def _staying(self) -> Iterator[tuple[int, _Seen]]:
        return ((rank, seen) for rank, seen in enumerate(self._seen) if not seen.has_left)

    def _limit_of(self, seen: _Seen) -> float:
        return self._limits[self.is_starting or seen.beat.is_patient]

    def ended(self, rank: int) -> Verdict:
        """Say that a rank's process has ended, or that its host closed the connection, without a word."""
        return Verdict(
            f"{self._at()}: {self.name(rank)} has ended without a word, last heard of in phase "
            f"'{self._seen[rank].beat.phase}'; expected it to go on. It was killed (for memory: see dmesg there), it "
            f"crashed (see its output), or its node failed. {GO_ON}",
            step=self.step, lost=rank,
        )  # fmt: skip

    def failed(self, rank: int, exit_status: int, reason: str) -> Verdict:
        """Say that a rank has ended with an error of its own."""
        return Verdict(f"{self.name(rank)}: {reason}", exit_status, self.step, lost=rank)

    def _silent(self, ranks: list[int]) -> Verdict:
        seen, option = self._seen[ranks[0]], self._option(self.is_starting)
        return Verdict(
            f"{self._at()}: {self._names(ranks)} not been heard of for {seen.silent_seconds:.0f} s, last in phase "
            f"'{seen.beat.phase}'; expected a sign of life within {option}. The process was stopped, or its "
            f"node or the network to it is down. {GO_ON}",
            step=self.step,
        )  # fmt: skip

    def _stuck(self, ranks: list[int]) -> Verdict:
        seen = self._seen[ranks[0]]
        option = self._option(self.is_starting or seen.beat.is_patient)
        waits = "The others wait for it. " if len(ranks) < len(self._seen) else ""
        if len(ranks) == len(self._seen) > 1 and seen.beat.is_waiting:
            waits = "They wait for each other: the network between them, or a GPU. "
        return Verdict(
            f"{self._at()}: {self._names(ranks)} not got on for {seen.idle_seconds:.0f} s, in phase "
            f"'{seen.beat.phase}'; expected a sign of life within {option}. {waits}Each rank's log (log.txt, "
            f"log-rank*.txt) says what it was doing. {GO_ON}",
            step=self.step,
        )  # fmt: skip

    def _at(self) -> str:
        return f"step {self.step}" if self.step else "start"

    def _option(self, is_long: bool) -> str:
        return f"parallel.{'start_' if is_long else ''}timeout_seconds ({self._limits[is_long]:g})"

    def _names(self, ranks: list[int]) -> str:
        if len(ranks) == 1:
            return f"{self.name(ranks[0])} has"
        if len(ranks) == len(self._seen):
            return f"all {len(ranks)} ranks have"
        more = f" and {len(ranks) - 3} more" if len(ranks) > 3 else ""
        return f"{', '.join(self.name(rank) for rank in ranks[:3])}{more} have"


class Stragglers:
    """Names ranks that take longer over their own part of a step than the others, which wait for them."""

    def __init__(self, judge: Judge) -> None:
        """Compare the ranks that a judge knows."""
        self._judge = judge
        self._last: list[tuple[int, float]] = []  # steps and seconds of each rank at the last reading
        self._agreeing: dict[int, int] = {}  # by rank: readings in a row that say other than what is known
        self._slow: set[int] = set()

    def read(self) -> Iterator[str]:
        """Compare the steps since the last reading, once there are enough; yield a sentence for each change."""
        now = [(beat.num_steps, beat.own_seconds) for beat in self._judge.beats()]
        if not self._last or any(steps < before for (steps, _), (before, _) in zip(now, self._last, strict=True)):
            self._last = now
            return
        spent = [(steps - before, seconds - former)
                 for (steps, seconds), (before, former) in zip(now, self._last, strict=True)]  # fmt: skip
        if len(now) < 2 or min(steps for steps, _ in spent) < _STEPS:
            return
        self._last = now
        means = [seconds / steps for steps, seconds in spent]
        median = statistics.median_low(means)  # of two ranks the quicker one
        for rank, mean in enumerate(means):
            is_slow = mean >= _SLOW_RATIO * median > 0
            if is_slow == (rank in self._slow):
                self._agreeing.pop(rank, None)
                continue
            self._agreeing[rank] = self._agreeing.get(rank, 0) + 1
            if self._agreeing[rank] >= _READINGS:
                del self._agreeing[rank]
                self._slow ^= {rank}
                yield self._sentence(rank, mean, median, is_slow)

    def _sentence(self, rank: int, mean: float, median: float, is_slow: bool) -> str:
        if not is_slow:
            return f"{self._judge.name(rank)} is about as fast as the other ranks again"
        return (
            f"{self._judge.name(rank)} takes {mean:.3g} s for its own part of a step, {mean / median:.1f} times as "
            f"long as the median rank ({median:.3g} s), and all others wait for it. Look for another program, heat, a "
            "slow disk or a faulty device there, or leave that node out"
        )
