"""Rotary position embedding in the rotate-half layout that Hugging Face's Llama uses.

Source: Su et al. 2021, "RoFormer"; the layout pairs element i with element i + C/2.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def rope_tables(positions_BT: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """Compute the cosines and sines of a batch's positions, once for all layers.

    They are fp32 whatever the model's dtype: bf16 has 8 bits, and position 2047 would turn by another angle.

    Args:
        positions_BT: position of each token in its document.
        head_dim: width C of one head, even.
        theta: base of the wavelengths.

    Returns:
        Two fp32 tensors `[B, T, 1, C/2]`.
    """
    exponents = torch.arange(0, head_dim, 2, device=positions_BT.device).float() / head_dim
    angles = positions_BT.float()[..., None, None] * (1.0 / theta**exponents)
    return angles.cos(), angles.sin()


def rope_truth(x_BTHC: Tensor, cos_BT1R: Tensor, sin_BT1R: Tensor) -> Tensor:
    """Compute `rope` in plain PyTorch."""
    first, second = x_BTHC.float().chunk(2, dim=-1)
    rotated = torch.cat((first * cos_BT1R - second * sin_BT1R, second * cos_BT1R + first * sin_BT1R), dim=-1)
    return rotated.to(x_BTHC.dtype)


def rope(x_BTHC: Tensor, cos_BT1R: Tensor, sin_BT1R: Tensor) -> Tensor:
    """Rotate queries or keys by the angles of their positions.

    Args:
        x_BTHC: heads, any strides; never changed in place.
        cos_BT1R: fp32 cosines of `rope_tables`, R = C/2.
        sin_BT1R: fp32 sines.

    Returns:
        `[B, T, H, C]`, contiguous, in the dtype of `x_BTHC`.
    """
    return _Rope.apply(x_BTHC, cos_BT1R, sin_BT1R)


class _Rope(torch.autograd.Function):
    """Keeps the two tables only, and writes each half where it belongs instead of concatenating."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotate(x, cos, sin)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _rotate(grad, cos, -sin), None, None  # the inverse of a rotation turns back


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    first, second = x[..., :half].float(), x[..., half:].float()
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    out[..., :half] = (first * cos).sub_(second * sin)
    out[..., half:] = (second * cos).add_(first * sin)
    return out
