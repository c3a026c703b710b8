"""Rotary position embedding in the rotate-half layout that Hugging Face's Llama uses.

Source: Su et al. 2021, "RoFormer"; the layout pairs element i with element i + C/2. Scaling to longer rows: Chen et
al. 2023 (linear), Peng et al. 2023 (YaRN), Llama 3.1; in transformers' order of operations, so that the tables of an
exported model are the same to the last bit.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.dispatch import use_triton


@dataclass(frozen=True)
class RopeScaling:
    """How the frequencies of a model for short rows are changed for longer ones.

    Args:
        type: `linear`, `llama3` or `yarn`.
        factor: by how much the low frequencies, or with `linear` all, are lowered.
        original_seq_len: row length before scaling; for `llama3` and `yarn`.
        low_freq_factor: `llama3` lowers by the whole factor what turns fewer times than this in an original row,
        high_freq_factor: and leaves what turns more often than this.
        beta_fast: `yarn` leaves what turns at least so often in an original row,
        beta_slow: and lowers by the whole factor what turns at most so often.
        attention_factor: `yarn` multiplies the cosines and sines by this; None: 0.1 ln(factor) + 1.
    """

    type: str
    factor: float
    original_seq_len: int | None = None
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None


def rope_tables(
    positions_BT: Tensor, head_dim: int, theta: float, scaling: RopeScaling | None = None
) -> tuple[Tensor, Tensor]:
    """Compute the cosines and sines of a batch's positions, once for all layers.

    They are fp32 whatever the model's dtype: bf16 has 8 bits, and position 2047 would turn by another angle.

    Args:
        positions_BT: position of each token in its document.
        head_dim: width C of one head, even.
        theta: base of the wavelengths.
        scaling: how the frequencies are changed; None: not at all.

    Returns:
        Two fp32 tensors `[B, T, 1, C/2]`.
    """
    frequencies_R, magnitude = rope_frequencies(head_dim, theta, scaling, positions_BT.device)
    angles = positions_BT.float()[..., None, None] * frequencies_R
    return (angles.cos(), angles.sin()) if magnitude == 1.0 else (angles.cos() * magnitude, angles.sin() * magnitude)


def rope_frequencies(
    head_dim: int, theta: float, scaling: RopeScaling | None, device: torch.device | None = None
) -> tuple[Tensor, float]:
    """Return what each pair turns by a position, fp32 `[C/2]`, and what the cosines and sines are multiplied by."""
    exponents = torch.arange(0, head_dim, 2, device=device).float() / head_dim
    return _frequencies(theta**exponents, theta, scaling)


def _frequencies(periods_R: Tensor, theta: float, scaling: RopeScaling | None) -> tuple[Tensor, float]:
    """Return what each pair turns by a position, and what the cosines and sines are multiplied by."""
    frequencies_R = 1.0 / periods_R
    if scaling is None:
        return frequencies_R, 1.0
    if scaling.type == "linear":
        return frequencies_R / scaling.factor, 1.0
    assert scaling.original_seq_len is not None, "checked with the config"
    if scaling.type == "llama3":
        return _llama3(frequencies_R, scaling, scaling.original_seq_len), 1.0
    kept_R = 1 - _yarn_ramp(periods_R, theta, scaling, scaling.original_seq_len)
    frequencies_R = 1.0 / (scaling.factor * periods_R) * (1 - kept_R) + frequencies_R * kept_R
    magnitude = scaling.attention_factor
    return frequencies_R, 0.1 * math.log(scaling.factor) + 1.0 if magnitude is None else magnitude


def _llama3(frequencies_R: Tensor, scaling: RopeScaling, original_seq_len: int) -> Tensor:
    """Lower long wavelengths by the factor, leave short ones, and blend between them by turns in an original row."""
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    wavelengths_R = 2 * math.pi / frequencies_R
    lowered_R = torch.where(wavelengths_R > original_seq_len / low, frequencies_R / scaling.factor, frequencies_R)
    share_R = (original_seq_len / wavelengths_R - low) / (high - low)
    blended_R = (1 - share_R) * lowered_R / scaling.factor + share_R * lowered_R
    between_R = (wavelengths_R >= original_seq_len / high) & (wavelengths_R <= original_seq_len / low)
    return torch.where(between_R, blended_R, lowered_R)


def _yarn_ramp(periods_R: Tensor, theta: float, scaling: RopeScaling, original_seq_len: int) -> Tensor:
    """Return 0 for pairs that keep their frequency, 1 for those that are lowered by the factor, a line between them."""
    R = len(periods_R)

    def pair_that_turns(times: float) -> float:
        return (2 * R * math.log(original_seq_len / (times * 2 * math.pi))) / (2 * math.log(theta))

    begin = max(math.floor(pair_that_turns(scaling.beta_fast)), 0)
    end: float = min(math.ceil(pair_that_turns(scaling.beta_slow)), 2 * R - 1)
    end = end + 0.001 if end == begin else end
    return ((torch.arange(R, dtype=torch.float32, device=periods_R.device) - begin) / (end - begin)).clamp(0, 1)


def rope_truth(x_BTHC: Tensor, cos_BT1R: Tensor, sin_BT1R: Tensor) -> Tensor:
    """Compute `rope` in plain PyTorch."""
    first, second = x_BTHC.float().chunk(2, dim=-1)
    rotated = torch.cat((first * cos_BT1R - second * sin_BT1R, second * cos_BT1R + first * sin_BT1R), dim=-1)
    return rotated.to(x_BTHC.dtype)


def rope(x_BTHC: Tensor, cos_BT1R: Tensor, sin_BT1R: Tensor) -> Tensor:
    """Rotate queries or keys, or both side by side, by the angles of their positions.

    Args:
        x_BTHC: heads, any strides; never changed in place.
        cos_BT1R: fp32 cosines of `rope_tables`, R = C/2.
        sin_BT1R: fp32 sines.

    Returns:
        `[B, T, H, C]`, contiguous, in the dtype of `x_BTHC`, rounded once.
    """
    if use_triton(x_BTHC) and x_BTHC.dtype != torch.float64:
        return _rope_op(x_BTHC, cos_BT1R, sin_BT1R, False)
    # A compiler fuses the plain form. For one token without gradients it takes 23 us and the other 56; same bits.
    if torch.compiler.is_compiling() or (x_BTHC.shape[1] == 1 and not torch.is_grad_enabled()):
        return rope_truth(x_BTHC, cos_BT1R, sin_BT1R)
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


@triton.jit
def _rope_kernel(
    x_ptr: tl.tensor,
    cos_ptr: tl.tensor,
    sin_ptr: tl.tensor,
    y_ptr: tl.tensor,
    x_stride_b: tl.tensor,
    x_stride_t: tl.tensor,
    x_stride_h: tl.tensor,
    table_stride_b: tl.tensor,
    table_stride_t: tl.tensor,
    T: tl.tensor,
    HEADS: tl.constexpr,
    PAIRS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BACK: tl.constexpr,
) -> None:
    tiles = tl.cdiv(T, BLOCK_T)  # of a row
    row = (tl.program_id(0) // tiles).to(tl.int64)  # products with strides pass 2**31
    token = (tl.program_id(0) % tiles).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)[:, None, None]
    pair = tl.arange(0, BLOCK_R)[None, None, :]
    turned = (token < T) & (pair < PAIRS)
    table = row * table_stride_b + token * table_stride_t + pair
    cos = tl.load(cos_ptr + table, mask=turned, other=0.0)
    sin = tl.load(sin_ptr + table, mask=turned, other=0.0)
    if BACK:
        sin = -sin
    for first_head in range(0, HEADS, BLOCK_H):  # once, but for very many heads
        head = (first_head + tl.arange(0, BLOCK_H)).to(tl.int64)[None, :, None]
        inside = turned & (head < HEADS)
        x = x_ptr + row * x_stride_b + token * x_stride_t + head * x_stride_h + pair
        first = tl.load(x, mask=inside, other=0.0).to(tl.float32)
        second = tl.load(x + PAIRS, mask=inside, other=0.0).to(tl.float32)
        y = y_ptr + ((row * T + token) * HEADS + head) * (2 * PAIRS) + pair
        tl.store(y, (first * cos - second * sin).to(y_ptr.dtype.element_ty), mask=inside)
        tl.store(y + PAIRS, (second * cos + first * sin).to(y_ptr.dtype.element_ty), mask=inside)


def rope_tile(num_heads: int, head_dim: int) -> tuple[int, int, int, int]:
    """Choose the tile of one program: a few tokens with all their heads, so that their angles are read once.

    Args:
        num_heads: heads that are turned together.
        head_dim: width of one head.

    Returns:
        Tokens, heads and pairs, powers of two, and warps: 16 pairs a thread, two loads of 16 bytes from each half.
    """
    block_r = triton.next_power_of_2(head_dim // 2)
    block_h = min(triton.next_power_of_2(num_heads), max(4096 // block_r, 1))
    block_t = min(max(2048 // (block_h * block_r), 1), 16)
    return block_t, block_h, block_r, min(max(block_t * block_h * block_r // 512, 1), 8)


def _tables_of(x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Bring both tables to `[B, T, 1, R]` with the same strides, those of pairs 1."""
    B, T, _, C = x.shape
    for table in (cos, sin):
        if table.dtype != torch.float32 or table.dim() != 4 or table.shape[2:] != (1, C // 2) or C % 2 == 1:
            raise ValueError(
                f"a table of heads {tuple(x.shape)} is {tuple(table.shape)} {table.dtype}; "
                f"expected {(B, T, 1, C // 2)} torch.float32 and an even width of heads."
            )
    cos, sin = cos.expand(B, T, 1, -1), sin.expand(B, T, 1, -1)
    if cos.stride() == sin.stride() and cos.stride(-1) == 1:
        return cos, sin
    return cos.contiguous(), sin.contiguous()


@torch.library.custom_op("longhaul::rope", mutates_args=())
def _rope_op(x: Tensor, cos: Tensor, sin: Tensor, back: bool) -> Tensor:
    """Turn by the angles, or `back` by them, which is the gradient."""
    cos, sin = _tables_of(x, cos, sin)
    x = x if x.stride(-1) == 1 else x.contiguous()
    B, T, H, C = x.shape
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if y.numel() > 0:
        block_t, block_h, block_r, num_warps = rope_tile(H, C)
        with torch.cuda.device_of(x):
            _rope_kernel[(B * triton.cdiv(T, block_t),)](
                x, cos, sin, y, *x.stride()[:3], *cos.stride()[:2], T,
                HEADS=H, PAIRS=C // 2, BLOCK_T=block_t, BLOCK_H=block_h, BLOCK_R=block_r, BACK=back,
                num_warps=num_warps,
            )  # fmt: skip
    return y


@_rope_op.register_fake
def _(x: Tensor, cos: Tensor, sin: Tensor, back: bool) -> Tensor:
    return x.new_empty(x.shape)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, cos, sin, ctx.back = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(cos, sin)


def _turn_back(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, None, None, None]:
    return None if grad is None else _rope_op(grad, *ctx.saved_tensors, not ctx.back), None, None, None


_rope_op.register_autograd(_turn_back, setup_context=_keep)
