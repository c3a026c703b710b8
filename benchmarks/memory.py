"""What the ZeRO stages cost: memory of a rank by kind, and payload of its collectives, on 1, 2, 4, 8 ranks.

Every case is a run of four steps by the command's own path (`benchmarks/usage.py` says how it is counted), with one row
in a micro-batch, so that activations are small. Beside it stands what theory has: `bytes_in_theory`. On CPUs; the
tensors are the same on GPUs, but for allocators, and for what kernels need inside.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

if sys.path[0] == str(Path(__file__).resolve().parent):  # run as a file
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks.ranks import run_ranks
from benchmarks.record import Record, first_line
from benchmarks.usage import measure
from pretrain.options.settings import load_config
from pretrain.ranks.distributed import leave_distributed
from pretrain.zero.engine import init_distributed

EXAMPLES = """examples:
  python benchmarks/memory.py configs/quickstart.yaml --out bench-results/memory.json      (prepared before)
  python benchmarks/memory.py configs/quickstart.yaml --ranks 2 --stages 2,3 --precisions bf16
  python benchmarks/plot.py bench-results/memory.json docs/memory.svg"""

STATES = ("parameters", "masters", "moments", "gradients")


def bytes_in_theory(num_parameters: int, stage: int, precision: str, num_ranks: int) -> dict[str, float]:
    """Bytes of a rank for the states of AdamW with gradients that are summed in fp32, before the update.

    In bf16 stage 0 runs as stage 1, and one rank in fp32 at stage 1 as stage 0 (`deepspeed_settings.effective_stage`).
    fp32 weights are their own masters at stage 0; at the others DeepSpeed keeps both.

    Source: Rajbhandari et al. 2020 (arXiv:1910.02054), section 3, with 4 bytes instead of 2 for a gradient.
    """
    width = 2 if precision == "bf16" else 4
    if precision == "bf16":
        stage = max(stage, 1)
    elif stage == 1 and num_ranks == 1:
        stage = 0
    return {
        "parameters": num_parameters * width / (num_ranks if stage == 3 else 1),
        "masters": num_parameters * 4 / num_ranks if stage else 0.0,
        "moments": num_parameters * 8 / (num_ranks if stage else 1),
        "gradients": num_parameters * 4 / (num_ranks if stage >= 2 else 1),
    }


def work(arguments: argparse.Namespace) -> None:
    """Measure all cases on one rank; rank 0 writes the rows."""
    ranks = init_distributed(1800)
    rows: list[dict[str, Any]] = []
    for precision in arguments.precisions.split(","):
        for stage in arguments.stages.split(","):
            config = load_config(arguments.config, [
                *arguments.overrides, f"run.dir={arguments.results}/{ranks.world_size}-{stage}-{precision}",
                f"parallel.zero_stage={stage}", f"train.precision={precision}", "train.micro_batch_size=1",
                f"train.global_batch_size={ranks.world_size}", "train.num_steps=4", "schedule.warmup_steps=1",
                "eval.every_steps=0", "log.tensorboard=false",
            ])  # fmt: skip
            found = measure(config, ranks)
            num_parameters = found.pop("num_parameters")
            theory = bytes_in_theory(num_parameters, int(stage), precision, ranks.world_size)
            rows.append({"stage": int(stage), "precision": precision, "ranks": ranks.world_size,
                         "num_parameters": num_parameters, "theory": theory} | found)  # fmt: skip
    if ranks.is_first:
        (arguments.results / f"{ranks.world_size}.json").write_text(json.dumps(rows), encoding="utf-8")
    leave_distributed()


def main(argv: Sequence[str] | None = None) -> int:
    """Start the ranks and record what they measured; return the exit status."""
    parser = argparse.ArgumentParser(
        prog="memory", description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", metavar="CONFIG", help="YAML file whose data is prepared")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="options that replace the file's")
    parser.add_argument("--ranks", default="1,2,4,8", help="numbers of ranks (%(default)s)")
    parser.add_argument("--stages", default="0,1,2,3", help="ZeRO stages (%(default)s)")
    parser.add_argument("--precisions", default="bf16,fp32", help="(%(default)s)")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--results", type=Path, help=argparse.SUPPRESS)  # where the ranks write
    arguments = parser.parse_intermixed_args(argv)
    if arguments.results:
        work(arguments)
        return 0
    settings = {name: value for name, value in vars(arguments).items() if name not in ("out", "results")}
    record = Record("memory", arguments.out, settings)
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, *(sys.argv[1:] if argv is None else argv), "--results", folder]
        for num_ranks in arguments.ranks.split(","):
            try:
                run_ranks(command, int(num_ranks))
            except RuntimeError as error:
                record.fail(f"{num_ranks} ranks", first_line(error))
                continue
            for row in json.loads((Path(folder) / f"{num_ranks}.json").read_text(encoding="utf-8")):
                record.add(**row)
    from benchmarks.table import render

    print(render([record.content]))
    return 1 if record.content["failures"] else 0


if __name__ == "__main__":
    status = main()
    sys.stdout.flush()
    if "RANK" in os.environ:
        os._exit(status)  # threads of gloo can abort a process that is done
    sys.exit(status)
