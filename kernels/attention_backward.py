"""The Triton programs of attention backward.

`grad_kv_kernel` holds a tile of keys and passes over the queries that see it. With ATOMIC_GRAD_Q it adds their
gradients into fp32 memory as it goes: one pass, five matrix products, sums in any order. Without, `grad_q_kernel`
computes them in a pass of its own: seven products, the same bits on every run. Query heads that share a key head are
taken one after another by the same program, so keys and values are never repeated.

Source: Dao et al. 2022, "FlashAttention", algorithm 4; Dao 2023, "FlashAttention-2".
"""

from __future__ import annotations

import triton
import triton.language as tl

from kernels.attention_parts import LOG2_E, bend, keep, load_interval, load_rows, phases, place, store_rows


@triton.jit
def delta_kernel(
    out_ptr: tl.tensor,
    grad_out_ptr: tl.tensor,
    delta_ptr: tl.tensor,
    grad_q_ptr: tl.tensor,
    out_strides: tl.tuple,
    grad_out_strides: tl.tuple,
    grad_q_strides: tl.tuple,
    T: tl.tensor,
    H: tl.constexpr,
    C: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_C: tl.constexpr,
    CLEAR_GRAD_Q: tl.constexpr,
) -> None:
    """Compute the row sums of out * grad_out, `[B, H, T]`, and clear the memory that gradients are added into."""
    program = tl.program_id(0)
    tiles = tl.cdiv(T, BLOCK)
    head, row = program // tiles, program % tiles * BLOCK
    b, h = head // H, head % H
    out = load_rows(out_ptr, out_strides, b, row, h, T, C, BLOCK, BLOCK_C, False, True).to(tl.float32)
    grad_out = load_rows(grad_out_ptr, grad_out_strides, b, row, h, T, C, BLOCK, BLOCK_C, False, True).to(tl.float32)
    rows = row + tl.arange(0, BLOCK)
    tl.store(delta_ptr + head.to(tl.int64) * T + rows, tl.sum(out * grad_out, 1), mask=rows < T)
    if CLEAR_GRAD_Q:
        zeros = tl.zeros((BLOCK, BLOCK_C), dtype=tl.float32)
        store_rows(grad_q_ptr, grad_q_strides, b, row, h, T, zeros, C, BLOCK, BLOCK_C)


@triton.jit
def _load_statistic(
    pointer: tl.tensor, rows: tl.tensor, T: tl.tensor, beyond: tl.constexpr, CHECK: tl.constexpr
) -> tl.tensor:
    if CHECK:
        loaded = tl.load(pointer + rows, mask=rows < T, other=beyond)
    else:
        loaded = tl.load(pointer + rows)
    return loaded


@triton.jit
def _probabilities(
    scores: tl.tensor,
    lse: tl.tensor,
    seen: tl.tensor,
    scale: tl.tensor,
    softcap: tl.tensor,
    MASKED: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
) -> tl.tensor:
    """Compute the probabilities again from bent scores; `lse` broadcasts along the keys, on whichever side they are."""
    to_log2 = softcap * LOG2_E if HAS_SOFTCAP else scale * LOG2_E
    probs = tl.math.exp2(scores * to_log2 - lse)
    if MASKED:
        probs = tl.where(seen, probs, 0.0)  # after exp2: what is not seen may have any score
    return probs


@triton.jit
def _grad_scores(
    probs: tl.tensor,
    grad_probs: tl.tensor,
    delta: tl.tensor,
    scores: tl.tensor,
    kept: tl.tensor,
    keep_scale: tl.tensor,
    HAS_SOFTCAP: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
) -> tl.tensor:
    """Compute the gradient of the scores, of which `scale` is left to the end; `scores` are bent."""
    if HAS_DROPOUT:
        grad_probs = tl.where(kept, grad_probs * keep_scale, 0.0)
    grad_scores = probs * (grad_probs - delta)
    if HAS_SOFTCAP:
        grad_scores = grad_scores * (1.0 - scores * scores)
    return grad_scores


