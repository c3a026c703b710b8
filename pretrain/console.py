"""What commands print: a line that stays in place on a terminal or plain lines, and texts as they are written."""

from __future__ import annotations

import io
import os
import select
import shutil
import sys
import unicodedata
from collections.abc import Callable, Sequence
from functools import wraps
from typing import ParamSpec, TextIO

ERASE_BELOW = "\x1b[J"  # what a terminal takes for: clear all from the cursor to the end of the screen
_LEAST_WIDTH = 40  # columns, below which lines are not broken at words
EXIT_CLOSED_PIPE = 141  # a shell's status of a program that SIGPIPE has ended: 128 + 13
_Arguments = ParamSpec("_Arguments")


def ends_at_closed_pipe(main: Callable[_Arguments, int]) -> Callable[_Arguments, int]:
    """Make a command end without a traceback where nobody reads on, as in `longhaul prepare --inspect DIR | head`.

    Its standard output is flushed before it returns; what its encoding has not got is written as `\\u5b57`.
    """

    @wraps(main)
    def guarded(*args: _Arguments.args, **kwargs: _Arguments.kwargs) -> int:
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(errors="backslashreplace")
        try:
            try:
                status = main(*args, **kwargs)
            except SystemExit:  # argparse has printed the help
                sys.stdout.flush()
                raise
            sys.stdout.flush()
        except BrokenPipeError:
            closed = [stream for stream in (sys.stdout, sys.stderr) if _is_closed_pipe(stream)]
            if not closed:
                raise  # another pipe, such as a connection
            for stream in closed:  # else the interpreter tries to write what is left, and complains
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
            return EXIT_CLOSED_PIPE
        return status

    return guarded


def _is_closed_pipe(stream: TextIO) -> bool:
    poll = select.poll()
    try:
        poll.register(stream.fileno(), 0)
    except (OSError, ValueError):  # no file, as in a notebook
        return False
    return any(event & select.POLLERR for _, event in poll.poll(0))


def warn(text: str) -> None:
    """Print a warning on stderr."""
    write_patiently(sys.stderr, f"warning: {text}\n")


def is_live(stream: TextIO) -> bool:
    """Tell whether a stream is a terminal on which what was shown can be replaced."""
    return stream.isatty() and os.environ.get("TERM", "") not in ("", "dumb")


class Below:
    """What stands below the cursor on stderr's terminal, such as a view of progress, for a text to take its place."""

    is_shown = False


def write_patiently(stream: TextIO, text: str) -> None:
    """Print at once. Where a stream is a file on a disk that is full, text is lost: no reason to end a program."""
    if Below.is_shown and stream is sys.stderr:
        text, Below.is_shown = ERASE_BELOW + text, False
    try:
        stream.write(text)
        stream.flush()
    except BrokenPipeError:  # nobody reads on, which `ends_at_closed_pipe` sees to
        raise
    except OSError:
        pass


def size_of(stream: TextIO) -> tuple[int, int]:
    """Return columns and lines of a terminal as it is now; stdout, which `shutil` asks, may be a file."""
    try:
        columns, lines = os.get_terminal_size(stream.fileno())
    except (OSError, ValueError):  # no file
        columns = lines = 0
    size = shutil.get_terminal_size()
    return (columns, lines) if columns and lines else (size.columns, size.lines)


def num_columns(text: str) -> int:
    """Return how many columns of a terminal a text takes: two for a letter of Chinese, none for an accent by itself."""
    if text.isascii():
        return len(text)
    return sum(
        0 if unicodedata.combining(one) else 1 + (unicodedata.east_asian_width(one) in ("W", "F")) for one in text
    )


def wrapped(text: str, width: int) -> str:
    """Break lines at spaces, where a terminal would break them inside of words; the rest of a line is set in.

    Args:
        text: in lines. A word that is longer than a line stays whole, for people copy paths.
        width: columns that there are; in a narrow terminal it is left to break lines as it does.
    """
    found = []
    for line in text.split("\n") if width >= _LEAST_WIDTH else [text]:
        indent = " " * (len(line) - len(line.lstrip(" ")) + 4)
        while width >= _LEAST_WIDTH and num_columns(line) > width:
            begin = len(line) - len(line.lstrip(" "))
            spaces = [place for place in range(begin, len(line)) if line[place] == " "]
            if not spaces:
                break
            at = max((place for place in spaces if num_columns(line[:place]) <= width), default=spaces[0])
            found.append(line[:at].rstrip(" "))
            line = indent + line[at:].lstrip(" ")
        found.append(line)
    return "\n".join(found)


