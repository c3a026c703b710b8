"""What a step's reports cost: `metrics.jsonl` and log, TensorBoard, and the view on a terminal.

Steps of a given length are slept through; what is timed is the call that records one, as training does it: on a file
system, with eight corpora, and on a terminal of this machine whose other end is read. With every part another one is
added, so that differences are what each of them costs.
"""

from __future__ import annotations

import argparse
import logging
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

if sys.path[0] == str(Path(__file__).resolve().parent):  # run as a file
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch

from benchmarks.record import Record
from pretrain.checkpoints.run_folder import open_log
from pretrain.options.run_options import LogSection
from pretrain.ranks.distributed import Ranks
from pretrain.training.metrics import MetricLog, StepMetrics

EXAMPLES = """examples:
  python benchmarks/reporting.py --out bench-results/reporting.json
  python benchmarks/reporting.py --step-seconds 0.2 --steps 100"""
PARTS = ("metrics.jsonl and log", "and TensorBoard", "and the view on a terminal")
_CORPORA = tuple(f"corpus-{number}" for number in range(8))
_PHASES = ("data", "forward", "backward", "optimizer", "communication", "others")


def metrics_of(step: int) -> StepMetrics:
    """Metrics of a step, as many as a run with eight corpora has."""
    share = 1 / len(_CORPORA)
    return StepMetrics(
        step=step, tokens=524_288 * step, loss=3.0 + 7.0 / step, objective=None, grad_norm=0.5 + 1.0 / step, lr=3e-4,
        step_seconds=0.05, memory_bytes=61_000_000_000, skipped_steps=0, clipped_steps=step // 7, damaged_documents=0,
        damaged_tokens=0, seq_len=2048, corpus_tokens={name: int(524_288 * step * share) for name in _CORPORA},
        epochs={name: step * 1e-5 for name in _CORPORA}, phase_seconds=dict.fromkeys(_PHASES, 0.008),
    )  # fmt: skip


@contextmanager
def stderr_on_terminal() -> Iterator[None]:
    """Make stderr a terminal whose other end is read meanwhile."""
    master, slave = os.openpty()
    reader = subprocess.Popen(["cat"], stdin=master, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    before, term = sys.stderr, os.environ.get("TERM")
    os.environ["TERM"] = "xterm-256color"
    with open(slave, "w", encoding="utf-8") as sys.stderr:
        try:
            yield
        finally:
            sys.stderr = before
            del os.environ["TERM"]
            if term is not None:
                os.environ["TERM"] = term
    os.close(master)
    reader.kill()  # a terminal that is gone ends it anyway
    reader.wait()


@contextmanager
def _stderr_nowhere() -> Iterator[None]:
    before = sys.stderr
    with open(os.devnull, "w", encoding="utf-8") as sys.stderr:
        try:
            yield
        finally:
            sys.stderr = before


def measure(part: str, folder: Path, num_steps: int, step_seconds: float) -> dict[str, float]:
    """Record so many steps; return the mean and the most of what one took, in wall and processor seconds."""
    place = PARTS.index(part)
    folder.mkdir()
    open_log(folder, Ranks(0, 0, 1, torch.device("cpu")))
    seconds, cpu_seconds = [], []
    with stderr_on_terminal() if place >= 2 else _stderr_nowhere():
        log = MetricLog(
            folder, LogSection(tensorboard=place >= 1), num_steps=10**6, tokens_per_step=524_288, world_size=8,
            flops_per_token={2048: (9e9, 8e9)}, peak_flops=1e15, first_step=0, attempt=1, save_every=1000,
        )  # fmt: skip
        for step in range(1, num_steps + 11):
            time.sleep(step_seconds)
            metrics = metrics_of(step)
            begin = time.perf_counter(), time.thread_time()
            log.step(metrics)
            if step > 10:  # the first ones import
                seconds.append(time.perf_counter() - begin[0])
                cpu_seconds.append(time.thread_time() - begin[1])
        log.close()
    logger = logging.getLogger("longhaul")
    for handler in list(logger.handlers):
        logger.removeHandler(handler)
        handler.close()
    return {"seconds": statistics.fmean(seconds), "cpu_seconds": statistics.fmean(cpu_seconds),
            "most_seconds": max(seconds)}  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return its exit status."""
    parser = argparse.ArgumentParser(
        prog="reporting", description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--steps", type=int, default=400, help="steps that are timed, of each part (%(default)s)")
    parser.add_argument("--step-seconds", type=float, default=0.05, help="length of a step (%(default)s)")
    arguments = parser.parse_args(argv)
    settings = {name: value for name, value in vars(arguments).items() if name != "out"}
    record = Record("reporting", arguments.out, settings)
    with tempfile.TemporaryDirectory() as folder:
        for part in PARTS:
            found = measure(part, Path(folder) / part.split()[-1], arguments.steps, arguments.step_seconds)
            record.add(part=part, **found)
    from benchmarks.table import render

    print(render([record.content]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
