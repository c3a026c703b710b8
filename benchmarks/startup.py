"""From the command to the first step, by part: `launch/pretrain.py` with one step, started several times.

The run measures the parts itself and writes them into its `first_step` event; this adds what comes after the step.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

if sys.path[0] == str(Path(__file__).resolve().parent):  # run as a file
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks.record import ROOT, Record

EXAMPLES = """examples:
  python benchmarks/startup.py configs/quickstart.yaml --out bench-results/startup.json      (prepared before)"""


def start_once(config: str, overrides: Sequence[str], run: Path) -> dict[str, float]:
    """Train one step in a process of its own; return the seconds of each part.

    Raises:
        RuntimeError: the run failed.
    """
    command = [sys.executable, str(ROOT / "launch/pretrain.py"), config, *overrides]
    command += [f"run.dir={run}", "train.num_steps=1", "schedule.warmup_steps=0", "eval.every_steps=0"]
    begin = time.monotonic()
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=os.environ | {"PYTHONPATH": ""})
    seconds = time.monotonic() - begin
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with status {done.returncode}: {done.stderr.strip()[-500:]}")
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    parts: dict[str, float] = next(line["seconds"] for line in lines if line.get("event") == "first_step")
    return parts | {"last checkpoint and exit": seconds - sum(parts.values())}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return its exit status."""
    parser = argparse.ArgumentParser(
        prog="startup", description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", metavar="CONFIG", help="YAML file whose data is prepared")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="options that replace the file's")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--runs", type=int, default=5, help="starts, of which medians are taken (%(default)s)")
    arguments = parser.parse_intermixed_args(argv)
    settings = {name: value for name, value in vars(arguments).items() if name != "out"}
    record = Record("startup", arguments.out, settings)
    with tempfile.TemporaryDirectory() as folder:
        starts = [
            start_once(arguments.config, arguments.overrides, Path(folder) / str(number))
            for number in range(arguments.runs)
        ]
    for part in starts[0]:
        record.add(part=part, seconds=statistics.median(start[part] for start in starts))
    from benchmarks.table import render

    print(render([record.content]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
