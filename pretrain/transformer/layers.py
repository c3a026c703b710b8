"""The parts of the Transformer. They hold parameters and know their names; arithmetic is in `kernels`.

Every parameter is used inside the `forward` of the module that holds it, which is what ZeRO-3 gathers by.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.activation import gelu, swiglu
from kernels.attention import attention
from kernels.dropout import SITE_ATTENTION_OUTPUT, SITE_FFN_OUTPUT, DropoutKey, dropout
from kernels.layer_norm import add_layer_norm, layer_norm
from kernels.linear_cross_entropy import linear_cross_entropy, soft_cap, token_losses
from kernels.rms_norm import add_rms_norm, rms_norm
from kernels.rope import rope
from kernels.visibility import Visibility
from pretrain.options.families import ModelShape
from pretrain.ranks.sequence_parallel import SequenceGroup
from pretrain.transformer.recompute import recomputed_in_chunks

_LOGITS_AT_ONCE = 2**24  # 64 MiB of them where many tokens are scored


class LayerCache(Protocol):
    """Keys and values of earlier tokens of one block, which generation keeps."""

    def extend(self, k_BTKC: Tensor, v_BTKC: Tensor) -> tuple[Tensor, Tensor]:
        """Append the keys and values of new tokens; return those of all slots `[B, S, K, C]`."""
        ...


@dataclass(frozen=True)
class Context:
    """What a block works with beside the residual stream. It comes from outside, so that all blocks are one code.

    Args:
        visible: which keys each token sees; shared by all blocks.
        rope_tables: fp32 cosines and sines `[B, T, 1, C/2]`, or None with learned positions; shared likewise.
        dropout_key: seed, step, rows and this block's layer, or None where nothing is dropped.
        attention_seeds_BH: of this block, from `attention_seeds`; None where no probabilities are dropped.
        cache: this block's in generation, else None.
        group: the ranks that share these rows, of which T are this rank's slots; None where it has whole rows.
        ffn_chunk_tokens: as `train.ffn_chunk_tokens`.
    """

    visible: Visibility
    rope_tables: tuple[Tensor, Tensor] | None = None
    dropout_key: DropoutKey | None = None
    attention_seeds_BH: Tensor | None = None
    cache: LayerCache | None = None
    group: SequenceGroup | None = None
    ffn_chunk_tokens: int = 0

    def dropped(self, x_BTD: Tensor, p: float, site: int) -> Tensor:
        """Drop of what a sublayer adds, with probability `p`."""
        key = self.dropout_key
        return x_BTD if key is None else dropout(x_BTD, p, key.at(key.layer, site))


class Linear(nn.Linear):
    """A linear layer whose values are left for `Transformer.initialise` to set."""

    stacked_rows: tuple[int, ...] = ()  # rows of each matrix, where the weight is several stacked for one product

    def reset_parameters(self) -> None:
        """Leave the parameters as they were allocated."""


class Embedding(nn.Embedding):
    """A lookup table whose values are left for `Transformer.initialise` to set."""

    weight: nn.Parameter

    def reset_parameters(self) -> None:
        """Leave the parameters as they were allocated."""


class RMSNorm(nn.Module):
    """RMSNorm with the residual addition before it."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(dim))

    def forward(self, x_BTD: Tensor, residual_BTD: Tensor | None) -> tuple[Tensor, Tensor]:
        """Normalise the residual stream after adding `x`; return the result and the new residual stream."""
        if residual_BTD is None:
            return rms_norm(x_BTD, self.weight, self.eps), x_BTD
        return add_rms_norm(x_BTD, residual_BTD, self.weight, self.eps)


