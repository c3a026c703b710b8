"""What is installed and what works: packages, GPUs, kernels, collectives, DeepSpeed, disk, SLURM; and the mend."""

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
    from pretrain.doctor.doctor_options import parse, run

    arguments = parse(argv, __doc__)
    begin_work()
    return run(arguments)


if __name__ == "__main__":
    sys.exit(main())
