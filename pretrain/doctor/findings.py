"""What a check is asked, and the lines that it finds: ok, warning, failure or skipped, with the mend."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pretrain.errors import LonghaulError

OK, WARNING, FAILURE, SKIPPED = "ok", "warning", "failure", "skipped"
ROOT = Path(__file__).resolve().parents[2]
# The folder of a script that is run is first on `sys.path`, and with -m and -c the working folder: in launch/ a module
# would be taken for the package `pretrain`.
_START = "import runpy, sys; sys.path[0] = sys.argv[1]; del sys.argv[:2]; runpy.run_module(sys.argv[0], {}, '__main__')"


@dataclass(frozen=True)
class Request:
    """What is to be looked at.

    Attributes:
        folder: whose disk is tried; empty: the run folder of the config, or the working folder.
        config: YAML file or run folder; empty for none.
        overrides: `key=value` that replace the file's.
        store: URL to list; empty for none.
        is_quick: leave out what takes long.
        compiles: build DeepSpeed's operators.
    """

    folder: str = ""
    config: str = ""
    overrides: Sequence[str] = ()
    store: str = ""
    is_quick: bool = False
    compiles: bool = False


@dataclass(frozen=True)
class Line:
    """One thing that was looked at.

    Attributes:
        name: what it is.
        outcome: OK, WARNING, FAILURE or SKIPPED.
        text: what was found.
        mend: what to do about it, in one sentence; empty where nothing is to be done.
    """

    name: str
    outcome: str
    text: str
    mend: str = ""


def ok(name: str, text: str) -> Line:
    """Say that something works."""
    return Line(name, OK, text)


def warning(name: str, text: str, mend: str) -> Line:
    """Say that something works badly, or not for everybody."""
    return Line(name, WARNING, text, mend)


def failure(name: str, text: str, mend: str) -> Line:
    """Say that something does not work that training needs."""
    return Line(name, FAILURE, text, mend)


def skipped(name: str, text: str, mend: str = "") -> Line:
    """Say why something was not looked at."""
    return Line(name, SKIPPED, text, mend)


def refused(name: str, error: LonghaulError, mend: str = "Mend what the line says.") -> Line:
    """Turn an error into a failure: `<where>: <name> is <value>; expected <rule>.` and `<fix>`.

    Args:
        name: of the line.
        error: what was refused.
        mend: where the error names none.
    """
    text = str(error).rstrip()
    begin = text.find("; expected")
    end = text.find(". ", begin) if begin >= 0 else text.rfind(". ")
    return failure(name, text.rstrip("."), mend) if end < 0 else failure(name, text[:end], text[end + 2 :])


def python_command(module: str, *arguments: str) -> list[str]:
    """Return the command that runs a module of this library with this Python, in whatever folder."""
    return [sys.executable, "-X", "faulthandler", "-c", _START, str(ROOT), module, *arguments]


def answer_of(*command: str, seconds: float = 20) -> tuple[int, str, str]:
    """Run another program, not longer than `seconds`; return its status, 127 if it is not there, and both outputs."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=seconds)
    except (FileNotFoundError, PermissionError) as error:
        return 127, "", f"{command[0]}: {error.strerror}"
    except subprocess.TimeoutExpired:
        return 124, "", f"{command[0]} did not answer in {seconds:.0f} s"
    return done.returncode, done.stdout, done.stderr


def last_line(text: str) -> str:
    """Return the last line that says something."""
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "")
