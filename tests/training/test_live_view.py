"""The view on a terminal: what it says, in any width, and that nothing that others print is lost."""

from __future__ import annotations

import io
import re
import sys

import pytest

from pretrain.console import Below, warn
from pretrain.training.live_view import LiveView
from tests.helpers.screen import Screen
from tests.training.test_metrics import make_log, step_metrics


class Terminal(io.StringIO):
    """A terminal that a person looks at."""

    def __init__(self, width: int, height: int, encoding: str) -> None:
        super().__init__()
        self.screen, self._encoding = Screen(width, height), encoding

    encoding = property(lambda self: self._encoding)

    def isatty(self) -> bool:
        return True

    def write(self, text: str) -> int:
        text.encode(self._encoding)
        self.screen.feed(text)
        return super().write(text)


@pytest.fixture
def terminals(monkeypatch):
    """What makes stderr a terminal, from within a test: pytest sets stderr between fixtures and tests."""
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setattr("pretrain.training.live_view.REDRAW_SECONDS", 0.0)
    monkeypatch.setattr(Below, "is_shown", False)
    for name in ("NO_COLOR", "FORCE_COLOR", "COLORTERM"):
        monkeypatch.delenv(name, raising=False)

    def open_terminal(width: int = 100, height: int = 30, encoding: str = "utf-8") -> Terminal:
        terminal = Terminal(width, height, encoding)
        monkeypatch.setenv("COLUMNS", str(width))
        monkeypatch.setenv("LINES", str(height))
        monkeypatch.setattr(sys, "stderr", terminal)
        return terminal

    return open_terminal


def line_of(step: int, **own) -> dict:
    return {"step": step, "loss": 4.0 - step / 100, "step_seconds": 2.0, "data_wait_seconds": 0.2, "mfu": 0.412,
            "tokens_per_second": 12345.0, "memory_bytes": 61_200_000_000, "lr": 3e-4, "grad_norm": 0.82,
            "skipped_steps": 0, "attempt": 1} | own  # fmt: skip


def view_of_a_run(num_steps=2000, save_every=250) -> LiveView:
    view = LiveView(num_steps, save_every)
    for step in range(1, 101):
        view.take(line_of(step))
    view.take({"step": 50, "eval/loss": 3.1})
    view.take({"step": 100, "eval/loss": 3.25})
    view.take({"step": 60, "event": "checkpoint_damaged", "message": "of step 40\nis damaged"})
    view.take({"step": 61, "event": "first_step", "message": "is nothing to be warned of"})
    return view


def test_the_view_says_how_the_run_stands(terminals):
    terminal = terminals()
    view = view_of_a_run()
    view.show()
    view.end()
    shown = terminal.screen.text()
    for words in ("step      100 of 2,000   ━───────────────────   5%   1h03m left   done ", "loss      3.0000   █",
                  "▁   ↓ 0.5000 in 100 steps", "held out  3.2500 at step 100   best 3.1000 at step 50",
                  "12.3k tokens/s   2 s a step   MFU 41.2%   data wait 10.0%   memory 61.2 GB",
                  "lr 3.00e-04   gradient norm 0.82", "saving    in 150 steps   5m00s",
                  "! step 60  checkpoint_damaged: of step 40 is damaged"):  # fmt: skip
        assert words in shown, shown
    assert "warned" not in shown and terminal.screen.column == 0
    assert "\x1b[?25l" not in terminal.getvalue()  # the cursor is never hidden, so no end can leave it so


def test_losses_that_only_jump_about_have_no_trend_and_a_bad_one_is_named(terminals):
    terminal = terminals()
    view = LiveView(2000, 0)
    for step in range(1, 61):
        view.take(line_of(step, loss=3.0 + (step % 2)))
    view.show()
    assert "→ 0.0000 in 60 steps" in terminal.screen.text() and "in 1,940 steps" in terminal.screen.text()
    view.take(line_of(61, loss=float("nan"), grad_norm=float("nan"), mfu=1.4, skipped_steps=2))
    view.show()
    shown = terminal.screen.text()
    assert "not a number" in shown and "gradient not finite   2 skipped" in shown and "MFU" not in shown


def test_at_the_end_nothing_is_left_to_come(terminals):
    terminal = terminals()
    view = LiveView(100, 30)
    view.take(line_of(100))
    view.show()
    assert "100%" in terminal.screen.text() and "left" not in terminal.screen.text()
    assert "saving" not in terminal.screen.text()


@pytest.mark.parametrize("width", [12, 40, 80, 200])
def test_no_line_is_wider_than_the_terminal(terminals, width):
    terminal = terminals(width)
    view = view_of_a_run()
    view.show()
    view.show()
    shown = terminal.screen.text().splitlines()
    assert shown[0] == "" and all(len(line) < width for line in shown)
    assert sum("100 of 2,000"[: width - 1] in line for line in shown) == 1
    if width == 40:
        assert {"speed     12.3k tokens/s   2 s a step", "          MFU 41.2%   data wait 10.0%"} <= set(shown)


