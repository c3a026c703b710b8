"""How each family's parameters and options are called in the published architecture.

One table per family drives both directions: `export_tensors` and `import_tensors` read the same rows, and both fail on
a tensor that no row names, so nothing is dropped or invented on the way.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pretrain.errors import ExportError
from pretrain.families import ModelShape


@dataclass(frozen=True)
class Weight:
    """One parameter of ours and the published tensors that hold it; `{i}` stands for the layer.

    Attributes:
        ours: name of our parameter.
        theirs: names of the published tensors; ours is these stacked along its first axis, in this order.
        rows: number of rows of each of them, as named in `_num_rows`; needed where there are several.
        transposed: the published matrix is [in, out], where ours is [out, in].
        vocabulary: rows are token ids; the published tensor has no padding rows.
    """

    ours: str
    theirs: tuple[str, ...]
    rows: tuple[str, ...] = ()
    transposed: bool = False
    vocabulary: bool = False


@dataclass(frozen=True)
class PublishedModel:
    """The published architecture of a family.

    Attributes:
        architecture: class in transformers.
        model_type: its `model_type` in `config.json`.
        options: key in `config.json` -> option of `ModelShape` that it holds.
        constants: keys of `config.json` that every model of the family has.
        weights: how the parameters are stored.
    """

    architecture: str
    model_type: str
    options: Mapping[str, str]
    constants: Mapping[str, Any]
    weights: tuple[Weight, ...]


def _weight_and_bias(
    ours: str, theirs: Iterable[str], rows: Iterable[str] = (), transposed: bool = False
) -> list[Weight]:
    """A linear layer or norm: its weight and, where the model has one, its bias."""
    names, rows = tuple(theirs), tuple(rows)
    return [
        Weight(f"{ours}.weight", tuple(f"{name}.weight" for name in names), rows, transposed),
        Weight(f"{ours}.bias", tuple(f"{name}.bias" for name in names), rows),
    ]


_LLAMA = PublishedModel(
    architecture="LlamaForCausalLM",
    model_type="llama",
    options={
        "vocab_size": "vocab_size",
        "hidden_size": "dim",
        "intermediate_size": "ffn_dim",
        "num_hidden_layers": "num_layers",
        "num_attention_heads": "num_heads",
        "num_key_value_heads": "num_kv_heads",
        "head_dim": "head_dim",
        "max_position_embeddings": "seq_len",
        "rms_norm_eps": "norm_eps",
        "attention_bias": "attention_bias",
        "mlp_bias": "ffn_bias",
        "tie_word_embeddings": "tie_embeddings",
        "initializer_range": "init_std",
    },
    constants={"hidden_act": "silu", "attention_dropout": 0.0, "pretraining_tp": 1, "use_cache": True},
    weights=(
        Weight("embedding.weight", ("model.embed_tokens.weight",), vocabulary=True),
        Weight("blocks.{i}.attention_norm.weight", ("model.layers.{i}.input_layernorm.weight",)),
        *_weight_and_bias(
            "blocks.{i}.attention.qkv",
            (f"model.layers.{{i}}.self_attn.{name}_proj" for name in "qkv"),
            rows=("query", "key", "key"),
        ),
        *_weight_and_bias("blocks.{i}.attention.output", ["model.layers.{i}.self_attn.o_proj"]),
        Weight("blocks.{i}.ffn_norm.weight", ("model.layers.{i}.post_attention_layernorm.weight",)),
        *_weight_and_bias(
            "blocks.{i}.ffn.gate_up",
            ["model.layers.{i}.mlp.gate_proj", "model.layers.{i}.mlp.up_proj"],
            rows=("ffn", "ffn"),
        ),
        *_weight_and_bias("blocks.{i}.ffn.down", ["model.layers.{i}.mlp.down_proj"]),
        Weight("final_norm.weight", ("model.norm.weight",)),
        Weight("output.weight", ("lm_head.weight",), vocabulary=True),
    ),
)

_GPT2 = PublishedModel(
    architecture="GPT2LMHeadModel",
    model_type="gpt2",
    options={
        "vocab_size": "vocab_size",
        "n_embd": "dim",
        "n_inner": "ffn_dim",
        "n_layer": "num_layers",
        "n_head": "num_heads",
        "n_positions": "seq_len",
        "n_ctx": "seq_len",  # llama.cpp's converter reads this one
        "layer_norm_epsilon": "norm_eps",
        "tie_word_embeddings": "tie_embeddings",
        "initializer_range": "init_std",
    },
    constants={
        "activation_function": "gelu_new",
        "attn_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "resid_pdrop": 0.0,
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False,
        "reorder_and_upcast_attn": False,
        "add_cross_attention": False,
        "use_cache": True,
    },
    weights=(
        Weight("embedding.weight", ("transformer.wte.weight",), vocabulary=True),
        Weight("position_embedding.weight", ("transformer.wpe.weight",)),
        *_weight_and_bias("blocks.{i}.attention_norm", ["transformer.h.{i}.ln_1"]),
        *_weight_and_bias("blocks.{i}.attention.qkv", ["transformer.h.{i}.attn.c_attn"], transposed=True),
        *_weight_and_bias("blocks.{i}.attention.output", ["transformer.h.{i}.attn.c_proj"], transposed=True),
        *_weight_and_bias("blocks.{i}.ffn_norm", ["transformer.h.{i}.ln_2"]),
        *_weight_and_bias("blocks.{i}.ffn.up", ["transformer.h.{i}.mlp.c_fc"], transposed=True),
        *_weight_and_bias("blocks.{i}.ffn.down", ["transformer.h.{i}.mlp.c_proj"], transposed=True),
        *_weight_and_bias("final_norm", ["transformer.ln_f"]),
        Weight("output.weight", ("lm_head.weight",), vocabulary=True),
    ),
)

PUBLISHED_MODELS: Mapping[str, PublishedModel] = {"llama": _LLAMA, "gpt2": _GPT2}


def published_config(shape: ModelShape) -> dict[str, Any]:
    """Return the keys of `config.json` that describe the model: the family's constants and the shape's options.

    RoPE's base is written twice: transformers 5 reads `rope_parameters`, transformers 4 and Ollama the key at the top,
    and each falls back to 10000 without a word where its own is missing.
    """
    family = PUBLISHED_MODELS[shape.family]
    config: dict[str, Any] = {"architectures": [family.architecture], "model_type": family.model_type}
    config |= {key: getattr(shape, option) for key, option in family.options.items()}
    config |= family.constants
    if shape.positions == "rope":
        config["rope_theta"] = shape.rope_theta
        config["rope_parameters"] = {"rope_type": "default", "rope_theta": shape.rope_theta}
    return config


def export_tensors(shape: ModelShape, parameters: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """Turn our parameters into the published tensors, one at a time.

    Args:
        shape: the model's shape.
        parameters: names and tensors of every parameter.

    Yields:
        Published name and tensor, which may be a view of the parameter.

    Raises:
        ExportError: a parameter is in no row of the family's table.
    """
    weights = _weights_of_layers(shape)
    for name, parameter in parameters:
        if name not in weights:
            raise ExportError(
                f"{name}: the parameter has no counterpart; expected one in the table of family {shape.family!r}. This "
                "model cannot be exported without loss."
            )
        weight = weights[name]
        tensor = parameter[: shape.vocab_size] if weight.vocabulary else parameter
        parts = tensor.split(_num_rows(weight, shape)) if weight.rows else [tensor]
        for published_name, part in zip(weight.theirs, parts, strict=True):
            yield published_name, part.t() if weight.transposed else part


def import_tensors(shape: ModelShape, tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Turn published tensors into our parameters, one at a time: the reverse of `export_tensors`.

    Args:
        shape: the shape of our model.
        tensors: every tensor of the published model; one that is tied to another is left out.

    Yields:
        Our name and the parameter; rows that pad the vocabulary are 0.

    Raises:
        ExportError: a tensor is in no row of the table, part of a parameter is missing, or a size does not fit.
    """
    left = dict(tensors)
    for name, weight in _weights_of_layers(shape).items():
        parts = {theirs: left.pop(theirs) for theirs in weight.theirs if theirs in left}
        if parts:  # else a bias or output layer that the model does not have
            yield name, _join(weight, parts, shape)
    if left:
        raise ExportError(
            f"{next(iter(left))}: the tensor ({len(left)} such) has no counterpart; expected only those in the table "
            f"of family {shape.family!r}. The model is of another architecture."
        )


