"""The decoder-only Transformer that every family is a setting of."""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.attention import prepare
from kernels.dropout import SITE_ATTENTION, SITE_EMBEDDING, DropoutKey, attention_seeds, dropout
from kernels.rope import RopeScaling, rope_tables
from kernels.visibility import Visibility, visibility
from pretrain.options.families import ModelShape
from pretrain.ranks.sequence_parallel import ALONE, SequenceGroup
from pretrain.transformer.activation_offload import KeptOnHost
from pretrain.transformer.compiling import compiled
from pretrain.transformer.layers import Block, Context, Embedding, Output, make_norm
from pretrain.transformer.recompute import recomputed


class KVCache:
    """Keys and values of the tokens seen so far, allocated once.

    Rows may be padded on the left: row b holds tokens from slot `start_B[b]` on.
    """

    def __init__(self, shape: ModelShape, start_B: Tensor, num_slots: int, dtype: torch.dtype) -> None:
        """Allocate an empty cache.

        Args:
            shape: of the model.
            start_B: int64 `[B]`, the slots of padding before each row's first token; their device is the cache's.
            num_slots: tokens that a row can hold, padding included.
            dtype: of the model's activations.
        """
        self.start_B = start_B
        self.num_slots = num_slots
        size = (len(start_B), num_slots, shape.num_kv_heads, shape.head_dim)
        self.layers = tuple(
            _LayerCache(*(torch.zeros(size, dtype=dtype, device=start_B.device) for _ in range(2)))
            for _ in range(shape.num_layers)
        )

    @property
    def num_used(self) -> int:
        """Slots that hold a token or padding, the same in every layer between two forward passes."""
        return self.layers[0].num_used

    def reserve(self, num_slots: int) -> None:
        """Make room for so many tokens, twice as many as there was at least; what is held stays."""
        if num_slots <= self.num_slots:
            return
        more = max(num_slots, 2 * self.num_slots) - self.num_slots
        self.num_slots += more
        for layer in self.layers:
            layer.k_BSKC = F.pad(layer.k_BSKC, (0, 0, 0, 0, 0, more))
            layer.v_BSKC = F.pad(layer.v_BSKC, (0, 0, 0, 0, 0, more))

    def forget_after(self, num_used: int) -> None:
        """Keep the first slots, and forget the tokens behind them."""
        for layer in self.layers:
            layer.num_used = min(layer.num_used, num_used)

    def keep(self, rows_B: Tensor) -> None:
        """Keep these rows, int64 numbers, and forget the others."""
        self.start_B = self.start_B[rows_B]
        for layer in self.layers:
            layer.k_BSKC, layer.v_BSKC = layer.k_BSKC[rows_B], layer.v_BSKC[rows_B]


class _LayerCache:
    """The part of a `KVCache` that belongs to one block.

    It does not refer to the whole: a cycle would keep a GPU's memory until Python's collector comes by.
    """

    def __init__(self, k_BSKC: Tensor, v_BSKC: Tensor) -> None:
        self.k_BSKC, self.v_BSKC, self.num_used = k_BSKC, v_BSKC, 0

    def extend(self, k_BTKC: Tensor, v_BTKC: Tensor) -> tuple[Tensor, Tensor]:
        begin, self.num_used = self.num_used, self.num_used + k_BTKC.shape[1]
        end = self.num_used
        self.k_BSKC[:, begin:end], self.v_BSKC[:, begin:end] = k_BTKC, v_BTKC
        return self.k_BSKC[:, :end], self.v_BSKC[:, :end]


def _run_block(
    checkpointing: str, block: nn.Module, x_BTD: Tensor, residual_BTD: Tensor | None, context: Context
) -> tuple[Tensor, Tensor]:
    if checkpointing != "none" and torch.is_grad_enabled():
        return recomputed(checkpointing, block, x_BTD, residual_BTD, context)
    return block(x_BTD, residual_BTD, context)


