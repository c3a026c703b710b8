"""What Longhaul's training loop costs over a bare torch loop: same model, batches, optimizer and learning rates.

Ours is `train_step` as it runs in training, with reading, checks, DeepSpeed, metrics and log. The bare loop has its
batches in memory and does forward, backward, clip and fused step. The two take turns step by step in one process, so
that whatever else the machine does meets both, and their losses are compared, so that both do the same work.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

if sys.path[0] == str(Path(__file__).resolve().parent):  # run as a file
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks.record import Record
from benchmarks.updates import Rows, by_torch
from pretrain.config import Config
from pretrain.distributed import Ranks
from pretrain.engine import init_distributed
from pretrain.families import resolve_shape
from pretrain.guard import StopRequest
from pretrain.metrics import StepMetrics
from pretrain.model import Transformer
from pretrain.run import Run, open_run
from pretrain.run_folder import RunFolder
from pretrain.schedule import lr_at
from pretrain.settings import load_config
from pretrain.start_clock import StartClock
from pretrain.stream import TokenStream
from pretrain.train import train_step

EXAMPLES = """examples:
  python benchmarks/overhead.py configs/quickstart.yaml --out bench-results/overhead.json      (prepared before)
  python benchmarks/overhead.py configs/quickstart.yaml train.precision=bf16 parallel.zero_stage=0"""


def bare_steps(run: Run, num_steps: int) -> Callable[[], float]:
    """Return a function that does the next step of the bare loop on the run's own batches and returns its loss."""
    config, device = run.config, run.ranks.device
    stream = TokenStream(config, run.plan, run.ranks.rank, run.tokenizer.fingerprint)
    steps = [stream.next_step() for _ in range(num_steps)]
    stream.close()
    batches = [
        [Rows(*(tensor.to(device) for tensor in vars(batch).values())) for batch in rows.micro_batches]
        for rows in steps
    ]
    shape = resolve_shape(config.model, run.tokenizer.vocab_size, config.data.seq_len)
    model = Transformer(shape, config.run.seed).to(device).train()
    update = by_torch(model, config, device)
    done = 0

    def step() -> float:
        nonlocal done
        lr = lr_at(done, run.plan.num_steps, config.optim.lr, config.schedule)
        loss = update(batches[done], lr, steps[done].num_targets, done)
        done += 1
        return loss

    return step


def measure(config: Config, ranks: Ranks, num_steps: int, num_warmup: int) -> dict[str, Any]:
    """Time both loops in turn; return medians, their ratio, and the largest difference of a loss."""
    losses: list[float] = []
    with ExitStack() as cleanup:
        folder = RunFolder(config)
        cleanup.callback(folder.close)
        stop = cleanup.enter_context(StopRequest())
        run = open_run(config, ranks, folder, stop, cleanup, StartClock())
        run.engine.train()
        bare = bare_steps(run, num_steps + num_warmup)
        assert run.log
        write = run.log.step

        def write_and_keep(metrics: StepMetrics) -> None:
            losses.append(metrics.loss)
            write(metrics)

        run.log.step = write_and_keep  # type: ignore[method-assign]
        times: dict[str, list[tuple[float, float]]] = {"ours": [], "bare": []}
        largest = 0.0
        for number in range(num_steps + num_warmup):
            bare_loss = 0.0
            for name in ("ours", "bare") if number % 2 else ("bare", "ours"):
                begin = time.perf_counter(), time.process_time()
                if name == "ours":
                    train_step(run)
                else:
                    bare_loss = bare()
                if number >= num_warmup:
                    times[name].append((time.perf_counter() - begin[0], time.process_time() - begin[1]))
            largest = max(largest, abs(losses[-1] - bare_loss))
    wall, cpu = ({name: [pair[kind] for pair in pairs] for name, pairs in times.items()} for kind in (0, 1))
    return {
        "ours_seconds": statistics.median(wall["ours"]),
        "bare_seconds": statistics.median(wall["bare"]),
        # of each pair, which ran side by side: what the machine does meanwhile changes slowly
        "ratio": statistics.median(a / b for a, b in zip(wall["ours"], wall["bare"], strict=True)),
        "cpu_ratio": statistics.median(a / b for a, b in zip(cpu["ours"], cpu["bare"], strict=True)),
        "largest_loss_difference": largest,
        "num_steps": num_steps,
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return its exit status."""
    parser = argparse.ArgumentParser(
        prog="overhead", description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", metavar="CONFIG", help="YAML file whose data is prepared")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="options that replace the file's")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--steps", type=int, default=30, help="timed steps of each loop (%(default)s)")
    parser.add_argument("--warmup", type=int, default=5, help="steps before them (%(default)s)")
    parser.add_argument("--stages", default="0,1", help="ZeRO stages to measure (%(default)s)")
    arguments = parser.parse_intermixed_args(argv)
    settings = {name: value for name, value in vars(arguments).items() if name != "out"}
    record = Record("overhead", arguments.out, settings)
    ranks = None
    with tempfile.TemporaryDirectory() as folder:
        for stage in arguments.stages.split(","):
            overrides = [*arguments.overrides, f"run.dir={folder}/run-{stage}", f"parallel.zero_stage={stage}"]
            overrides += [f"train.num_steps={arguments.steps + arguments.warmup}", "schedule.warmup_steps=1"]
            config = load_config(arguments.config, overrides)
            ranks = ranks or init_distributed(config.parallel.timeout_seconds)
            row = measure(config, ranks, arguments.steps, arguments.warmup)
            record.add(case=f"ZeRO {stage}, {config.train.precision}", **row)
    from benchmarks.table import render

    print(render([record.content]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
