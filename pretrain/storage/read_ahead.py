"""Steps that are read ahead by a thread of its own."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")
_STOP_SECONDS = 5.0


class ReadAhead(Generic[T]):
    """Reads steps on a thread of its own, a bounded number ahead of who takes them."""

    def __init__(
        self, read_step: Callable[[int], T], cursor: int, next_cursor: Callable[[int], int], depth: int
    ) -> None:
        """Begin to read.

        Args:
            read_step: reads the step at a place.
            cursor: the first place.
            next_cursor: the place after one.
            depth: steps that are ready at most.
        """
        self._read_step, self._cursor, self._next_cursor, self._depth = read_step, cursor, next_cursor, depth
        self._steps: deque[T] = deque()
        self._failure: BaseException | None = None
        self._stopped = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="longhaul-data", daemon=True)
        self._thread.start()

    def take(self) -> T:
        """Return the next step; raise what the thread raised, once the steps before it are taken."""
        with self._changed:
            self._changed.wait_for(lambda: self._steps or self._failure or self._stopped)
            if self._stopped:
                raise RuntimeError("the token stream was closed")
            if self._steps:
                self._changed.notify_all()
                return self._steps.popleft()
            assert self._failure is not None
            raise self._failure

    def stop(self) -> None:
        """End the thread; a read that hangs in the file system is left behind, it does not hold up an exit."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()
        self._thread.join(_STOP_SECONDS)

    def wait(self) -> None:
        """Wait, after `stop`, until nothing is read any more, however long that takes."""
        self._thread.join()

    def _run(self) -> None:
        try:
            while True:
                with self._changed:
                    self._changed.wait_for(lambda: self._stopped or len(self._steps) < self._depth)
                    if self._stopped:
                        return
                step = self._read_step(self._cursor)
                self._cursor = self._next_cursor(self._cursor)
                with self._changed:
                    self._steps.append(step)
                    self._changed.notify_all()
        except BaseException as error:  # surfaces in take, whatever it is: nobody sees a thread's exception
            with self._changed:
                self._failure = error
                self._changed.notify_all()
