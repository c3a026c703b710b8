"""Train, or go on from the newest good checkpoint in the run folder: `deepspeed launch/pretrain.py CONFIG`."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

if sys.path[0] == str(Path(__file__).resolve().parent):  # run as a file: launch/ would shadow the package `pretrain`
    sys.path[0] = str(Path(__file__).resolve().parents[1])

EXAMPLES = """examples:
  deepspeed launch/pretrain.py configs/gpt2-124m.yaml
  deepspeed --num_gpus 2 launch/pretrain.py configs/quickstart.yaml train.num_steps=20 run.dir=runs/try
  torchrun --nproc-per-node 8 launch/pretrain.py configs/llama-350m.yaml
  srun python launch/pretrain.py configs/llama-1.3b.yaml          (one task a GPU)

exit status: 0 done, 1 failed, 2 wrong config or use, 75 stopped by a signal and resumable by the same command;
the run folder's status.json says the same, since the deepspeed launcher hides exit statuses."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return its exit status."""
    parser = argparse.ArgumentParser(
        prog="pretrain", description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", metavar="CONFIG", help="YAML file")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="options that replace the file's")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # DeepSpeed's launcher adds it
    arguments = parser.parse_args(argv)
    limit_threads()
    from pretrain.errors import LonghaulError
    from pretrain.settings import load_config

    rank = os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0"))
    try:
        config = load_config(arguments.config, arguments.overrides)
    except LonghaulError as error:
        return show(error, is_shown=rank == "0")
    from pretrain.train import train

    try:
        return train(config)
    except LonghaulError as error:
        return show(error, is_shown=rank == "0" or not error.agreed, rank=rank)


def limit_threads() -> None:
    """Divide the cores between the processes of this node, unless OMP_NUM_THREADS says otherwise."""
    if "OMP_NUM_THREADS" not in os.environ:
        local_size = os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or "1"
        os.environ["OMP_NUM_THREADS"] = str(max(1, len(os.sched_getaffinity(0)) // int(local_size)))


def show(error: Exception, *, is_shown: bool, rank: str = "0") -> int:
    """Print a user's error without a traceback; return its exit status."""
    if is_shown:
        print(f"error: {error}" if rank == "0" else f"error on rank {rank}: {error}", file=sys.stderr, flush=True)
    return error.exit_status  # type: ignore[attr-defined]


if __name__ == "__main__":
    status = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(
        status
    )  # threads of gloo can abort a process that is done ("terminate called without an active exception")
