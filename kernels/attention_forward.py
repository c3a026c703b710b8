"""The Triton program of attention forward: online softmax over tiles of keys.

Source: Dao et al. 2022, "FlashAttention"; Dao 2023, "FlashAttention-2".
"""

from __future__ import annotations

import triton
import triton.language as tl

from kernels.attention_parts import LOG2_E, bend, keep, load_interval, load_rows, phases, place, store_rows


@triton.jit
def _attend(
    weighted: tl.tensor,
    total: tl.tensor,
    largest: tl.tensor,
    q: tl.tensor,
    k_x: tl.tensor,
    v_x: tl.tensor,
    k_strides: tl.tuple,
    v_strides: tl.tuple,
    b: tl.tensor,
    kv_head: tl.tensor,
    row: tl.tensor,
    first: tl.tensor,
    end: tl.tensor,
    seed: tl.tensor,
    begin: tl.tensor,
    stop: tl.tensor,
    S: tl.tensor,
    scale: tl.tensor,
    softcap: tl.tensor,
    threshold: tl.tensor,
    C: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_C: tl.constexpr,
    MASKED: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """Add the keys from `begin` to `stop` to the running sums."""
    to_log2 = softcap * LOG2_E if HAS_SOFTCAP else scale * LOG2_E
    for key in tl.range(begin, stop, BLOCK_K):
        k = load_rows(k_x, k_strides, b, key, kv_head, S, C, BLOCK_K, BLOCK_C, DESCRIPTORS, MASKED)
        scores = bend(tl.dot(q, tl.trans(k), input_precision="ieee"), scale, softcap, HAS_SOFTCAP)
        if MASKED:
            keys = (key + tl.arange(0, BLOCK_K))[None, :]
            scores = tl.where((keys >= first[:, None]) & (keys < end[:, None]), scores, float("-inf"))
        new_largest = tl.maximum(largest, tl.max(scores, 1) * to_log2)
        # A row that has seen nothing yet has -inf: subtracted from itself it would be NaN.
        pivot = tl.where(new_largest == float("-inf"), 0.0, new_largest) if MASKED else new_largest
        probs = tl.math.exp2(scores * to_log2 - pivot[:, None])
        shrink = tl.math.exp2(largest - pivot)
        total = total * shrink + tl.sum(probs, 1)
        if HAS_DROPOUT:
            probs = tl.where(keep(seed, row, key, threshold, BLOCK_Q, BLOCK_K), probs, 0.0)
        v = load_rows(v_x, v_strides, b, key, kv_head, S, C, BLOCK_K, BLOCK_C, DESCRIPTORS, MASKED)
        weighted = tl.dot(probs.to(v.dtype), v, weighted * shrink[:, None], input_precision="ieee")
        largest = new_largest
    return weighted, total, largest


@triton.jit(do_not_specialize=["T", "S", "num_rows", "heads_in_section", "threshold"])
def forward_kernel(
    q_x: tl.tensor,
    k_x: tl.tensor,
    v_x: tl.tensor,
    out_ptr: tl.tensor,
    lse_ptr: tl.tensor,
    first_ptr: tl.tensor,
    end_ptr: tl.tensor,
    seeds_ptr: tl.tensor,
    q_strides: tl.tuple,
    k_strides: tl.tuple,
    v_strides: tl.tuple,
    out_strides: tl.tuple,
    T: tl.tensor,
    S: tl.tensor,
    num_rows: tl.tensor,  # B * H
    heads_in_section: tl.tensor,
    scale: tl.tensor,
    softcap: tl.tensor,
    keep_scale: tl.tensor,
    threshold: tl.tensor,
    H: tl.constexpr,
    GROUP: tl.constexpr,
    C: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_C: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
) -> None:
    """Attend with a tile of queries of one head; keep log2 of the sum of exponentials for the backward pass."""
    tile, head = place(tl.cdiv(T, BLOCK_Q), num_rows, heads_in_section, True)
    b, h = head // H, head % H
    kv_head, row = h // GROUP, tile * BLOCK_Q
    base = b.to(tl.int64) * T
    first, end = load_interval(first_ptr, end_ptr, base, row, T, BLOCK_Q)
    seed = tl.load(seeds_ptr + head) if HAS_DROPOUT else 0
    q = load_rows(q_x, q_strides, b, row, h, T, C, BLOCK_Q, BLOCK_C, DESCRIPTORS, True)
    largest = tl.full((BLOCK_Q,), float("-inf"), dtype=tl.float32)
    total = tl.zeros((BLOCK_Q,), dtype=tl.float32)
    weighted = tl.zeros((BLOCK_Q, BLOCK_C), dtype=tl.float32)
    # words of dropout come in fours of keys
    begin, full_begin, full_end, stop = phases(
        first_ptr, end_ptr, base, row, T, BLOCK_Q, BLOCK_K, 4 if HAS_DROPOUT else 1
    )
    for phase in tl.static_range(3):
        low = begin if phase == 0 else (full_begin if phase == 1 else full_end)
        high = full_begin if phase == 0 else (full_end if phase == 1 else stop)
        weighted, total, largest = _attend(
            weighted, total, largest, q, k_x, v_x, k_strides, v_strides, b, kv_head, row, first, end, seed, low, high,
            S, scale, softcap, threshold, C, BLOCK_Q, BLOCK_K, BLOCK_C, phase != 1, HAS_SOFTCAP, HAS_DROPOUT,
            DESCRIPTORS,
        )  # fmt: skip
    nothing = total == 0.0
    out = weighted * (keep_scale / tl.where(nothing, 1.0, total))[:, None]
    store_rows(out_ptr, out_strides, b, row, h, T, out, C, BLOCK_Q, BLOCK_C)
    # +inf where a query sees nothing, so that its probabilities are zeros in the backward pass
    lse = tl.where(nothing, float("inf"), largest + tl.math.log2(total))
    rows = row + tl.arange(0, BLOCK_Q)
    tl.store(lse_ptr + head.to(tl.int64) * T + rows, lse, mask=rows < T)
