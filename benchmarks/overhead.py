"""Longhaul's training loop beside bare torch, plain PyTorch and transformers' Trainer: same weights, batches and rates.

Ours is `train_step` as it runs in training, with reading, checks, DeepSpeed, metrics and log. The bare loop has its
batches in memory and does forward, backward, clip and fused step with our model. The plain one does so with the model
that people write in plain PyTorch (`benchmarks/baseline.py`). The last is `Trainer.train()` with transformers' model of
that shape (`benchmarks/peers.py`), batches in memory too. They take turns step by step in one process, so that whatever
else the machine does meets all. The losses of ours and the bare loop are compared, so that both do the same work; those
of the last two differ, because their documents see each other.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from itertools import cycle, permutations
from pathlib import Path
from typing import Any

if sys.path[0] == str(Path(__file__).resolve().parent):  # run as a file
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks.baseline import Baseline
from benchmarks.record import Record, first_line
from benchmarks.table import ratio_keys, render
from benchmarks.timing import median_ratio
from benchmarks.updates import Rows, by_torch, plain_step
from pretrain.checkpoints.run_folder import RunFolder, log_path
from pretrain.data.stream import TokenStream
from pretrain.errors import ExportError
from pretrain.options.config import Config
from pretrain.options.families import resolve_shape
from pretrain.options.schedule import lr_at
from pretrain.options.settings import load_config
from pretrain.ranks.distributed import Ranks
from pretrain.ranks.start_clock import StartClock
from pretrain.ranks.watchdog import Watchdog
from pretrain.training.guard import StopRequest
from pretrain.training.metrics import StepMetrics
from pretrain.training.run import Run, open_run
from pretrain.training.train import train_step
from pretrain.transformer.model import Transformer
from pretrain.zero.engine import init_distributed

EXAMPLES = """examples:
  python benchmarks/overhead.py configs/quickstart.yaml --out bench-results/overhead.json      (prepared before)
  python benchmarks/overhead.py configs/quickstart.yaml train.precision=bf16 parallel.zero_stage=0"""

OTHERS = ("bare", "plain", "trainer")
Step = Callable[[list[Rows], int, float, int], float]  # micro-batches, targets, learning rate, number -> mean loss


def read_steps(run: Run, num_steps: int) -> list[tuple[list[Rows], int]]:
    """Read the rows of the run's first steps, and the number of targets of each, into the memory of its device."""
    config, device = run.config, run.ranks.device
    stream = TokenStream(config, run.plan, run.ranks.rank, run.tokenizer.fingerprint)
    steps = [stream.next_step() for _ in range(num_steps)]
    stream.close()
    return [
        ([Rows(*(tensor.to(device) for tensor in vars(batch).values())) for batch in rows.micro_batches],
         rows.num_targets)
        for rows in steps
    ]  # fmt: skip


def make_loops(run: Run, cleanup: ExitStack) -> tuple[dict[str, Step], dict[str, str]]:
    """Build the other loops with the run's initial weights; return them, and why others are not among them."""
    config, device = run.config, run.ranks.device
    shape = resolve_shape(config.model, run.tokenizer.vocab_size, config.data.seq_len)
    ours = Transformer(shape, config.run.seed).to(device).train()
    loops: dict[str, Step] = {}
    reasons: dict[str, str] = {}
    try:
        baseline = Baseline(shape).to(device)
        baseline.load_state_dict(ours.state_dict(), strict=not shape.tie_embeddings)  # ours has one tensor then
        plain = plain_step(baseline, config, device)
        loops["plain"] = lambda batches, num_targets, lr, number: plain(batches, lr)
    except ValueError as error:
        reasons["plain PyTorch"] = first_line(error)
    try:
        from benchmarks.peers import TrainerLoop, copy_weights, make_model

        theirs = make_model(shape, device)
        copy_weights(ours, theirs, shape)
        loop = TrainerLoop(theirs, config)
        cleanup.callback(loop.close)
        loops["trainer"] = lambda batches, num_targets, lr, number: loop.step(batches, lr)
    except (ImportError, ValueError, ExportError) as error:
        reasons["transformers"] = first_line(error)
    bare = by_torch(ours, config, device)
    loops["bare"] = lambda batches, num_targets, lr, number: bare(batches, lr, num_targets, number)
    return loops, reasons


