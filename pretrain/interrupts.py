"""How a command ends at Ctrl-C, SIGTERM, or when its terminal is closed: in one line and with a status of its own.

While a command starts, a signal ends the process at once: nothing is begun, and imports, which take most of that
time, are not written to be interrupted: some make another error of KeyboardInterrupt, some lose it. From `begin_work`
on a signal raises KeyboardInterrupt, so that what is half-written is removed on the way out. Before the first line of
a command Python itself starts, some hundredths of a second, and there Ctrl-C has Python's own traceback.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from types import FrameType
from typing import ParamSpec

from pretrain.console import write_patiently
from pretrain.errors import EXIT_INTERRUPTED

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_ONCE_SECONDS = 1.0  # one stop can come twice: from the terminal, and from a launcher that passes it on
_Arguments = ParamSpec("_Arguments")


class Terminated(KeyboardInterrupt):
    """SIGTERM or SIGHUP: a stop like Ctrl-C, but by nobody who sits at the terminal and could be asked."""


class _Stop:
    """What the signals of one command do.

    Attributes:
        said, status: the line and the exit status, if it is stopped now.
        is_working: a signal raises; else it ends the process.
        received: a signal has come.
        is_holding: a signal waits.
    """

    def __init__(self, status: int) -> None:
        self.said, self.status = "stopped before it began", status
        self.is_working, self.received, self._raised_at = False, False, 0.0
        self.is_holding, self._waiting = False, 0
        # one of several ranks speaks
        self.speaks = os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) == "0"

    def handle(self, number: int, _frame: FrameType | None) -> None:
        self.received = True
        if self.is_holding:
            self._waiting = number
            return
        if not self.is_working:
            if self.speaks and self.said:
                os.write(2, f"{_line_end()}{self.said}\n".encode())  # sys.stderr may be in the middle of a write
            os._exit(self.status)
        now = time.monotonic()
        if now - self._raised_at >= _ONCE_SECONDS:
            self._raised_at = now
            raise KeyboardInterrupt if number == signal.SIGINT else Terminated

    def release(self) -> None:
        """Do what has waited."""
        self.is_holding, number, self._waiting = False, self._waiting, 0
        if number:
            self.handle(number, None)

    def end(self) -> int:
        """Say it; what still comes ends the process, which has only threads to wait for."""
        self.is_working = False
        if self.speaks:
            write_patiently(sys.stderr, f"{_line_end()}{self.said}\n")
        self.said = ""
        return self.status


_current: _Stop | None = None


def _line_end() -> str:
    return "\n" if sys.stderr.isatty() else ""  # the terminal has written ^C


def ends_on_signal(status: int = EXIT_INTERRUPTED) -> Callable[[Callable[_Arguments, int]], Callable[_Arguments, int]]:
    """Make a command end in one line on stderr when it is told to stop.

    Args:
        status: exit status, `EXIT_STOPPED` where the same command goes on with what is done.
    """

    def decorate(main: Callable[_Arguments, int]) -> Callable[_Arguments, int]:
        @wraps(main)
        def guarded(*args: _Arguments.args, **kwargs: _Arguments.kwargs) -> int:
            global _current
            outer, stop = _current, _Stop(status)
            _current, previous = stop, {}
            if threading.current_thread() is threading.main_thread():
                # what nohup, or a shell that starts it in the background, has it ignore stays ignored
                heeded = [number for number in SIGNALS if signal.getsignal(number) != signal.SIG_IGN]
                previous = {number: signal.signal(number, stop.handle) for number in heeded}
            try:
                return main(*args, **kwargs)
            except KeyboardInterrupt:
                return stop.end()
            except BaseException:  # that a library made of it
                if not stop.received:
                    raise
                return stop.end()
            finally:
                _current = outer
                if not stop.received:
                    for number, handler in previous.items():
                        signal.signal(number, handler)

        return guarded

    return decorate


def begin_work(said: str = "stopped", status: int | None = None) -> None:
    """Tell that from here on a signal is to raise KeyboardInterrupt in the command that runs.

    Args:
        said: what the command then says.
        status: its exit status; None: that of the command.
    """
    if _current is not None:
        _current.said, _current.is_working = said, True
        _current.status = _current.status if status is None else status


@contextmanager
def signals_held() -> Iterator[None]:
    """Hold signals, from programs that are started too, until what belongs together is done."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # of this thread, which is what others inherit
    if _current is not None:
        _current.is_holding = True  # another thread of a library may get it
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        if _current is not None:
            _current.release()
