"""Make the examples of the tasks in `configs/tasks`, offline: `python launch/make_tasks.py [TASK …]`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

if sys.path[0] == str(Path(__file__).resolve().parent):  # run as a file: launch/ would shadow the package `pretrain`
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from pretrain.console import ends_at_closed_pipe

EXAMPLES = """examples:
  python launch/make_tasks.py                       # all six, into data/tasks/<task>
  python launch/make_tasks.py roles --train 8000 --seed 2 --out /tmp/tasks

The same arguments write the same bytes. exit status: 0 done, 1 failed, 2 wrong use."""


@ends_at_closed_pipe
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return its exit status."""
    parser = argparse.ArgumentParser(
        prog="make_tasks", description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    from pretrain.tasks.task_data import TASKS, write_task

    parser.add_argument("tasks", nargs="*", metavar="TASK", help=f"of {', '.join(TASKS)}; all by default")
    parser.add_argument("--out", default="data/tasks", metavar="FOLDER", help="where each task gets a folder")
    parser.add_argument("--train", type=_count, default=4000, metavar="N", help="training examples of each")
    parser.add_argument("--held-out", type=_count, default=200, metavar="N", help="held-out examples of each")
    parser.add_argument("--seed", type=int, default=1, help="other examples, and others that are held out")
    arguments = parser.parse_args(argv)
    from pretrain.errors import LonghaulError
    from pretrain.redaction import print_error

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


def _count(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number}; expected 1 or more")
    return number


if __name__ == "__main__":
    sys.exit(main())
