"""What a step waits for its collectives, measured around the calls that DeepSpeed makes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import wraps
from typing import Any

from pretrain.ranks.heartbeat import Heartbeat
from pretrain.ranks.profiling import PhaseClock

COLLECTIVES = (
    "all_reduce", "all_reduce_coalesced", "reduce", "reduce_scatter", "reduce_scatter_tensor", "all_gather",
    "all_gather_into_tensor", "all_gather_coalesced", "broadcast", "all_to_all_single",
)  # fmt: skip


class CommunicationTimer:
    """Gives the seconds of collectives to the clock of the step that runs, as its phase `communication`.

    Attributes:
        clock: of the step; None where nothing is measured.
        heartbeat: told of every collective.
    """

    def __init__(self) -> None:
        self.clock: PhaseClock | None = None
        self.heartbeat = Heartbeat()
        self._inside = False

    def watch(self, backend: Any) -> None:
        """Time the collectives of a backend from now on; again for the same backend changes nothing.

        Args:
            backend: an object with collectives as methods, as DeepSpeed's.
        """
        for name in COLLECTIVES:
            call = getattr(backend, name, None)
            if call is not None and not hasattr(call, "is_timed"):
                setattr(backend, name, self._timed(call))

    @contextmanager
    def phase(self) -> Iterator[None]:
        """Enclose one call; a collective that others make up counts once."""
        if self._inside:
            yield
            return
        self._inside = True
        try:
            with self.heartbeat.waiting(), self.clock.within("communication") if self.clock else nullcontext():
                yield
        finally:
            self._inside = False

    def _timed(self, call: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(call)
        def timed(*args: Any, **kwargs: Any) -> Any:
            with self.phase():
                work = call(*args, **kwargs)
            return work if work is None or not hasattr(work, "wait") else _TimedWork(work, self)

        timed.is_timed = True  # type: ignore[attr-defined]
        return timed


class _TimedWork:
    """A collective that is under way; what waiting for it takes is communication too."""

    def __init__(self, work: Any, timer: CommunicationTimer) -> None:
        self._work, self._timer = work, timer

    def wait(self, *args: Any, **kwargs: Any) -> Any:
        with self._timer.phase():
            return self._work.wait(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._work, name)