class LayerNorm(nn.Module):
    """LayerNorm, scaled and shifted, with the residual addition before it."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(dim))
        self.bias = nn.Parameter(torch.empty(dim))

    def forward(self, x_BTD: Tensor, residual_BTD: Tensor | None) -> tuple[Tensor, Tensor]:
        """Normalise the residual stream after adding `x`; return the result and the new residual stream."""
        if residual_BTD is None:
            return layer_norm(x_BTD, self.weight, self.bias, self.eps), x_BTD
        return add_layer_norm(x_BTD, residual_BTD, self.weight, self.bias, self.eps)


def make_norm(shape: ModelShape) -> RMSNorm | LayerNorm:
    """Make the norm that the shape names."""
    kind = LayerNorm if shape.norm == "layernorm" else RMSNorm
    return kind(shape.dim, shape.norm_eps)


class Attention(nn.Module):
    """Multi-head, grouped-query or multi-query attention with one projection for queries, keys and values."""

    def __init__(self, shape: ModelShape) -> None:
        super().__init__()
        self.num_heads, self.num_kv_heads, self.head_dim = shape.num_heads, shape.num_kv_heads, shape.head_dim
        self.attention_dropout, self.softcap = shape.attention_dropout, shape.attention_softcap
        self.rope_dim = shape.rope_dim
        qkv_dim = (shape.num_heads + 2 * shape.num_kv_heads) * shape.head_dim
        self.qkv = Linear(shape.dim, qkv_dim, bias=shape.attention_bias is not False)
        self.qkv.stacked_rows = tuple(
            n * shape.head_dim for n in (self.num_heads, self.num_kv_heads, self.num_kv_heads)
        )
        self.norm_heads = shape.qk_norm == "full"  # all of them together
        widths = (
            n * shape.head_dim if self.norm_heads else shape.head_dim for n in (self.num_heads, self.num_kv_heads)
        )
        self.q_norm, self.k_norm = (RMSNorm(width, shape.norm_eps) if shape.qk_norm else None for width in widths)
        self.output = Linear(shape.num_heads * shape.head_dim, shape.dim, bias=shape.attention_bias is True)

    def forward(self, x_BTD: Tensor, context: Context) -> Tensor:
        """Compute what attention adds to the residual stream.

        Args:
            x_BTD: normalised residual stream.
            context: of this block.
        """
        B, T, _ = x_BTD.shape
        q_BTHC, k_BSKC, v_BSKC = self.project(x_BTD, context.rope_tables)
        if context.cache is not None:
            k_BSKC, v_BSKC = context.cache.extend(k_BSKC, v_BSKC)
        seeds_BH, group = context.attention_seeds_BH, context.group
        if group is not None:
            q_BTHC, k_BSKC, v_BSKC = group.slots_to_heads(q_BTHC, k_BSKC, v_BSKC)
        out_BTHC = attention(q_BTHC, k_BSKC, v_BSKC, context.visible, self.attention_dropout, seeds_BH, self.softcap)
        if group is not None:
            out_BTHC = group.heads_to_slots(out_BTHC)
        return self.output(out_BTHC.reshape(B, T, self.num_heads * self.head_dim))

    def project(self, x_BTD: Tensor, rope_tables: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor, Tensor]:
        """Compute queries, keys and values, the first two turned by their positions."""
        H, K = self.num_heads, self.num_kv_heads
        qkv = self.qkv(x_BTD).view(*x_BTD.shape[:2], H + 2 * K, self.head_dim)
        # split, not slices: its gradient is one concatenation, theirs are three tensors of zeros and two sums
        qk, v_BTKC = qkv.split((H + K, K), dim=2)
        return *self._positioned(qk, rope_tables), v_BTKC

    def _positioned(self, qk: Tensor, rope_tables: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor]:
        """Normalise queries and keys, if the model does, and turn them by their positions."""
        heads = (self.num_heads, self.num_kv_heads)
        if self.q_norm is not None and self.k_norm is not None:
            q_BTHC, k_BTKC = qk.split(heads, dim=2)
            if self.norm_heads:
                q_BTHC = self.q_norm(q_BTHC.flatten(2), None)[0].view(q_BTHC.shape)
                k_BTKC = self.k_norm(k_BTKC.flatten(2), None)[0].view(k_BTKC.shape)
            else:
                q_BTHC, k_BTKC = self.q_norm(q_BTHC, None)[0], self.k_norm(k_BTKC, None)[0]
            if rope_tables is not None:
                q_BTHC, k_BTKC = self._turned(q_BTHC, rope_tables), self._turned(k_BTKC, rope_tables)
            return q_BTHC, k_BTKC
        if rope_tables is not None:
            qk = self._turned(qk, rope_tables)  # queries and keys lie side by side: one call
        q_BTHC, k_BTKC = qk.split(heads, dim=2)
        return q_BTHC, k_BTKC

    def _turned(self, x_BTHC: Tensor, rope_tables: tuple[Tensor, Tensor]) -> Tensor:
        """Turn the first `rope_dim` dimensions of each head, and leave the others."""
        if self.rope_dim == self.head_dim:
            return rope(x_BTHC, *rope_tables)
        first, rest = x_BTHC.split((self.rope_dim, self.head_dim - self.rope_dim), dim=3)
        return torch.cat((rope(first, *rope_tables), rest), dim=3)


def _in_chunks(compute: Callable[[Tensor], Tensor], x_BTD: Tensor, num_tokens: int) -> Tensor:
    """Compute what treats every token alike for so many of them at once, and again in the backward pass; 0: for all."""
    if not 0 < num_tokens < x_BTD.shape[0] * x_BTD.shape[1]:
        return compute(x_BTD)
    return recomputed_in_chunks(compute, x_BTD.flatten(0, 1), num_tokens).view(x_BTD.shape)


class SwiGLUFeedForward(nn.Module):
    """The gated feed-forward: one projection for gate and up, SwiGLU, projection down."""

    def __init__(self, shape: ModelShape) -> None:
        super().__init__()
        self.gate_up = Linear(shape.dim, 2 * shape.ffn_dim, bias=shape.ffn_bias)
        self.gate_up.stacked_rows = (shape.ffn_dim, shape.ffn_dim)
        self.down = Linear(shape.ffn_dim, shape.dim, bias=shape.ffn_bias)

    def forward(self, x_BTD: Tensor, context: Context) -> Tensor:
        """Compute what the feed-forward adds to the residual stream."""
        return _in_chunks(lambda x: self.down(swiglu(self.gate_up(x))), x_BTD, context.ffn_chunk_tokens)


class GELUFeedForward(nn.Module):
    """The feed-forward without a gate: projection up, GELU, projection down."""

    def __init__(self, shape: ModelShape) -> None:
        super().__init__()
        self.up = Linear(shape.dim, shape.ffn_dim, bias=shape.ffn_bias)
        self.down = Linear(shape.ffn_dim, shape.dim, bias=shape.ffn_bias)

    def forward(self, x_BTD: Tensor, context: Context) -> Tensor:
        """Compute what the feed-forward adds to the residual stream."""
        return _in_chunks(lambda x: self.down(gelu(self.up(x))), x_BTD, context.ffn_chunk_tokens)


class Block(nn.Module):
    """One Transformer block: pre-norm, or with the norms behind the sublayers (`reordered_rmsnorm`).

    It passes on what its feed-forward adds beside the residual stream, not yet summed, so that the sum is fused with
    the norm that follows.
    """

    def __init__(self, shape: ModelShape) -> None:
        super().__init__()
        self.dropout, self.is_reordered = shape.dropout, shape.norm == "reordered_rmsnorm"
        self.attention_norm = make_norm(shape)
        self.attention = Attention(shape)
        self.ffn_norm = make_norm(shape)
        self.ffn = (SwiGLUFeedForward if shape.activation == "swiglu" else GELUFeedForward)(shape)

    def forward(self, x_BTD: Tensor, residual_BTD: Tensor | None, context: Context) -> tuple[Tensor, Tensor]:
        """Run the block.

        Args:
            x_BTD: what the layer before adds to the residual stream; for the first block, the stream itself.
            residual_BTD: the residual stream; None for the first block.
            context: of this block.

        Returns:
            What this block's feed-forward adds, and the residual stream that it is to be added to.
        """
        if self.is_reordered:
            stream_BTD = x_BTD if residual_BTD is None else x_BTD + residual_BTD
            added_BTD = self.attention_norm(self.attention(stream_BTD, context), None)[0]
            stream_BTD = stream_BTD + context.dropped(added_BTD, self.dropout, SITE_ATTENTION_OUTPUT)
            added_BTD = self.ffn_norm(self.ffn(stream_BTD, context), None)[0]
            return context.dropped(added_BTD, self.dropout, SITE_FFN_OUTPUT), stream_BTD
        normed_BTD, residual_BTD = self.attention_norm(x_BTD, residual_BTD)
        added_BTD = context.dropped(self.attention(normed_BTD, context), self.dropout, SITE_ATTENTION_OUTPUT)
        normed_BTD, residual_BTD = self.ffn_norm(added_BTD, residual_BTD)
        return context.dropped(self.ffn(normed_BTD, context), self.dropout, SITE_FFN_OUTPUT), residual_BTD


class Output(nn.Module):
    """The output layer with its loss; the weights are the embedding's own where the two are tied."""

    def __init__(
        self, shape: ModelShape, tied_to: nn.Parameter | None, z_loss: float = 0.0, label_smoothing: float = 0.0
    ) -> None:
        super().__init__()
        self.vocab_size, self.softcap = shape.vocab_size, shape.logit_softcap
        self.z_loss, self.label_smoothing = z_loss, label_smoothing
        self.tied = tied_to is not None
        # Held as an attribute of this module even when tied: ZeRO-3 gathers what the running module holds.
        self.weight = nn.Parameter(torch.empty(shape.padded_vocab_size, shape.dim)) if tied_to is None else tied_to

    def forward(
        self, x_BTD: Tensor, targets_BT: Tensor | None, per_token: bool = False, places_N: Tensor | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Compute the summed objective and cross-entropy, the cross-entropy of each token, or the logits.

        Args:
            x_BTD: normalised final hidden states.
            targets_BT: int64, -100 where not scored; None for logits.
            per_token: the cross-entropy of each token, without gradients, instead of the sums.
            places_N: as `Transformer.score`, and `targets_BT` is `[N]` then.

        Returns:
            fp32: two scalars, `[B, T]`, or `[B, T, V]` without the padding of the vocabulary; or as
            `Transformer.score`.
        """
        if places_N is not None and targets_BT is not None:
            return self._scores(x_BTD.flatten(0, 1), places_N, targets_BT)
        if targets_BT is None:
            return soft_cap(F.linear(x_BTD, self.weight[: self.vocab_size]).float(), self.softcap)
        x_ND, targets_N = x_BTD.flatten(0, 1), targets_BT.flatten()
        if per_token:
            losses_N = token_losses(x_ND, self.weight, targets_N, self.vocab_size, self.softcap)
            return losses_N.view(targets_BT.shape)
        return linear_cross_entropy(
            x_ND, self.weight, targets_N, self.vocab_size, self.z_loss, self.label_smoothing, self.softcap
        )

    def _scores(self, x_ND: Tensor, places_N: Tensor, targets_N: Tensor) -> tuple[Tensor, Tensor]:
        size = max(1, _LOGITS_AT_ONCE // self.vocab_size)
        parts = []
        for places_C, targets_C in zip(places_N.split(size), targets_N.split(size), strict=True):
            logits_CV = soft_cap(F.linear(x_ND[places_C], self.weight[: self.vocab_size]).float(), self.softcap)
            log_probs_C = logits_CV.gather(1, targets_C[:, None])[:, 0] - logits_CV.logsumexp(1)
            parts.append((log_probs_C, logits_CV.argmax(1) == targets_C))
        log_probs_N, is_first_N = (torch.cat(part) for part in zip(*parts, strict=True))
        return log_probs_N, is_first_N

    def _save_to_state_dict(self, *args: Any) -> None:
        if not self.tied:  # a tied weight is stored once, as embedding.weight
            super()._save_to_state_dict(*args)

    def _load_from_state_dict(self, *args: Any) -> None:
        if not self.tied:
            super()._load_from_state_dict(*args)
