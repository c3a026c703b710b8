"""Attention by PyTorch's own operators: the explicit truth, and what runs where no Triton kernel does.

On a GPU this is PyTorch's fused `scaled_dot_product_attention` with an additive mask, of which a sliding window is a
part; on a CPU `kernels/attention_cpu.py` calls the same piece by piece. With dropout of probabilities, which has to be
keyed by row, and with a soft-cap, which the fused operator does not have, it is the explicit truth: B H T S fp32 scores
are held, forward and backward.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from kernels.attention_cpu import attention_cpu, fused_attention
from kernels.dropout import DropoutKey, attention_keep_mask, attention_seeds
from kernels.visibility import Visibility


def attention_truth(
    q_BTHC: Tensor,
    k_BSKC: Tensor,
    v_BSKC: Tensor,
    visible: Visibility,
    dropout_p: float = 0.0,
    dropout_key: DropoutKey | Tensor | None = None,
    softcap: float | None = None,
    scale: float | None = None,
) -> Tensor:
    """Compute `attention` in plain PyTorch, with explicit probabilities in fp32."""
    B, T, H, _ = q_BTHC.shape
    num_keys, num_kv_heads = k_BSKC.shape[1:3]
    probs_BHTS = attention_probabilities(q_BTHC, k_BSKC, visible, softcap, scale)
    if dropout_p > 0.0 and dropout_key is not None:
        seeds_BH = attention_seeds(H, dropout_key) if isinstance(dropout_key, DropoutKey) else dropout_key
        kept_BHTS = attention_keep_mask(seeds_BH, T, num_keys, dropout_p)
        probs_BHTS = torch.where(kept_BHTS, probs_BHTS / (1.0 - dropout_p), 0.0)
    probs_BKGTS = probs_BHTS.view(B, num_kv_heads, H // num_kv_heads, T, num_keys)
    out_BKGTC = probs_BKGTS.to(v_BSKC.dtype) @ v_BSKC.transpose(1, 2)[:, :, None]
    return out_BKGTC.permute(0, 3, 1, 2, 4).flatten(2, 3)


def attention_probabilities(
    q_BTHC: Tensor, k_BSKC: Tensor, visible: Visibility, softcap: float | None = None, scale: float | None = None
) -> Tensor:
    """Compute the share that each query gives to each key; all are 0 where a query sees none.

    Returns:
        `[B, H, T, S]`, fp32, or fp64 for fp64 queries.
    """
    B, T, H, C = q_BTHC.shape
    num_keys, num_kv_heads = k_BSKC.shape[1:3]
    q_BKGTC = q_BTHC.reshape(B, T, num_kv_heads, H // num_kv_heads, C).permute(0, 2, 3, 1, 4)
    scores_BKGTS = q_BKGTC @ k_BSKC.permute(0, 2, 3, 1)[:, :, None]
    if scores_BKGTS.dtype != torch.float64:
        scores_BKGTS = scores_BKGTS.float()
    scores_BKGTS = scores_BKGTS * (1.0 / math.sqrt(C) if scale is None else scale)
    if softcap is not None:
        scores_BKGTS = softcap * (scores_BKGTS / softcap).tanh()
    seen_B11TS = visible.seen_BTS[:, None, None]
    # A query that sees nothing: equal scores, whose probabilities are then dropped, instead of NaN.
    scores_BKGTS = scores_BKGTS.masked_fill(~seen_B11TS, -math.inf).masked_fill(~seen_B11TS.any(-1, True), 0.0)
    return scores_BKGTS.softmax(-1).masked_fill(~seen_B11TS, 0.0).flatten(1, 2)


def attention_sdpa(
    q_BTHC: Tensor, k_BSKC: Tensor, v_BSKC: Tensor, visible: Visibility, scale: float | None = None
) -> Tensor:
    """Compute `attention` without dropout and soft-cap by the quickest of PyTorch's operators."""
    num_heads = q_BTHC.shape[2]
    if q_BTHC.device.type == "cpu":
        return attention_cpu(q_BTHC, k_BSKC, v_BSKC, visible, scale)
    # Of PyTorch's GPU kernels flash takes no mask, cuDNN's can return NaN gradients with one (pytorch#196678), and the
    # memory-efficient one refuses fewer key heads than query heads: explicit scores would run instead.
    k_BSKC, v_BSKC = repeat_heads(k_BSKC, num_heads), repeat_heads(v_BSKC, num_heads)
    with sdpa_kernel([SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]):
        return fused_attention(q_BTHC, k_BSKC, v_BSKC, visible.bias_B1TS, scale=scale)


def repeat_heads(x_BSKC: Tensor, num_heads: int) -> Tensor:
    """Repeat each key or value head for the query heads that share it.

    Returns:
        `[B, S, H, C]`.
    """
    B, S, K, C = x_BSKC.shape
    return x_BSKC[:, :, :, None].expand(B, S, K, num_heads // K, C).reshape(B, S, num_heads, C)
