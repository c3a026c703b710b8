"""The arguments that commands which read a config have in common: CONFIG, and options that replace the file's."""

from __future__ import annotations

from typing import Any

from pretrain.command_line import CommandLine
from pretrain.options.spellings import options_meant


def add_config(parser: CommandLine, help: str = "YAML file", **settings: Any) -> None:
    """Have a command take CONFIG, with argparse's `settings`, and `key=value …` behind it."""
    parser.add_argument("config", metavar="CONFIG", help=help, **settings)
    add_overrides(parser)


def add_overrides(parser: CommandLine) -> None:
    """Have a command take `key=value …`, and say so where one is spelt as a flag."""
    parser.add_argument("overrides", nargs="*", default=[], metavar="key=value", help="options that replace the file's")
    parser.options_meant = options_meant
