"""Where a model's parameters are and how large, without building it."""

from __future__ import annotations

import math
from collections.abc import Iterator

from pretrain.options.families import ModelShape

Shapes = dict[str, tuple[int, ...]]


def parameter_shapes(shape: ModelShape) -> Shapes:
    """Return the shape of every parameter by its name, in the order that `Transformer` has them in."""
    found: Shapes = {"embedding.weight": (shape.padded_vocab_size, shape.dim)}
    if shape.positions == "learned":
        found["position_embedding.weight"] = (shape.seq_len, shape.dim)
    for index in range(shape.num_layers):
        found |= {f"blocks.{index}.{name}": size for name, size in _block(shape)}
    found |= dict(_norm("final_norm", shape))
    if not shape.tie_embeddings:
        found["output.weight"] = (shape.padded_vocab_size, shape.dim)
    return found


def modules_in_order(shape: ModelShape) -> list[list[int]]:
    """Return the parameters' sizes of every module that holds some, in the order in which a forward pass runs them.

    The output layer holds the embedding's weights where they are tied.
    """
    by_owner: dict[str, list[int]] = {}
    for name, size in parameter_shapes(shape).items():
        by_owner.setdefault(name.rpartition(".")[0], []).append(math.prod(size))
    by_owner.setdefault("output", by_owner["embedding"])
    return list(by_owner.values())


def hidden_matrices(shape: ModelShape) -> list[list[tuple[int, int]]]:
    """Return rows and columns of the matrices between hidden states, those that are stored as one weight together.

    Queries, keys and values are stored so, and gate and up.
    """
    width, D, F = shape.head_dim, shape.dim, shape.ffn_dim
    qkv = [(heads * width, D) for heads in (shape.num_heads, shape.num_kv_heads, shape.num_kv_heads)]
    up = [(F, D)] * (2 if shape.activation == "swiglu" else 1)
    return [qkv, [(D, shape.num_heads * width)], up, [(D, F)]] * shape.num_layers


def _norm(name: str, shape: ModelShape) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield f"{name}.weight", (shape.dim,)
    if shape.norm == "layernorm":
        yield f"{name}.bias", (shape.dim,)


def _linear(name: str, rows: int, cols: int, bias: bool) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield f"{name}.weight", (rows, cols)
    if bias:
        yield f"{name}.bias", (rows,)


def _block(shape: ModelShape) -> Iterator[tuple[str, tuple[int, ...]]]:
    width, heads = shape.head_dim, shape.num_heads
    yield from _norm("attention_norm", shape)
    yield from _linear(
        "attention.qkv", (heads + 2 * shape.num_kv_heads) * width, shape.dim, shape.attention_bias is not False
    )
    if shape.qk_norm:
        q_heads, k_heads = (heads, shape.num_kv_heads) if shape.qk_norm == "full" else (1, 1)
        yield "attention.q_norm.weight", (q_heads * width,)
        yield "attention.k_norm.weight", (k_heads * width,)
    yield from _linear("attention.output", shape.dim, heads * width, shape.attention_bias is True)
    yield from _norm("ffn_norm", shape)
    if shape.activation == "swiglu":
        yield from _linear("ffn.gate_up", 2 * shape.ffn_dim, shape.dim, shape.ffn_bias)
    else:
        yield from _linear("ffn.up", shape.ffn_dim, shape.dim, shape.ffn_bias)
    yield from _linear("ffn.down", shape.dim, shape.ffn_dim, shape.ffn_bias)
