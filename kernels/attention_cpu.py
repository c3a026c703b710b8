"""Attention on a CPU: PyTorch's fused CPU kernel, called for the pieces that `kernels/pieces.py` cuts.

`scaled_dot_product_attention` with a mask computes every score of a row, and with `is_causal` whole blocks of 512 keys;
the pieces hold not much more than what is seen.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.pieces import Piece, has_bf16_units
from kernels.visibility import Visibility

_SHORT_SLOTS = 256


def attention_cpu(
    q_BTHC: Tensor, k_BSKC: Tensor, v_BSKC: Tensor, visible: Visibility, scale: float | None = None
) -> Tensor:
    """Compute `attention` without dropout and soft-cap on a CPU."""
    T, H = q_BTHC.shape[1:3]
    S, K = k_BSKC.shape[1:3]
    if torch.compiler.is_compiling():  # a compiler cannot read on the host where to cut, nor what the CPU has
        narrow, wide = q_BTHC.dtype, torch.promote_types(q_BTHC.dtype, torch.float32)
        q_BTHC, k_BSKC, v_BSKC, bias_B1TS = (x.to(wide) for x in (q_BTHC, k_BSKC, v_BSKC, visible.bias_B1TS))
        return fused_attention(q_BTHC, k_BSKC, v_BSKC, bias_B1TS, scale=scale).to(narrow)
    if q_BTHC.dtype == torch.bfloat16 and has_bf16_units():
        if S <= _SHORT_SLOTS and visible.all_see:
            return _short(q_BTHC, k_BSKC, v_BSKC, visible.bias_B1TS, scale)
    elif q_BTHC.dtype == torch.bfloat16 and T * H > K:  # keys that one query sees once are not worth a copy
        # Without bf16 units the fused kernel takes eight times as long in bf16 as in fp32.
        out_BTHC = _by_pieces(q_BTHC.float(), k_BSKC.float(), v_BSKC.float(), visible, scale)
        return out_BTHC.to(q_BTHC.dtype)
    return _by_pieces(q_BTHC, k_BSKC, v_BSKC, visible, scale)


def fused_attention(
    q_BTHC: Tensor,
    k_BSKC: Tensor,
    v_BSKC: Tensor,
    bias_B1TS: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    """Call PyTorch's `scaled_dot_product_attention` with heads where they are here."""
    out_BHTC = F.scaled_dot_product_attention(
        q_BTHC.transpose(1, 2),
        k_BSKC.transpose(1, 2),
        v_BSKC.transpose(1, 2),
        attn_mask=bias_B1TS,
        is_causal=is_causal,
        scale=scale,
        enable_gqa=q_BTHC.shape[2] != k_BSKC.shape[2],
    )
    return out_BHTC.transpose(1, 2)


def _by_pieces(q_BTHC: Tensor, k_BSKC: Tensor, v_BSKC: Tensor, visible: Visibility, scale: float | None) -> Tensor:
    pieces = visible.pieces
    if q_BTHC.shape[1] == 1 and len(pieces) == 1:
        return _one_query(q_BTHC, k_BSKC[:, pieces[0].keys], v_BSKC[:, pieces[0].keys], pieces[0].bias_B1TS, scale)
    if len(pieces) == 1 and pieces[0].is_whole(q_BTHC.shape[0], q_BTHC.shape[1], k_BSKC.shape[1]):
        return fused_attention(q_BTHC, k_BSKC, v_BSKC, pieces[0].bias_B1TS, pieces[0].is_causal, scale)
    out_BTHC: Tensor = _Pieces.apply(q_BTHC, k_BSKC, v_BSKC, pieces, scale)
    return out_BTHC


