"""The output layer and its loss together, so that the logits of a whole batch never exist.

The gradients are computed in the forward pass, chunk by chunk, from logits that are still at hand: three matrix
products as in the plain computation, no recomputation, and memory for one chunk of logits instead of two full copies
(2048 tokens, 4000 classes, width 256, on one core: 101 ms against 119 ms, of which the three products are 85 ms).

Source: Liger Kernel (Hsu et al. 2024) for the chunking; gradients accumulate in fp32 here.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.cross_entropy import IGNORED
from kernels.dispatch import use_triton
from kernels.linear_cross_entropy_op import linear_cross_entropy_op, token_losses_op
from kernels.matmul import matmul_fp32

_CHUNK_ELEMENTS_CPU = 2**21  # 8 MiB of fp32 logits: about a last-level cache; flat from 2^18 to 2^23 when measured
# Fewer rows and the matrix product loses more than the cache gives: with 32,000 classes, chunks of 65, 262 and 524
# tokens took 1.52, 1.11 and 1.02 times as long as plain PyTorch (512 rows of width 768, EPYC).
_MIN_CHUNK_TOKENS_CPU = 512


def token_losses(
    x_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, num_classes: int, softcap: float | None = None
) -> Tensor:
    """Compute the cross-entropy of each token, chunk by chunk and without gradients: for evaluation.

    Args:
        x_ND: final hidden states.
        weight_VD: the output layer's weights; rows from `num_classes` on are padding.
        targets_N: int64 class of each token, -100 where it is not scored.
        num_classes: classes that count.
        softcap: logits are softcap x tanh(logit / softcap); None leaves them as they are.

    Returns:
        fp32 `[N]`, nats, 0 where not scored.
    """
    with torch.no_grad():
        if use_triton(x_ND):
            return token_losses_op(*_in_one_dtype(x_ND, weight_VD), targets_N, num_classes, 0.0, 0.0, softcap)[1]
        weight_CD = weight_VD[:num_classes]
        parts = []
        for rows in _chunks(x_ND, num_classes):
            logits_NC = soft_cap(matmul_fp32(x_ND[rows], weight_CD.t()), softcap)
            parts.append(_Chunk(logits_NC, targets_N[rows]).cross_entropy())
        return torch.cat(parts) if parts else x_ND.new_zeros(0, dtype=torch.float32)


def soft_cap(logits: Tensor, softcap: float | None) -> Tensor:
    """Bound logits smoothly to (-softcap, softcap), in place where no gradient is taken; None leaves them.

    Source: Gemma Team 2024, "Gemma 2", section 2.
    """
    if softcap is None:
        return logits
    if logits.requires_grad:
        return softcap * torch.tanh(logits / softcap)
    return logits.div_(softcap).tanh_().mul_(softcap)


def linear_cross_entropy_truth(
    x_ND: Tensor,
    weight_VD: Tensor,
    targets_N: Tensor,
    num_classes: int,
    z_loss: float = 0.0,
    label_smoothing: float = 0.0,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute `linear_cross_entropy` in plain PyTorch, from all logits at once in fp32."""
    logits_NV = soft_cap(x_ND.float() @ weight_VD[:num_classes].float().t(), softcap)
    scored_N = targets_N != IGNORED
    picked_N = logits_NV.gather(1, torch.where(scored_N, targets_N, 0)[:, None])[:, 0]
    log_sum_N = logits_NV.logsumexp(-1)
    smoothed_N = log_sum_N - (1.0 - label_smoothing) * picked_N - label_smoothing * logits_NV.mean(-1)
    objective = torch.where(scored_N, smoothed_N + z_loss * log_sum_N**2, 0.0).sum()
    return objective, torch.where(scored_N, log_sum_N - picked_N, 0.0).sum().detach()


