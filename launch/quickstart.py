"""The whole journey on a small config, offline: prepare, train, evaluate, generate, convert, load the export."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

if sys.path[0] == str(Path(__file__).resolve().parent):  # run as a file: launch/ would shadow the package `pretrain`
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from pretrain.console import ends_at_closed_pipe
from pretrain.errors import EXIT_STOPPED, LonghaulError
from pretrain.interrupts import begin_work, ends_on_signal

EXAMPLES = """examples:
  python launch/quickstart.py
  python launch/quickstart.py run.dir=runs/quickstart-2 train.num_steps=50
  python launch/quickstart.py --config mine.yaml run.dir=runs/mine

exit status: 0 done, 1 failed, 2 wrong config or use, 75 stopped; the same command then goes on."""


@ends_at_closed_pipe
@ends_on_signal(EXIT_STOPPED)
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return its exit status."""
    from pretrain.command_line import CommandLine
    from pretrain.options.config_arguments import add_overrides

    parser = CommandLine("quickstart", __doc__, EXAMPLES)
    parser.add_argument("--config", default="configs/quickstart.yaml", metavar="CONFIG", help="YAML file (%(default)s)")
    add_overrides(parser)
    arguments = parser.parse_intermixed_args(argv)
    from pretrain.training.quickstart import quickstart

    begin_work("stopped. Run it again: it goes on from here.")
    try:
        quickstart(arguments.config, arguments.overrides)
    except LonghaulError as error:
        from pretrain.redaction import print_error

        print_error(error)
        return error.exit_status
    return 0


if __name__ == "__main__":
    sys.exit(main())
