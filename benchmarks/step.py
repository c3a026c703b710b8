"""A whole training step of a config's model on synthetic packed documents, beside plain PyTorch and transformers.

Tokens/s, model FLOPs utilisation and peak memory of each variant (`benchmarks/updates.py` says what they are), each in
a process of its own. (`benchmarks/overhead.py` compares training loops step by step in turn.) The micro-batch is the
largest power of two whose predicted memory fits, unless it is given; as that differs, memory is also compared at the
config's own micro-batch.
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
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

if sys.path[0] == str(Path(__file__).resolve().parent):  # run as a file
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch

from benchmarks.record import Record, first_line
from benchmarks.updates import VARIANTS, Rows, Update, draw_rows, make_update
from pretrain.options.batch_plan import BatchPlan
from pretrain.options.config import Config
from pretrain.options.families import ModelShape, flops_per_token, num_parameters, resolve_shape
from pretrain.options.settings import load_config
from pretrain.ranks.hardware import peak_flops, peak_memory_bytes

EXAMPLES = """examples:
  python benchmarks/step.py configs/llama-350m.yaml --out bench-results/step-llama-350m.json
  python benchmarks/step.py configs/gpt2-124m.yaml --variants ours-torch,baseline-compiled --micro-batch 16
  python benchmarks/step.py configs/gpt2-124m.yaml --shrink        (a CPU: shows that it runs, not how fast)"""

LARGEST_MICRO_BATCH = 64
RESERVED_SECONDS = 15.0  # for each variant that comes after
USABLE_MEMORY = 0.9  # of the device: the rest is for fragments, cuBLAS workspaces and the context
SHRINK = (
    "model.dim=64", "model.num_layers=2", "model.num_heads=4", "model.ffn_dim=128", "tokenizer.vocab_size=512",
    "data.seq_len=64", "schedule.warmup_steps=1",
)  # fmt: skip


def open_config(
    path: str, shrink: bool, micro_batch: int, num_micro_steps: int, seq_len: int | None = None
) -> tuple[Config, ModelShape]:
    """Load a config with one step of `num_micro_steps` micro-batches, and resolve its model's shape."""
    overrides = [
        f"train.micro_batch_size={micro_batch}",
        f"train.global_batch_size={micro_batch * num_micro_steps}",
        "train.precision=bf16",
        *([f"data.seq_len={seq_len}"] if seq_len else []),
    ]
    config = load_config(path, overrides)
    if shrink:
        grouped = config.model.num_kv_heads not in (None, config.model.num_heads)
        window = ["model.sliding_window=20"] if config.model.sliding_window is not None else []
        heads = (["model.num_kv_heads=2"] if grouped else []) + (["model.head_dim=24"] if config.model.head_dim else [])
        config = load_config(path, [*overrides, *SHRINK, *heads, *window])
    BatchPlan.of(config, 1)
    return config, resolve_shape(config.model, config.tokenizer.vocab_size, config.data.seq_len)


def largest_micro_batch(update: Update, shape: ModelShape, largest: int) -> int:
    """Return the largest power of two whose peak memory fits, found by doubling.

    Memory grows linearly with the micro-batch, so two sizes predict the next one, and it is never run out of.
    """
    capacity = USABLE_MEMORY * torch.cuda.get_device_properties(update.device).total_memory
    size, previous = 1, 0
    for _ in range(2):  # the optimizer's state exists only after the first update
        peak = _peak_of_one(update, shape, size)
    while size < largest:
        growth = peak - previous if previous else 0  # from size / 2 to size
        if peak + 2 * growth > capacity:
            return size
        size *= 2
        previous, peak = peak, _peak_of_one(update, shape, size)
    return size


def _peak_of_one(update: Update, shape: ModelShape, size: int) -> int:
    torch.cuda.reset_peak_memory_stats()
    update.run([draw_rows(shape, size, update.device)])
    return torch.cuda.max_memory_allocated()


def time_updates(update: Update, batches: list[Rows], num_steps: int, max_seconds: float) -> tuple[list[float], float]:
    """Run up to `num_steps` updates after three for warm-up, as long as time allows.

    Returns:
        Seconds of each timed update, and the last loss.
    """
    for _ in range(3):
        loss = update.run(batches)
    seconds: list[float] = []
    while len(seconds) < num_steps and (len(seconds) < 3 or sum(seconds) < max_seconds):
        if update.device.type == "cuda":
            torch.cuda.synchronize()
        begin = time.perf_counter()
        loss = update.run(batches)
        if update.device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - begin)
    return seconds, loss


def memory_at(update: Update, shape: ModelShape, size: int) -> int | None:
    """Return the peak memory of an update of one micro-batch of this size; None where it does not fit."""
    torch.cuda.empty_cache()
    try:
        for _ in range(2):  # the first may compile
            peak = _peak_of_one(update, shape, size)
    except torch.OutOfMemoryError:
        return None
    return peak


