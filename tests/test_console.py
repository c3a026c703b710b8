"""Progress lines, on a terminal and in a file."""

from __future__ import annotations

import io

import pytest

from pretrain.console import (
    LiveLine,
    counted,
    cut,
    format_count,
    format_duration,
    num_columns,
    warn,
    wrapped,
    write_patiently,
)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_gets_one_line_that_changes():
    stream = Terminal()
    line = LiveLine(stream)
    line.show("step 1", plain=False)
    line.show("step 2", plain=False)
    line.say("saved")
    assert stream.getvalue() == "\r\x1b[Kstep 1\r\x1b[Kstep 2\nsaved\n"


def test_lines_break_at_words_and_no_word_is_lost():
    text = (
        "step 4  event: "
        + "words of a sentence that is long " * 4
        + "/a/path/"
        + "x" * 60
        + "/end 字字字字 a\n  second"
    )
    lines = wrapped(text, 50).split("\n")
    assert " ".join(text.split()) == " ".join(" ".join(lines).split())
    long = [line for line in lines if num_columns(line) > 50]
    assert [line.split() for line in long] == [["/a/path/" + "x" * 60 + "/end"]]
    assert all(line.startswith("    ") for line in lines[1:-1]) and lines[-1] == "  second"
    assert wrapped("字 " * 30, 41).split("\n")[0] == "字 " * 13 + "字" and wrapped("a b " * 30, 20) == "a b " * 30
    assert num_columns("e\u0301字") == 3 and cut("字字字", 5) == "字字"


def test_a_file_gets_plain_lines_when_due():
    stream = io.StringIO()
    line = LiveLine(stream)
    line.show("step 1", plain=False)
    line.show("step 2", plain=True)
    line.end()
    assert stream.getvalue() == "step 2\n"


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0s"), (59, "59s"), (185, "3m05s"), (7620, "2h07m"), (356400, "4d03h")]
)
def test_durations(seconds, text):
    assert format_duration(seconds) == text


@pytest.mark.parametrize(
    ("value", "text"), [(950, "950"), (12345, "12.3k"), (4.56e6, "4.56M"), (7.89e9, "7.89B"), (1e12, "1T")]
)
def test_counts(value, text):
    assert format_count(value) == text


def test_one_of_a_thing_is_one():
    assert [counted(number, "rank") for number in (0, 1, 1000)] == ["0 ranks", "1 rank", "1,000 ranks"]
    assert [counted(number, "process") for number in (1, 2)] == ["1 process", "2 processes"]


def test_a_full_disk_under_stderr_ends_nothing(monkeypatch):
    with open("/dev/full", "w") as full:
        write_patiently(full, "lost\n")
        LiveLine(full).say("lost")
        monkeypatch.setattr("sys.stderr", full)
        warn("lost")
        full.buffer.raw.close()  # what is buffered cannot be written either
    with pytest.raises(BrokenPipeError):
        write_patiently(Closed(), "nobody reads")


class Closed(io.StringIO):
    def write(self, text: str) -> int:
        raise BrokenPipeError