def _join(weight: Weight, parts: Mapping[str, Tensor], shape: ModelShape) -> Tensor:
    """Put one parameter together from its published tensors."""
    num_rows = [shape.vocab_size] if weight.vocabulary else _num_rows(weight, shape)
    rows = []
    for index, name in enumerate(weight.theirs):
        if name not in parts:
            raise ExportError(f"{name}: the tensor is missing; expected it beside {next(iter(parts))}. Copy it again.")
        part = parts[name].t() if weight.transposed else parts[name]
        if num_rows and len(part) != num_rows[index]:
            raise ExportError(
                f"{name}: the tensor has {len(part)} rows; expected {num_rows[index]}. The model is of another shape "
                "than its config says."
            )
        rows.append(part)
    if weight.vocabulary:
        rows.append(rows[0].new_zeros(shape.padded_vocab_size - shape.vocab_size, shape.dim))
    return torch.cat(rows)


def _weights_of_layers(shape: ModelShape) -> dict[str, Weight]:
    """The family's table with every layer written out, by the name of our parameter."""
    weights: dict[str, Weight] = {}
    for weight in PUBLISHED_MODELS[shape.family].weights:
        for layer in range(shape.num_layers) if "{i}" in weight.ours else (0,):
            theirs = tuple(name.replace("{i}", str(layer)) for name in weight.theirs)
            ours = weight.ours.replace("{i}", str(layer))
            weights[ours] = Weight(ours, theirs, weight.rows, weight.transposed, weight.vocabulary)
    return weights


def _num_rows(weight: Weight, shape: ModelShape) -> list[int]:
    sizes = {
        "query": shape.num_heads * shape.head_dim,
        "key": shape.num_kv_heads * shape.head_dim,
        "ffn": shape.ffn_dim,
    }
    return [sizes[row] for row in weight.rows]
