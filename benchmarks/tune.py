"""Times tile shapes of the attention programs on this GPU and writes its table, `kernels/tiles/<name of the GPU>.json`.

Each program is timed alone, on rows that stand for a shape class, with the shapes of `benchmarks/tile_candidates.py`
and the one that the table has now. A shape that the GPU refuses, or whose result is not PyTorch's, is left out. The
quickest replaces the old one if it is at least 2% quicker, twice. Training reads the table when it starts.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import os
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any

if sys.path[0] == str(Path(__file__).resolve().parent):  # run as a file
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
import triton
from torch import Tensor

from benchmarks.record import first_line
from benchmarks.tile_candidates import CANDIDATES, FEW_QUERIES
from benchmarks.timing import Timer
from kernels.attention_op import Backward, launch_forward
from kernels.attention_torch import attention_sdpa, attention_truth
from kernels.tile_table import FOLDER, KERNELS, Tile, own_name, read_table, table_name
from kernels.visibility import visibility

EXAMPLES = """examples:
  python benchmarks/tune.py --dry-run
  python benchmarks/tune.py --kernels forward,grad_kv_atomic --classes "128 long,64 long" --seconds 60"""

QUERIES_AND_KEYS = {"long": (4096, 4096), "short": (1024, 1024), "few": (1, 4096), "extra": (1024, 1024)}
SOFTCAP = 30.0  # stands for what the class `extra` has
TOKENS, WIDTH = 16384, 2048  # B x S, H x C
GAIN = 0.98  # of the old time, that a new shape may take at most
TOLERANCE = 0.02  # of ||actual - PyTorch's|| / ||PyTorch's||; both round to bf16, which makes about 0.005
MAX_WORKERS = 8  # that compile at the same time
# What most training runs need comes first: length, widths of heads, programs.
ORDER = (
    ("long", (128, 64), ("forward", "grad_kv_atomic")),
    ("long", (128, 64), ("grad_kv", "grad_q")),
    ("short", (128, 64), KERNELS),
    ("few", (128, 64), ("forward",)),
    ("long", (256, 32), KERNELS),
    ("short", (256, 32), KERNELS),
    ("few", (256, 32), ("forward",)),
    ("extra", (128, 64, 256, 32), KERNELS),
)


def list_classes() -> list[str]:
    """List the shape classes, the most important first."""
    return list(dict.fromkeys(f"{width} {length}" for length, widths, _ in ORDER for width in widths))


def list_entries(kernels: Sequence[str], classes: Sequence[str]) -> list[tuple[str, str]]:
    """List program and shape class of what is tuned, the most important first."""
    entries = [(kernel, f"{width} {length}") for length, widths, names in ORDER for width in widths for kernel in names]
    return [(kernel, name) for kernel, name in entries if kernel in kernels and name in classes]


def list_candidates(kernel: str, shape_class: str, current: Tile) -> list[Tile]:
    """List the shapes that are tried for an entry, the current one first."""
    width, length = shape_class.split()
    tiles = [
        current,
        *(Tile(*numbers) for numbers in (FEW_QUERIES if length == "few" else CANDIDATES[kernel][int(width)])),
    ]
    return list(dict.fromkeys(tiles))


class Workload:
    """Tensors of one shape, causal, and the programs on them, each alone.

    Args:
        sizes: B, T, S, H, C; T queries are the last of S slots.
        device: where.
        dtype: of queries, keys and values.
        softcap: of scores; 0: none.
    """

    def __init__(
        self, sizes: tuple[int, int, int, int, int], device: torch.device, dtype: torch.dtype, softcap: float = 0.0
    ) -> None:
        B, T, S, H, C = sizes
        self.softcap = softcap
        generator = torch.Generator(device).manual_seed(1)
        shapes = ((B, T, H, C), (B, S, H, C), (B, S, H, C), (B, T, H, C))
        drawn = [torch.randn(shape, generator=generator, device=device, dtype=dtype) for shape in shapes]
        self.q, self.k, self.v, self.grad_out = drawn
        self.visible = visibility(torch.zeros(B, T, dtype=torch.int64, device=device), S, dtype)
        self.keys_of_queries = self.visible.first_BT, self.visible.end_BT
        self.scale = 1.0 / math.sqrt(C)

    @cached_property
    def expected(self) -> dict[str, list[Tensor]]:
        """What each program has to compute, by PyTorch's operators."""
        q, k, v = (x.detach().requires_grad_() for x in (self.q, self.k, self.v))
        if self.softcap:
            out = attention_truth(q, k, v, self.visible, softcap=self.softcap)
        else:
            out = attention_sdpa(q, k, v, self.visible)
        grad_q, grad_k, grad_v = torch.autograd.grad(out, (q, k, v), self.grad_out)
        return {
            "forward": [out.detach()],
            "grad_kv_atomic": [grad_k, grad_v, grad_q],
            "grad_kv": [grad_k, grad_v],
            "grad_q": [grad_q],
        }

    @cached_property
    def _backward(self) -> tuple[Backward, dict[str, Any]]:
        out, lse_BHT = self._forward(None)
        backward = Backward(self.grad_out, self.q, self.k, self.v, out, lse_BHT)
        backward.delta(None)
        return backward, backward.numbers(None, 0.0, self.softcap, self.scale)

    @cached_property
    def _sums(self) -> Tensor:
        return self._zeros()

    def _zeros(self) -> Tensor:
        return torch.zeros(self.q.shape, dtype=torch.float32, device=self.q.device)

    def _forward(self, tile: Tile | None) -> tuple[Tensor, Tensor]:
        return launch_forward(self.q, self.k, self.v, *self.keys_of_queries, None, 0.0, self.softcap, self.scale, tile)

    def prepare(self, kernel: str) -> None:
        """Compute what a program starts from, so that runs on several threads find it."""
        _ = self.expected, self.visible.queries_BS, self._backward if kernel != "forward" else None
        if kernel == "grad_kv_atomic":
            _ = self._sums

    def launch(self, kernel: str, tile: Tile, sums: Tensor | None = None) -> list[Tensor]:
        """Launch a program; `sums` is where grad_kv_atomic adds the gradients of the queries (its own memory)."""
        if kernel == "forward":
            return [self._forward(tile)[0]]
        backward, numbers = self._backward
        if kernel == "grad_q":
            return [backward.grad_q(*self.keys_of_queries, numbers, tile)]
        if kernel == "grad_kv_atomic":
            sums = self._sums if sums is None else sums
        return list(backward.grad_kv(*self.visible.queries_BS, numbers, sums, tile))

    def attempt(self, kernel: str, tile: Tile) -> str | None:
        """Compile and run a program once, and compare what it computes; return what is wrong with it."""
        try:
            sums = self._zeros() if kernel == "grad_kv_atomic" else None
            actual = self.launch(kernel, tile, sums)
            actual += [] if sums is None else [sums * self.scale]
            pairs = zip(actual, self.expected[kernel], strict=True)
            errors = [float((a.float() - e.float()).norm() / e.float().norm()) for a, e in pairs]
        except Exception as error:  # whatever it is, this shape is not for this GPU
            return first_line(error)
        wrong = [error for error in errors if not error <= TOLERANCE]
        return f"its result is off by {wrong[0]:.2g}" if wrong else None


