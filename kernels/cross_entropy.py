"""Cross-entropy of logits in one Triton launch, which leaves the gradient in the logits' own memory.

One program takes one row: a pass for the largest logit and the sum of exponentials, and a pass that writes the
gradient; 8 bytes read and 2 or 4 written per logit. A gradient in half precision takes the first half of its row, so
that the buffer of logits is all the memory there is: a second buffer would add half as much and save no traffic.

The mathematics beside it in plain PyTorch is `linear_cross_entropy_truth`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

IGNORED = -100  # target of a token that is not scored

MAX_BLOCK = 4096  # logits a program holds at a time: 8 a thread with 16 warps, so that few rows share L2
_ROW_MULTIPLE = 32  # rows of logits start at multiples of 128 bytes
_LOWEST: tl.constexpr = tl.constexpr(-3.0e38)  # below any logit, and finite: -inf - -inf is NaN
_IGNORED: tl.constexpr = tl.constexpr(IGNORED)


@triton.jit
def _tanh(x: tl.tensor) -> tl.tensor:
    """Return tanh and its derivative; by exp, which every backend has."""
    small = tl.exp(-2.0 * tl.abs(x))
    size = (1.0 - small) / (1.0 + small)
    return tl.where(x < 0.0, -size, size), 4.0 * small / ((1.0 + small) * (1.0 + small))


@triton.jit
def _load_capped(logits_ptr: tl.tensor, column: tl.tensor, inside: tl.tensor, SOFTCAP: tl.constexpr) -> tl.tensor:
    """Return logits, capped where there is a cap, and the cap's derivative; -inf outside."""
    logits = tl.load(logits_ptr + column, mask=inside, other=float("-inf"))
    if SOFTCAP > 0.0:
        tanh, slope = _tanh(logits * (1.0 / SOFTCAP))
        logits = tl.where(inside, SOFTCAP * tanh, float("-inf"))
    else:
        slope = logits
    return logits, slope


@triton.jit
def _take_block(
    logits_ptr: tl.tensor,
    column: tl.tensor,
    inside: tl.tensor,
    top: tl.tensor,
    sums: tl.tensor,
    totals: tl.tensor,
    SMOOTHING: tl.constexpr,
    SOFTCAP: tl.constexpr,
) -> tl.tensor:
    """Go on with the largest logit, the sum of exponentials relative to it and the sum of logits, lane by lane."""
    logits, _ = _load_capped(logits_ptr, column, inside, SOFTCAP)
    above = logits - top
    small = tl.exp(-tl.abs(above))  # one exponential does: one of the two terms is scaled by exp(0)
    sums = tl.where(above > 0.0, sums * small + 1.0, sums + small)  # NaN takes the second branch and stays
    if SMOOTHING > 0.0:
        totals += tl.where(inside, logits, 0.0)
    return tl.maximum(top, logits), sums, totals


@triton.jit
def _write_block(
    logits_ptr: tl.tensor,
    grad_ptr: tl.tensor,
    column: tl.tensor,
    inside: tl.tensor,
    target: tl.tensor,
    top: tl.tensor,
    scale: tl.tensor,
    twice_z_lse: tl.tensor,
    CLASSES: tl.constexpr,
    Z_LOSS: tl.constexpr,
    SMOOTHING: tl.constexpr,
    SOFTCAP: tl.constexpr,
    GRAD_SCALE: tl.constexpr,
) -> None:
    logits, slope = _load_capped(logits_ptr, column, inside, SOFTCAP)
    softmax = tl.exp(logits - top) * scale
    # In fp32, before anything is rounded; the term of z-loss by itself, as softmax - 1 may be 0.
    grad = softmax - tl.where(column == target, 1.0 - SMOOTHING + SMOOTHING / CLASSES, SMOOTHING / CLASSES)
    if Z_LOSS > 0.0:
        grad += softmax * twice_z_lse
    if SOFTCAP > 0.0:
        grad *= slope
    # The gradient of a block lies over logits of this block or of earlier ones: every thread must have read them.
    tl.debug_barrier()
    tl.store(grad_ptr + column, (grad * GRAD_SCALE).to(grad_ptr.dtype.element_ty), mask=inside)


