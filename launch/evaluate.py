"""Held-out loss, perplexity, bits per byte and tasks of lm-eval, of one run or several beside each other."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

if sys.path[0] == str(Path(__file__).resolve().parent):  # run as a file: launch/ would shadow the package `pretrain`
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from pretrain.console import ends_at_closed_pipe
from pretrain.errors import LonghaulError
from pretrain.interrupts import begin_work, ends_on_signal

EXAMPLES = """examples:
  python launch/evaluate.py runs/quickstart
  python launch/evaluate.py runs/quickstart --step 400 --json
  python launch/evaluate.py runs/mine --tasks hellaswag,arc_easy --num-fewshot 0 --limit 500
  python launch/evaluate.py runs/mine --tasks my_task --include-path tasks --no-held-out
  python launch/evaluate.py runs/mine runs/other --steps all        (a table; what was computed before is read)
  torchrun --nproc-per-node 8 launch/evaluate.py runs/mine --tasks mmlu --dtype bf16

exit status: 0 done, 1 failed, 2 wrong use, 130 stopped by a signal: checkpoints that were done are not done again."""


@ends_at_closed_pipe
@ends_on_signal()
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return its exit status."""
    from pretrain.command_line import CommandLine
    from pretrain.evaluation.evaluate_options import add_arguments, options_from, steps_from

    parser = CommandLine("evaluate", __doc__, EXAMPLES)
    add_arguments(parser)
    arguments = parser.parse_args(argv)
    local_size = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or "1")
    if local_size > 1:
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // local_size)))
    rank = os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0"))
    is_everybodys = True  # all ranks read the same arguments
    try:
        options, steps = options_from(arguments), steps_from(arguments)  # before the imports, which take long
        is_everybodys = False
        from pretrain.evaluation.evaluate_runs import evaluate_runs

        begin_work("stopped; checkpoints that were done are kept")
        evaluate_runs(arguments.runs, arguments.step, steps, options, arguments.json)
    except LonghaulError as error:
        from pretrain.redaction import print_error

        if rank == "0" or not (is_everybodys or error.agreed):
            print_error(error, "" if rank == "0" else f" on rank {rank}")
        return error.exit_status
    return 0


if __name__ == "__main__":
    status = main()
    if "RANK" in os.environ:
        os._exit(status)  # threads of gloo can abort a process that is done
    sys.exit(status)
