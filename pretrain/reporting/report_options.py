"""The command line of `launch/report.py`. Without torch: `--help` is quick."""

from __future__ import annotations

import argparse
from pathlib import Path

from pretrain.command_line import CommandLine, count, written
from pretrain.errors import ConfigError
from pretrain.generation.generate_options import read_text

EXAMPLES = """examples:
  python launch/report.py runs/quickstart
  python launch/report.py runs/a runs/b runs/c --out comparison.html --png plots
  python launch/report.py runs/quickstart --inspect 'def main():'
  python launch/report.py runs/quickstart --step 400 --inspect-file example.py --out example.html
  python launch/report.py runs/quickstart --inspect-file - < example.py

exit status: 0 done, 1 failed, 2 wrong use, 130 stopped by a signal: the page is whole or as it was."""


def make_parser(description: str | None) -> CommandLine:
    """Return what reads the arguments: what is to be looked at, and where the page goes."""
    parser = CommandLine("report", description, EXAMPLES)
    parser.add_argument("run", metavar="RUN", nargs="+", help="run folder; several are laid over each other")
    parser.add_argument(
        "--out", metavar="FILE", type=Path, help="page to write; by default RUN/report.html, of several runs "
        "comparison.html in the first, and with --inspect in RUN/inspect",
    )  # fmt: skip
    parser.add_argument("--png", metavar="DIR", type=Path, help="also write the main curves as PNG files there")
    parser.add_argument(
        "--json", action="store_true", help="print one JSON object, with the figures, on stdout and nothing else there"
    )
    text = parser.add_argument_group("a text instead of the run's course")
    which = text.add_mutually_exclusive_group()
    which.add_argument(
        "--inspect",
        type=written,
        metavar="TEXT",
        help="loss of each token, what each layer would predict, attention maps",
    )
    which.add_argument(
        "--inspect-file", metavar="FILE", help="likewise, of the text in a file; - is the standard input"
    )
    text.add_argument("--step", type=count, metavar="N", help="checkpoint to use; the newest good one by default")
    return parser


def text_from(arguments: argparse.Namespace) -> str | None:
    """Return the text to look at; None if the run's course is asked for.

    Raises:
        ConfigError: options that do not go together, or a file that cannot be read.
    """
    is_inspection = arguments.inspect is not None or arguments.inspect_file is not None
    if not is_inspection:
        if arguments.step is not None:
            raise ConfigError(
                f"--step is {arguments.step}; expected only with --inspect or --inspect-file, since a report is of all "
                "steps. Leave it out."
            )
        return None
    if len(arguments.run) > 1:
        raise ConfigError(
            f"RUN is {' '.join(arguments.run)}; expected one run with --inspect and --inspect-file. Name one, or leave "
            "them out to compare runs."
        )
    if arguments.png is not None:
        raise ConfigError(
            f"--png is {arguments.png}; expected without --inspect and --inspect-file, whose page has no curves. Leave "
            "it out."
        )
    if arguments.inspect_file is not None:
        return read_text("--inspect-file", arguments.inspect_file)
    return str(arguments.inspect)