def measure(
    arguments: argparse.Namespace, variant: str, keep: Callable[[dict[str, Any]], None] = lambda row: None
) -> dict[str, Any]:
    """Measure one variant in this process; return its row.

    Args:
        arguments: of the command.
        variant: one of `VARIANTS`.
        keep: is given the row before memory is measured once more, for which time may not suffice.
    """
    config, shape = open_config(
        arguments.config, arguments.shrink, arguments.micro_batch or 1, arguments.micro_steps, arguments.seq_len
    )
    backend = "aot_eager" if arguments.shrink else "inductor"
    torch.manual_seed(1)
    update = make_update(variant, config, shape, backend)
    on_gpu = update.device.type == "cuda"
    micro_batch = arguments.micro_batch
    if micro_batch is None:
        micro_batch = largest_micro_batch(update, shape, LARGEST_MICRO_BATCH) if on_gpu else 2
    update.compile()
    while True:
        batches = [draw_rows(shape, micro_batch, update.device, seed) for seed in range(arguments.micro_steps)]
        if on_gpu:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        try:
            seconds, loss = time_updates(update, batches, arguments.steps, max_seconds=6.0)
            break
        except torch.OutOfMemoryError:  # compiled code or fragments may need more than was predicted
            if arguments.micro_batch is not None or micro_batch == 1:
                raise
            micro_batch //= 2
    median = statistics.median(seconds)
    tokens_per_second = micro_batch * arguments.micro_steps * shape.seq_len / median
    peak = peak_flops(update.device, "bf16")
    flops = {"mfu": flops_per_token(shape, causal=False), "mfu_causal": flops_per_token(shape, causal=True)}
    row = {
        "variant": variant,
        "num_parameters": num_parameters(shape),
        "seq_len": shape.seq_len,
        "micro_batch_size": micro_batch,
        "num_micro_steps": arguments.micro_steps,
        "num_timed_steps": len(seconds),
        "step_seconds": median,
        "step_seconds_range": [min(seconds), max(seconds)],
        "tokens_per_second": tokens_per_second,
        **{name: tokens_per_second * value / peak if peak else None for name, value in flops.items()},
        "peak_flops": peak,
        "peak_memory_bytes": peak_memory_bytes(update.device),
        "common_micro_batch_size": arguments.micro_batch or load_config(arguments.config).train.micro_batch_size,
        "common_memory_bytes": None,
        "loss": loss,
    }
    if on_gpu:
        keep(row)
        row["common_memory_bytes"] = memory_at(update, shape, row["common_micro_batch_size"])
    return row


def measure_apart(arguments: argparse.Namespace, variant: str, seconds: float) -> dict[str, Any]:
    """Measure one variant in a process of its own, so that neither memory nor a failure reaches the next one.

    Raises:
        RuntimeError: it failed or took longer than `seconds`.
    """
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "row.json"
        command = [sys.executable, __file__, arguments.config, "--variants", variant, "--row", str(result)]
        command += ["--steps", str(arguments.steps), "--micro-steps", str(arguments.micro_steps)]
        command += ["--micro-batch", str(arguments.micro_batch)] if arguments.micro_batch else []
        command += ["--seq-len", str(arguments.seq_len)] if arguments.seq_len else []
        command += ["--shrink"] if arguments.shrink else []
        try:
            done = subprocess.run(command, timeout=seconds, stdout=sys.stderr)
            ending = f"its process ended with status {done.returncode} and no result"
        except subprocess.TimeoutExpired:
            ending = f"took longer than {seconds:.0f} s"
        if not result.exists():
            raise RuntimeError(ending)
        row = json.loads(result.read_text(encoding="utf-8"))
    if "error" in row:
        raise RuntimeError(row["error"])
    return row


def _measure_as_child(arguments: argparse.Namespace) -> int:
    def write(row: dict[str, Any]) -> None:
        temporary = arguments.row.with_suffix(".tmp")  # this process may be killed at any time
        temporary.write_text(json.dumps(row), encoding="utf-8")
        os.replace(temporary, arguments.row)

    try:
        row = measure(arguments, arguments.variants[0], write)
    except Exception as error:  # whatever it is, the other variants go on and the record says it
        row = {"error": first_line(error)}
        print(f"{arguments.config} {arguments.variants[0]}: {row['error']}", file=sys.stderr)
    write(row)
    return 1 if "error" in row else 0


def _variants(text: str) -> list[str]:
    chosen = text.split(",")
    if unknown := [name for name in chosen if name not in VARIANTS]:
        raise argparse.ArgumentTypeError(f"{','.join(unknown)}; expected some of {','.join(VARIANTS)}")
    return chosen


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return its exit status."""
    parser = argparse.ArgumentParser(
        prog="step", description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", metavar="CONFIG", help="YAML file of the model")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--variants", type=_variants, default=list(VARIANTS), help=f"of {','.join(VARIANTS)}")
    parser.add_argument("--micro-batch", type=int, help="rows; the largest power of two that fits by default")
    parser.add_argument("--micro-steps", type=int, default=1, help="micro-batches of a step; 1 by default")
    parser.add_argument("--seq-len", type=int, help="tokens in a row; the config's by default")
    parser.add_argument("--steps", type=int, default=20, help="timed steps at most")
    parser.add_argument("--seconds", type=float, default=1e9, help="for all variants together")
    parser.add_argument("--shrink", action="store_true", help="tiny shape; torch.compile without code generation")
    parser.add_argument("--row", type=Path, help=argparse.SUPPRESS)  # measure one variant here, for `measure_apart`
    arguments = parser.parse_args(argv)
    if arguments.row:
        return _measure_as_child(arguments)
    deadline = time.monotonic() + arguments.seconds
    settings = {name: value for name, value in vars(arguments).items() if name not in ("out", "row")}
    record = Record("step", arguments.out, settings)
    for index, variant in enumerate(arguments.variants):
        left = deadline - time.monotonic()
        try:
            # A variant may not use up the time of those after it; what it leaves is theirs.
            num_after = len(arguments.variants) - index - 1
            share = max(left - RESERVED_SECONDS * num_after, left / (num_after + 1), 1.0)
            record.add(**measure_apart(arguments, variant, share))
        except RuntimeError as error:
            record.fail(variant, str(error))
    from benchmarks.table import render

    print(render([record.content]))
    return 0 if record.content["rows"] else 1


if __name__ == "__main__":
    sys.exit(main())