@triton.jit
def cross_entropy_kernel(
    logits_ptr: tl.tensor,
    targets_ptr: tl.tensor,
    objective_ptr: tl.tensor,
    cross_entropy_ptr: tl.tensor,
    grad_ptr: tl.tensor,
    logits_stride: tl.tensor,
    grad_stride: tl.tensor,
    CLASSES: tl.constexpr,
    BLOCK: tl.constexpr,
    Z_LOSS: tl.constexpr,  # a runtime float may arrive as fp64
    SMOOTHING: tl.constexpr,
    SOFTCAP: tl.constexpr,
    HAS_GRAD: tl.constexpr,
    GRAD_SCALE: tl.constexpr,
) -> None:
    """Compute objective and cross-entropy of one row, and its gradient in place; SOFTCAP 0: none."""
    WHOLE: tl.constexpr = CLASSES // BLOCK * BLOCK  # blocks without a mask, whose loads are wide for any CLASSES
    row = tl.program_id(0).to(tl.int64)  # row * stride passes 2**31
    logits_ptr += row * logits_stride
    grad_ptr += row * grad_stride
    lane = tl.arange(0, BLOCK)
    everywhere = tl.full((BLOCK,), True, tl.int1)
    rest = WHOLE + lane
    target = tl.load(targets_ptr + row)
    if target == _IGNORED:
        tl.store(objective_ptr + row, 0.0)
        tl.store(cross_entropy_ptr + row, 0.0)
        if HAS_GRAD:
            zeros = tl.zeros((BLOCK,), grad_ptr.dtype.element_ty)
            for start in range(0, WHOLE, BLOCK):
                tl.store(grad_ptr + start + lane, zeros)
            if WHOLE < CLASSES:
                tl.store(grad_ptr + rest, zeros, mask=rest < CLASSES)
    else:
        valid = (target >= 0) & (target < CLASSES)  # any other class: NaN, and nothing read outside the row
        picked = tl.load(logits_ptr + target, mask=valid, other=float("nan"))
        if SOFTCAP > 0.0:
            picked = SOFTCAP * _tanh(picked * (1.0 / SOFTCAP))[0]
        tops = tl.full((BLOCK,), _LOWEST, tl.float32)
        sums = tl.zeros((BLOCK,), tl.float32)
        totals = tl.zeros((BLOCK,), tl.float32)
        for start in range(0, WHOLE, BLOCK):
            tops, sums, totals = _take_block(
                logits_ptr, start + lane, everywhere, tops, sums, totals, SMOOTHING, SOFTCAP
            )
        if WHOLE < CLASSES:
            tops, sums, totals = _take_block(logits_ptr, rest, rest < CLASSES, tops, sums, totals, SMOOTHING, SOFTCAP)
        top = tl.max(tops, axis=0)
        sum_ = tl.sum(sums * tl.exp(tops - top), axis=0)
        log_sum = tl.log(sum_)  # as `picked - top`, relative to the largest logit
        cross_entropy = log_sum - (picked - top)
        objective = cross_entropy
        if SMOOTHING > 0.0:
            objective += SMOOTHING * (picked - tl.sum(totals, axis=0) / CLASSES)
        if Z_LOSS > 0.0:
            objective += Z_LOSS * (log_sum + top) * (log_sum + top)
        tl.store(objective_ptr + row, objective)
        tl.store(cross_entropy_ptr + row, cross_entropy)
        if HAS_GRAD:
            class_, scale, twice_z_lse = target.to(tl.int32), 1.0 / sum_, 2.0 * Z_LOSS * (log_sum + top)
            for start in range(0, WHOLE, BLOCK):
                _write_block(logits_ptr, grad_ptr, start + lane, everywhere, class_, top, scale, twice_z_lse,
                             CLASSES, Z_LOSS, SMOOTHING, SOFTCAP, GRAD_SCALE)  # fmt: skip
            if WHOLE < CLASSES:
                _write_block(logits_ptr, grad_ptr, rest, rest < CLASSES, class_, top, scale, twice_z_lse,
                             CLASSES, Z_LOSS, SMOOTHING, SOFTCAP, GRAD_SCALE)  # fmt: skip


def vocabulary_block(num_classes: int) -> tuple[int, int]:
    """Choose how many logits a program holds at a time, and its warps.

    Args:
        num_classes: logits of a row.

    Returns:
        Tile width, a power of two, and warps, so that a thread has 8 logits.
    """
    block = min(max(triton.next_power_of_2(num_classes), 32), MAX_BLOCK)
    return block, max(block // 256, 1)


def row_stride(num_classes: int) -> int:
    """Count the fp32 elements from one row of logits to the next: aligned for wide loads and for matrix units."""
    return -(-num_classes // _ROW_MULTIPLE) * _ROW_MULTIPLE


def new_logits(num_rows: int, num_classes: int, device: torch.device) -> Tensor:
    """Allocate fp32 logits `[num_rows, num_classes]`, whose rows are `row_stride` apart."""
    return torch.empty(num_rows, row_stride(num_classes), dtype=torch.float32, device=device)[:, :num_classes]


def cross_entropy_(
    logits_NC: Tensor,
    targets_N: Tensor,
    objective_N: Tensor,
    cross_entropy_N: Tensor,
    options: tuple[float, float, float | None],
    grad_dtype: torch.dtype | None,
    grad_scale: float = 1.0,
) -> Tensor:
    """Compute the loss of each row and overwrite its logits by the gradient.

    Args:
        logits_NC: fp32, made by `new_logits`, or rows of it.
        targets_N: int64, contiguous; -100 where not scored: loss 0, gradient 0. Any other class that does not exist
            gives NaN.
        objective_N: fp32, written: what `linear_cross_entropy` sums.
        cross_entropy_N: fp32, written: nats.
        options: z_loss, label_smoothing, softcap as in `linear_cross_entropy`.
        grad_dtype: of the gradient; None: none is written and the logits stay.
        grad_scale: multiplies the gradient before it is rounded.

    Returns:
        The gradient `[N, C]`, a view of the memory of the logits.
    """
    z_loss, label_smoothing, softcap = options
    num_rows, num_classes = logits_NC.shape
    grad_NC = logits_NC
    if grad_dtype is not None and grad_dtype != torch.float32:
        whole = logits_NC.as_strided((num_rows, row_stride(num_classes)), logits_NC.stride())
        grad_NC = whole.view(grad_dtype)[:, :num_classes]
    block, num_warps = vocabulary_block(num_classes)
    if num_rows > 0:
        with torch.cuda.device_of(logits_NC):
            cross_entropy_kernel[(num_rows,)](
                logits_NC, targets_N, objective_N, cross_entropy_N, grad_NC, logits_NC.stride(0), grad_NC.stride(0),
                CLASSES=num_classes, BLOCK=block, Z_LOSS=z_loss, SMOOTHING=label_smoothing, SOFTCAP=softcap or 0.0,
                HAS_GRAD=grad_dtype is not None, GRAD_SCALE=grad_scale, num_warps=num_warps,
            )  # fmt: skip
    return grad_NC
