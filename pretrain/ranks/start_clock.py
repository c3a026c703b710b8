"""Where the time from the start of the process to its first step goes: people wait for it after every restart."""

from __future__ import annotations

import os
import time

from pretrain.ranks.heartbeat import Heartbeat


class StartClock:
    """Seconds of each part of a start, in order; the first one, `python`, is everything before this object.

    Args:
        part: that begins now.
    Attributes:
        seconds: by part.
        cpu_seconds: of this process, by part: the rest is waiting, for a file system or for other ranks.
        heartbeat: told of every part that begins.
    """

    def __init__(self, part: str = "imports") -> None:
        self._part, self._last, self._last_cpu = "python", time.monotonic() - process_age(), 0.0
        self.seconds: dict[str, float] = {}
        self.cpu_seconds: dict[str, float] = {}
        self.heartbeat = Heartbeat()
        self.begin(part)

    def begin(self, part: str) -> None:
        """Say that a part begins, and so the last one ends."""
        self.end()
        self._part = part
        self.heartbeat.enter(part)

    def end(self) -> dict[str, float]:
        """Say that the last part is over; return the seconds by part."""
        now, now_cpu = time.monotonic(), time.process_time()
        self.seconds[self._part], self.cpu_seconds[self._part] = now - self._last, now_cpu - self._last_cpu
        self._last, self._last_cpu = now, now_cpu
        return self.seconds

    def __str__(self) -> str:
        parts = ", ".join(f"{part} {seconds:.1f}" for part, seconds in self.seconds.items())
        return f"{sum(self.seconds.values()):.1f} s from the start of the process: {parts}"


def process_age() -> float:
    """Return the seconds since this process began; 0 where the system does not tell.

    Source: proc(5): field 22 of /proc/self/stat is the start in clock ticks after boot.
    """
    try:
        with open("/proc/self/stat", encoding="utf-8", errors="replace") as file:
            started = int(file.read().rpartition(")")[2].split()[19]) / os.sysconf("SC_CLK_TCK")
        return time.clock_gettime(time.CLOCK_BOOTTIME) - started
    except (OSError, ValueError, IndexError, AttributeError):
        return 0.0
