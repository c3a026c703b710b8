"""What commands' arguments have in common: numbers that are checked, what a misspelt flag was meant to be, examples."""

from __future__ import annotations

import argparse
import difflib
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from pretrain.errors import EXIT_USAGE

_NAMES = {"pretrain": "train", "make_tasks": "make-tasks"}  # of commands whose file is called otherwise


class CommandLine(argparse.ArgumentParser):
    """An argument parser that keeps the lines of `description` and `epilog`, and suggests flags.

    Usage and examples are of the name that it was called by: `python launch/plan.py` or `longhaul plan`.

    Attributes:
        options_meant: of a command that takes `key=value`: says which options of a config a word may stand for.
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
        self.options_meant: Callable[[str], list[str]] | None = None

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Remember what was given, for `error`, and parse it."""
        self._given = list(sys.argv[1:] if args is None else args)
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        """End the process with status 2 and a message, which says what a flag that is unknown was meant to be.

        Of many ranks the first one speaks, for all of them were given the same.
        """
        if os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) != "0":
            sys.exit(EXIT_USAGE)
        meant = [one for place, word in enumerate(self._given) if (one := self._meant(word, self._given[place + 1 :]))]
        super().error(f"{message}. Did you mean {' and '.join(meant)}?" if meant else message)

    def _meant(self, word: str, following: list[str]) -> str:
        """What an unknown flag was meant to be: an option of the config, or another flag; empty if neither is like it.

        Args:
            word: as it was given, perhaps with `=` and a value.
            following: the words behind it, the first of which may be its value.
        """
        flag, _, value = word.partition("=")
        if not flag.startswith("--") or flag in (*self._option_string_actions, "--"):
            return ""
        if self.options_meant and (options := self.options_meant(flag[2:])):
            if not value and following and not following[0].startswith("-") and "=" not in following[0]:
                value = following[0]
            return " or ".join(f"{option}={value or '…'}" for option in options)
        return next(iter(difflib.get_close_matches(flag, self._option_string_actions, n=1)), "")


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


def written(text: str) -> str:
    """Take a text that a model is to read; the `type` of an argument."""
    if any("\ud800" <= letter <= "\udfff" for letter in text):  # as Python reads bytes that the encoding has not got
        raise argparse.ArgumentTypeError(
            f"it is {ascii(text)}, which is no UTF-8; expected text. Have the terminal and LANG agree "
            "(LANG=C.UTF-8), or give the text in a file"
        )
    return text


def real(text: str) -> float:
    """Read a number; the `type` of an argument whose range is said later."""
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"it is {text or 'empty'}; expected a number") from None
