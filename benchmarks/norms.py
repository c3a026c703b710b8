"""RMSNorm and LayerNorm, alone and fused with the residual addition, beside PyTorch's and Liger's.

Each is timed forward and backward at several widths in bf16. The bytes are the least that the operation must move:
its inputs and outputs of `[N, D]` once, weights and statistics left out; implementations that move more get less.
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
from kernels.layer_norm import add_layer_norm, add_layer_norm_truth, layer_norm, layer_norm_truth
from kernels.rms_norm import add_rms_norm, add_rms_norm_truth, rms_norm, rms_norm_truth

EXAMPLES = """examples:
  python benchmarks/norms.py --out bench-results/norms.json
  python benchmarks/norms.py --widths 1024,4096 --rows 8192
  python benchmarks/norms.py --shrink        (a CPU: shows that it runs, not how fast)"""

EPS = 1e-5
WIDTHS = (768, 1024, 2048, 4096, 8192)
OPERATIONS = ("rmsnorm", "add_rmsnorm", "layernorm", "add_layernorm")
NUM_CHECKED = 256  # rows that are compared with fp64

Outputs = tuple[Tensor, ...]
Norm = Callable[[Tensor, Tensor, Tensor, Tensor], Outputs]  # x, residual, weight, bias

OURS: dict[str, Norm] = {
    "rmsnorm": lambda x, r, w, b: (rms_norm(x, w, EPS),),
    "add_rmsnorm": lambda x, r, w, b: add_rms_norm(x, r, w, EPS),
    "layernorm": lambda x, r, w, b: (layer_norm(x, w, b, EPS),),
    "add_layernorm": lambda x, r, w, b: add_layer_norm(x, r, w, b, EPS),
}
TRUTHS: dict[str, Norm] = {
    "rmsnorm": lambda x, r, w, b: (rms_norm_truth(x, w, EPS),),
    "add_rmsnorm": lambda x, r, w, b: add_rms_norm_truth(x, r, w, EPS),
    "layernorm": lambda x, r, w, b: (layer_norm_truth(x, w, b, EPS),),
    "add_layernorm": lambda x, r, w, b: add_layer_norm_truth(x, r, w, b, EPS),
}


def _eager(operation: str, x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> Outputs:
    total = x + residual if operation.startswith("add_") else x
    if operation.endswith("rmsnorm"):
        y = F.rms_norm(total, (x.shape[-1],), weight, EPS)
    else:
        y = F.layer_norm(total, (x.shape[-1],), weight, bias, EPS)
    return (y, total) if operation.startswith("add_") else (y,)


def _exact(operation: str, x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> Outputs:
    """Compute it in the precision of the arguments, written independently of the kernels' truths."""
    total = x + residual if operation.startswith("add_") else x
    centred = total if operation.endswith("rmsnorm") else total - total.mean(-1, keepdim=True)
    y = centred / (centred.square().mean(-1, keepdim=True) + EPS).sqrt() * weight
    y = y if operation.endswith("rmsnorm") else y + bias
    return (y, total) if operation.startswith("add_") else (y,)


def _liger(operation: str) -> Norm:
    from liger_kernel.ops import LigerFusedAddRMSNormFunction, LigerLayerNormFunction, LigerRMSNormFunction

    # in_place=False: in place, its backward writes over the incoming gradient, which the next run uses again
    norms: dict[str, Norm] = {
        "rmsnorm": lambda x, r, w, b: (LigerRMSNormFunction.apply(x, w, EPS, 0.0, "llama", False),),
        "add_rmsnorm": lambda x, r, w, b: LigerFusedAddRMSNormFunction.apply(x, r, w, EPS, 0.0, "llama", False),
        "layernorm": lambda x, r, w, b: (LigerLayerNormFunction.apply(x, w, b, EPS),),
    }

    def add_layer_norm_unfused(x: Tensor, r: Tensor, w: Tensor, b: Tensor) -> Outputs:  # Liger has no fused one
        total = x + r
        return LigerLayerNormFunction.apply(total, w, b, EPS), total

    return norms.get(operation, add_layer_norm_unfused)


def implementation(name: str, operation: str, compile_backend: str) -> Norm:
    """Return one implementation of an operation: `ours`, `eager`, `compiled` or `liger`."""
    if name == "ours":
        return OURS[operation]
    if name == "eager":
        return lambda *arguments: _eager(operation, *arguments)
    if name == "liger":
        return _liger(operation)
    torch._dynamo.reset()  # else the second width is compiled for any width
    return torch.compile(TRUTHS[operation], dynamic=False, backend=compile_backend)


