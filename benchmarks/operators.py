"""RoPE, SwiGLU, GELU and the output layer with its loss, beside PyTorch's, torch.compile's and Liger's.

Each is timed forward and backward in bf16, with the memory that both take beyond the inputs. The bytes of the first
three are the least that they must move. The loss is one call over all tokens; PyTorch's holds all logits, and torch's
chunked form (`F.linear_cross_entropy`, where this torch has it) does not.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

if sys.path[0] == str(Path(__file__).resolve().parent):  # run as a file
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.record import Record, first_line
from benchmarks.timing import Timer
from kernels.activation import gelu, swiglu, swiglu_truth
from kernels.linear_cross_entropy import linear_cross_entropy
from kernels.rope import rope, rope_tables, rope_truth

EXAMPLES = """examples:
  python benchmarks/operators.py --out bench-results/operators.json
  python benchmarks/operators.py --operators loss --tokens 16384 --classes 32000
  python benchmarks/operators.py --shrink        (a CPU: shows that it runs, not how fast)"""

OPERATORS = ("loss", "swiglu", "rope", "gelu")
SIZES = {"tokens": 8192, "classes": 128256, "width": 2048, "ffn": 5632, "heads": 20, "head_dim": 128, "repeats": 15}
SHRUNK = {"tokens": 64, "classes": 300, "width": 32, "ffn": 48, "heads": 3, "head_dim": 16, "repeats": 2}
SEQ_LEN = 2048
NUM_CHECKED = 256  # tokens that are compared with fp64

Function = Callable[..., Tensor]


class Case:
    """The inputs of one operator: what is differentiated, what is not, and how often memory is passed over."""

    def __init__(self, operator: str, sizes: dict[str, int], device: torch.device) -> None:
        self.operator, self.device = operator, device
        generator = torch.Generator(device).manual_seed(1)

        def draw(*size: int, scale: float = 1.0) -> Tensor:
            drawn = torch.randn(size, generator=generator, device=device) * scale
            return drawn.to(torch.bfloat16)

        N = sizes["tokens"]
        self.fixed: tuple[Any, ...] = ()
        self.inputs: tuple[Tensor, ...]
        if operator == "loss":
            self.inputs = draw(N, sizes["width"]), draw(sizes["classes"], sizes["width"], scale=0.02)
            self.fixed = (torch.randint(sizes["classes"], (N,), generator=generator, device=device),)
            self.passes = None
        elif operator == "rope":
            rows = max(N // SEQ_LEN, 1)
            positions_BT = torch.arange(N // rows, device=device).expand(rows, -1)
            self.inputs = (draw(rows, N // rows, sizes["heads"], sizes["head_dim"]),)
            self.fixed = rope_tables(positions_BT, sizes["head_dim"], 10000.0)
            self.passes = {"forward": 2.0, "backward": 2.0}  # of the input
        else:
            self.inputs = (draw(N, (2 if operator == "swiglu" else 1) * sizes["ffn"]),)
            self.passes = {"forward": 1.5 if operator == "swiglu" else 2.0, "backward": 2.5}
            if operator == "gelu":
                self.passes["backward"] = 3.0

    def leaves(self, rows: int | None = None, dtype: torch.dtype = torch.bfloat16) -> tuple[list[Tensor], tuple]:
        """Return fresh inputs that need gradients and the others, the first `rows` tokens of them."""
        part = slice(rows)
        tensors, fixed = list(self.inputs), self.fixed
        if self.operator == "loss":
            tensors[0], fixed = tensors[0][part], (fixed[0][part],)
        elif self.operator == "rope":
            tensors[0], fixed = tensors[0][:1, part], tuple(table[:1, part] for table in fixed)
        else:
            tensors[0] = tensors[0][part]
        return [x.detach().to(dtype).requires_grad_() for x in tensors], fixed

    def grad(self, out: Tensor) -> Tensor:
        """Return the incoming gradient: one for a loss, else fixed noise."""
        if out.dim() == 0:
            return torch.ones_like(out)
        generator = torch.Generator(out.device).manual_seed(2)
        return torch.randn(out.shape, generator=generator, device=out.device).to(out.dtype)

    def error(self, function: Function) -> float:
        """Return the largest ||actual - exact|| / ||exact|| of the output and the gradients, on the first tokens."""
        actual = self._results(function, torch.bfloat16)
        exact = self._results(TRUTHS[self.operator], torch.float64)
        errors = [float((a.double() - e).norm() / e.norm()) for a, e in zip(actual, exact, strict=True)]
        return max(errors) if all(error == error for error in errors) else float("nan")

    def _results(self, function: Function, dtype: torch.dtype) -> list[Tensor]:
        leaves, fixed = self.leaves(NUM_CHECKED, dtype)
        out = function(*leaves, *fixed)
        return [out.detach(), *torch.autograd.grad(out, leaves, self.grad(out.to(torch.bfloat16)).to(out.dtype))]


def _unfused_loss(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    logits = x @ weight.t()
    wide = logits if logits.dtype == torch.float64 else logits.float()
    return F.cross_entropy(wide, targets, reduction="sum")


TRUTHS: dict[str, Function] = {
    "loss": _unfused_loss,
    "swiglu": swiglu_truth,
    "gelu": lambda x: F.gelu(x, approximate="tanh"),
    "rope": lambda x, cos, sin: rope_truth(x, cos, sin) if x.dtype != torch.float64 else _rope_fp64(x, cos, sin),
}
OURS: dict[str, Function] = {
    "loss": lambda x, weight, targets: linear_cross_entropy(x, weight, targets, weight.shape[0])[0],
    "swiglu": swiglu,
    "gelu": gelu,
    "rope": rope,
}


def _rope_fp64(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    cos, sin = cos.double(), sin.double()
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def _liger(operator: str) -> Function:
    from liger_kernel.ops import LigerFusedLinearCrossEntropyFunction, LigerSiLUMulFunction

    if operator == "swiglu":
        return lambda x: LigerSiLUMulFunction.apply(*x.chunk(2, dim=-1))
    if operator == "loss":
        # input, weight, target, bias, class weights, ignored class, z-loss, smoothing, reduction
        return lambda x, weight, targets: LigerFusedLinearCrossEntropyFunction.apply(
            x, weight, targets, None, None, -100, 0.0, 0.0, "sum"
        )[0]
    raise ValueError(f"left out: Liger's {operator} has another layout")


def implementation(name: str, operator: str, backend: str) -> Function:
    """Return one implementation of an operator: `ours`, `eager`, `compiled`, `chunked` (loss only) or `liger`."""
    if name == "ours":
        return OURS[operator]
    if name == "eager":
        return TRUTHS[operator]
    if name == "liger":
        return _liger(operator)
    if name == "chunked":
        if operator != "loss" or not hasattr(F, "linear_cross_entropy"):
            raise ValueError("left out: this torch has no F.linear_cross_entropy, or it is for the loss only")
        return lambda x, weight, targets: F.linear_cross_entropy(x, weight, targets, reduction="sum")
    torch._dynamo.reset()
    return torch.compile(TRUTHS[operator], dynamic=False, backend=backend)


def peak_bytes(case: Case, function: Function) -> int | None:
    """Return what forward and backward take beyond what there was; None where memory is not counted."""
    if case.device.type != "cuda":
        return None
    leaves, fixed = case.leaves()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    out = function(*leaves, *fixed)
    torch.autograd.grad(out, leaves, case.grad(out))
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def measure(record: Record, case: Case, name: str, timer: Timer, backend: str, bandwidth: float) -> None:
    """Check and time one implementation."""
    function = implementation(name, case.operator, backend)
    error = case.error(function)
    leaves, fixed = case.leaves()
    grad = case.grad(function(*leaves, *fixed))
    seconds = {
        "forward": timer.median_seconds(lambda _: function(*leaves, *fixed), lambda: None),
        "backward": timer.median_seconds(
            lambda out: torch.autograd.grad(out, leaves, grad), lambda: function(*leaves, *fixed)
        ),
    }
    memory = peak_bytes(case, function)
    for direction, spent in seconds.items():
        size = case.inputs[0].numel() * case.inputs[0].element_size()
        share = None if case.passes is None else 100 * case.passes[direction] * size / spent / bandwidth
        record.add(
            operator=case.operator, implementation=name, direction=direction, microseconds=spent * 1e6,
            percent_of_copy=share, peak_bytes=memory, relative_error=error,
        )  # fmt: skip


def run(record: Record, arguments: argparse.Namespace, deadline: float) -> None:
    """Measure every implementation of every operator; what fails is recorded and left out."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    timer = Timer(device, arguments.repeats, warm_up=1 if arguments.shrink else 3)
    bandwidth = timer.copy_bandwidth(2**22 if arguments.shrink else 2**30)
    record.content["copy_gigabytes_per_second"] = bandwidth / 1e9
    backend = "aot_eager" if arguments.shrink else "inductor"
    names = ["ours", "eager", "chunked", "compiled"]
    if device.type == "cuda" and find_spec("liger_kernel") is not None:
        names.insert(2, "liger")
    else:
        record.fail("liger", "left out: needs a GPU and the package liger-kernel")
    sizes = {name: getattr(arguments, name) for name in SIZES}
    for name in names:  # compiling takes longest, so it comes last
        for operator in arguments.operators:
            if time.monotonic() > deadline:
                record.fail(f"{operator} {name}", "left out: no time left")
                continue
            if name == "chunked" and operator != "loss":
                continue
            try:
                measure(record, Case(operator, sizes, device), name, timer, backend, bandwidth)
            except Exception as error:  # one part must not stop the others, whatever is wrong with it
                record.fail(f"{operator} {name}", first_line(error))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return its exit status."""
    parser = argparse.ArgumentParser(
        prog="operators", description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--operators", default=",".join(OPERATORS), help="which, with commas")
    parser.add_argument("--seconds", type=float, default=1e9, help="start nothing new after this time")
    parser.add_argument("--shrink", action="store_true", help="tiny sizes; torch.compile without code generation")
    for name, size in SIZES.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, help=f"{size} by default")
    arguments = parser.parse_args(argv)
    arguments.operators = [name.strip() for name in arguments.operators.split(",")]
    if unknown := [name for name in arguments.operators if name not in OPERATORS]:
        parser.error(f"--operators has {', '.join(unknown)}; expected some of {', '.join(OPERATORS)}")
    for name, size in (SHRUNK if arguments.shrink else SIZES).items():
        setattr(arguments, name, getattr(arguments, name) or size)
    settings = {name: value for name, value in vars(arguments).items() if name != "out"}
    record = Record("operators", arguments.out, settings)
    run(record, arguments, time.monotonic() + arguments.seconds)
    record.write()
    from benchmarks.table import render

    print(render([record.content]))
    return 0 if record.content["rows"] else 1


if __name__ == "__main__":
    sys.exit(main())
