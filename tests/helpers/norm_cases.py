"""What is checked of the Triton norms: in the interpreter by `kernels/interpreter_norms.py`, on a GPU by `gpu/test_norms.py`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from kernels.layer_norm import add_layer_norm, add_layer_norm_truth, layer_norm, layer_norm_truth
from kernels.rms_norm import add_rms_norm, add_rms_norm_truth, rms_norm, rms_norm_truth

KINDS = ("rmsnorm", "layernorm", "layernorm_without_bias")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SHAPES = ((1, 1), (5, 7), (1, 64), (5, 192), (199, 64), (5, 760), (7, 1128))
EPS = 1e-5

Norm = Callable[..., Tensor | tuple[Tensor, Tensor]]


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Let `torch.empty` return NaN, so that an element that no program writes is seen."""
    torch.use_deterministic_algorithms(True)  # torch.utils.deterministic.fill_uninitialized_memory is on by default
    assert torch.empty(1000).isnan().all()
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def implementations(kind: str, with_residual: bool) -> tuple[Norm, Norm]:
    """Return the operation and its truth, both called as f(x, residual, weight, bias)."""
    if kind == "rmsnorm":
        if with_residual:
            return (
                lambda x, r, w, b: add_rms_norm(x, r, w, EPS),
                lambda x, r, w, b: add_rms_norm_truth(x, r, w, EPS),
            )
        return lambda x, r, w, b: rms_norm(x, w, EPS), lambda x, r, w, b: rms_norm_truth(x, w, EPS)
    if with_residual:
        return (
            lambda x, r, w, b: add_layer_norm(x, r, w, b, EPS),
            lambda x, r, w, b: add_layer_norm_truth(x, r, w, b, EPS),
        )
    return lambda x, r, w, b: layer_norm(x, w, b, EPS), lambda x, r, w, b: layer_norm_truth(x, w, b, EPS)


def exact(kind: str, x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, ...]:
    """Compute the norm in the precision of its arguments, written independently of the truths."""
    total = x if residual is None else x + residual
    centred = total if kind == "rmsnorm" else total - total.mean(-1, keepdim=True)
    y = centred / (centred.pow(2).mean(-1, keepdim=True) + EPS).sqrt() * weight
    y = y if bias is None else y + bias
    return (y,) if residual is None else (y, total)


def inputs(kind: str, shape: tuple[int, int], dtype: torch.dtype, device: str, with_residual: bool) -> list:
    """Draw x, residual, weight and bias; None where the case has none."""
    generator = torch.Generator().manual_seed(shape[0] * 10007 + shape[1])

    def draw(*size: int) -> Tensor:
        return torch.randn(size, generator=generator).to(device, dtype)

    x, weight, bias = draw(*shape) * 1.5 + 0.5, 1.0 + 0.2 * draw(shape[1]), draw(shape[1])
    return [x, draw(*shape) if with_residual else None, weight, bias if kind == "layernorm" else None]


def results(norm: Norm, arguments: list, grads: list[Tensor]) -> list[Tensor]:
    """Run forward and backward; return outputs, then the gradient of every argument that is not None."""
    leaves = [None if a is None else a.detach().requires_grad_() for a in arguments]
    outputs = norm(*leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    torch.autograd.backward(outputs, [g.to(o.dtype) for g, o in zip(grads, outputs, strict=False)])
    return [*(o.detach() for o in outputs), *(leaf.grad for leaf in leaves if leaf is not None)]


def worst_ratio(
    actual: list[Tensor], eager: list[Tensor], reference: list[Tensor], least_noise: float = 1e-12
) -> float:
    """Compare by the rule of FlashAttention's tests: error <= 2 x the error of eager code in that dtype + noise.

    Args:
        actual: what is tested.
        eager: the same in plain PyTorch.
        reference: the same in fp64.
        least_noise: a bound is not smaller.

    Returns:
        The largest of error / (2 x eager error + atol), which must not pass 1; NaN counts as infinite.
    """
    worst = 0.0
    for a, e, r in zip(actual, eager, reference, strict=True):
        assert a.dtype == e.dtype and a.shape == e.shape == r.shape
        rounded = r.to(a.dtype)
        noise = 2 * (rounded + 0.3 - 0.3 - rounded).abs().max().double()
        # With a handful of elements either term may be 0 by luck: at least one unit in the last place of the largest.
        atol = max(noise, torch.finfo(a.dtype).eps * r.abs().max())
        bound = 2 * (e.double() - r).abs().max() + atol
        ratio = ((a.double() - r).abs().max() / bound.clamp_min(least_noise)).item()
        worst = max(worst, ratio if ratio == ratio else float("inf"))
    return worst


def measure(kind: str, shape: tuple[int, int], dtype: torch.dtype, device: str, with_residual: bool) -> float:
    """Run one case and return its worst ratio."""
    arguments = inputs(kind, shape, dtype, device, with_residual)
    generator = torch.Generator().manual_seed(1)
    grads = [torch.randn(shape, generator=generator).to(device, dtype) for _ in range(2)]
    norm, truth = implementations(kind, with_residual)
    with poisoned_memory():
        actual = results(norm, arguments, grads)
    eager = results(truth, arguments, grads)
    wide = [None if a is None else a.double() for a in arguments]
    reference = results(lambda *a: exact(kind, *a), wide, [g.double() for g in grads])
    return worst_ratio(actual, eager, reference)


def strided_ratio(kind: str, device: str) -> float:
    """Run a case whose input, residual and gradient are slices of wider or transposed tensors."""
    wide = torch.randn(4, 6, 100, device=device)
    x, residual = wide[:, ::2, 10:50], torch.randn(40, 3, 4, device=device).permute(2, 1, 0)
    arguments = inputs(kind, (1, 40), torch.float32, device, True)
    arguments[0], arguments[1] = x, residual
    grads = [torch.randn(4, 3, 80, device=device)[..., 20:60], torch.randn(1, 1, 40, device=device).expand(4, 3, 40)]
    norm, truth = implementations(kind, True)
    before = wide.clone()
    with poisoned_memory():
        actual = results(norm, arguments, grads)
    assert torch.equal(wide, before)
    reference = results(
        lambda *a: exact(kind, *a), [None if a is None else a.double() for a in arguments], [g.double() for g in grads]
    )
    return worst_ratio(actual, results(truth, arguments, grads), reference)