class Case:
    """The inputs of one operation at one width, and what is done with an implementation of it."""

    def __init__(self, operation: str, num_rows: int, width: int, timer: Timer) -> None:
        self.operation, self.timer = operation, timer
        generator = torch.Generator(timer.device).manual_seed(width)

        def draw(*size: int) -> Tensor:
            return torch.randn(size, generator=generator, device=timer.device, dtype=torch.bfloat16)

        self.has_residual = operation.startswith("add_")
        self.x, self.residual = draw(num_rows, width), draw(num_rows, width)
        self.weight, self.bias = 1 + 0.2 * draw(width), draw(width)
        self.grads = tuple(draw(num_rows, width) for _ in range(2 if self.has_residual else 1))

    def _used(self, x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> list[Tensor]:
        used = [x, residual] if self.has_residual else [x]
        return [*used, weight, bias] if self.operation.endswith("layernorm") else [*used, weight]

    def _leaves(self) -> list[Tensor]:
        return [t.detach().requires_grad_() for t in (self.x, self.residual, self.weight, self.bias)]

    def error(self, norm: Norm) -> float:
        """Return the larger of ||out - exact|| / ||exact|| of y and of the gradient of x, on the first rows."""
        leaves = self._leaves()
        outputs = norm(*leaves)
        actual = (outputs[0].detach(), torch.autograd.grad(outputs, leaves[0], self.grads)[0])
        first = slice(NUM_CHECKED)
        wide = [t.double() for t in (self.x[first], self.residual[first], self.weight, self.bias)]
        wide[0].requires_grad_()
        outputs = _exact(self.operation, *wide)
        grads = [grad[first].double() for grad in self.grads]
        exact = (outputs[0].detach(), torch.autograd.grad(outputs, wide[0], grads)[0])
        errors = [float((a[first].double() - e).norm() / e.norm()) for a, e in zip(actual, exact, strict=True)]
        return max(errors) if all(error == error for error in errors) else float("nan")

    def forward_seconds(self, norm: Norm) -> float:
        """Time the forward pass as training runs it, with what the backward pass needs."""
        leaves = self._leaves()
        return self.timer.median_seconds(lambda _: norm(*leaves), lambda: None)

    def backward_seconds(self, norm: Norm) -> float:
        """Time the backward pass to all inputs and parameters."""
        leaves = self._leaves()
        used = self._used(*leaves)
        return self.timer.median_seconds(
            lambda outputs: torch.autograd.grad(outputs, used, self.grads), lambda: norm(*leaves)
        )

    def least_bytes(self, direction: str) -> int:
        """Return the bytes that the direction must move: with a residual one tensor more each way, or one more in."""
        if direction == "forward":  # x (and residual) in, y (and their sum) out
            num_tensors = 4 if self.has_residual else 2
        else:  # x and the gradient of y (and of the sum) in, one gradient out, which x and residual share
            num_tensors = 4 if self.has_residual else 3
        return num_tensors * self.x.numel() * self.x.element_size()


def run(record: Record, arguments: argparse.Namespace, deadline: float) -> None:
    """Measure every implementation of every operation at every width; what fails is recorded and left out."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    timer = Timer(device, arguments.repeats, warm_up=2 if arguments.shrink else 5)
    bandwidth = timer.copy_bandwidth(2**22 if arguments.shrink else 2**30)
    record.content["copy_gigabytes_per_second"] = bandwidth / 1e9
    backend = "aot_eager" if arguments.shrink else "inductor"
    # Compiling takes longest, so it comes last.
    names = ["ours", "eager"]
    if device.type == "cuda" and find_spec("liger_kernel") is not None:
        names.append("liger")
    else:
        record.fail("liger", "left out: needs a GPU and the package liger-kernel")
    for group in (names, ["compiled"]):
        for width in arguments.widths:
            for operation in OPERATIONS:
                for name in group:
                    part = f"{operation} {name} D={width}"
                    if time.monotonic() > deadline:
                        record.fail(part, "left out: no time left")
                        continue
                    try:
                        measure(record, Case(operation, arguments.rows, width, timer), name, backend, bandwidth)
                    except Exception as error:  # one part must not stop the others, whatever is wrong with it
                        record.fail(part, first_line(error))


def measure(record: Record, case: Case, name: str, backend: str, bandwidth: float) -> None:
    """Check and time one implementation in both directions."""
    norm = implementation(name, case.operation, backend)
    error = case.error(norm)
    for direction, seconds in (("forward", case.forward_seconds(norm)), ("backward", case.backward_seconds(norm))):
        rate = case.least_bytes(direction) / seconds
        record.add(
            operation=case.operation,
            direction=direction,
            implementation=name,
            num_rows=case.x.shape[0],
            width=case.x.shape[1],
            dtype="bf16",
            microseconds=seconds * 1e6,
            gigabytes_per_second=rate / 1e9,
            percent_of_copy=100 * rate / bandwidth,
            relative_error=error,
        )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return its exit status."""
    parser = argparse.ArgumentParser(
        prog="norms", description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--rows", type=int, help="N; 32768 by default")
    parser.add_argument("--widths", type=lambda text: [int(part) for part in text.split(",")], help="D, with commas")
    parser.add_argument("--repeats", type=int, help="timed runs; 25 by default")
    parser.add_argument("--seconds", type=float, default=1e9, help="start nothing new after this time")
    parser.add_argument("--shrink", action="store_true", help="tiny sizes; torch.compile without code generation")
    arguments = parser.parse_args(argv)
    defaults: dict[str, Any] = {"rows": 32768, "widths": WIDTHS, "repeats": 25}
    if arguments.shrink:
        defaults = {"rows": 64, "widths": WIDTHS[:1], "repeats": 3}
    for option, value in defaults.items():
        setattr(arguments, option, getattr(arguments, option) or value)
    settings = {name: value for name, value in vars(arguments).items() if name != "out"}
    record = Record("norms", arguments.out, settings)
    run(record, arguments, time.monotonic() + arguments.seconds)
    record.write()
    from benchmarks.table import render

    print(render([record.content]))
    return 0 if record.content["rows"] else 1


if __name__ == "__main__":
    sys.exit(main())
