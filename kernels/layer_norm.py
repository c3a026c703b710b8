"""LayerNorm, alone and fused with the residual addition before it.

Source: Ba, Kiros and Hinton 2016, "Layer Normalization".
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from kernels.dispatch import check_norm, num_programs, row_block, rows_of, use_triton


def layer_norm_truth(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """Compute `layer_norm` with PyTorch's own operator, in fp32 and rounded once."""
    bias_fp32 = None if bias is None else bias.float()
    return F.layer_norm(x.float(), (x.shape[-1],), weight.float(), bias_fp32, eps).to(x.dtype)


def add_layer_norm_truth(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """Compute `add_layer_norm` in plain PyTorch."""
    new_residual = x + residual
    return layer_norm_truth(new_residual, weight, bias, eps), new_residual


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """Subtract each row's mean, divide by its deviation, scale and shift, with fp32 statistics.

    Args:
        x: `[..., D]`, any strides.
        weight: `[D]`, of any floating dtype.
        bias: `[D]`, or None.
        eps: added to the variance.

    Returns:
        `[..., D]` in the dtype of `x`, rounded once.
    """
    check_norm(x, None, weight, bias)
    return _forward_op(x, weight, bias, eps)[0] if use_triton(x) else layer_norm_truth(x, weight, bias, eps)


def add_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """Add `x` to the residual stream and normalise the sum, in one pass over memory.

    Args:
        x: `[..., D]`, what a sublayer adds.
        residual: `[..., D]`, same shape and dtype.
        weight: `[D]`.
        bias: `[D]`, or None.
        eps: added to the variance.

    Returns:
        The normalised sum and the sum itself, which is the new residual, both `[..., D]`.
    """
    check_norm(x, residual, weight, bias)
    if not use_triton(x):
        return add_layer_norm_truth(x, residual, weight, bias, eps)
    y, new_residual, _, _ = _add_forward_op(x, residual, weight, bias, eps)
    return y, new_residual


@triton.jit
def _forward_kernel(
    x_ptr: tl.tensor,
    residual_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    bias_ptr: tl.tensor,
    y_ptr: tl.tensor,
    sum_ptr: tl.tensor,
    mean_ptr: tl.tensor,
    rstd_ptr: tl.tensor,
    x_stride: tl.tensor,
    residual_stride: tl.tensor,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    EPS: tl.constexpr,  # a runtime float may arrive as fp64 and drag the whole row into fp64 arithmetic
    HAS_RESIDUAL: tl.constexpr,
    HAS_BIAS: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)  # row * stride passes 2**31
    column = tl.arange(0, BLOCK)
    inside = column < WIDTH
    x = tl.load(x_ptr + row * x_stride + column, mask=inside, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        x += tl.load(residual_ptr + row * residual_stride + column, mask=inside, other=0.0).to(tl.float32)
        rounded = x.to(sum_ptr.dtype.element_ty)
        tl.store(sum_ptr + row * WIDTH + column, rounded, mask=inside)
        x = rounded.to(tl.float32)  # the backward pass reads the rounded sum: normalise the same values
    mean = tl.sum(x, axis=0) / WIDTH
    # Two passes over registers: E[x^2] - E[x]^2 would cancel where the mean is large. Columns past the end stay 0.
    centred = tl.where(inside, x - mean, 0.0)
    rstd = 1.0 / tl.sqrt(tl.sum(centred * centred, axis=0) / WIDTH + EPS)
    weight = tl.load(weight_ptr + column, mask=inside, other=0.0).to(tl.float32)
    y = centred * rstd * weight
    if HAS_BIAS:
        y += tl.load(bias_ptr + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(y_ptr + row * WIDTH + column, y.to(y_ptr.dtype.element_ty), mask=inside)
    tl.store(mean_ptr + row, mean)
    tl.store(rstd_ptr + row, rstd)


@triton.jit
def _backward_kernel(
    grad_y_ptr: tl.tensor,
    grad_sum_ptr: tl.tensor,
    x_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    mean_ptr: tl.tensor,
    rstd_ptr: tl.tensor,
    grad_x_ptr: tl.tensor,
    partial_weight_ptr: tl.tensor,
    partial_bias_ptr: tl.tensor,
    grad_y_stride: tl.tensor,
    grad_sum_stride: tl.tensor,
    x_stride: tl.tensor,
    num_rows: tl.tensor,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    HAS_GRAD_SUM: tl.constexpr,
    HAS_GRAD_WEIGHT: tl.constexpr,
    HAS_GRAD_BIAS: tl.constexpr,
) -> None:
    program = tl.program_id(0).to(tl.int64)
    row = program
    column = tl.arange(0, BLOCK)
    inside = column < WIDTH
    weight = tl.load(weight_ptr + column, mask=inside, other=0.0).to(tl.float32)
    grad_weight = tl.zeros((BLOCK,), dtype=tl.float32)
    grad_bias = tl.zeros((BLOCK,), dtype=tl.float32)
    for _ in range(program, num_rows, tl.num_programs(0)):
        x = tl.load(x_ptr + row * x_stride + column, mask=inside, other=0.0).to(tl.float32)
        grad_y = tl.load(grad_y_ptr + row * grad_y_stride + column, mask=inside, other=0.0).to(tl.float32)
        mean = tl.load(mean_ptr + row)
        rstd = tl.load(rstd_ptr + row)
        normed = tl.where(inside, (x - mean) * rstd, 0.0)
        if HAS_GRAD_WEIGHT:
            grad_weight += grad_y * normed
        if HAS_GRAD_BIAS:
            grad_bias += grad_y
        grad_normed = grad_y * weight  # 0 past the end of the row
        slope = tl.sum(grad_normed * normed, axis=0) / WIDTH
        offset = tl.sum(grad_normed, axis=0) / WIDTH
        grad_x = (grad_normed - normed * slope - offset) * rstd
        if HAS_GRAD_SUM:
            grad_sum_row = grad_sum_ptr + row * grad_sum_stride
            grad_x += tl.load(grad_sum_row + column, mask=inside, other=0.0).to(tl.float32)
        tl.store(grad_x_ptr + row * WIDTH + column, grad_x.to(grad_x_ptr.dtype.element_ty), mask=inside)
        row += tl.num_programs(0)  # 64 bits, which the variable of the loop need not have
    # One partial sum a program and one reduction afterwards: no atomics, so the same bits on every run.
    if HAS_GRAD_WEIGHT:
        tl.store(partial_weight_ptr + program * WIDTH + column, grad_weight, mask=inside)
    if HAS_GRAD_BIAS:
        tl.store(partial_bias_ptr + program * WIDTH + column, grad_bias, mask=inside)


def _launch_forward(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x_ND = rows_of(x)
    residual_ND = x_ND if residual is None else rows_of(residual)
    num_rows, width = x_ND.shape
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    total = y if residual is None else torch.empty_like(y)
    mean_N, rstd_N = (torch.empty(num_rows, dtype=torch.float32, device=x.device) for _ in range(2))
    block, num_warps = row_block(width)
    if num_rows > 0:
        with torch.cuda.device_of(x):
            _forward_kernel[(num_rows,)](
                x_ND,
                residual_ND,
                weight.contiguous(),
                (weight if bias is None else bias).contiguous(),
                y,
                total,
                mean_N,
                rstd_N,
                x_ND.stride(0),
                residual_ND.stride(0),
                WIDTH=width,
                BLOCK=block,
                EPS=eps,
                HAS_RESIDUAL=residual is not None,
                HAS_BIAS=bias is not None,
                num_warps=num_warps,
            )
    return y, total, mean_N, rstd_N


@torch.library.custom_op("longhaul::layer_norm", mutates_args=())
def _forward_op(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    y, _, mean_N, rstd_N = _launch_forward(x, None, weight, bias, eps)
    return y, mean_N, rstd_N


@torch.library.custom_op("longhaul::add_layer_norm", mutates_args=())
def _add_forward_op(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _launch_forward(x, residual, weight, bias, eps)


@torch.library.custom_op("longhaul::layer_norm_backward", mutates_args=())
def _backward_op(
    grad_y: Tensor,
    grad_sum: Tensor | None,
    x: Tensor,
    weight: Tensor,
    mean_N: Tensor,
    rstd_N: Tensor,
    with_grad_weight: bool,
    with_grad_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the gradients of x, weight and bias; the last two are empty where they are not wanted."""
    x_ND, grad_y_ND = rows_of(x), rows_of(grad_y)
    grad_sum_ND = x_ND if grad_sum is None else rows_of(grad_sum)
    num_rows, width = x_ND.shape
    block, num_warps = row_block(width)
    programs = num_programs(x, num_rows, num_warps)
    grad_x = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    partial_PD, partial_bias_PD = (
        torch.empty((programs, width if is_wanted else 0), dtype=torch.float32, device=x.device)
        for is_wanted in (with_grad_weight, with_grad_bias)
    )
    if num_rows > 0:
        with torch.cuda.device_of(x):
            _backward_kernel[(programs,)](
                grad_y_ND,
                grad_sum_ND,
                x_ND,
                weight.contiguous(),
                mean_N,
                rstd_N,
                grad_x,
                partial_PD,
                partial_bias_PD,
                grad_y_ND.stride(0),
                grad_sum_ND.stride(0),
                x_ND.stride(0),
                num_rows,
                WIDTH=width,
                BLOCK=block,
                HAS_GRAD_SUM=grad_sum is not None,
                HAS_GRAD_WEIGHT=with_grad_weight,
                HAS_GRAD_BIAS=with_grad_bias,
                num_warps=num_warps,
            )
    return grad_x, partial_PD.sum(0).to(weight.dtype), partial_bias_PD.sum(0).to(weight.dtype)


@_forward_op.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    statistics = [x.new_empty(x.shape[:-1].numel(), dtype=torch.float32) for _ in range(2)]
    return x.new_empty(x.shape), statistics[0], statistics[1]


@_add_forward_op.register_fake
def _(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    statistics = [x.new_empty(x.shape[:-1].numel(), dtype=torch.float32) for _ in range(2)]
    return x.new_empty(x.shape), x.new_empty(x.shape), statistics[0], statistics[1]


@_backward_op.register_fake
def _(
    grad_y: Tensor,
    grad_sum: Tensor | None,
    x: Tensor,
    weight: Tensor,
    mean_N: Tensor,
    rstd_N: Tensor,
    with_grad_weight: bool,
    with_grad_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    grads = [weight.new_empty(weight.shape if is_wanted else (0,)) for is_wanted in (with_grad_weight, with_grad_bias)]
    return x.new_empty(x.shape), grads[0], grads[1]


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, weight, *_ = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, weight, output[1], output[2])


def _backward(ctx: Any, grad_y: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad_y is None:
        return None, None, None, None
    x, weight, mean_N, rstd_N = ctx.saved_tensors
    wanted = ctx.needs_input_grad[1:3]
    grad_x, *grads = _backward_op(grad_y, None, x, weight, mean_N, rstd_N, *wanted)
    return grad_x, *_if_wanted(grads, wanted), None


def _if_wanted(grads: list[Tensor], wanted: tuple[bool, ...]) -> list[Tensor | None]:
    return [grad if is_wanted else None for grad, is_wanted in zip(grads, wanted, strict=True)]


def _add_keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
    ctx.set_materialize_grads(False)  # the last norm's new residual has no gradient: do not make one of zeros
    ctx.save_for_backward(output[1], inputs[2], output[2], output[3])


def _add_backward(
    ctx: Any, grad_y: Tensor | None, grad_sum: Tensor | None, *_: Tensor | None
) -> tuple[Tensor | None, ...]:
    if grad_y is None:
        return grad_sum, grad_sum, None, None, None
    total, weight, mean_N, rstd_N = ctx.saved_tensors
    wanted = ctx.needs_input_grad[2:4]
    grad_x, *grads = _backward_op(grad_y, grad_sum, total, weight, mean_N, rstd_N, *wanted)
    return grad_x, grad_x, *_if_wanted(grads, wanted), None


_forward_op.register_autograd(_backward, setup_context=_keep)
_add_forward_op.register_autograd(_add_backward, setup_context=_add_keep)