@triton.jit
def _pass_over_queries(
    grad_k: tl.tensor,
    grad_v: tl.tensor,
    k: tl.tensor,
    v: tl.tensor,
    q_x: tl.tensor,
    grad_out_x: tl.tensor,
    grad_q_x: tl.tensor,
    lse_ptr: tl.tensor,
    delta_ptr: tl.tensor,
    q_strides: tl.tuple,
    grad_out_strides: tl.tuple,
    grad_q_strides: tl.tuple,
    b: tl.tensor,
    h: tl.tensor,
    row: tl.tensor,
    first: tl.tensor,
    end: tl.tensor,
    seed: tl.tensor,
    begin: tl.tensor,
    stop: tl.tensor,
    T: tl.tensor,
    scale: tl.tensor,
    softcap: tl.tensor,
    keep_scale: tl.tensor,
    threshold: tl.tensor,
    C: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_C: tl.constexpr,
    MASKED: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
    ATOMIC_GRAD_Q: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    DESCRIPTOR_ADD: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """Add what the queries from `begin` to `stop` of one head give to the gradients of a tile of keys and values.

    Scores lie as `[BLOCK_K, BLOCK_Q]`, so that the products for keys and values need no transposed tile.
    """
    for query in tl.range(begin, stop, BLOCK_Q):
        q = load_rows(q_x, q_strides, b, query, h, T, C, BLOCK_Q, BLOCK_C, DESCRIPTORS, MASKED)
        queries = query + tl.arange(0, BLOCK_Q)
        lse = _load_statistic(lse_ptr, queries, T, float("inf"), MASKED)
        scores = bend(tl.dot(k, tl.trans(q), input_precision="ieee"), scale, softcap, HAS_SOFTCAP)
        seen = (queries[None, :] >= first[:, None]) & (queries[None, :] < end[:, None]) if MASKED else scores
        probs = _probabilities(scores, lse[None, :], seen, scale, softcap, MASKED, HAS_SOFTCAP)
        kept = tl.trans(keep(seed, query, row, threshold, BLOCK_Q, BLOCK_K)) if HAS_DROPOUT else scores
        grad_out = load_rows(grad_out_x, grad_out_strides, b, query, h, T, C, BLOCK_Q, BLOCK_C, DESCRIPTORS, MASKED)
        dropped = tl.where(kept, probs * keep_scale, 0.0) if HAS_DROPOUT else probs
        grad_v = tl.dot(dropped.to(grad_out.dtype), grad_out, grad_v, input_precision="ieee")
        grad_probs = tl.dot(v, tl.trans(grad_out), input_precision="ieee")
        delta = _load_statistic(delta_ptr, queries, T, 0.0, MASKED)
        grad_scores = _grad_scores(
            probs, grad_probs, delta[None, :], scores, kept, keep_scale, HAS_SOFTCAP, HAS_DROPOUT
        )
        grad_scores = grad_scores.to(q.dtype)
        grad_k = tl.dot(grad_scores, q, grad_k, input_precision="ieee")
        if ATOMIC_GRAD_Q:
            grad_q = tl.dot(tl.trans(grad_scores), k, input_precision="ieee")
            if DESCRIPTOR_ADD:
                grad_q_x.atomic_add([b, h, query, 0], grad_q.reshape([1, 1, BLOCK_Q, BLOCK_C]))
            else:
                column = tl.arange(0, BLOCK_C)[None, :]
                base = grad_q_x + b.to(tl.int64) * grad_q_strides[0] + h.to(tl.int64) * grad_q_strides[2]
                pointers = base + queries.to(tl.int64)[:, None] * grad_q_strides[1] + column
                tl.atomic_add(pointers, grad_q, mask=(queries < T)[:, None] & (column < C), sem="relaxed")
    return grad_k, grad_v


@triton.jit(do_not_specialize=["T", "S", "num_rows", "heads_in_section", "threshold"])
def grad_kv_kernel(
    q_x: tl.tensor,
    k_x: tl.tensor,
    v_x: tl.tensor,
    grad_out_x: tl.tensor,
    grad_q_x: tl.tensor,
    grad_k_ptr: tl.tensor,
    grad_v_ptr: tl.tensor,
    lse_ptr: tl.tensor,
    delta_ptr: tl.tensor,
    first_ptr: tl.tensor,
    end_ptr: tl.tensor,
    seeds_ptr: tl.tensor,
    q_strides: tl.tuple,
    k_strides: tl.tuple,
    v_strides: tl.tuple,
    grad_out_strides: tl.tuple,
    grad_q_strides: tl.tuple,
    grad_kv_strides: tl.tuple,
    T: tl.tensor,
    S: tl.tensor,
    num_rows: tl.tensor,  # B * K * SPLITS
    heads_in_section: tl.tensor,
    scale: tl.tensor,
    softcap: tl.tensor,
    keep_scale: tl.tensor,
    threshold: tl.tensor,
    H: tl.constexpr,
    GROUP: tl.constexpr,
    SPLITS: tl.constexpr,  # programs that share the query heads of a key head
    C: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_C: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
    ATOMIC_GRAD_Q: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    DESCRIPTOR_ADD: tl.constexpr,
) -> None:
    """Compute the gradients of a tile of keys and values, and with ATOMIC_GRAD_Q add those of the queries."""
    tile, head = place(tl.cdiv(S, BLOCK_K), num_rows, heads_in_section, False)
    num_parts: tl.constexpr = H // GROUP * SPLITS
    b, part = head // num_parts, head % num_parts
    kv_head, row = part // SPLITS, tile * BLOCK_K
    base = b.to(tl.int64) * S
    first, end = load_interval(first_ptr, end_ptr, base, row, S, BLOCK_K)
    k = load_rows(k_x, k_strides, b, row, kv_head, S, C, BLOCK_K, BLOCK_C, DESCRIPTORS, True)
    v = load_rows(v_x, v_strides, b, row, kv_head, S, C, BLOCK_K, BLOCK_C, DESCRIPTORS, True)
    grad_k = tl.zeros((BLOCK_K, BLOCK_C), dtype=tl.float32)
    grad_v = tl.zeros((BLOCK_K, BLOCK_C), dtype=tl.float32)
    begin, full_begin, full_end, stop = phases(first_ptr, end_ptr, base, row, S, BLOCK_K, BLOCK_Q, 1)
    # A tile that ends beyond the keys is masked throughout: the probability of a zero key can be infinite.
    full_end = tl.where(row + BLOCK_K > S, full_begin, full_end)
    heads_of_part: tl.constexpr = GROUP // SPLITS
    for index in range(heads_of_part):
        h = part * heads_of_part + index
        row_of_head = (b * H + h).to(tl.int64)
        seed = tl.load(seeds_ptr + row_of_head) if HAS_DROPOUT else 0
        for phase in tl.static_range(3):
            low = begin if phase == 0 else (full_begin if phase == 1 else full_end)
            high = full_begin if phase == 0 else (full_end if phase == 1 else stop)
            grad_k, grad_v = _pass_over_queries(
                grad_k, grad_v, k, v, q_x, grad_out_x, grad_q_x, lse_ptr + row_of_head * T, delta_ptr + row_of_head * T,
                q_strides, grad_out_strides, grad_q_strides, b, h, row, first, end, seed, low, high, T,
                scale, softcap, keep_scale, threshold, C, BLOCK_Q, BLOCK_K, BLOCK_C, phase != 1, HAS_SOFTCAP,
                HAS_DROPOUT, ATOMIC_GRAD_Q, DESCRIPTORS, DESCRIPTOR_ADD,
            )  # fmt: skip
    store_rows(grad_k_ptr, grad_kv_strides, b, row, part, S, grad_k * scale, C, BLOCK_K, BLOCK_C)
    store_rows(grad_v_ptr, grad_kv_strides, b, row, part, S, grad_v, C, BLOCK_K, BLOCK_C)


@triton.jit
def _pass_over_keys(
    grad_q: tl.tensor,
    q: tl.tensor,
    grad_out: tl.tensor,
    lse: tl.tensor,
    delta: tl.tensor,
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
    keep_scale: tl.tensor,
    threshold: tl.tensor,
    C: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_C: tl.constexpr,
    MASKED: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
) -> tl.tensor:
    """Add what the keys from `begin` to `stop` give to the gradient of a tile of queries."""
    for key in tl.range(begin, stop, BLOCK_K):
        k = load_rows(k_x, k_strides, b, key, kv_head, S, C, BLOCK_K, BLOCK_C, DESCRIPTORS, MASKED)
        scores = bend(tl.dot(q, tl.trans(k), input_precision="ieee"), scale, softcap, HAS_SOFTCAP)
        keys = (key + tl.arange(0, BLOCK_K))[None, :]
        seen = (keys >= first[:, None]) & (keys < end[:, None]) if MASKED else scores
        probs = _probabilities(scores, lse[:, None], seen, scale, softcap, MASKED, HAS_SOFTCAP)
        v = load_rows(v_x, v_strides, b, key, kv_head, S, C, BLOCK_K, BLOCK_C, DESCRIPTORS, MASKED)
        grad_probs = tl.dot(grad_out, tl.trans(v), input_precision="ieee")
        kept = keep(seed, row, key, threshold, BLOCK_Q, BLOCK_K) if HAS_DROPOUT else scores
        grad_scores = _grad_scores(
            probs, grad_probs, delta[:, None], scores, kept, keep_scale, HAS_SOFTCAP, HAS_DROPOUT
        )
        grad_q = tl.dot(grad_scores.to(k.dtype), k, grad_q, input_precision="ieee")
    return grad_q


@triton.jit(do_not_specialize=["T", "S", "num_rows", "heads_in_section", "threshold"])
def grad_q_kernel(
    q_x: tl.tensor,
    k_x: tl.tensor,
    v_x: tl.tensor,
    grad_out_x: tl.tensor,
    grad_q_ptr: tl.tensor,
    lse_ptr: tl.tensor,
    delta_ptr: tl.tensor,
    first_ptr: tl.tensor,
    end_ptr: tl.tensor,
    seeds_ptr: tl.tensor,
    q_strides: tl.tuple,
    k_strides: tl.tuple,
    v_strides: tl.tuple,
    grad_out_strides: tl.tuple,
    grad_q_strides: tl.tuple,
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
    """Compute the gradient of a tile of queries of one head."""
    tile, head = place(tl.cdiv(T, BLOCK_Q), num_rows, heads_in_section, True)
    b, h = head // H, head % H
    kv_head, row = h // GROUP, tile * BLOCK_Q
    base = b.to(tl.int64) * T
    first, end = load_interval(first_ptr, end_ptr, base, row, T, BLOCK_Q)
    seed = tl.load(seeds_ptr + head) if HAS_DROPOUT else 0
    q = load_rows(q_x, q_strides, b, row, h, T, C, BLOCK_Q, BLOCK_C, DESCRIPTORS, True)
    grad_out = load_rows(grad_out_x, grad_out_strides, b, row, h, T, C, BLOCK_Q, BLOCK_C, DESCRIPTORS, True)
    rows = row + tl.arange(0, BLOCK_Q)
    lse = tl.load(lse_ptr + head.to(tl.int64) * T + rows, mask=rows < T, other=float("inf"))
    delta = tl.load(delta_ptr + head.to(tl.int64) * T + rows, mask=rows < T, other=0.0)
    grad_q = tl.zeros((BLOCK_Q, BLOCK_C), dtype=tl.float32)
    begin, full_begin, full_end, stop = phases(
        first_ptr, end_ptr, base, row, T, BLOCK_Q, BLOCK_K, 4 if HAS_DROPOUT else 1
    )
    for phase in tl.static_range(3):
        low = begin if phase == 0 else (full_begin if phase == 1 else full_end)
        high = full_begin if phase == 0 else (full_end if phase == 1 else stop)
        grad_q = _pass_over_keys(
            grad_q, q, grad_out, lse, delta, k_x, v_x, k_strides, v_strides, b, kv_head, row, first, end, seed, low,
            high, S, scale, softcap, keep_scale, threshold, C, BLOCK_Q, BLOCK_K, BLOCK_C, phase != 1, HAS_SOFTCAP,
            HAS_DROPOUT, DESCRIPTORS,
        )  # fmt: skip
    store_rows(grad_q_ptr, grad_q_strides, b, row, h, T, grad_q * scale, C, BLOCK_Q, BLOCK_C)
