"""The command line of `launch/report.py`. Without torch: `--help` is quick."""

from __future__ import annotations

import argparse
from pathlib import Path

from pretrain.command_line import whole
from pretrain.errors import ConfigError
from pretrain.generation.generate_options import read_text


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what is to be looked at, and where the page goes."""
    parser.add_argument("run", metavar="RUN", help="run folder")
    which = parser.add_mutually_exclusive_group()
    which.add_argument(
        "--inspect", metavar="TEXT", help="loss of each token, what each layer would predict, attention maps"
    )
    which.add_argument(
        "--inspect-file", metavar="FILE", help="likewise, of the text in a file; - is the standard input"
    )
    parser.add_argument("--step", type=whole, metavar="N", help="checkpoint to use; the newest good one by default")
    parser.add_argument("--out", metavar="FILE", type=Path, help="page to write; by default in RUN/inspect")
    parser.add_argument("--json", action="store_true", help="print one JSON object on stdout and nothing else there")


def text_from(arguments: argparse.Namespace) -> str:
    """Return the text to look at.

    Raises:
        ConfigError: there is none, or its file cannot be read.
    """
    if arguments.inspect_file is not None:
        return read_text("--inspect-file", arguments.inspect_file)
    if arguments.inspect is None:
        raise ConfigError(
            "--inspect is missing; expected a text to look at. Add --inspect TEXT or --inspect-file FILE; a run's "
            "curves are in its tensorboard/ and metrics.jsonl."
        )
    return str(arguments.inspect)