class Transformer(nn.Module):
    """A pre-norm decoder-only Transformer over rows of packed documents."""

    def __init__(
        self,
        shape: ModelShape,
        seed: int,
        activation_checkpointing: str = "none",
        z_loss: float = 0.0,
        label_smoothing: float = 0.0,
        group: SequenceGroup = ALONE,
        ffn_chunk_tokens: int = 0,
    ) -> None:
        """Build the model and draw its initial weights; on the meta device, nothing is drawn.

        Args:
            shape: from `families.resolve_shape`.
            seed: fixes the initial weights and dropout.
            activation_checkpointing: `full` computes each block again in the backward pass, `selective` what is cheap
                of it, `none` nothing; `offload` is `full` with the blocks' inputs in the host's memory meanwhile.
            z_loss: part of the training objective, as in `linear_cross_entropy`.
            label_smoothing: likewise.
            group: the ranks that share rows in training and evaluation.
            ffn_chunk_tokens: for how many tokens feed-forwards are computed at once; 0: for all.
        """
        super().__init__()
        self.shape, self.seed = shape, seed
        self.rope_scaling = RopeScaling(**shape.rope_scaling.model_dump()) if shape.rope_scaling else None
        self.activation_checkpointing = activation_checkpointing
        self.group, self.ffn_chunk_tokens = group, ffn_chunk_tokens
        self._compiled_block: Callable[..., Any] | None = None
        self.on_block: Callable[[int, Tensor, Tensor], None] | None = None  # told what leaves each block, if set
        self.embedding = Embedding(shape.padded_vocab_size, shape.dim)
        self.position_embedding = Embedding(shape.seq_len, shape.dim) if shape.positions == "learned" else None
        self.blocks = nn.ModuleList(Block(shape) for _ in range(shape.num_layers))
        self.final_norm = make_norm(shape)
        tied_to = self.embedding.weight if shape.tie_embeddings else None
        self.output = Output(shape, tied_to, z_loss, label_smoothing)
        self.initialise()

    def initialise(self) -> None:
        """Draw the initial weights of all parameters that are not on the meta device."""
        parameters = [(name, parameter) for name, parameter in self.named_parameters() if not parameter.is_meta]
        # A generator draws on one core; drawing is most of the start of a large model.
        with ThreadPoolExecutor(torch.get_num_threads()) as pool:
            list(pool.map(lambda item: self.draw(*item), parameters))

    @torch.no_grad()
    def draw(self, name: str, weight: Tensor) -> None:
        """Fill a tensor of any dtype, on any device, with the initial values of the parameter of that name.

        Weights are normal with `init_std`, those that write to the residual stream with init_std / sqrt(2 L); norms
        are 1, biases and the padding of the vocabulary 0. Each parameter has its own generator, keyed by the seed and
        its name: the values do not depend on the device, on the dtype but for rounding, or on the order of drawing.

        Source: Radford et al. 2019 (GPT-2), section 2.3.
        """
        owner, kind = name.rsplit(".", 1)
        if kind in ("bias", "lora_b"):
            weight.zero_()
        elif owner.endswith("norm"):
            weight.fill_(1.0)
        else:
            writes_residual = owner.endswith((".attention.output", ".ffn.down"))
            std = self.shape.init_std / (math.sqrt(2 * self.shape.num_layers) if writes_residual else 1.0)
            if kind == "lora_a":
                std = 1 / math.sqrt(3 * weight.shape[1])  # as wide as the uniform numbers of LoRA's authors
            digest = hashlib.sha256(f"{self.seed}:{name}".encode()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
            weight.copy_(torch.empty(weight.shape, device="cpu").normal_(0.0, std, generator=generator))
            if owner in ("embedding", "output"):
                weight[self.shape.vocab_size :] = 0.0

    def compile_blocks(self, backend: str = "inductor") -> None:
        """Have training run the blocks through `torch.compile`, which happens in the first forward pass.

        Evaluation and generation, whose batches are of many sizes, run as before.
        """
        self._compiled_block = compiled(_run_block, backend)

    def forward(
        self,
        tokens_BT: Tensor,
        targets_BT: Tensor | None = None,
        doc_start_BT: Tensor | None = None,
        row_ids_B: Tensor | None = None,
        step: int = 0,
        per_token: bool = False,
        cache: KVCache | None = None,
        last_only: bool = False,
        places_N: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Compute the training objective and the cross-entropy of a batch, or `logits` where there are no targets.

        Args:
            tokens_BT: int64 token ids; where ranks share rows, of this rank's slots.
            targets_BT: int64, the token that follows each one; -100 where it is not scored.
            doc_start_BT: int, the slot of the row where each token's document begins, of all slots of the row.
            row_ids_B: int64, the global number of each row, which keys dropout; None: no dropout.
            step: of training, which keys dropout.
            per_token: return the cross-entropy of each token, without gradients, instead of the sums.
            cache, last_only: for `logits`.
            places_N: for `logits`, or for `score`, whose targets are `targets_BT`.

        Returns:
            fp32 nats: two sums over the scored tokens, of the objective, which has gradients, and of the
            cross-entropy, which has none; or `[B, T]`.
        """
        if targets_BT is None or doc_start_BT is None:
            return self._logits(tokens_BT, cache, last_only, targets_BT, places_N)
        drops = self.training and max(self.shape.dropout, self.shape.attention_dropout) > 0.0
        own = self.group.own(doc_start_BT.shape[1])
        key = DropoutKey(self.seed, step, row_ids_B, first_slot=own.start) if drops and row_ids_B is not None else None
        assert tokens_BT.shape[1] == own.stop - own.start, "rows are cut by feed.py and evaluate.py"
        positions_BT = self._positions(doc_start_BT[:, own], own.start)
        hidden_BTD = self._hidden(tokens_BT, doc_start_BT, positions_BT, key, None)
        return self.output(hidden_BTD, targets_BT, per_token)

    @torch.no_grad()
    def token_losses(self, tokens_BT: Tensor, targets_BT: Tensor, doc_start_BT: Tensor) -> Tensor:
        """Compute the loss of each token, without dropout, for evaluation.

        Returns:
            fp32 `[B, T]`, nats, 0 where not scored.
        """
        # Through __call__, so that ZeRO-3's hooks on the whole model run too.
        return self(tokens_BT, targets_BT, doc_start_BT, per_token=True)

    @torch.no_grad()
    def logits(
        self, tokens_BT: Tensor, cache: KVCache | None = None, last_only: bool = False, places_N: Tensor | None = None
    ) -> Tensor:
        """Compute the logits of the next token, without dropout.

        Args:
            tokens_BT: the tokens that follow those in the cache, or whole rows of one document each.
            cache: is extended by these tokens.
            last_only: only for the last token of each row.
            places_N: int64, `row * T + slot` of the tokens whose logits are wanted; None: all.

        Returns:
            fp32 `[B, T, V]`, `[B, 1, V]` or `[N, V]`; V without padding.
        """
        # Through __call__, so that ZeRO-3's hooks on the whole model run too.
        return self(tokens_BT, cache=cache, last_only=last_only, places_N=places_N)

    @torch.no_grad()
    def score(self, tokens_BT: Tensor, places_N: Tensor, targets_N: Tensor) -> tuple[Tensor, Tensor]:
        """Compute how probable tokens are, without dropout, and without the logits of other places.

        Args:
            tokens_BT: rows of one document each, padded on the right.
            places_N: int64, `row * T + slot` of the token that each target follows; several may follow one.
            targets_N: int64 token ids.

        Returns:
            `[N]`: fp32 natural logarithms of probabilities, and whether no other token is more probable.
        """
        return self(tokens_BT, targets_N, places_N=places_N)

    def _logits(
        self, tokens_BT: Tensor, cache: KVCache | None, last_only: bool,
        targets_N: Tensor | None, places_N: Tensor | None,
    ) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
        num_past = 0 if cache is None else cache.num_used
        slot_T = torch.arange(num_past, num_past + tokens_BT.shape[1], device=tokens_BT.device)
        start_B1 = torch.zeros_like(tokens_BT[:, :1]) if cache is None else cache.start_B[:, None]
        # A padding slot begins a document of its own: it must see a key, but its result is never used.
        doc_start_BT = torch.minimum(start_B1, slot_T)
        positions_BT = self._positions(doc_start_BT, num_past)
        hidden_BTD = self._hidden(tokens_BT, doc_start_BT, positions_BT, None, cache)
        if places_N is not None and targets_N is None:
            return self.output(hidden_BTD.flatten(0, 1)[places_N], None)
        return self.output(hidden_BTD[:, -1:] if last_only else hidden_BTD, targets_N, places_N=places_N)

    def _positions(self, doc_start_BT: Tensor, first_slot: int) -> Tensor:
        slot_T = torch.arange(first_slot, first_slot + doc_start_BT.shape[1], device=doc_start_BT.device)
        return slot_T - doc_start_BT

    def _hidden(
        self,
        tokens_BT: Tensor,
        doc_start_BT: Tensor,
        positions_BT: Tensor,
        key: DropoutKey | None,
        cache: KVCache | None,
    ) -> Tensor:
        x_BTD = self.embedding(tokens_BT)
        tables = None
        if self.position_embedding is None:
            tables = rope_tables(positions_BT, self.shape.rope_dim, self.shape.rope_theta, self.rope_scaling)
        else:
            x_BTD = x_BTD + self.position_embedding(positions_BT)
        if key is not None:
            x_BTD = dropout(x_BTD, self.shape.dropout, key.at(0, SITE_EMBEDDING))
        num_keys = doc_start_BT.shape[1] + (0 if cache is None else cache.num_used)
        visible = visibility(doc_start_BT, num_keys, x_BTD.dtype, self.shape.sliding_window)
        run_block, residual_BTD = _run_block, None
        if self._compiled_block is not None and self.training and torch.is_grad_enabled():
            drops = key is not None and self.shape.attention_dropout > 0.0
            prepare(visible, self.shape.head_dim, drops or self.shape.attention_softcap is not None)
            # The first block's own code, without a residual, would be compiled too: give it one.
            run_block, residual_BTD = self._compiled_block, torch.zeros_like(x_BTD).requires_grad_(x_BTD.requires_grad)
        group = self.group if tokens_BT.shape[1] < doc_start_BT.shape[1] else None
        mode, kept = self.activation_checkpointing, KeptOnHost()
        contexts = self._contexts(visible, tables, key, cache, group)
        for index, (block, context) in enumerate(zip(self.blocks, contexts, strict=True)):
            with kept.of_block() if mode == "offload" and torch.is_grad_enabled() else nullcontext():
                x_BTD, residual_BTD = run_block(mode, block, x_BTD, residual_BTD, context)
            if self.on_block is not None and self.training:
                self.on_block(index, x_BTD, residual_BTD)
        return self.final_norm(x_BTD, residual_BTD)[0]

    def _contexts(
        self,
        visible: Visibility,
        tables: tuple[Tensor, Tensor] | None,
        key: DropoutKey | None,
        cache: KVCache | None,
        group: SequenceGroup | None,
    ) -> Iterator[Context]:
        """Yield what each block works with."""
        seeds_LBH = None
        if key is not None:
            device, num_layers = key.row_ids_B.device, self.shape.num_layers
            layer_L = torch.arange(num_layers, device=device)
            if self.shape.attention_dropout > 0.0:  # of all layers at once: Philox is some eighty operations
                seeds_LBH = attention_seeds(self.shape.num_heads, key.at(layer_L[:, None, None], SITE_ATTENTION))
                seeds_LBH = seeds_LBH[:, :, self.group.own(self.shape.num_heads)].contiguous()
            # Numbers would be part of the compiled code; tensors are read by it.
            step = layer_L.new_zeros(()) + key.step
            keys = [dataclasses.replace(key, step=step, layer=layer) for layer in layer_L]
        for index in range(self.shape.num_layers):
            yield Context(
                visible,
                tables,
                None if key is None else keys[index],
                None if seeds_LBH is None else seeds_LBH[index],
                None if cache is None else cache.layers[index],
                group,
                self.ffn_chunk_tokens,
            )

    def _apply(self, fn, recurse: bool = True):  # type: ignore[no-untyped-def]
        # Leaving the meta device makes a new Parameter in each module that holds one: tie them again.
        super()._apply(fn, recurse)
        if self.output.tied:
            self.output.weight = self.embedding.weight
        return self
