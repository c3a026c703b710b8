"""What a model makes of one text: the loss of each token, what each layer would predict, who attends to what."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kernels.attention_torch import attention_probabilities
from kernels.visibility import Visibility
from pretrain.errors import ConfigError, TrainingError
from pretrain.tokenizers.tokenizer import Tokenizer
from pretrain.transformer.layers import Block
from pretrain.transformer.model import Transformer

MAX_TOKENS = 4096  # of a text: what a browser shows quickly
NUM_CHOICES, NUM_LENS_CHOICES = 10, 3  # the most probable tokens that are kept of a place, after all layers and of each
# Of an analysis; what is beyond is cut at a token, so that a page is 26.8 MB at most.
MAX_LENS_CELLS = 40_000
MAX_MAP_VALUES = 16 * 2**20
MAX_MAP_TOKENS = 512
_ROWS_AT_ONCE = 64  # places whose logits are held at once: fp32, the whole vocabulary
_MOST_DIFFERENT = 1e-3  # of the largest value: fused attention and the explicit one round differently


@dataclass(frozen=True)
class Guess:
    """What is predicted at P places, of which each is followed by a token, but maybe the last.

    Args:
        ids_PK: int64, the most probable tokens, the first one first.
        probs_PK: fp32, their probabilities.
        entropy_P: fp32 nats.
        target_prob_P: fp32, of the token that follows; 0 where none does.
        target_rank_P: int64, how many tokens were more probable than it; -1 where none follows.
    """

    ids_PK: Tensor
    probs_PK: Tensor
    entropy_P: Tensor
    target_prob_P: Tensor
    target_rank_P: Tensor


@dataclass(frozen=True)
class Inspection:
    """What a model makes of a text of T tokens, which begins a document. All tensors are on the CPU.

    Args:
        ids: of the beginning of the document and the text: T + 1.
        loss_T: fp32 nats, the loss of each token of the text, as evaluation computes it.
        guess: at all T + 1 places, after all layers.
        lens: at the first places, of the embedding and of the stream after each block: L + 1.
        maps_LHX: uint8, per layer and head what each token gives to itself and those before it, of the first tokens,
            row by row: 255 times the root of the share, so that small ones stay visible.
        num_map_tokens: how many tokens these are.
        map_error: largest difference between the attention that the model computed and that of these maps, before they
            were rounded, as a share of the largest value.
    """

    ids: list[int]
    loss_T: Tensor
    guess: Guess
    lens: list[Guess]
    maps_LHX: Tensor
    num_map_tokens: int
    map_error: float

    @property
    def num_lens_places(self) -> int:
        """At how many places the layers were asked."""
        return len(self.lens[0].ids_PK)


@torch.no_grad()
def inspect(model: Transformer, tokenizer: Tokenizer, text: str) -> Inspection:
    """Run a model over a text, as the beginning of a document, and look at it on the way.

    Only one layer's states are held at a time.

    Args:
        model: on any device, in evaluation mode.
        tokenizer: the run's.
        text: what to look at.

    Raises:
        ConfigError: the text is empty or too long.
        TrainingError: the model computes NaN or infinity.
    Source: nostalgebraist 2020, "interpreting GPT: the logit lens": the final norm and the output layer, applied to the
        residual stream between blocks.
    """
    ids = [tokenizer.bos_id, *tokenizer.encode(text)]
    _check_length(len(ids), model.shape.seq_len)
    shape, device = model.shape, model.embedding.weight.device
    tokens_BT = torch.tensor([ids], device=device)
    targets_BT = torch.tensor([[*ids[1:], -100]], device=device)
    watch = _Watch(model, targets_BT[0], num_map_tokens(len(ids), shape.num_layers, shape.num_heads))
    with watch.installed():
        losses_BT = model.token_losses(tokens_BT, targets_BT, torch.zeros_like(tokens_BT))
    loss_T = losses_BT[0, :-1].cpu()
    if not loss_T.isfinite().all() or watch.guess is None:
        raise TrainingError(
            "model: its losses are NaN or infinite; expected numbers. Use an earlier checkpoint (--step)."
        )
    if watch.map_error > _MOST_DIFFERENT:
        raise RuntimeError(f"attention and its maps differ by {watch.map_error:.1e} of the largest value")
    maps_LHX = torch.stack(watch.maps)
    return Inspection(ids, loss_T, watch.guess, watch.lens, maps_LHX, watch.num_map_tokens, watch.map_error)


def _check_length(num_tokens: int, seq_len: int) -> None:
    if num_tokens < 2:
        raise ConfigError("--inspect is empty; expected a text of at least one token. Give one.")
    most = min(seq_len, MAX_TOKENS + 1)
    if num_tokens > most:
        why = f"as fit data.seq_len ({seq_len})" if most == seq_len else "as a page holds"
        raise ConfigError(
            f"--inspect is {num_tokens} tokens with the beginning of the document; expected at most {most}, {why}. "
            f"Shorten it by at least {num_tokens - most} tokens."
        )


def num_map_tokens(num_tokens: int, num_layers: int, num_heads: int) -> int:
    """Return of how many tokens maps of all layers and heads are few enough values."""
    per_head = MAX_MAP_VALUES // (num_layers * num_heads)
    return max(min(num_tokens, MAX_MAP_TOKENS, int(((8 * per_head + 1) ** 0.5 - 1) / 2)), 1)


class _Watch:
    """What is noted while a model runs over one row."""

    def __init__(self, model: Transformer, targets_P: Tensor, num_map_tokens: int) -> None:
        self.lens: list[Guess] = []
        self.guess: Guess | None = None
        self.maps: list[Tensor] = []
        self.num_map_tokens, self.map_error = num_map_tokens, 0.0
        self._model, self._targets_P = model, targets_P
        self._num_lens_places = min(len(targets_P), max(MAX_LENS_CELLS // (len(model.blocks) + 1), 1))
        self._own_NHC: Tensor | None = None

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Look at the model's parts as they run."""
        blocks = [block for block in self._model.blocks if isinstance(block, Block)]
        handles = [blocks[0].register_forward_pre_hook(lambda _, inputs: self._see_stream(*inputs[:2]))]
        for block in blocks:
            handles.append(block.register_forward_hook(lambda _, __, outputs: self._see_stream(*outputs)))
            handles.append(block.attention.register_forward_pre_hook(self._see_attention))
            handles.append(block.attention.output.register_forward_pre_hook(self._compare_attention))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _see_stream(self, x_BTD: Tensor, residual_BTD: Tensor | None) -> None:
        """Note what would be predicted from the residual stream here."""
        hidden_PD = self._model.final_norm(x_BTD, residual_BTD)[0][0]
        n = self._num_lens_places
        self.lens.append(_guess(self._model, hidden_PD[:n], self._targets_P[:n], NUM_LENS_CHOICES))
        if len(self.lens) == len(self._model.blocks) + 1:
            self.guess = _guess(self._model, hidden_PD, self._targets_P, NUM_CHOICES)

    def _see_attention(self, attention: Any, inputs: tuple[Any, ...]) -> None:
        """Note what each of the first tokens gives to those before it. They depend on no later one."""
        x_BTD, context = inputs
        n = self.num_map_tokens
        tables = None if context.rope_tables is None else tuple(table[:, :n] for table in context.rope_tables)
        q_BNHC, k_BNKC, v_BNKC = attention.project(x_BTD[:, :n], tables)
        seen = context.visible
        visible = Visibility(seen.first_BT[:, :n].contiguous(), seen.end_BT[:, :n].contiguous(), n, seen.dtype)
        probs_HNN = attention_probabilities(q_BNHC, k_BNKC, visible, attention.softcap)[0]
        v_NHC = v_BNKC[0].float().repeat_interleave(attention.num_heads // attention.num_kv_heads, dim=1)
        self._own_NHC = torch.einsum("hts,shc->thc", probs_HNN.float(), v_NHC)
        rows, columns = torch.tril_indices(n, n, device=probs_HNN.device)
        self.maps.append((probs_HNN[:, rows, columns].sqrt() * 255).round().to(torch.uint8).cpu())

    def _compare_attention(self, _: Any, inputs: tuple[Any, ...]) -> None:
        """Note how far what the model computed is from what the map gives."""
        assert self._own_NHC is not None
        model_ND = inputs[0][0, : self.num_map_tokens].float()
        difference = (model_ND - self._own_NHC.flatten(1)).abs().amax() / model_ND.abs().amax().clamp(min=1e-30)
        self.map_error = max(self.map_error, float(difference))


def _guess(model: Transformer, hidden_PD: Tensor, targets_P: Tensor, num_choices: int) -> Guess:
    parts = []
    for hidden, targets in zip(hidden_PD.split(_ROWS_AT_ONCE), targets_P.split(_ROWS_AT_ONCE), strict=True):
        logits_PV = model.output(hidden[None], None)[0]
        log_probs_PV = logits_PV.log_softmax(-1)
        top = log_probs_PV.topk(min(num_choices, log_probs_PV.shape[-1]), dim=-1)
        target_P1 = log_probs_PV.gather(1, targets.clamp(min=0)[:, None])
        rank_P = (log_probs_PV > target_P1).sum(-1)
        entropy_P = -(log_probs_PV.exp() * log_probs_PV).sum(-1)
        prob_P = target_P1[:, 0].exp()
        is_last_P = targets < 0
        part = (top.indices, top.values.exp(), entropy_P, prob_P.masked_fill(is_last_P, 0.0),
                rank_P.masked_fill(is_last_P, -1))  # fmt: skip
        parts.append(tuple(x.cpu() for x in part))
    return Guess(*(torch.cat(x) for x in zip(*parts, strict=True)))