def test_a_low_terminal_shows_the_first_lines(terminals):
    terminal = terminals(height=4)
    view = view_of_a_run()
    for _ in range(3):
        view.show()
    assert len(terminal.screen.text().splitlines()) == 3 and terminal.screen.text().count("2,000") == 1


def test_whatever_else_is_printed_stays_and_the_view_comes_once(terminals):
    terminal = terminals()
    view = view_of_a_run()
    terminal.write("before\n")
    view.show()
    view.say("step 100  held-out loss 3.2500")
    warn("of this process")  # clears the view first
    view.show()
    terminal.write("of a library in C\n")
    view.show()
    terminal.write("two lines\nof another rank\n")
    view.show()
    terminal.write("and one that is not ended")
    view.show()
    view.end()
    terminal.write("after\n")
    shown = terminal.screen.text().splitlines()
    words = ("before", "step 100  held-out loss 3.2500", "warning: of this process", "of a library in C", "two lines",
             "of another rank", "and one that is not ended", "after")  # fmt: skip
    places = [next(place for place, line in enumerate(shown) if line.startswith(word)) for word in words]
    assert places == sorted(places)
    assert sum("100 of 2,000" in line for line in shown) == 1
    assert shown[places[2]] == "warning: of this process" and shown[places[3]] == "of a library in C"


def test_a_terminal_that_became_narrower_is_drawn_anew(monkeypatch, terminals):
    terminal = terminals()
    view = view_of_a_run()
    view.show()
    terminal.screen.width = 50
    terminal.screen.rows[1:] = [part for line in terminal.screen.rows[1:] for part in re.findall(".{1,50}", line)]
    monkeypatch.setenv("COLUMNS", "50")
    view.show()
    shown = terminal.screen.text()
    assert shown.count("2,000") == shown.count("held out") == shown.count("saving") == 1


def test_colours_are_left_out_where_they_are_not_wanted(monkeypatch, terminals):
    terminal = terminals()
    view_of_a_run().show()
    assert "\x1b[36m" in terminal.getvalue()
    monkeypatch.setenv("NO_COLOR", "1")
    plain = terminals()
    view_of_a_run().show()
    assert not re.search(r"\x1b\[[0-9;]*3[0-9]m", plain.getvalue()) and "2,000" in plain.screen.text()


def test_a_terminal_without_unicode_gets_ascii(terminals):
    terminal = terminals(encoding="latin-1")
    view_of_a_run().show()
    assert "v 0.5000 in 100 steps" in terminal.screen.text() and "#-----" in terminal.screen.text()


def test_it_is_drawn_a_few_times_a_second(monkeypatch, terminals):
    terminal = terminals()
    monkeypatch.setattr("pretrain.training.live_view.REDRAW_SECONDS", 60.0)
    view = view_of_a_run()
    for _ in range(50):
        view.show()
    assert terminal.getvalue().count("2,000") == 1
    view.take(line_of(101))
    view.end()
    assert "101 of 2,000" in terminal.screen.text()


def test_metrics_draw_a_view_on_a_terminal_and_nothing_moves_on_others(monkeypatch, terminals, tmp_path):
    terminal = terminals()
    log = make_log(tmp_path, tensorboard=False)
    for step in (1, 2, 3):
        log.step(step_metrics(step, loss=4.0 - step))
    log.evaluation(3, 3000, 1.5, 4.48, 0.7)
    log.rewind(2)
    log.event(3, "rollback", "back to step 2")
    log.step(step_metrics(3, loss=0.5))
    log.close()
    shown = terminal.screen.text()
    assert "3 of 10" in shown and "loss      0.5000" in shown and "! step 3  rollback: back to step 2" in shown
    assert "step 3  held-out loss 1.5000" in shown and "held out  1.5" not in shown  # taken back with its step
    resumed = terminals()
    log = make_log(tmp_path, first_step=3, attempt=2, tensorboard=False)
    log.step(step_metrics(4, loss=0.25))
    log.close()
    assert "! step 3  rollback" in resumed.screen.text() and "4 of 10" in resumed.screen.text()
    for term in ("dumb", ""):
        monkeypatch.setenv("TERM", term)
        plain = terminals()
        log = make_log(tmp_path / f"plain-{term}", tensorboard=False)
        log.step(step_metrics(1))
        log.step(step_metrics(2))
        log.close()
        assert plain.getvalue().startswith("step 2/10  loss 2.0000") and "\x1b" not in plain.getvalue()
