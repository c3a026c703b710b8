"""`linear_cross_entropy` on a GPU as PyTorch operators: chunks, buffers and autograd.

Memory, in bytes, for N tokens of width D, C classes of Vp padded rows, R = `chunk_rows(N, C)`, S = `row_stride(C)` and
b bytes an element of x and weight:

    forward    4 R S + 4 Vp D + 4 N D + 8 N    logits of one chunk, both gradients, losses of each token
    between            4 Vp D + 4 N D          held for backward
    backward       (4 + b) (Vp D + N D)

Weights that are not trained, as beside adapters, have no gradient: no product, and no Vp D above.

Gradients stay fp32 until the gradient of the loss has been multiplied in, and are rounded once: a gradient of x in
x.dtype would save (4 - b) N D bytes, 67 MB of 8192 x 4096 in bf16, be rounded twice, and in fp16 underflow before the
loss scale reached it. The multiplication rounds as it goes, so it is no pass of its own.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kernels.cross_entropy import cross_entropy_, new_logits
from kernels.loss_chunks import chunk_rows
from kernels.matmul import add_matmul, matmul_into

# fp16 has nothing between 0 and 6e-8, and many probabilities among 128k classes are smaller. A gradient of a logit is
# at most 1 + 2 z_loss lse; times this, up to 63 of it is finite in fp16. The backward pass divides by it, in fp32.
_GRAD_SCALE_FP16 = 2.0**10

_Options = tuple[float, float, float | None]  # z_loss, label_smoothing, softcap


def grad_scale(dtype: torch.dtype) -> float:
    """Return what the gradients of `linear_cross_entropy`'s operator are multiplied by."""
    return _GRAD_SCALE_FP16 if dtype == torch.float16 else 1.0


def compute(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    num_classes: int,
    options: _Options,
    with_grads: bool,
    with_grad_weight: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute the losses of all tokens, chunk by chunk, and the gradients of their sum.

    Args:
        x: `[N, D]`.
        weight: `[Vp, D]` in the dtype of x.
        targets: int64 `[N]`.
        num_classes: rows of `weight` that count.
        options: z_loss, label_smoothing, softcap.
        with_grads: compute gradients.
        with_grad_weight: that of weight too, where there are any.

    Returns:
        Objective and cross-entropy `[N]`; the objective's gradients by x and weight times `grad_scale`, empty if not
        wanted. All fp32.
    """
    num_tokens, width = x.shape
    fp32: dict[str, Any] = {"dtype": torch.float32, "device": x.device}
    objective, cross_entropy = torch.empty(num_tokens, **fp32), torch.empty(num_tokens, **fp32)
    grad_x = torch.empty((num_tokens if with_grads else 0, width), **fp32)
    with_grad_weight = with_grad_weight and with_grads
    grad_weight = torch.empty((weight.shape[0] if with_grad_weight else 0, width), **fp32)
    used, grad_used = weight[:num_classes], grad_weight[:num_classes]
    grad_weight[num_classes if num_tokens > 0 else 0 :].zero_()
    targets = targets.contiguous()
    grad_dtype = (x.dtype if x.element_size() == 2 else torch.float32) if with_grads else None
    size = chunk_rows(num_tokens, num_classes)
    buffer = new_logits(size, num_classes, x.device)
    for start in range(0, num_tokens, max(size, 1)):
        rows = slice(start, min(start + size, num_tokens))
        logits = buffer[: rows.stop - start]
        matmul_into(logits, x[rows], used.t())
        grad_logits = cross_entropy_(
            logits, targets[rows], objective[rows], cross_entropy[rows], options, grad_dtype, grad_scale(x.dtype)
        )
        if with_grads:
            matmul_into(grad_x[rows], grad_logits, used)
        if with_grad_weight:
            (matmul_into if start == 0 else add_matmul)(grad_used, grad_logits.t(), x[rows])
    return objective, cross_entropy, grad_x, grad_weight


@torch.library.custom_op("longhaul::token_losses", mutates_args=())
def token_losses_op(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    num_classes: int,
    z_loss: float,
    label_smoothing: float,
    softcap: float | None,
) -> tuple[Tensor, Tensor]:
    """Compute objective and cross-entropy of each token, fp32 `[N]`, without gradients."""
    with torch.autocast(x.device.type, enabled=False):  # which would round the logits
        return compute(x, weight, targets, num_classes, (z_loss, label_smoothing, softcap), False)[:2]


@torch.library.custom_op("longhaul::linear_cross_entropy", mutates_args=())
def linear_cross_entropy_op(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    num_classes: int,
    z_loss: float,
    label_smoothing: float,
    softcap: float | None,
    with_grad_weight: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute the sums of objective and cross-entropy, and the objective's gradients as `compute` returns them."""
    options = (z_loss, label_smoothing, softcap)
    with torch.autocast(x.device.type, enabled=False):
        objective, cross_entropy, grad_x, grad_weight = compute(
            x, weight, targets, num_classes, options, True, with_grad_weight
        )
    return objective.sum(), cross_entropy.sum(), grad_x, grad_weight


@torch.library.custom_op("longhaul::scaled", mutates_args=())
def _scaled_op(x: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """Multiply by a scalar and round, without the product in between: the gradient of the weights is large."""
    return torch.mul(x, factor, out=torch.empty(x.shape, dtype=dtype, device=x.device))


@token_losses_op.register_fake
def _(
    x: Tensor, weight: Tensor, targets: Tensor, classes: int, z_loss: float, smoothing: float, softcap: float | None
) -> tuple[Tensor, Tensor]:
    return (x.new_empty(x.shape[0], dtype=torch.float32), x.new_empty(x.shape[0], dtype=torch.float32))


@linear_cross_entropy_op.register_fake
def _(
    x: Tensor, weight: Tensor, targets: Tensor, classes: int, z_loss: float, smoothing: float, softcap: float | None,
    with_grad_weight: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    def of(*shape: int) -> Tensor:
        return x.new_empty(shape, dtype=torch.float32)

    return of(), of(), of(*x.shape), of(weight.shape[0] if with_grad_weight else 0, weight.shape[1])


@_scaled_op.register_fake
def _(x: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    return x.new_empty(x.shape, dtype=dtype)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
    ctx.set_materialize_grads(False)  # else zeros of the size of the weights, twice
    ctx.save_for_backward(output[2], output[3])
    ctx.dtype = inputs[0].dtype


def _backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 8
    grad_x, grad_weight = ctx.saved_tensors
    scale = grad_scale(ctx.dtype)
    factor = grad / scale if scale != 1.0 else grad
    wants_x, wants_weight = ctx.needs_input_grad[:2]
    return (
        _scaled_op(grad_x, factor, ctx.dtype) if wants_x else None,
        _scaled_op(grad_weight, factor, ctx.dtype) if wants_weight else None,
        *(None,) * 6,
    )


linear_cross_entropy_op.register_autograd(_backward, setup_context=_keep)
