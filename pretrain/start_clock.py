"""Where the time from the start of the process to its first step goes: people wait for it after every restart."""

from __future__ import annotations

import os
import time


class StartClock:
    """Seconds of each part of a start, in order; the first part is everything before this object: Python and imports.

    Attributes:
        seconds: by part.
    """

    def __init__(self) -> None:
        self._last = time.monotonic()
        self.seconds: dict[str, float] = {"imports": process_age()}

    def mark(self, part: str) -> None:
        """Say that a part is over; it began where the last one ended."""
        now = time.monotonic()
        self.seconds[part] = now - self._last
        self._last = now

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
