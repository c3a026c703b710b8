"""Attention on a CPU, forward and backward, beside what PyTorch's `scaled_dot_product_attention` offers.

That is one call with a mask, and the quicker of it and calls that need none: `is_causal` where each row is one
document, else one such call a document. Masks and cuts are made before, since all layers share them. The three take
turns in one process, so that whatever else the machine does meets all.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from itertools import accumulate
from pathlib import Path

if sys.path[0] == str(Path(__file__).resolve().parent):  # run as a file
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
from torch import Tensor

from benchmarks.record import Record
from benchmarks.timing import median_ratio, time_in_turns
from kernels.attention import attention
from kernels.attention_cpu import fused_attention
from kernels.visibility import visibility

ROWS = {4096: 1, 2048: 1, 512: 4, 128: 8}  # by their length; long ones first, after which the allocator keeps memory
CASES = ("one document", "mean 50", "mean 200", "mean 500", "mixture", "window 512")
Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


def draw_lengths(case: str, seq_len: int, rng: random.Random) -> list[int]:
    """Return the lengths of the documents of one row."""
    if case in ("one document", "window 512"):
        return [seq_len]
    lengths: list[int] = []
    while sum(lengths) < seq_len:
        # A mixture has a median of 200 and a mean of 500 tokens: many short texts, a few long ones.
        drawn = rng.lognormvariate(5.3, 1.35) if case == "mixture" else rng.expovariate(1 / float(case.split()[1]))
        lengths.append(max(1, min(round(drawn), seq_len - sum(lengths))))
    return lengths


def starts_of(lengths: list[int]) -> list[int]:
    """Return the slot where the document of each token begins."""
    begins = accumulate(lengths, initial=0)
    return [begin for begin, length in zip(begins, lengths, strict=False) for _ in range(length)]


def by_document(lengths: list[int]) -> Attention:
    """Return attention by one call a document."""

    def attend(q_BTHC: Tensor, k_BTKC: Tensor, v_BTKC: Tensor) -> Tensor:
        parts = (x.flatten(0, 1)[None].split(lengths, 1) for x in (q_BTHC, k_BTKC, v_BTKC))
        outs = [fused_attention(q, k, v, is_causal=True) for q, k, v in zip(*parts, strict=True)]
        return torch.cat(outs, 1).view(q_BTHC.shape)

    return attend


def measure_case(case: str, seq_len: int, dtype: torch.dtype, arguments: argparse.Namespace) -> dict[str, object]:
    """Measure one case; return its row."""
    rows = ROWS.get(seq_len, 1)
    rng = random.Random(f"{case} {seq_len}")
    lengths = [draw_lengths(case, seq_len, rng) for _ in range(rows)]
    window = 512 if case == "window 512" else None
    visible = visibility(torch.tensor([starts_of(row) for row in lengths]), seq_len, dtype, window)
    begin = time.perf_counter()
    num_pieces = len(visible.pieces)
    cut_seconds = time.perf_counter() - begin
    functions: dict[str, Attention] = {
        "ours": lambda q, k, v: attention(q, k, v, visible),
        "masked": lambda q, k, v: fused_attention(q, k, v, visible.bias_B1TS),
    }
    if case == "one document":
        functions["apart"] = lambda q, k, v: fused_attention(q, k, v, is_causal=True)
    elif window is None:
        functions["apart"] = by_document([length for row in lengths for length in row])
    torch.manual_seed(1)
    sizes = [(rows, seq_len, heads, 64) for heads in (arguments.heads, arguments.kv_heads, arguments.kv_heads)]
    tensors = [torch.randn(size).to(dtype).requires_grad_() for size in sizes]
    times = time_in_turns(functions, tensors, [torch.randn(sizes[0]).to(dtype)], arguments.seconds)
    medians = {name: statistics.median(wall for wall, _ in rounds) for name, rounds in times.items()}
    best = min((name for name in medians if name != "ours"), key=lambda name: medians[name])
    return {
        "case": case, "dtype": str(dtype).removeprefix("torch."), "seq_len": seq_len, "num_rows": rows,
        "num_documents": sum(len(row) for row in lengths), "num_pieces": num_pieces,
        "ours_seconds": medians["ours"], "masked_seconds": medians["masked"], "best_sdpa_seconds": medians[best],
        "ratio": median_ratio(times["ours"], times[best], 0), "cpu_ratio": median_ratio(times["ours"], times[best], 1),
        "num_rounds": len(times["ours"]), "cut_seconds": cut_seconds,
    }  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return its exit status."""
    parser = argparse.ArgumentParser(prog="attention_cpu", description=__doc__)
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--heads", type=int, default=8, help="query heads of 64 (%(default)s)")
    parser.add_argument("--kv-heads", type=int, default=8, help="key and value heads (%(default)s)")
    parser.add_argument("--seq-lens", type=int, nargs="+", default=list(ROWS), help="tokens in a row (%(default)s)")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"], help="%(default)s")
    parser.add_argument("--seconds", type=float, default=4.0, help="for each case (%(default)s)")
    arguments = parser.parse_args(argv)
    settings = {name: value for name, value in vars(arguments).items() if name != "out"}
    record = Record("attention_cpu", arguments.out, settings | {"num_threads": torch.get_num_threads()})
    for dtype in arguments.dtypes:
        for case in CASES:
            for seq_len in arguments.seq_lens:
                if case != "window 512" or seq_len > 512:
                    record.add(**measure_case(case, seq_len, getattr(torch, dtype), arguments))
    from benchmarks.table import render

    print(render([record.content]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
