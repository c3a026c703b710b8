"""The whole journey on a small config, offline: prepare, train, evaluate, generate, convert, load the export."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

if sys.path[0] == str(Path(__file__).resolve().parent):  # run as a file: launch/ would shadow the package `pretrain`
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from pretrain.command_line import CommandLine
from pretrain.console import ends_at_closed_pipe

EXAMPLES = """examples:
  python launch/quickstart.py
  python launch/quickstart.py run.dir=runs/quickstart-2 train.num_steps=50

exit status: 0 done, 1 failed, 2 wrong config or use, 75 stopped; the same command then goes on."""


@ends_at_closed_pipe
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return its exit status."""
    parser = CommandLine(prog="quickstart", description=__doc__, epilog=EXAMPLES)
    parser.add_argument("--config", default="configs/quickstart.yaml", metavar="CONFIG", help="YAML file")
    parser.add_argument("overrides", nargs="*", default=[], metavar="key=value", help="options that replace the file's")
    arguments = parser.parse_args(argv)
    from pretrain.errors import LonghaulError
    from pretrain.training.quickstart import quickstart

    try:
        quickstart(arguments.config, arguments.overrides)
    except LonghaulError as error:
        from pretrain.redaction import print_error

        print_error(error)
        return error.exit_status
    return 0


if __name__ == "__main__":
    sys.exit(main())
