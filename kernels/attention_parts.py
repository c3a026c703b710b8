"""What the programs of attention forward and backward share: their place, tiles in memory, scores, dropout.

A tile is rows of one head: `[BLOCK, BLOCK_C]`, where BLOCK_C is the head width rounded up to a power of two and the
columns beyond it are zeros. With DESCRIPTORS `x` is a host-made tensor descriptor over `[B, H, T, C]`, whose bounds the
hardware checks; otherwise it is a pointer. Heads are addressed with 64 bits: b * stride passes 2**31.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def place(
    num_tiles: tl.tensor,
    num_heads: tl.tensor,
    heads_in_section: tl.tensor,
    LAST_TILE_FIRST: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """Return tile and head (of all rows) of this program.

    Programs start in the order of their number. Heads are taken in sections whose keys and values fit the L2 cache
    together; in a section the tiles with most work come first, so that no long one starts last.
    """
    program = tl.program_id(0)
    section = program // (heads_in_section * num_tiles)
    within = program - section * heads_in_section * num_tiles
    heads = tl.minimum(heads_in_section, num_heads - section * heads_in_section)
    tile = within // heads
    head = section * heads_in_section + within - tile * heads
    if LAST_TILE_FIRST:
        tile = num_tiles - 1 - tile
    return tile, head


@triton.jit
def load_rows(
    x: tl.tensor,
    strides: tl.tuple,
    b: tl.tensor,
    row: tl.tensor,
    h: tl.tensor,
    num_rows: tl.tensor,
    C: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_C: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    CHECK: tl.constexpr,
) -> tl.tensor:
    """Load a tile; rows from `num_rows` on are zeros, and need CHECK where there may be any."""
    if DESCRIPTORS:
        loaded = x.load([b, h, row, 0]).reshape([BLOCK, BLOCK_C])
    else:
        base = x + b.to(tl.int64) * strides[0] + tl.cast(row, tl.int64) * strides[1] + h.to(tl.int64) * strides[2]
        offset = tl.arange(0, BLOCK)
        column = tl.arange(0, BLOCK_C)
        pointers = base + offset[:, None] * strides[1] + column[None, :]
        if CHECK:
            inside = (row + offset < num_rows)[:, None] & (column < C)[None, :]
            loaded = tl.load(pointers, mask=inside, other=0.0)
        elif C < BLOCK_C:
            loaded = tl.load(pointers, mask=(column < C)[None, :], other=0.0)
        else:
            loaded = tl.load(pointers)
    return loaded


@triton.jit
def store_rows(
    x: tl.tensor,
    strides: tl.tuple,
    b: tl.tensor,
    row: tl.tensor,
    h: tl.tensor,
    num_rows: tl.tensor,
    tile: tl.tensor,
    C: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_C: tl.constexpr,
) -> None:
    """Store what of a tile lies within the tensor."""
    base = x + b.to(tl.int64) * strides[0] + tl.cast(row, tl.int64) * strides[1] + h.to(tl.int64) * strides[2]
    offset = tl.arange(0, BLOCK)
    column = tl.arange(0, BLOCK_C)
    inside = (row + offset < num_rows)[:, None] & (column < C)[None, :]
    tl.store(base + offset[:, None] * strides[1] + column[None, :], tile.to(x.dtype.element_ty), mask=inside)


@triton.jit
def load_interval(
    first_ptr: tl.tensor, end_ptr: tl.tensor, base: tl.tensor, row: tl.tensor, num_rows: tl.tensor, BLOCK: tl.constexpr
) -> tuple[tl.tensor, tl.tensor]:
    """Load what each row of a tile sees; rows from `num_rows` on see nothing."""
    rows = row + tl.arange(0, BLOCK)
    first = tl.load(first_ptr + base + rows, mask=rows < num_rows, other=0x7FFFFFFF)
    return first, tl.load(end_ptr + base + rows, mask=rows < num_rows, other=0)


@triton.jit
def phases(
    first_ptr: tl.tensor,
    end_ptr: tl.tensor,
    base: tl.tensor,
    row: tl.tensor,
    num_rows: tl.tensor,
    BLOCK: tl.constexpr,
    STEP: tl.constexpr,
    ALIGN: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor]:
    """Cut what the rows of a tile see into steps: masked from the first number, unmasked from the second, masked again
    from the third to the fourth.

    Because intervals do not go back, the first and the last row of the tile say what all rows see and what any sees.
    """
    last = tl.minimum(row + BLOCK, num_rows) - 1
    begin = tl.load(first_ptr + base + row) // ALIGN * ALIGN
    all_begin = tl.load(first_ptr + base + last)
    all_end = tl.load(end_ptr + base + row)
    end = tl.load(end_ptr + base + last)
    full_begin = begin + tl.cdiv(tl.maximum(all_begin - begin, 0), STEP) * STEP
    full_begin = tl.minimum(full_begin, begin + tl.cdiv(tl.maximum(end - begin, 0), STEP) * STEP)
    full_end = full_begin + tl.maximum(all_end - full_begin, 0) // STEP * STEP
    return begin, full_begin, full_end, end


@triton.jit
def bend(scores: tl.tensor, scale: tl.tensor, softcap: tl.tensor, HAS_SOFTCAP: tl.constexpr) -> tl.tensor:
    """Return tanh(scale * s / softcap) with a soft-cap, else the scores; by exp, which every backend has."""
    if HAS_SOFTCAP:
        scores = 2.0 * tl.sigmoid(scores * (2.0 * scale / softcap)) - 1.0
    return scores


@triton.jit
def keep(
    seed: tl.tensor,
    query: tl.tensor,
    key: tl.tensor,
    threshold: tl.tensor,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
) -> tl.tensor:
    """Draw which probabilities of a tile are kept, as `kernels.dropout.attention_keep_mask` does.

    Args:
        seed: of the head in its row, 64 bits.
        query: first of the tile.
        key: first of the tile, a multiple of 4.
        threshold: words below it drop.
        BLOCK_Q: queries.
        BLOCK_K: keys.

    Returns:
        bool `[BLOCK_Q, BLOCK_K]`.
    """
    group = key // 4 + tl.arange(0, BLOCK_K // 4)[None, :] + tl.zeros((BLOCK_Q, 1), dtype=tl.int32)
    row = query + tl.arange(0, BLOCK_Q)[:, None] + tl.zeros((1, BLOCK_K // 4), dtype=tl.int32)
    word0, word1, word2, word3 = tl.philox(seed, group, row, 0, 0)
    pairs = tl.join(tl.join(word0, word2), tl.join(word1, word3))  # the last axis is the quickest
    words = tl.reshape(pairs, (BLOCK_Q, BLOCK_K))
    return words >= threshold
