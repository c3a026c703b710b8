"""From the command to the first step, by part: `launch/pretrain.py` with one step, started several times.

The run measures the parts itself and writes them into its `first_step` event; this adds what comes after the step.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

if sys.path[0] == str(Path(__file__).resolve().parent):  # run as a file
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks.ranks import run_ranks
from benchmarks.record import ROOT, Record

EXAMPLES = """examples:
  python benchmarks/startup.py configs/quickstart.yaml --out bench-results/startup.json      (prepared before)
  python benchmarks/startup.py configs/quickstart.yaml --ranks 2"""


def start_once(
    config: str, overrides: Sequence[str], run: Path, num_ranks: int = 1
) -> dict[str, tuple[float, float | None]]:
    """Train one step in processes of its own; return seconds of each part on rank 0, and its CPU seconds.

    `in all` has the CPU seconds of all ranks.

    Raises:
        RuntimeError: the run failed.
    """
    command = [sys.executable, str(ROOT / "launch/pretrain.py"), config, *overrides]
    command += [f"run.dir={run}", "train.num_steps=1", "schedule.warmup_steps=0", "eval.every_steps=0"]
    whole = run_ranks(command, num_ranks, timeout=600)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    event = next(line for line in lines if line.get("event") == "first_step")
    parts = {part: (seconds, event["cpu_seconds"][part]) for part, seconds in event["seconds"].items()}
    to_first_step, cpu_to_first_step = (sum(event[kind].values()) for kind in ("seconds", "cpu_seconds"))
    return parts | {
        "to the end of the first step": (to_first_step, cpu_to_first_step),
        "last checkpoint and exit": (whole.seconds - to_first_step, None),
        "in all": (whole.seconds, whole.cpu_seconds),
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return its exit status."""
    parser = argparse.ArgumentParser(
        prog="startup", description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", metavar="CONFIG", help="YAML file whose data is prepared")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="options that replace the file's")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--runs", type=int, default=5, help="starts, of which medians are taken (%(default)s)")
    parser.add_argument("--ranks", type=int, default=1, help="processes, all on this machine (%(default)s)")
    arguments = parser.parse_intermixed_args(argv)
    settings = {name: value for name, value in vars(arguments).items() if name != "out"}
    record = Record("startup", arguments.out, settings)
    with tempfile.TemporaryDirectory() as folder:
        starts = [
            start_once(arguments.config, arguments.overrides, Path(folder) / str(number), arguments.ranks)
            for number in range(arguments.runs)
        ]
    for part, (_, cpu_seconds) in starts[0].items():
        record.add(
            part=part, seconds=statistics.median(start[part][0] for start in starts),
            cpu_seconds=None if cpu_seconds is None else statistics.median(start[part][1] or 0.0 for start in starts),
        )  # fmt: skip
    from benchmarks.table import render

    print(render([record.content]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
