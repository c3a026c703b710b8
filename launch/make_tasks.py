"""Make the examples of the tasks in `configs/tasks`, offline: `python launch/make_tasks.py [TASK …]`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

if sys.path[0] == str(Path(__file__).resolve().parent):  # run as a file: launch/ would shadow the package `pretrain`
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from pretrain.console import ends_at_closed_pipe
from pretrain.interrupts import begin_work, ends_on_signal

EXAMPLES = """examples:
  python launch/make_tasks.py                       # all six, into data/tasks/<task>
  python launch/make_tasks.py roles --train 8000 --seed 2 --out /tmp/tasks

The same arguments write the same bytes. exit status: 0 done, 1 failed, 2 wrong use, 130 stopped by a signal: files that
were not named yet are as they were."""


@ends_at_closed_pipe
@ends_on_signal()
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return its exit status."""
    from pretrain.command_line import CommandLine, count, whole
    from pretrain.errors import LonghaulError
    from pretrain.redaction import print_error
    from pretrain.tasks.task_data import TASKS, write_task

    parser = CommandLine("make_tasks", __doc__, EXAMPLES)
    parser.add_argument("tasks", nargs="*", metavar="TASK", help=f"of {', '.join(TASKS)}; all by default")
    parser.add_argument(
        "--out", default="data/tasks", metavar="DIR", help="where each task gets a folder (%(default)s)"
    )
    parser.add_argument(
        "--train", type=count, default=4000, metavar="N", help="training examples of each (%(default)s)"
    )
    parser.add_argument("--held-out", type=count, default=200, metavar="N", help="held-out ones of each (%(default)s)")
    parser.add_argument("--seed", type=whole, default=1, metavar="N", help="others, and others held out (%(default)s)")
    arguments = parser.parse_args(argv)
    begin_work("stopped; files are whole or as they were")
    try:
        for name in arguments.tasks or TASKS:
            folder = Path(arguments.out, name)
            paths = write_task(name, folder, arguments.train, arguments.held_out, arguments.seed)
            print(
                f"{name}: {arguments.train} training and {arguments.held_out} held-out examples: {paths[0]}, {paths[1]}"
            )
    except LonghaulError as error:
        print_error(error)
        return error.exit_status
    except OSError as error:
        print(f"error: {error.filename}: it cannot be written: {error.strerror}.", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