def linear_cross_entropy(
    x_ND: Tensor,
    weight_VD: Tensor,
    targets_N: Tensor,
    num_classes: int,
    z_loss: float = 0.0,
    label_smoothing: float = 0.0,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Sum the training objective of a linear classifier over the scored tokens, and its cross-entropy beside it.

    With lse the logarithm of the sum of a token's exponentiated logits, its objective is
    lse - (1 - label_smoothing) logit[target] - label_smoothing mean(logits) + z_loss lse^2.

    Args:
        x_ND: final hidden states.
        weight_VD: the output layer's weights; rows from `num_classes` on are padding: never probable, no gradient.
        targets_N: int64 class of each token, -100 where it is not scored.
        num_classes: classes that count.
        z_loss: weight of lse^2, which keeps logits from drifting.
        label_smoothing: probability that the target distribution spreads evenly over all classes.
        softcap: logits are softcap x tanh(logit / softcap); None leaves them as they are.

    Returns:
        fp32 scalars in nats: the objective, which has gradients, and the cross-entropy, which has none. The two are
        equal without z-loss and smoothing; both are 0, with gradients of 0, if no token is scored.

    Source: z-loss: Chowdhery et al. 2022 (PaLM), section 5; label smoothing: Szegedy et al. 2016, section 7.
    """
    with_grads = torch.is_grad_enabled() and (x_ND.requires_grad or weight_VD.requires_grad)
    if use_triton(x_ND):
        arguments = (*_in_one_dtype(x_ND, weight_VD), targets_N, num_classes, z_loss, label_smoothing, softcap)
        if with_grads:
            objective, cross_entropy, *_ = linear_cross_entropy_op(*arguments, weight_VD.requires_grad)
            return objective, cross_entropy.detach()
        objective_N, cross_entropy_N = token_losses_op(*arguments)
        return objective_N.sum(), cross_entropy_N.sum()
    if not with_grads:
        with torch.no_grad():
            return _forward(x_ND, weight_VD, targets_N, num_classes, (z_loss, label_smoothing, softcap), None)
    return _LinearCrossEntropy.apply(x_ND, weight_VD, targets_N, num_classes, (z_loss, label_smoothing, softcap))


def _in_one_dtype(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Convert to autocast's dtype where that is on, else to the wider of the two."""
    kind = x.device.type
    autocast = torch.is_autocast_enabled(kind)
    dtype = torch.get_autocast_dtype(kind) if autocast else torch.promote_types(x.dtype, weight.dtype)
    return x.to(dtype), weight.to(dtype)


_Options = tuple[float, float, float | None]  # z_loss, label_smoothing, softcap


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, targets: Tensor, num_classes: int, options: _Options
    ) -> tuple[Tensor, Tensor]:
        grad_x = torch.empty(x.shape, dtype=torch.float32, device=x.device)
        grad_weight = None  # of a weight that is not trained
        if ctx.needs_input_grad[1]:
            grad_weight = torch.zeros(weight.shape, dtype=torch.float32, device=x.device)
        objective, cross_entropy = _forward(x, weight, targets, num_classes, options, (grad_x, grad_weight))
        ctx.save_for_backward(grad_x, grad_weight)
        ctx.dtypes = x.dtype, weight.dtype
        ctx.mark_non_differentiable(cross_entropy)
        return objective, cross_entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor, Tensor | None, None, None, None]:
        grad_x, grad_weight = ctx.saved_tensors
        x_dtype, weight_dtype = ctx.dtypes
        grad_x = (grad_x * grad).to(x_dtype)
        return grad_x, None if grad_weight is None else (grad_weight * grad).to(weight_dtype), None, None, None


def _forward(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    num_classes: int,
    options: _Options,
    grads: tuple[Tensor, Tensor | None] | None,
) -> tuple[Tensor, Tensor]:
    """Return objective and cross-entropy; write the objective's gradients, fp32, into `grads` if they are wanted."""
    z_loss, label_smoothing, softcap = options
    used = weight[:num_classes]
    objective, cross_entropy = (torch.zeros((), dtype=torch.float32, device=x.device) for _ in range(2))
    for rows in _chunks(x, num_classes):
        logits = soft_cap(matmul_fp32(x[rows], used.t()), softcap)
        slope = 1.0 - (logits / softcap).square_() if softcap is not None and grads is not None else None
        mean = logits.mean(-1, keepdim=True) if label_smoothing else None
        chunk = _Chunk(logits, targets[rows])
        cross_entropy += chunk.cross_entropy().sum()
        objective += chunk.objective(z_loss, label_smoothing, mean).sum()
        if grads is None:
            continue
        grad_logits = chunk.grad_logits(z_loss, label_smoothing)
        if slope is not None:
            grad_logits.mul_(slope)
        grad_logits = grad_logits.to(x.dtype)
        grads[0][rows] = matmul_fp32(grad_logits, used)
        if grads[1] is not None:
            grads[1][:num_classes] += matmul_fp32(grad_logits.t(), x[rows])
    return objective, cross_entropy


class _Chunk:
    """The softmax of some tokens; fp32 `logits` `[N, C]` are turned into exp(logit - max) in place."""

    def __init__(self, logits: Tensor, targets: Tensor) -> None:
        self.scored = (targets != IGNORED)[:, None]
        self.index = torch.where(self.scored, targets[:, None], 0)
        self.top = logits.amax(-1, keepdim=True)
        logits.sub_(self.top)
        self.picked = logits.gather(1, self.index)  # as lse, relative to the largest logit
        self.exps = logits.exp_()
        self.sums = self.exps.sum(-1, keepdim=True)
        self.log_sums = self.sums.log()

    def cross_entropy(self) -> Tensor:
        """Nats `[N]`, 0 where not scored."""
        return torch.where(self.scored, self.log_sums - self.picked, 0.0)[:, 0]

    def objective(self, z_loss: float, label_smoothing: float, mean: Tensor | None) -> Tensor:
        """Nats `[N]`; `mean` is that of the logits, where there is smoothing."""
        objective = self.cross_entropy()[:, None]
        if mean is not None:
            objective = objective + torch.where(self.scored, label_smoothing * (self.picked + self.top - mean), 0.0)
        if z_loss:
            objective = objective + torch.where(self.scored, z_loss * (self.log_sums + self.top) ** 2, 0.0)
        return objective[:, 0]

    def grad_logits(self, z_loss: float, label_smoothing: float) -> Tensor:
        """The objective's gradient by the logits `[N, C]`, in place of the exponentials."""
        scale = self.sums.reciprocal()
        if z_loss:
            scale = scale * (1.0 + 2.0 * z_loss * (self.log_sums + self.top))
        grad = self.exps.mul_(torch.where(self.scored, scale, 0.0))
        if label_smoothing:
            grad.sub_(torch.where(self.scored, label_smoothing / grad.shape[1], 0.0))
        return grad.scatter_add_(1, self.index, -(1.0 - label_smoothing) * self.scored.float())


def _chunks(x: Tensor, num_classes: int) -> list[slice]:
    size = max(_CHUNK_ELEMENTS_CPU // num_classes, _MIN_CHUNK_TOKENS_CPU)
    return [slice(start, min(start + size, x.shape[0])) for start in range(0, x.shape[0], size)]
