"""The operators of a block and the loss on a CPU in fp32, forward and backward, beside plain PyTorch's.

Plain is what people write: `F.rms_norm` after an addition, `F.silu(gate) * up`, RoPE by halves, `F.cross_entropy` of
all logits. Both must agree; they take turns in one process, so that whatever else the machine does meets both, and a
ratio is the median over the rounds.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

if sys.path[0] == str(Path(__file__).resolve().parent):  # run as a file
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.baseline import rotate
from benchmarks.record import Record
from benchmarks.timing import median_ratio, time_in_turns
from kernels.activation import gelu, swiglu
from kernels.layer_norm import add_layer_norm
from kernels.linear_cross_entropy import linear_cross_entropy
from kernels.rms_norm import add_rms_norm
from kernels.rope import rope, rope_tables

EXAMPLES = """examples:
  python benchmarks/operators_cpu.py --out bench-results/operators-cpu.json
  python benchmarks/operators_cpu.py --operators loss --sizes 512x1024x50304"""

SIZES = ("2048x256x8192", "512x768x32000")  # tokens, width, classes: the quickstart's, and a small model's
HEAD_DIM, EPS = 64, 1e-5
Results = tuple[Tensor, ...]


class Case(NamedTuple):
    """The inputs of one operator, and both functions of them."""

    tensors: list[Tensor]
    ours: Callable[..., Results]
    plain: Callable[..., Results]


def _loss(N: int, D: int, V: int) -> Case:
    targets = torch.randint(V, (N,))
    x, weight = torch.randn(N, D), 0.02 * torch.randn(V, D)
    return Case(
        [x, weight],
        lambda x, weight: (linear_cross_entropy(x, weight, targets, V)[0],),
        lambda x, weight: (F.cross_entropy(x @ weight.t(), targets, reduction="sum"),),
    )


def _add_rms_norm(N: int, D: int, V: int) -> Case:
    def plain(x: Tensor, residual: Tensor, weight: Tensor) -> Results:
        total = x + residual
        return F.rms_norm(total, (D,), weight, EPS), total

    return Case(
        [torch.randn(N, D), torch.randn(N, D), torch.ones(D)],
        lambda x, residual, weight: add_rms_norm(x, residual, weight, EPS),
        plain,
    )


def _add_layer_norm(N: int, D: int, V: int) -> Case:
    def plain(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> Results:
        total = x + residual
        return F.layer_norm(total, (D,), weight, bias, EPS), total

    tensors = [torch.randn(N, D), torch.randn(N, D), torch.ones(D), torch.zeros(D)]
    return Case(tensors, lambda x, residual, weight, bias: add_layer_norm(x, residual, weight, bias, EPS), plain)


def _swiglu(N: int, D: int, V: int) -> Case:
    def plain(gate_up: Tensor) -> Results:
        gate, up = gate_up.chunk(2, dim=-1)
        return (F.silu(gate) * up,)

    return Case([torch.randn(N, 2 * 3 * D)], lambda gate_up: (swiglu(gate_up),), plain)


def _gelu(N: int, D: int, V: int) -> Case:
    return Case([torch.randn(N, 4 * D)], lambda x: (gelu(x),), lambda x: (F.gelu(x, approximate="tanh"),))


def _rope(N: int, D: int, V: int) -> Case:
    x_BTHC = torch.randn(1, N, D // HEAD_DIM, HEAD_DIM)
    tables = rope_tables(torch.arange(N)[None], HEAD_DIM, 10000.0)
    cos_TC, sin_TC = (torch.cat((table, table), -1).view(N, HEAD_DIM) for table in tables)

    def plain(x_BTHC: Tensor) -> Results:
        return (rotate(x_BTHC.transpose(1, 2), cos_TC, sin_TC).transpose(1, 2),)

    return Case([x_BTHC], lambda x: (rope(x, *tables),), plain)


OPERATORS: dict[str, Callable[[int, int, int], Case]] = {
    "loss": _loss,
    "add_rmsnorm": _add_rms_norm,
    "add_layernorm": _add_layer_norm,
    "swiglu": _swiglu,
    "gelu": _gelu,
    "rope": _rope,
}


def measure(operator: str, sizes: tuple[int, int, int], seconds: float) -> dict[str, Any]:
    """Compare both ways of one operator; return the row.

    Raises:
        AssertionError: they do not agree.
    """
    torch.manual_seed(1)
    case = OPERATORS[operator](*sizes)
    tensors = [tensor.requires_grad_() for tensor in case.tensors]
    grads = [torch.ones_like(out) if out.dim() == 0 else torch.randn_like(out) for out in case.plain(*tensors)]
    results = [
        (*outs, *torch.autograd.grad(outs, tensors, grads)) for outs in (case.ours(*tensors), case.plain(*tensors))
    ]
    torch.testing.assert_close(*results, rtol=1e-3, atol=1e-3)
    times = time_in_turns({"ours": case.ours, "torch": case.plain}, tensors, grads, seconds)
    medians = {f"{name}_seconds": statistics.median(wall for wall, _ in rounds) for name, rounds in times.items()}
    ratios = {key: median_ratio(times["ours"], times["torch"], kind) for kind, key in enumerate(("ratio", "cpu_ratio"))}
    about = {"operator": operator, **dict(zip(("num_tokens", "width", "num_classes"), sizes, strict=True))}
    return about | medians | ratios | {"num_rounds": len(times["ours"])}


def _sizes(text: str) -> tuple[int, int, int]:
    tokens, width, classes = (int(part) for part in text.split("x"))
    return tokens, width, classes


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return its exit status."""
    parser = argparse.ArgumentParser(
        prog="operators_cpu", description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--operators", nargs="+", choices=OPERATORS, default=list(OPERATORS), help="all by default")
    parser.add_argument(
        "--sizes", nargs="+", type=_sizes, default=[_sizes(text) for text in SIZES], metavar="TOKENSxWIDTHxCLASSES",
        help=f"{' '.join(SIZES)} by default",
    )  # fmt: skip
    parser.add_argument("--seconds", type=float, default=3.0, help="for each operator and size (%(default)s)")
    arguments = parser.parse_args(argv)
    settings = {name: value for name, value in vars(arguments).items() if name != "out"}
    record = Record("operators_cpu", arguments.out, settings | {"num_threads": torch.get_num_threads()})
    for sizes in arguments.sizes:
        for operator in arguments.operators:
            record.add(**measure(operator, sizes, arguments.seconds))
    from benchmarks.table import render

    print(render([record.content]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
