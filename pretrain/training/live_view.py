"""What a terminal shows of a run while it trains: one view that is drawn anew in place. The only file on rich.

The cursor is left at the view's first line, which is empty, and is never hidden. So whatever else is printed, by
libraries in C or by other ranks, begins on that line and stays: the next drawing erases only what is below the cursor.
A terminal that was resized, whose lines are broken otherwise now, is erased as well; and a process that is killed
leaves nothing to be undone (docs/notes/0040-watching.md).
"""

from __future__ import annotations

import math
import select
import sys
import time
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TextIO

from pretrain.console import (
    ERASE_BELOW,
    Below,
    counted,
    format_bytes,
    format_count,
    format_duration,
    size_of,
    wrapped,
    write_patiently,
)

if TYPE_CHECKING:
    from rich.text import Text

REDRAW_SECONDS = 0.5  # between two drawings at least; a step that is longer is drawn when it is over
TREND_STEPS = 100  # whose losses are a small curve
_RECENT_STEPS = 20  # that times are means of
_NUM_MESSAGES = 3
_LABEL_WIDTH, _SPARK_WIDTH, _BAR_WIDTH = 10, 20, 20
# Events of a run that goes as it should. All others, which are unforeseen, stay in sight at the view's end.
_ORDINARY = set(
    "start mixture network plan first_step phase profile wandb adapters frozen resumed_from config_changed from_scratch"
    " not_from_scratch damage_mended done stopped".split()
)
_BLOCKS, _SIGNS = "▁▂▃▄▅▆▇█", {"down": "↓", "up": "↑", "level": "→", "full": "━", "rest": "─", "mark": "!"}
_ASCII_BLOCKS, _ASCII_SIGNS = "_.-=+*#@", {"down": "v", "up": "^", "level": "=", "full": "#", "rest": "-", "mark": "!"}