def _one_query(q_B1HC: Tensor, k_BSKC: Tensor, v_BSKC: Tensor, bias_B11S: Tensor | None, scale: float | None) -> Tensor:
    """Attend with one query a row, as generation does: the heads that share a key head are the queries of one.

    PyTorch's kernel reads the keys for each head, and for all queries of a head at once. Of 1,500 keys of 4 heads of
    64, which 16 query heads share, a query took 257 us instead of 684 on one core of an AMD EPYC.
    """
    B, _, H, C = q_B1HC.shape
    K = k_BSKC.shape[2]
    out_BKGC = F.scaled_dot_product_attention(
        q_B1HC.reshape(B, K, H // K, C), k_BSKC.transpose(1, 2), v_BSKC.transpose(1, 2), bias_B11S, scale=scale
    )
    return out_BKGC.reshape(B, 1, H, C)


class _Pieces(torch.autograd.Function):
    """Attention piece by piece, each written to and added up at its place.

    Autograd's own slices would fill gradients of the whole row for every piece. The two operators are those that
    `scaled_dot_product_attention` calls on a CPU.
    """

    @staticmethod
    def forward(
        ctx: Any, q_BTHC: Tensor, k_BSKC: Tensor, v_BSKC: Tensor, pieces: list[Piece], scale: float | None
    ) -> Tensor:
        out_BTHC = q_BTHC.new_zeros(q_BTHC.shape)
        lses = []
        for piece in pieces:
            part_BHTC, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                _heads_first(q_BTHC, piece.rows, piece.queries),
                _heads_first(k_BSKC, piece.rows, piece.keys),
                _heads_first(v_BSKC, piece.rows, piece.keys),
                0.0,
                piece.is_causal,
                attn_mask=piece.bias_B1TS,
                scale=scale,
            )
            _heads_first(out_BTHC, piece.rows, piece.queries).copy_(part_BHTC)
            lses.append(lse)
        ctx.save_for_backward(q_BTHC, k_BSKC, v_BSKC, out_BTHC, *lses)
        ctx.pieces, ctx.scale = pieces, scale
        return out_BTHC

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BTHC: Tensor) -> tuple[Tensor | None, ...]:
        q_BTHC, k_BSKC, v_BSKC, out_BTHC, *lses = ctx.saved_tensors
        grad_q_BTHC = q_BTHC.new_zeros(q_BTHC.shape)
        # Chunks of one document share its keys: their gradients are sums, which bf16 would round at every addition.
        sum_dtype = torch.promote_types(k_BSKC.dtype, torch.float32)
        grad_k_BSKC, grad_v_BSKC = (x.new_zeros(x.shape, dtype=sum_dtype) for x in (k_BSKC, v_BSKC))
        for piece, lse in zip(ctx.pieces, lses, strict=True):
            part_q, part_k, part_v = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                _heads_first(grad_BTHC, piece.rows, piece.queries),
                _heads_first(q_BTHC, piece.rows, piece.queries),
                _heads_first(k_BSKC, piece.rows, piece.keys),
                _heads_first(v_BSKC, piece.rows, piece.keys),
                _heads_first(out_BTHC, piece.rows, piece.queries),
                lse,
                0.0,
                piece.is_causal,
                attn_mask=piece.bias_B1TS,
                scale=ctx.scale,
            )
            _heads_first(grad_q_BTHC, piece.rows, piece.queries).copy_(part_q)
            _heads_first(grad_k_BSKC, piece.rows, piece.keys).add_(part_k)
            _heads_first(grad_v_BSKC, piece.rows, piece.keys).add_(part_v)
        return grad_q_BTHC, grad_k_BSKC.to(k_BSKC.dtype), grad_v_BSKC.to(v_BSKC.dtype), None, None


def _heads_first(x_BTHC: Tensor, rows: slice, slots: slice) -> Tensor:
    return x_BTHC[rows, slots].transpose(1, 2)


def _short(q_BTHC: Tensor, k_BSKC: Tensor, v_BSKC: Tensor, bias_B1TS: Tensor, scale: float | None) -> Tensor:
    """Attend by explicit bf16 scores, which on bf16 units are quicker than the fused kernel in short rows.

    Forward and backward on one core with AMX, 1024 tokens, 4 heads of 64: 3.7 ms against 11.2 in rows of 128, 5.3
    against 9.0 in rows of 256, the same in rows of 512. Without such units it takes longer than that kernel.
    """
    B, T, H, C = q_BTHC.shape
    S, K = k_BSKC.shape[1:3]
    # The query heads that share a key head are rows of one product, so keys and values are not repeated.
    q_BKRC = (
        (q_BTHC * (1.0 / math.sqrt(C) if scale is None else scale))
        .view(B, T, K, H // K, C)
        .permute(0, 2, 3, 1, 4)
        .reshape(B, K, -1, C)
    )
    scores_BKRS = q_BKRC @ k_BSKC.permute(0, 2, 3, 1).contiguous()
    scores_BKGTS = scores_BKRS.view(B, K, H // K, T, S) + bias_B1TS[:, None]
    out_BKRC = scores_BKGTS.softmax(-1).view(B, K, -1, S) @ v_BSKC.transpose(1, 2).contiguous()
    return out_BKRC.view(B, K, H // K, T, C).permute(0, 3, 1, 2, 4).flatten(2, 3)
