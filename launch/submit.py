"""Submit a run to SLURM, see how it stands, stop it: `python launch/submit.py CONFIG --nodes N --gpus-per-node N`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

if sys.path[0] == str(Path(__file__).resolve().parent):  # run as a file: launch/ would shadow the package `pretrain`
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from pretrain.console import ends_at_closed_pipe
from pretrain.interrupts import begin_work, ends_on_signal


@ends_at_closed_pipe
@ends_on_signal()
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return its exit status."""
    from pretrain.cluster.submit_options import parse, run
    from pretrain.errors import LonghaulError
    from pretrain.redaction import print_error

    arguments = parse(argv, __doc__)
    begin_work()
    try:
        print(run(arguments))
    except LonghaulError as error:
        print_error(error)
        return error.exit_status
    return 0


if __name__ == "__main__":
    sys.exit(main())