def representative(shape_class: str, device: torch.device) -> Workload:
    """Make the tensors that stand for a shape class."""
    width, length = shape_class.split()
    T, S = QUERIES_AND_KEYS[length]
    sizes = (TOKENS // S, T, S, WIDTH // int(width), int(width))
    return Workload(sizes, device, torch.bfloat16, SOFTCAP if length == "extra" else 0.0)


@dataclass
class Outcome:
    """What the tuner found for one entry: the shape to use, the seconds of each that ran, and why others did not."""

    current: Tile
    best: Tile
    seconds: dict[Tile, float] = field(default_factory=dict)
    refused: dict[Tile, str] = field(default_factory=dict)

    def describe(self) -> str:
        """Write it as lines of text, old to new."""
        lines = []
        if not self.seconds:
            lines.append("  stays as it is: no shape ran")
        elif self.best == self.current:
            lines.append(f"  {self._timed(self.current)} stays, the best of {len(self.seconds)} within 2%")
        else:
            lines.append(f"  {self._timed(self.current)} -> {self._timed(self.best)}, of {len(self.seconds)}")
        return "\n".join([*lines, *(f"  left out {_name(tile)}: {why}" for tile, why in self.refused.items())])

    def _timed(self, tile: Tile) -> str:
        return (
            f"{_name(tile)} ({self.seconds[tile] * 1e6:.0f} us)" if tile in self.seconds else f"{_name(tile)} (fails)"
        )


def _name(tile: Tile) -> str:
    return f"[{tile.block_q}, {tile.block_k}, {tile.num_warps}, {tile.num_stages}]"


def choose(current: Tile, seconds: dict[Tile, float]) -> Tile:
    """Return the quickest, or the current one if no other is at least 2% quicker."""
    if not seconds:
        return current
    best = min(seconds, key=lambda tile: seconds[tile])
    return best if current not in seconds or seconds[best] <= GAIN * seconds[current] else current


def tune_entry(workload: Workload, kernel: str, tiles: list[Tile], timer: Timer, num_workers: int) -> Outcome:
    """Try all shapes of one entry, of which the first is the current one, and choose."""
    outcome = Outcome(tiles[0], tiles[0])
    workload.prepare(kernel)
    # The first one alone, because it also starts what Triton has one of; the others compile side by side.
    why = [workload.attempt(kernel, tiles[0])]
    # A thread gets its CUDA context from the first call of the runtime, which a launch of Triton is not.
    start = torch.cuda.synchronize if torch.cuda.is_initialized() else None
    with ThreadPoolExecutor(num_workers, initializer=start) as pool:
        why += pool.map(lambda tile: workload.attempt(kernel, tile), tiles[1:])
    outcome.refused = {tile: reason for tile, reason in zip(tiles, why, strict=True) if reason}

    def time_one(tile: Tile) -> float:
        return timer.median_seconds(lambda _: workload.launch(kernel, tile), lambda: None)

    outcome.seconds = {tile: time_one(tile) for tile in tiles if tile not in outcome.refused}
    best = choose(tiles[0], outcome.seconds)
    if best != tiles[0] and tiles[0] in outcome.seconds:  # once more: the quickest of many may have been lucky
        again = {tile: time_one(tile) for tile in (tiles[0], best)}
        outcome.seconds |= again
        best = choose(tiles[0], again)
    outcome.best = best
    return outcome


def table_text(table: dict[str, Any]) -> str:
    """Write a table as the files have it, an entry a line."""
    programs = []
    for kernel, tiles in table["tiles"].items():
        entries = ",\n".join(f"   {json.dumps(name)}: {json.dumps(list(numbers))}" for name, numbers in tiles.items())
        programs.append(f"  {json.dumps(kernel)}: {{\n{entries}\n  }}")
    head = "".join(f" {json.dumps(key)}: {json.dumps(table[key])},\n" for key in ("gpu", "tuned"))
    return "{\n" + head + ' "tiles": {\n' + ",\n".join(programs) + "\n }\n}\n"


def write_table(path: Path, table: dict[str, Any]) -> None:
    """Write a table; a run that is cut short leaves the one before it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(table_text(table), encoding="utf-8")
    os.replace(temporary, path)


def tune(arguments: argparse.Namespace, device: torch.device) -> int:
    """Tune what is asked for, write the table after each entry that got better, and say what was found."""
    gpu = torch.cuda.get_device_name(device)
    out = arguments.out or FOLDER / f"{own_name(gpu)}.json"
    table = copy.deepcopy(read_table(table_name(device)))
    today = datetime.now(UTC).date().isoformat()
    made_with = {"date": today, "torch": torch.__version__, "triton": triton.__version__, "device": gpu}
    table |= {"gpu": gpu, "tuned": made_with}
    timer = Timer(device, repeats=15, warm_up=2)
    deadline = time.monotonic() + arguments.seconds
    workload, workload_class, num_better = None, "", 0
    num_workers = min(MAX_WORKERS, os.cpu_count() or 1)
    for kernel, shape_class in list_entries(arguments.kernels, arguments.classes):
        if time.monotonic() > deadline:
            print(f"{kernel}, {shape_class}: not reached, stays as it is", flush=True)
            continue
        print(f"{kernel}, {shape_class}:", flush=True)
        tiles = list_candidates(kernel, shape_class, Tile(*table["tiles"][kernel][shape_class]))
        try:
            if workload is None or workload_class != shape_class:
                workload = None  # frees the one before
                workload, workload_class = representative(shape_class, device), shape_class
            outcome = tune_entry(workload, kernel, tiles, timer, num_workers)
        except Exception as error:  # one entry must not stop the others
            print(f"  stays as it is: {first_line(error)}", flush=True)
            continue
        print(outcome.describe(), flush=True)
        if outcome.best != outcome.current:
            num_better += 1
            table["tiles"][kernel][shape_class] = list(vars(outcome.best).values())
            if not arguments.dry_run:
                write_table(out, table)
    if not num_better:
        print("nothing was at least 2% quicker: no table written")
    else:
        place = f"; training finds it as kernels/tiles/{own_name(gpu)}.json"
        print(f"{num_better} entries {'would be' if arguments.dry_run else 'are'} new in {out}{place}")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return its exit status."""
    classes = list_classes()
    parser = argparse.ArgumentParser(
        prog="tune", description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kernels", default=",".join(KERNELS), help="programs, with commas")
    parser.add_argument("--classes", default=",".join(classes), help="shape classes, with commas")
    parser.add_argument("--seconds", type=float, default=1e9, help="start no entry after this time; the rest stays")
    parser.add_argument("--dry-run", action="store_true", help="write nothing")
    parser.add_argument("--out", type=Path, help="file to write; by default in kernels/tiles, where training finds it")
    arguments = parser.parse_args(argv)
    for option, known in (("kernels", KERNELS), ("classes", classes)):
        asked = [part.strip() for part in getattr(arguments, option).split(",")]
        setattr(arguments, option, asked)
        if unknown := [name for name in asked if name not in known]:
            parser.error(f"--{option} has {', '.join(unknown)}; expected some of {', '.join(known)}")
    if not torch.cuda.is_available():
        print(
            "tune: torch.cuda.is_available() is False; expected a GPU of the kind that the table is for.",
            file=sys.stderr,
        )
        return 1
    return tune(arguments, torch.device("cuda", 0))


if __name__ == "__main__":
    sys.exit(main())
