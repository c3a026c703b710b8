"""Train, or go on from the newest good checkpoint in the run folder: `deepspeed launch/pretrain.py CONFIG`."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

if sys.path[0] == str(Path(__file__).resolve().parent):  # run as a file: launch/ would shadow the package `pretrain`
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from pretrain.command_line import CommandLine, count
from pretrain.console import ends_at_closed_pipe, write_patiently
from pretrain.options.config_arguments import add_config
from pretrain.ranks.start_clock import StartClock
from pretrain.training.guard import StopRequest

EXAMPLES = """examples:
  deepspeed launch/pretrain.py configs/gpt2-124m.yaml
  deepspeed --num_gpus 2 launch/pretrain.py configs/quickstart.yaml train.num_steps=20 run.dir=runs/try
  torchrun --nproc-per-node 8 launch/pretrain.py configs/llama-350m.yaml
  python launch/pretrain.py --explain 64 configs/llama-70b.yaml     (memory by ZeRO stage, and DeepSpeed's JSON)
  python launch/submit.py configs/llama-1.3b.yaml --nodes 4 --gpus-per-node 8     (on a SLURM cluster)

exit status: 0 done, 1 failed, 2 wrong config or use, 69 the machine or another rank failed (worth trying
again), 75 stopped by a signal and resumable by the same command. In status.json too, for the launcher hides it."""


@ends_at_closed_pipe
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return its exit status."""
    parser = CommandLine("pretrain", __doc__, EXAMPLES)
    add_config(parser)
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--check", action="store_true", help="check CONFIG, print its run folder, start nothing")
    mode.add_argument("--explain", type=count, metavar="RANKS", help="say what `parallel` means on so many ranks")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # DeepSpeed's launcher adds it
    arguments = parser.parse_args(argv)
    local_size = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or "1")
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // local_size)))
    rank = os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0"))
    is_everybodys, clock = True, StartClock("config")  # all ranks read the same config
    with StopRequest(ends_process=True, speaks=rank == "0") as stop:  # before the imports, which take long
        from pretrain.errors import LonghaulError
        from pretrain.options.place_checks import show_checked
        from pretrain.options.settings import load_config
        from pretrain.redaction import print_error

        try:
            config = load_config(arguments.config, arguments.overrides)
            if arguments.check:
                return show_checked(config)
            is_everybodys = False
            clock.begin("imports")
            from pretrain.training.explain_parallel import show_parallel
            from pretrain.training.train import train

            return show_parallel(config, arguments.explain) if arguments.explain else train(config, stop, clock)
        except LonghaulError as error:
            if rank == "0" or not (is_everybodys or error.agreed):
                print_error(error, "" if rank == "0" else f" on rank {rank}")
            return error.exit_status


if __name__ == "__main__":
    status = main()
    write_patiently(sys.stderr, "")
    os._exit(status)  # threads of gloo can abort a process that is done
