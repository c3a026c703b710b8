"""Where a model's parameters are and how large, without building it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from pretrain.options.config import Config
from pretrain.options.families import ModelShape
from pretrain.transformer.lora_layers import LAYERS, A, B, adapted_layers, is_adapter

Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Adapters:
    """What `train.lora` says of shapes: the rank, and which layers."""

    rank: int
    targets: tuple[str, ...]


def adapters_of(config: Config) -> Adapters | None:
    """The adapters of a config that tunes so, which are all that its run trains then; targets in a block's order."""
    lora = config.train.lora
    return None if lora is None else Adapters(lora.rank, tuple(one for one in LAYERS if one in lora.targets))


def all_shapes(shape: ModelShape, adapters: Adapters | None) -> Shapes:
    """Return the shape of every parameter of a model by its name, adapters behind the layers that they stand beside."""
    plain = parameter_shapes(shape)
    if adapters is None:
        return plain
    wanted, found = adapted_layers(adapters.targets), Shapes()
    for name, size in plain.items():
        found[name] = size
        owner, _, kind = name.rpartition(".")
        if kind == "weight" and owner.partition(".")[2].partition(".")[2] in wanted:
            if f"{owner}.bias" in plain:
                found[f"{owner}.bias"] = plain[f"{owner}.bias"]
            found |= {f"{owner}.{A}": (adapters.rank, size[1]), f"{owner}.{B}": (size[0], adapters.rank)}
    return found


def trained_shapes(shape: ModelShape, adapters: Adapters | None) -> Shapes:
    """Return the shapes of the parameters that are trained: the adapters where there are some, else all."""
    found = all_shapes(shape, adapters)
    return found if adapters is None else {name: size for name, size in found.items() if is_adapter(name)}


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


def modules_in_order(shape: ModelShape, adapters: Adapters | None = None) -> dict[str, list[int]]:
    """Return the parameters' sizes of every module that holds some, in the order in which a forward pass runs them.

    The output layer holds the embedding's weights where they are tied.
    """
    by_owner: dict[str, list[int]] = {}
    for name, size in all_shapes(shape, adapters).items():
        by_owner.setdefault(name.rpartition(".")[0], []).append(math.prod(size))
    by_owner.setdefault("output", by_owner["embedding"])
    return by_owner


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
