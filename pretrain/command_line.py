"""What commands' arguments have in common: whole numbers that are checked, and what a misspelt flag was meant to be."""

from __future__ import annotations

import argparse
import difflib
from typing import Any, NoReturn


class CommandLine(argparse.ArgumentParser):
    """An argument parser that keeps the lines of `description` and `epilog`, and suggests flags."""

    def __init__(self, **options: Any) -> None:
        """Take the options of argparse's."""
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, **options)

    def error(self, message: str) -> NoReturn:
        """End the process with status 2 and a message, which says what a flag that is unknown was meant to be."""
        _, _, unknown = message.partition("unrecognized arguments: ")
        flags = [word.partition("=")[0] for word in unknown.split() if word.startswith("-")]
        close = [one for flag in flags for one in difflib.get_close_matches(flag, self._option_string_actions, n=1)]
        super().error(f"{message}. Did you mean {' and '.join(close)}?" if close else message)


def count(text: str) -> int:
    """Read a whole number from 1; the `type` of an argument."""
    if not (text.isascii() and text.isdigit() and int(text)):
        raise argparse.ArgumentTypeError(f"it is {text or 'empty'}; expected a whole number from 1")
    return int(text)
