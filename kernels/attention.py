"""Causal attention in which packed documents do not see each other.

On a CPU and a GPU alike this is PyTorch's fused `scaled_dot_product_attention` with an additive mask, of which a
sliding window is a part. With dropout of probabilities, which has to be keyed by row, and with a soft-cap, which the
fused operator does not have, it is the explicit truth: B H T S fp32 scores are held, forward and backward.

Source: Vaswani et al. 2017; grouped queries: Ainslie et al. 2023, "GQA"; sliding window: Beltagy et al. 2020,
"Longformer"; soft-cap: Gemma Team 2024, "Gemma 2".
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from kernels.dropout import DropoutKey, keep_mask

_SHORT_SLOTS_CPU = 256


@dataclass(frozen=True)
class Visibility:
    """Which keys each query sees, prepared once for all layers.

    Args:
        first_BT: the first key that each query sees.
        bias_B1TS: 0 where a query sees a key and -inf elsewhere, in the dtype of the queries. Made once because
            PyTorch turns a bool mask into this one in every call: 30 ms against 19 ms for B=8, T=256 on one core.
    """

    first_BT: Tensor
    bias_B1TS: Tensor


def visibility(doc_start_BT: Tensor, num_keys: int, dtype: torch.dtype, window: int | None = None) -> Visibility:
    """Prepare the mask of a batch: the query of slot t sees the keys s with `doc_start[t] <= s <= t`.

    Args:
        doc_start_BT: int, the slot where each token's document begins.
        num_keys: S; the T queries are the last T of the S slots.
        dtype: of queries, keys and values.
        window: a query sees this many keys at most, itself included: `t - window < s`. None: no limit.
    """
    num_queries = doc_start_BT.shape[1]
    key_S = torch.arange(num_keys, device=doc_start_BT.device)
    query_T = torch.arange(num_keys - num_queries, num_keys, device=doc_start_BT.device)
    first_BT = doc_start_BT if window is None else torch.maximum(doc_start_BT, query_T - (window - 1))
    seen_BTS = (key_S <= query_T[:, None]) & (key_S >= first_BT[..., None])
    bias_BTS = torch.zeros(seen_BTS.shape, dtype=dtype, device=seen_BTS.device).masked_fill_(~seen_BTS, -math.inf)
    return Visibility(first_BT, bias_BTS[:, None])


def attention_truth(
    q_BTHC: Tensor,
    k_BSKC: Tensor,
    v_BSKC: Tensor,
    visible: Visibility,
    dropout_p: float = 0.0,
    dropout_key: DropoutKey | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Compute `attention` in plain PyTorch, with explicit probabilities in fp32."""
    B, T, H, C = q_BTHC.shape
    num_keys, num_kv_heads = k_BSKC.shape[1:3]
    q_BKGTC = q_BTHC.view(B, T, num_kv_heads, H // num_kv_heads, C).permute(0, 2, 3, 1, 4)
    k_BK1CS, v_BK1SC = k_BSKC.permute(0, 2, 3, 1)[:, :, None], v_BSKC.transpose(1, 2)[:, :, None]
    scores_BKGTS = (q_BKGTC @ k_BK1CS).float() / math.sqrt(C)
    if softcap is not None:
        scores_BKGTS = softcap * (scores_BKGTS / softcap).tanh()
    probs_BKGTS = (scores_BKGTS + visible.bias_B1TS[:, None].float()).softmax(-1)
    if dropout_p > 0.0 and dropout_key is not None:
        kept_BHTS = keep_mask((B, H, T, num_keys), dropout_p, dropout_key)
        probs_BKGTS = torch.where(kept_BHTS.view(probs_BKGTS.shape), probs_BKGTS / (1.0 - dropout_p), 0.0)
    out_BKGTC = probs_BKGTS.to(v_BSKC.dtype) @ v_BK1SC
    return out_BKGTC.permute(0, 3, 1, 2, 4).flatten(2, 3)


def attention(
    q_BTHC: Tensor,
    k_BSKC: Tensor,
    v_BSKC: Tensor,
    visible: Visibility,
    dropout_p: float = 0.0,
    dropout_key: DropoutKey | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Let each query average the values of the keys that it sees.

    Args:
        q_BTHC: queries; H is a multiple of K, and query head h uses key head h // (H / K).
        k_BSKC: keys of the S slots, of which the queries are the last T.
        v_BSKC: values.
        visible: which keys each query sees; every query must see at least one.
        dropout_p: probability that a probability is dropped.
        dropout_key: seed, step, rows and place of the dropout; None for no dropout.
        softcap: scores s become softcap * tanh(s / softcap); None: they stay as they are.

    Returns:
        `[B, T, H, C]`.
    """
    if softcap is not None or (dropout_p > 0.0 and dropout_key is not None):
        return attention_truth(q_BTHC, k_BSKC, v_BSKC, visible, dropout_p, dropout_key, softcap)
    num_heads, num_kv_heads = q_BTHC.shape[2], k_BSKC.shape[2]
    if q_BTHC.is_cuda:
        # Of PyTorch's GPU kernels flash takes no mask, cuDNN's can return NaN gradients with one (pytorch#196678), and
        # the memory-efficient one refuses fewer key heads than query heads: explicit scores would run instead.
        k_BSKC, v_BSKC = repeat_heads(k_BSKC, num_heads), repeat_heads(v_BSKC, num_heads)
        with sdpa_kernel([SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]):
            return _fused(q_BTHC, k_BSKC, v_BSKC, visible.bias_B1TS, grouped=False)
    if q_BTHC.dtype == torch.bfloat16 and k_BSKC.shape[1] <= _SHORT_SLOTS_CPU:
        return _short(q_BTHC, k_BSKC, v_BSKC, visible.bias_B1TS)
    return _fused(q_BTHC, k_BSKC, v_BSKC, visible.bias_B1TS, grouped=num_heads != num_kv_heads)


def repeat_heads(x_BSKC: Tensor, num_heads: int) -> Tensor:
    """Repeat each key or value head for the query heads that share it.

    Returns:
        `[B, S, H, C]`.
    """
    B, S, K, C = x_BSKC.shape
    return x_BSKC[:, :, :, None].expand(B, S, K, num_heads // K, C).reshape(B, S, num_heads, C)


def _short(q_BTHC: Tensor, k_BSKC: Tensor, v_BSKC: Tensor, bias_B1TS: Tensor) -> Tensor:
    """Attend by explicit bf16 scores, which on a CPU are quicker than PyTorch's fused kernel in short rows.

    Forward and backward on one core, 1024 tokens, 4 heads of 64: 3.7 ms against 11.2 in rows of 128, 5.3 against 9.0
    in rows of 256, the same in rows of 512.
    """
    B, T, H, C = q_BTHC.shape
    S, K = k_BSKC.shape[1:3]
    # The query heads that share a key head are rows of one product, so keys and values are not repeated.
    q_BKRC = (q_BTHC * (1.0 / math.sqrt(C))).view(B, T, K, H // K, C).permute(0, 2, 3, 1, 4).reshape(B, K, -1, C)
    scores_BKRS = q_BKRC @ k_BSKC.permute(0, 2, 3, 1).contiguous()
    scores_BKGTS = scores_BKRS.view(B, K, H // K, T, S) + bias_B1TS[:, None]
    out_BKRC = scores_BKGTS.softmax(-1).view(B, K, -1, S) @ v_BSKC.transpose(1, 2).contiguous()
    return out_BKRC.view(B, K, H // K, T, C).permute(0, 3, 1, 2, 4).flatten(2, 3)


def _fused(q_BTHC: Tensor, k_BSKC: Tensor, v_BSKC: Tensor, bias_B1TS: Tensor, grouped: bool) -> Tensor:
    out_BHTC = F.scaled_dot_product_attention(
        q_BTHC.transpose(1, 2),
        k_BSKC.transpose(1, 2),
        v_BSKC.transpose(1, 2),
        attn_mask=bias_B1TS,
        enable_gqa=grouped,
    )
    return out_BHTC.transpose(1, 2)