class LiveView:
    """The view of one run, told of each line of its `metrics.jsonl`."""

    def __init__(self, num_steps: int, save_every: int, stream: TextIO | None = None) -> None:
        """Show nothing yet.

        Args:
            num_steps: of the whole run.
            save_every: steps between checkpoints; 0: one at the end.
            stream: a terminal; by default stderr.
        """
        from rich.console import Console

        self._num_steps, self._save_every, self._stream = num_steps, save_every, stream or sys.stderr
        is_unicode = "utf" in (getattr(self._stream, "encoding", None) or "").lower()
        self._blocks, self._signs = (_BLOCKS, _SIGNS) if is_unicode else (_ASCII_BLOCKS, _ASCII_SIGNS)
        self._console = Console(file=self._stream, force_terminal=True, highlight=False, markup=False, emoji=False)
        self._drawn_at, self._is_begun, self._is_shown = -math.inf, False, False
        self.forget()

    def forget(self) -> None:
        """Forget what it was told."""
        self._line: Mapping[str, Any] = {}
        self._recent: deque[Mapping[str, Any]] = deque(maxlen=_RECENT_STEPS)
        self._losses: deque[float] = deque(maxlen=TREND_STEPS)
        self._held_out: tuple[int, float] | None = None
        self._best: tuple[int, float] | None = None
        self._messages: deque[tuple[int, str]] = deque(maxlen=_NUM_MESSAGES)

    def take(self, line: Mapping[str, Any]) -> None:
        """Take in a line of `metrics.jsonl`, without drawing."""
        if "event" in line:
            if line["event"] not in _ORDINARY:
                self._messages.append((line["step"], f"{line['event']}: {line['message']}"))
        elif "loss" in line:
            if line["attempt"] != self._line.get("attempt"):
                self._recent.clear()  # another start may be quicker, or on other machines
            self._line = line
            self._recent.append(line)
            if _is_number(line["loss"]):
                self._losses.append(line["loss"])
        elif _is_number(line.get("eval/loss")):
            self._held_out = line["step"], line["eval/loss"]
            if self._best is None or self._held_out[1] < self._best[1]:
                self._best = self._held_out

    def show(self) -> None:
        """Draw the view, unless that was done a moment ago or the terminal takes nothing now (Ctrl-S, a slow line)."""
        self._is_begun = True
        if time.monotonic() - self._drawn_at >= REDRAW_SECONDS and _takes_more(self._stream):
            self._write("", stays=False)

    def say(self, text: str) -> None:
        """Print a text that stays, above the view."""
        self._write(wrapped(text, size_of(self._stream)[0] - 1) + "\n", stays=False)

    def end(self) -> None:
        """Draw the view once more, and go to the line after it."""
        self._write("", stays=True)
        self._is_begun = False

    def _write(self, text: str, stays: bool) -> None:
        width, height = size_of(self._stream)
        drawing = ""
        if self._is_begun:
            lines = self._drawn(width - 1, height - 1)
            up = f"\x1b[{len(lines) - 1}A" if len(lines) > 1 else ""
            drawing = "\n".join(lines) + ("\n" if stays else f"\r{up}")
            self._drawn_at = time.monotonic()
        # So many spaces end on this line if the cursor is at its beginning, and else, behind what others wrote, on the
        # next one.
        erase = " " * (width - 1) + f"\r{ERASE_BELOW}" if self._is_shown else ""
        Below.is_shown, self._is_shown = False, self._is_begun and not stays
        write_patiently(self._stream, erase + text + drawing)
        Below.is_shown = self._is_shown

    def _drawn(self, width: int, height: int) -> list[str]:
        """The view's lines for a terminal, with its colours."""
        from rich.text import Text

        lines = [Text(), *self.lines(width)][: max(height, 1)]
        with self._console.capture() as captured:
            self._console.print(Text("\n").join(lines), end="", no_wrap=True, overflow="ignore", crop=False)
        return captured.get().split("\n")

    def lines(self, width: int) -> list[Text]:
        """What the view says, in lines of at most `width` columns."""
        from rich.text import Text

        lines: list[Text] = []
        for label, items in self._rows():
            lines += _flow(label, items, width)
        for step, message in self._messages:
            text = Text(f"{self._signs['mark']} step {step:,}  {' '.join(message.split())}", style="yellow")
            text.truncate(width, overflow="ellipsis" if self._signs is _SIGNS else "crop")
            lines.append(text)
        return lines

    def _rows(self) -> Iterable[tuple[str, list[Text]]]:
        from rich.text import Text

        line, step = self._line, self._line["step"]
        seconds = sum(one["step_seconds"] for one in self._recent) / len(self._recent)
        waits = sum(one["data_wait_seconds"] for one in self._recent) / (seconds * len(self._recent))
        left = (self._num_steps - step) * seconds
        yield "step", [
            Text(f"{step:,} of {self._num_steps:,}", style="bold"), self._bar(step),
            Text(f"{math.floor(100 * step / self._num_steps)}%"),
            *([Text(f"{format_duration(left)} left"), Text(f"done {_clock(left)}")] if left > 0 else []),
        ]  # fmt: skip
        loss = line["loss"]
        shown = Text(f"{loss:.4f}", style="bold") if _is_number(loss) else Text("not a number", style="bold red")
        yield "loss", [shown, *self._trend()]
        if self._held_out and self._best:
            yield (
                "held out",
                [
                    Text(f"{self._held_out[1]:.4f} at step {self._held_out[0]:,}"),
                    Text(f"best {self._best[1]:.4f} at step {self._best[0]:,}", style="green"),
                ],
            )
        mfu = line["mfu"]
        rate = sum(one["tokens_per_second"] * one["step_seconds"] for one in self._recent) / (
            seconds * len(self._recent)
        )
        yield "speed", [
            Text(f"{format_count(rate)} tokens/s"), Text(f"{seconds:.3g} s a step"),
            *([Text(f"MFU {100 * mfu:.1f}%")] if mfu and mfu <= 1 else []),
            Text(f"data wait {100 * waits:.1f}%", style="yellow" if waits > 0.05 else ""),
            Text(f"memory {format_bytes(line['memory_bytes'])}"),
        ]  # fmt: skip
        norm = line["grad_norm"]
        yield "update", [
            Text(f"lr {line['lr']:.2e}"),
            Text(f"gradient norm {norm:.3g}") if _is_number(norm) else Text("gradient not finite", style="red"),
            *([Text(f"{line['skipped_steps']} skipped", style="yellow")] if line["skipped_steps"] else []),
        ]  # fmt: skip
        if left > 0:
            next_save = min((step // self._save_every + 1) * self._save_every if self._save_every else self._num_steps,
                            self._num_steps)  # fmt: skip
            steps = next_save - step
            yield "saving", [Text(f"in {counted(steps, 'step')}"), Text(format_duration(steps * seconds))]

    def _bar(self, step: int) -> Text:
        from rich.text import Text

        done = min(_BAR_WIDTH * step // self._num_steps, _BAR_WIDTH)
        bar = Text(self._signs["full"] * done, style="green")
        return bar.append(self._signs["rest"] * (_BAR_WIDTH - done), style="dim")

    def _trend(self) -> list[Text]:
        """The last losses as a small curve, and by how much the later half of them is below the earlier one."""
        from rich.text import Text

        losses = list(self._losses)
        if len(losses) < 8:
            return []
        num_cells = min(_SPARK_WIDTH, len(losses))
        edges = [len(losses) * cell // num_cells for cell in range(num_cells + 1)]
        means = [sum(losses[begin:end]) / (end - begin) for begin, end in zip(edges, edges[1:], strict=False)]
        low, span = min(means), (max(means) - min(means)) or 1.0
        curve = "".join(self._blocks[min(int(8 * (mean - low) / span), 7)] for mean in means)
        (before, error_before), (after, error_after) = map(
            _mean, (losses[: len(losses) // 2], losses[len(losses) // 2 :])
        )
        change, error = after - before, math.hypot(error_before, error_after)
        kind = "level" if abs(change) <= 2 * error else "down" if change < 0 else "up"
        style = {"level": "", "down": "green", "up": "red"}[kind]
        word = f"{self._signs[kind]} {abs(change):.4f} in {len(losses)} steps"
        return [Text(curve, style="cyan"), Text(word, style=style)]


def _takes_more(stream: TextIO) -> bool:
    """Whether writing would not wait, as far as that can be known."""
    try:
        return bool(select.select([], [stream.fileno()], [], 0)[1])
    except (OSError, ValueError):
        return True


def _is_number(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def _mean(values: Sequence[float]) -> tuple[float, float]:
    """The mean, and its standard error."""
    mean = sum(values) / len(values)
    return mean, math.sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1) / len(values))


def _clock(seconds: float) -> str:
    """The time of day so many seconds from now, with the day where it is not today."""
    then = time.localtime(time.time() + seconds)
    now = time.localtime()
    if then[:3] == now[:3]:
        return time.strftime("%H:%M", then)
    return time.strftime("%a %H:%M" if seconds < 6 * 86400 else "%d %b %Y", then)


def _flow(label: str, items: Sequence[Text], width: int) -> list[Text]:
    """Lay items beside each other behind a label, on as many lines as they need; one that is too long is cut."""
    from rich.text import Text

    indent = _LABEL_WIDTH if width >= 2 * _LABEL_WIDTH else 0
    lines = [Text(label.ljust(indent)[:indent], style="dim") if indent else Text()]
    for item in items:
        gap = 0 if lines[-1].cell_len <= indent else 3
        if gap and lines[-1].cell_len + gap + item.cell_len > width:
            lines.append(Text(" " * indent))
            gap = 0
        lines[-1] = Text.assemble(lines[-1], " " * gap, item)
        if lines[-1].cell_len > width:
            lines[-1].truncate(width)
    return lines
