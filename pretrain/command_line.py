"""What commands' arguments have in common: numbers that are checked, what a misspelt flag was meant to be, examples."""

from __future__ import annotations

import argparse
import difflib
import re
import sys
from pathlib import Path
from typing import Any, NoReturn

_NAMES = {"pretrain": "train", "make_tasks": "make-tasks"}  # of commands whose file is called otherwise


class CommandLine(argparse.ArgumentParser):
    """An argument parser that keeps the lines of `description` and `epilog`, and suggests flags.

    Usage and examples are of the name that it was called by: `python launch/plan.py` or `longhaul plan`.
    """

    def __init__(self, prog: str, description: str | None, epilog: str, **options: Any) -> None:
        """Take the name of the command's file in `launch`, its description and examples, and argparse's options."""
        description, shown = description or "", f"python launch/{prog}.py"
        if Path(sys.argv[0]).stem in ("longhaul", "cli"):
            shown = f"longhaul {_NAMES.get(prog, prog)}"
            description, epilog = _as_longhaul(description), _as_longhaul(epilog)
        kind = argparse.RawDescriptionHelpFormatter
        super().__init__(
            prog=shown, description=description, epilog=epilog, formatter_class=kind, allow_abbrev=False, **options
        )
        self._given: list[str] = []

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Remember what was given, for `error`, and parse it."""
        self._given = list(sys.argv[1:] if args is None else args)
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        """End the process with status 2 and a message, which says what a flag that is unknown was meant to be."""
        words = [word.partition("=")[0] for word in self._given]
        flags = [word for word in words if word.startswith("--") and word not in (*self._option_string_actions, "--")]
        close = [one for flag in flags for one in difflib.get_close_matches(flag, self._option_string_actions, n=1)]
        super().error(f"{message}. Did you mean {' and '.join(close)}?" if close else message)


def _as_longhaul(text: str) -> str:
    return re.sub(r"python launch/(\w+)\.py", lambda found: f"longhaul {_NAMES.get(found[1], found[1])}", text)


def count(text: str) -> int:
    """Read a whole number from 1; the `type` of an argument."""
    if not (text.isascii() and text.isdigit() and int(text)):
        raise argparse.ArgumentTypeError(f"it is {text or 'empty'}; expected a whole number from 1")
    return int(text)


def whole(text: str) -> int:
    """Read a whole number; the `type` of an argument whose range is said later."""
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"it is {text or 'empty'}; expected a whole number") from None


def real(text: str) -> float:
    """Read a number; the `type` of an argument whose range is said later."""
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"it is {text or 'empty'}; expected a number") from None