def measure(
    config: Config, ranks: Ranks, num_steps: int, num_warmup: int, max_seconds: float
) -> tuple[dict[str, Any], dict[str, str]]:
    """Time all loops in turn; return medians, ratios and losses, and why others were left out.

    Of `num_steps` steps after the warm-up, as many are timed as begin within `max_seconds`, and at least three.
    """
    losses: dict[str, list[float]] = {"ours": [], "bare": [], "plain": [], "trainer": []}
    with ExitStack() as cleanup:
        folder = RunFolder(config)
        cleanup.callback(folder.close)
        stop = cleanup.enter_context(StopRequest())
        watchdog = Watchdog(
            ranks, config.parallel.timeout_seconds, config.parallel.start_timeout_seconds, log_path(folder.path, ranks)
        )
        cleanup.callback(watchdog.close)
        run = open_run(config, ranks, folder, stop, watchdog, cleanup, StartClock())
        watchdog.first_step_is_over()
        run.engine.train()
        loops, reasons = make_loops(run, cleanup)
        batches = read_steps(run, num_steps + num_warmup)
        assert run.log
        write = run.log.step

        def write_and_keep(metrics: StepMetrics) -> None:
            losses["ours"].append(metrics.loss)
            write(metrics)

        run.log.step = write_and_keep  # type: ignore[method-assign]
        times: dict[str, list[tuple[float, float]]] = {name: [] for name in ("ours", *loops)}
        orders = cycle(permutations(times))
        deadline = time.monotonic() + max_seconds
        for number, (rows, num_targets) in enumerate(batches):
            if time.monotonic() > deadline and len(times["ours"]) >= 3:
                break
            lr = lr_at(number, run.plan.num_steps, config.optim.lr, config.schedule)
            for name in next(orders):
                begin = time.perf_counter(), time.process_time()
                if name == "ours":
                    train_step(run)
                else:
                    losses[name].append(loops[name](rows, num_targets, lr, number))
                if number >= num_warmup:
                    times[name].append((time.perf_counter() - begin[0], time.process_time() - begin[1]))
    return summary(times, losses), reasons


def summary(times: dict[str, list[tuple[float, float]]], losses: dict[str, list[float]]) -> dict[str, Any]:
    """Summarise the pairs of wall and CPU seconds of each loop's steps, and its losses.

    A ratio is the median over the steps, whose turns ran side by side: what the machine does meanwhile changes slowly.
    """
    row: dict[str, Any] = {"num_steps": len(times["ours"])}
    for name in ("ours", *OTHERS):
        row[f"{name}_seconds"] = statistics.median(wall for wall, _ in times[name]) if name in times else None
    for name in OTHERS:
        for kind, key in enumerate(ratio_keys(name)):
            row[key] = median_ratio(times["ours"], times[name], kind) if name in times else None
    # ours may write a step's loss after the next step has begun, and the last one not at all
    pairs_of_losses = zip(losses["ours"], losses["bare"], strict=False)
    row["largest_loss_difference"] = max(abs(ours - bare) for ours, bare in pairs_of_losses)
    row["last_losses"] = {name: values[-1] if values else None for name, values in losses.items()}
    return row


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
    parser.add_argument("--seconds", type=float, default=1e9, help="for the steps of all stages; fewer are timed then")
    parser.add_argument("--stages", default="0,1", help="ZeRO stages to measure (%(default)s)")
    arguments = parser.parse_intermixed_args(argv)
    settings = {name: value for name, value in vars(arguments).items() if name != "out"}
    record = Record("overhead", arguments.out, settings)
    ranks = None
    with tempfile.TemporaryDirectory() as folder:
        stages = arguments.stages.split(",")
        for stage in stages:
            overrides = [*arguments.overrides, f"run.dir={folder}/run-{stage}", f"parallel.zero_stage={stage}"]
            overrides += [f"train.num_steps={arguments.steps + arguments.warmup}", "schedule.warmup_steps=1"]
            config = load_config(arguments.config, overrides)
            ranks = ranks or init_distributed(config.parallel.start_timeout_seconds)
            row, reasons = measure(config, ranks, arguments.steps, arguments.warmup, arguments.seconds / len(stages))
            record.add(case=f"ZeRO {stage}, {config.train.precision}", **row)
            for name, reason in reasons.items():
                record.fail(name, reason)
    print(render([record.content]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