def cut(text: str, width: int) -> str:
    """Return as much of a text as so many columns hold."""
    while num_columns(text) > width:
        text = text[: max(width, 0)] if len(text) > width else text[:-1]
    return text


class LiveLine:
    """Shows progress: rewrites one line on a terminal, prints every so often elsewhere."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self.stream = stream or sys.stderr
        self.is_terminal = is_live(self.stream)
        self._shown = False

    def show(self, text: str, *, plain: bool) -> None:
        """Show `text` now on a terminal; elsewhere print it only if `plain`."""
        if self.is_terminal:
            write_patiently(self.stream, "\r\x1b[K" + cut(text, size_of(self.stream)[0] - 1))
            self._shown = True
        elif plain:
            self.say(text)

    def say(self, text: str) -> None:
        """Print a line that stays."""
        self.end()
        shown = wrapped(text, size_of(self.stream)[0] - 1) if self.is_terminal else text
        write_patiently(self.stream, shown + "\n")

    def end(self) -> None:
        """Leave the live line as it is and go to the next one."""
        if self._shown:
            write_patiently(self.stream, "\n")
            self._shown = False


class TextPrinter:
    """Prints texts in their order, though they are written side by side.

    The first text that is not complete is shown as it grows; what comes of later ones waits for its turn. Without
    `stream` each text is shown when it is complete.
    """

    def __init__(self, beginnings: Sequence[str], stream: bool, output: TextIO | None = None) -> None:
        self._output, self._stream = output or sys.stdout, stream
        self._waiting = list(beginnings)
        self._complete = [False] * len(beginnings)
        self._turn, self._is_shown = 0, False
        self._show()

    def add(self, index: int, text: str, finish: str) -> None:
        """Take what was added to a text; `finish` is not empty when it is complete."""
        self._waiting[index] += text
        self._complete[index] = bool(finish)
        self._show()

    def _show(self) -> None:
        while self._turn < len(self._waiting) and (self._stream or self._complete[self._turn]):
            if not self._is_shown and len(self._waiting) > 1:
                self._output.write(f"--- {self._turn + 1} of {len(self._waiting)} ---\n")
            self._output.write(self._waiting[self._turn])
            self._waiting[self._turn], self._is_shown = "", True
            if not self._complete[self._turn]:
                break
            self._output.write("\n")
            self._turn, self._is_shown = self._turn + 1, False
        self._output.flush()


def format_duration(seconds: float) -> str:
    """Write a duration the way people say it: `12s`, `3m05s`, `2h07m`, `4d03h`."""
    seconds = int(seconds)
    if seconds < 60:
        return f"{seconds}s"
    if seconds < 3600:
        return f"{seconds // 60}m{seconds % 60:02d}s"
    if seconds < 86400:
        return f"{seconds // 3600}h{seconds % 3600 // 60:02d}m"
    return f"{seconds // 86400}d{seconds % 86400 // 3600:02d}h"


def format_count(value: float) -> str:
    """Write a count with a unit letter: `950`, `12.3k`, `4.56M`, `7.89B`."""
    for limit, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if value >= limit:
            return f"{value / limit:.3g}{unit}"
    return f"{value:.0f}"


def counted(number: int, noun: str) -> str:
    """Write how many there are of something: `1 rank`, `2 ranks`, `1,000 steps`, `3 processes`."""
    end = "" if number == 1 else "es" if noun.endswith("s") else "s"
    return f"{number:,} {noun}{end}"


def format_bytes(num_bytes: float) -> str:
    """Write a number of bytes with a unit: `950 B`, `12.3 kB`, `4.6 GB`."""
    for limit, unit in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if num_bytes >= limit:
            return f"{num_bytes / limit:.1f} {unit}"
    return f"{num_bytes:.0f} B"
