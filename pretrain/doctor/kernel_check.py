"""The own kernels against PyTorch in fp64, forward and backward: Triton's on a GPU, elsewhere what stands for them.

With `TRITON_INTERPRET=1` in the environment Triton's programs run on a CPU, interpreted.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.activation import gelu, swiglu, swiglu_truth
from kernels.attention import attention, attention_truth
from kernels.layer_norm import layer_norm, layer_norm_truth
from kernels.linear_cross_entropy import linear_cross_entropy, linear_cross_entropy_truth
from kernels.rms_norm import rms_norm, rms_norm_truth
from kernels.visibility import visibility
from pretrain.doctor.findings import Line, Request, failure, ok, skipped

_EPS = 1e-5
_LEAST = 2.0**-18  # of the largest value: fused fp32 attention of a CPU takes exponentials to a few 1e-7
_MEND = (
    "Do not train here: use the torch and triton that belong together (the line `triton and torch`), empty "
    "~/.triton/cache, and report it if that does not help."
)
_Operation = Callable[..., Tensor]
# name: (operation, the same in plain PyTorch, the same in fp64, arguments)
_Case = tuple[_Operation, _Operation, _Operation, list[Tensor]]


def check(request: Request) -> Iterator[Line]:
    """Compile and run one program, then compare all operations."""
    is_interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    on_gpu = torch.cuda.is_available()
    if is_interpreted and on_gpu:
        yield skipped("interpreter", "there is a GPU, on which the kernels were run themselves")
        return
    device = torch.device("cuda" if on_gpu else "cpu")
    if on_gpu:
        yield _compile_one(device)
        if request.is_quick:
            yield skipped("own kernels", "left out by --quick")
            return
    how = f"by Triton on {torch.cuda.get_device_name()}" if on_gpu else "on the CPU as in training"
    how = "by Triton's interpreter" if is_interpreted else how
    # bf16 is what trains on a GPU; the interpreter computes it wrongly, without an error, in triton 3.6 and 3.7
    has_bf16 = on_gpu and torch.cuda.is_bf16_supported(including_emulation=False)
    dtype = torch.bfloat16 if has_bf16 else torch.float16 if on_gpu or is_interpreted else torch.float32
    for name, case in cases(device, dtype).items():
        yield judge(name, compare(*case), f"{how} in {str(dtype).removeprefix('torch.')}")


def _compile_one(device: torch.device) -> Line:
    """Compile a small program, not found in any cache, and run it."""
    with tempfile.TemporaryDirectory(prefix="longhaul-doctor-") as folder:
        old = os.environ.get("TRITON_CACHE_DIR")
        os.environ["TRITON_CACHE_DIR"] = folder
        try:
            begin = time.monotonic()
            x = torch.linspace(-3, 3, 1000, device=device)
            off = (gelu(x) - F.gelu(x, approximate="tanh")).abs().max().item()
            seconds, num_files = time.monotonic() - begin, sum(path.is_file() for path in Path(folder).rglob("*"))
        finally:
            os.environ.pop("TRITON_CACHE_DIR")
            if old is not None:
                os.environ["TRITON_CACHE_DIR"] = old
    if off > 1e-4 or num_files == 0:
        return failure("Triton", f"a small program is off by {off:.2g} and left {num_files} files in its cache", _MEND)
    return ok("Triton", f"a small program was compiled and run in {seconds:.1f} s")


def judge(name: str, ratio: float, how: str) -> Line:
    """Say whether an operation is as exact as it must be.

    Args:
        name: of the operation.
        ratio: its error, to what is allowed.
        how: it was run.
    """
    if ratio <= 1:
        return ok(name, f"forward and backward have {ratio:.2f} of the error that is allowed, {how}")
    return failure(name, f"forward or backward has {ratio:.3g} times the error that is allowed, {how}", _MEND)


def compare(operation: _Operation, truth: _Operation, exact: _Operation, arguments: list[Tensor]) -> float:
    """Return the error of output and gradients to what is allowed: twice that of plain PyTorch in the same dtype.

    Args:
        operation: what training calls.
        truth: the same in plain PyTorch.
        exact: the same, to be run in fp64.
        arguments: those of floating dtypes get gradients.
    """
    wide = [one.double() if one.is_floating_point() else one for one in arguments]
    found, plain, wanted = _run(operation, arguments), _run(truth, arguments), _run(exact, wide)
    worst = 0.0
    for a, p, w in zip(found, plain, wanted, strict=True):
        bound = 2 * (p.double() - w).abs().max() + max(torch.finfo(a.dtype).eps, _LEAST) * w.abs().max()
        ratio = ((a.double() - w).abs().max() / bound.clamp_min(1e-30)).item()
        worst = max(worst, ratio if ratio == ratio else float("inf"))  # not a number is as wrong as can be
    return worst


def _run(operation: _Operation, arguments: list[Tensor]) -> list[Tensor]:
    leaves = [one.detach().clone().requires_grad_(one.is_floating_point()) for one in arguments]
    output = operation(*leaves)
    weights = torch.arange(output.numel(), device=output.device) % 7 - 3.0  # exact in every dtype
    output.backward(weights.reshape(output.shape).to(output.dtype))
    return [output.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]


def cases(device: torch.device, dtype: torch.dtype) -> dict[str, _Case]:
    """Return the operations that are compared, with their arguments."""
    generator = torch.Generator().manual_seed(0)

    def draw(*size: int) -> Tensor:
        return torch.randn(size, generator=generator).to(device, dtype)

    starts_BT = torch.zeros(2, 96, dtype=torch.int32, device=device)
    starts_BT[1, 40:] = 40  # two documents in one row
    sees = visibility(starts_BT, 96, dtype)
    mask_B1TS = sees.seen_BTS[:, None]

    def exact_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, mask_B1TS, enable_gqa=True).transpose(1, 2)

    targets = torch.arange(70, device=device) * 7 % 300
    return {
        "attention": (
            lambda q, k, v: attention(q, k, v, sees), lambda q, k, v: attention_truth(q, k, v, sees), exact_attention,
            [draw(2, 96, 4, 32), draw(2, 96, 2, 32), draw(2, 96, 2, 32)],
        ),
        "RMSNorm": (
            lambda x, w: rms_norm(x, w, _EPS), lambda x, w: rms_norm_truth(x, w, _EPS),
            lambda x, w: F.rms_norm(x, w.shape, w, _EPS), [draw(37, 200), draw(200)],
        ),
        "LayerNorm": (
            lambda x, w, b: layer_norm(x, w, b, _EPS), lambda x, w, b: layer_norm_truth(x, w, b, _EPS),
            lambda x, w, b: F.layer_norm(x, w.shape, w, b, _EPS), [draw(37, 200), draw(200), draw(200)],
        ),
        "SwiGLU": (swiglu, swiglu_truth, swiglu_truth, [draw(37, 200)]),
        "loss": (
            lambda x, w: linear_cross_entropy(x, w, targets, 300)[0],
            lambda x, w: linear_cross_entropy_truth(x, w, targets, 300)[0],
            lambda x, w: F.cross_entropy(x @ w.t(), targets, reduction="sum"), [draw(70, 64), draw(300, 64)],
        ),
    }  # fmt: skip
