"""Dropout whose mask is a pure function of (seed, step, row, layer, site, element).

No generator state: the mask does not depend on the number of ranks, on the micro-batch that a row falls in, or on
whether a block is computed a second time in the backward pass. Triton's `tl.philox` computes the same words: on a GPU
masks are drawn inside the program that drops, forward and again backward, and never stored.

Source: Salmon et al. 2011, "Parallel Random Numbers: As Easy as 1, 2, 3" (Philox-4x32-10).
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.dispatch import use_triton

# 8 elements a thread: two groups of four words.
BLOCK, NUM_WARPS = 1024, 4

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10

SITE_EMBEDDING, SITE_ATTENTION, SITE_ATTENTION_OUTPUT, SITE_FFN_OUTPUT = range(4)
_SITES_PER_LAYER = 8  # room for later sites without changing the masks of these


@dataclass(frozen=True)
class DropoutKey:
    """What fixes a dropout mask besides its shape.

    Args:
        seed: of the run, up to 64 bits.
        step: of training; a number, or an int64 scalar.
        row_ids_B: int64 `[B]`, the global number of each row.
        layer: index of the block, or int64 numbers that broadcast with what is drawn.
        site: place in the block, one of `SITE_*`.
        first_slot: of the row that what is dropped begins with, where other ranks have the slots before it.
    """

    seed: int
    step: int | Tensor
    row_ids_B: Tensor
    layer: int | Tensor = 0
    site: int = SITE_EMBEDDING
    first_slot: int = 0

    def at(self, layer: int | Tensor, site: int) -> DropoutKey:
        """Make the key of another place in the model."""
        return dataclasses.replace(self, layer=layer, site=site)


def philox(seed: Tensor | int, counter: tuple[Tensor | int, ...]) -> tuple[Tensor | int, ...]:
    """Compute Philox-4x32-10.

    Args:
        seed: the 64-bit key, its low word first; a number, or int64 that broadcasts with the counter.
        counter: four words of 32 bits, as int64 tensors that broadcast, or as numbers.

    Returns:
        Four words of 32 bits, in int64.
    """
    k0, k1 = seed & _MASK, (seed >> 32) & _MASK
    c0, c1, c2, c3 = counter
    for _ in range(_ROUNDS):
        # The 64-bit products may wrap into the sign; masking the arithmetic shift gives their high word all the same.
        product0, product2 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1 = ((product2 >> 32) & _MASK) ^ c1 ^ k0, product2 & _MASK
        c2, c3 = ((product0 >> 32) & _MASK) ^ c3 ^ k1, product0 & _MASK
        k0, k1 = (k0 + _KEY_STEPS[0]) & _MASK, (k1 + _KEY_STEPS[1]) & _MASK
    return c0, c1, c2, c3


def attention_seeds(num_heads: int, key: DropoutKey) -> Tensor:
    """Draw the Philox key of each head of each row, from which attention kernels draw the masks of probabilities.

    Args:
        num_heads: H, of all ranks.
        key: where and when; several layers, `[L, 1, 1]`, are drawn at once.

    Returns:
        int64 `[B, H]` or `[L, B, H]`, words 0 and 1 of the counter (head, row, step, place).
    """
    head_H = torch.arange(num_heads, dtype=torch.int64, device=key.row_ids_B.device)
    place = key.layer * _SITES_PER_LAYER + key.site
    low, high, *_ = philox(key.seed, (head_H, (key.row_ids_B & _MASK)[:, None], key.step & _MASK, place))
    return torch.as_tensor(low | (high << 32))


def attention_keep_mask(seeds_BH: Tensor, num_queries: int, num_keys: int, p: float) -> Tensor:
    """Draw which probabilities of attention are kept: key s of query t takes word s % 4 of the counter (s // 4, t).

    Args:
        seeds_BH: from `attention_seeds`.
        num_queries: T.
        num_keys: S.
        p: probability that a probability is dropped.

    Returns:
        bool `[B, H, T, S]`, true with probability 1 - p.
    """
    if torch.compiler.is_compiling():  # as in `dropout`
        return _attention_mask_op(seeds_BH, num_queries, num_keys, p)
    return _attention_mask(seeds_BH, num_queries, num_keys, p)


def _attention_mask(seeds_BH: Tensor, num_queries: int, num_keys: int, p: float) -> Tensor:
    group = torch.arange(-(-num_keys // 4), dtype=torch.int64, device=seeds_BH.device)
    query_T1 = torch.arange(num_queries, dtype=torch.int64, device=seeds_BH.device)[:, None]
    words = philox(seeds_BH[:, :, None, None], (group, query_T1, 0, 0))
    threshold = drop_threshold(p)
    kept = torch.stack([torch.as_tensor(word) >= threshold for word in words], dim=-1)
    return kept.flatten(-2)[..., :num_keys].contiguous()


def drop_threshold(p: float) -> int:
    """Return the word of 32 bits below which an element is dropped."""
    return min(round(p * 2**32), _MASK)


def keep_mask(shape: tuple[int, ...], p: float, key: DropoutKey) -> Tensor:
    """Draw which elements are kept.

    Element e of a row, counted from slot 0 wherever the tensor begins, takes word e % 4 of the counter (e // 4, row,
    step, place), each of 32 bits; the place is layer * 8 + site, with what exceeds 32 bits of e // 4 in its top byte.

    Args:
        shape: `[B, T, ...]`, one row of the key for each index of the first dimension.
        p: probability that an element is dropped.
        key: where and when.

    Returns:
        bool of that shape, true with probability 1 - p.
    """
    row_ids_B = key.row_ids_B
    num_elements, first = math.prod(shape[1:]), _first_element(shape, key)
    group = torch.arange(first // 4, -(-(first + num_elements) // 4), dtype=torch.int64, device=row_ids_B.device)
    place = (group >> 32 << 24) + (key.layer * _SITES_PER_LAYER + key.site)
    words = philox(key.seed, (group & _MASK, (row_ids_B & _MASK)[:, None], key.step & _MASK, place))
    threshold = drop_threshold(p)
    kept = torch.stack([torch.as_tensor(word) >= threshold for word in words], dim=-1)
    return kept.flatten(1)[:, first % 4 : first % 4 + num_elements].reshape(shape)


def _first_element(shape: torch.Size | tuple[int, ...], key: DropoutKey) -> int:
    """The number in its row of the first element of a tensor of this shape."""
    return key.first_slot * math.prod(shape[2:])


def dropout_truth(x: Tensor, p: float, key: DropoutKey) -> Tensor:
    """Compute `dropout` in plain PyTorch."""
    return torch.where(keep_mask(tuple(x.shape), p, key), x * (1.0 / (1.0 - p)), 0.0)


def dropout(x: Tensor, p: float, key: DropoutKey) -> Tensor:
    """Zero elements with probability `p` and scale the others by 1 / (1 - p).

    Args:
        x: `[B, T, ...]`, one row of the key for each index of the first dimension.
        p: probability that an element is dropped; 0 returns `x`.
        key: where and when.
    """
    if p == 0.0:
        return x
    # Where a compiler fuses Philox on a CPU, its products overflow as C++ forbids, and masks come out wrong.
    if (use_triton(x) and x.dtype != torch.float64) or torch.compiler.is_compiling():
        device = key.row_ids_B.device
        step, layer = (_on_device(number, device) for number in (key.step, key.layer))
        seed = key.seed - (key.seed >> 63 << 64)
        return _dropout_op(x, key.row_ids_B, step, layer, seed, key.site, _first_element(x.shape, key), p)
    return dropout_truth(x, p, key)


def _on_device(number: int | Tensor, device: torch.device) -> Tensor:
    """Bring a number to the device by a launch: copied there, the host would wait for all that the GPU has to do."""
    return number if isinstance(number, Tensor) else torch.full((), number, dtype=torch.int64, device=device)


@triton.jit(do_not_specialize=["seed", "step_ptr", "layer_ptr", "first_group"])
def _dropout_kernel(
    x_ptr: tl.tensor,
    rows_ptr: tl.tensor,
    step_ptr: tl.tensor,
    layer_ptr: tl.tensor,
    y_ptr: tl.tensor,
    seed: tl.tensor,
    num_elements: tl.tensor,
    first_group: tl.tensor,  # of four words, which the row begins with, behind SKIPPED words of it
    SKIPPED: tl.constexpr,
    SITE: tl.constexpr,
    SITES_PER_LAYER: tl.constexpr,
    THRESHOLD: tl.constexpr,
    SCALE: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    tiles = tl.cdiv(num_elements + SKIPPED, BLOCK)  # of a row
    row = (tl.program_id(0) // tiles).to(tl.int64)
    tile = (tl.program_id(0) % tiles).to(tl.int64)
    group = first_group + tile * (BLOCK // 4) + tl.arange(0, BLOCK // 4)
    zero = tl.zeros((BLOCK // 4,), dtype=tl.uint32)
    place = (group >> 32 << 24) + tl.load(layer_ptr) * SITES_PER_LAYER + SITE
    word0, word1, word2, word3 = tl.philox(
        seed,
        group.to(tl.uint32),
        tl.load(rows_ptr + row).to(tl.uint32) + zero,
        tl.load(step_ptr).to(tl.uint32) + zero,
        place.to(tl.uint32),
    )
    words = tl.reshape(tl.join(tl.join(word0, word2), tl.join(word1, word3)), (BLOCK,))  # the last axis is the quickest
    element = tile * BLOCK + tl.arange(0, BLOCK) - SKIPPED
    inside = (element >= 0) & (element < num_elements)
    x = tl.load(x_ptr + row * num_elements + element, mask=inside, other=0.0).to(tl.float32)
    y = tl.where(words >= THRESHOLD, x * SCALE, 0.0)
    tl.store(y_ptr + row * num_elements + element, y.to(y_ptr.dtype.element_ty), mask=inside)


@torch.library.custom_op("longhaul::dropout", mutates_args=())
def _dropout_op(
    x: Tensor, row_ids_B: Tensor, step: Tensor, layer: Tensor, seed: int, site: int, first: int, p: float
) -> Tensor:
    """Drop by the key, from element `first` of each row on.

    Its gradient is the same: the mask is drawn again, and nothing but the key is kept.
    """
    if not use_triton(x) or x.dtype == torch.float64:
        flat = x.flatten(1)  # [B, T], where each element is a slot
        return dropout_truth(flat, p, DropoutKey(seed, step, row_ids_B, layer, site, first)).view(x.shape)
    x, row_ids_B = x.contiguous(), row_ids_B.contiguous()
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if y.numel() > 0:
        num_elements = y[0].numel()
        with torch.cuda.device_of(x):
            _dropout_kernel[(len(x) * triton.cdiv(num_elements + first % 4, BLOCK),)](
                x, row_ids_B, step, layer, y, seed, num_elements, first // 4, SKIPPED=first % 4,
                SITE=site, SITES_PER_LAYER=_SITES_PER_LAYER, THRESHOLD=drop_threshold(p), SCALE=1.0 / (1.0 - p),
                BLOCK=BLOCK, num_warps=NUM_WARPS,
            )  # fmt: skip
    return y


@_dropout_op.register_fake
def _(x: Tensor, row_ids_B: Tensor, step: Tensor, layer: Tensor, seed: int, site: int, first: int, p: float) -> Tensor:
    return x.new_empty(x.shape)


def _keep_key(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, row_ids_B, step, layer, *ctx.numbers = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(row_ids_B, step, layer)


def _drop_gradient(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
    return None if grad is None else _dropout_op(grad, *ctx.saved_tensors, *ctx.numbers), *[None] * 7


_dropout_op.register_autograd(_drop_gradient, setup_context=_keep_key)


@torch.library.custom_op("longhaul::attention_keep_mask", mutates_args=())
def _attention_mask_op(seeds_BH: Tensor, num_queries: int, num_keys: int, p: float) -> Tensor:
    return _attention_mask(seeds_BH, num_queries, num_keys, p)


@_attention_mask_op.register_fake
def _(seeds_BH: Tensor, num_queries: int, num_keys: int, p: float) -> Tensor:
    return seeds_BH.new_empty((*seeds_BH.shape, num_queries, num_keys), dtype=torch.bool)
