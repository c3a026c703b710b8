"""The published architectures that families are exported as: how their parameters and options are called.

One table per family: a new family is a new table here and a new entry in `families.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from pretrain.options.families import ModelShape


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
        derived: key in `config.json` -> what it holds, where that is no option as it is.
        ignored: options that clients load without honouring them, with the clients' names.
    """

    architecture: str
    model_type: str
    options: Mapping[str, str]
    constants: Mapping[str, Any]
    weights: tuple[Weight, ...]
    derived: Mapping[str, Callable[[ModelShape], Any]] = field(default_factory=dict)
    ignored: Mapping[str, str] = field(default_factory=dict)


def _weight_and_bias(
    ours: str, theirs: Iterable[str], rows: Iterable[str] = (), transposed: bool = False
) -> list[Weight]:
    """A linear layer or norm: its weight and, where the model has one, its bias."""
    names, rows = tuple(theirs), tuple(rows)
    return [
        Weight(f"{ours}.weight", tuple(f"{name}.weight" for name in names), rows, transposed),
        Weight(f"{ours}.bias", tuple(f"{name}.bias" for name in names), rows),
    ]


_EMBEDDING = Weight("embedding.weight", ("model.embed_tokens.weight",), vocabulary=True)
_OUTPUT = Weight("output.weight", ("lm_head.weight",), vocabulary=True)
_ATTENTION = (
    *_weight_and_bias(
        "blocks.{i}.attention.qkv",
        (f"model.layers.{{i}}.self_attn.{name}_proj" for name in "qkv"),
        rows=("query", "key", "key"),
    ),
    *_weight_and_bias("blocks.{i}.attention.output", ["model.layers.{i}.self_attn.o_proj"]),
)
_NORMS = (
    *_weight_and_bias("blocks.{i}.attention_norm", ["model.layers.{i}.input_layernorm"]),
    *_weight_and_bias("blocks.{i}.ffn_norm", ["model.layers.{i}.post_attention_layernorm"]),
    *_weight_and_bias("final_norm", ["model.norm"]),
)
_SWIGLU = (
    *_weight_and_bias(
        "blocks.{i}.ffn.gate_up",
        ["model.layers.{i}.mlp.gate_proj", "model.layers.{i}.mlp.up_proj"],
        rows=("ffn", "ffn"),
    ),
    *_weight_and_bias("blocks.{i}.ffn.down", ["model.layers.{i}.mlp.down_proj"]),
)
_SIZES = {  # the keys that most families share
    "vocab_size": "vocab_size",
    "hidden_size": "dim",
    "intermediate_size": "ffn_dim",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_heads",
    "num_key_value_heads": "num_kv_heads",
    "max_position_embeddings": "seq_len",
    "tie_word_embeddings": "tie_embeddings",
    "initializer_range": "init_std",
}

_LLAMA = PublishedModel(
    architecture="LlamaForCausalLM",
    model_type="llama",
    options=_SIZES
    | {
        "head_dim": "head_dim",
        "rms_norm_eps": "norm_eps",
        "attention_bias": "attention_bias",
        "mlp_bias": "ffn_bias",
    },
    constants={"hidden_act": "silu", "attention_dropout": 0.0, "pretraining_tp": 1, "use_cache": True},
    weights=(_EMBEDDING, *_ATTENTION, *_NORMS, *_SWIGLU, _OUTPUT),
)

_MISTRAL = PublishedModel(
    architecture="MistralForCausalLM",
    model_type="mistral",
    options=_SIZES | {"head_dim": "head_dim", "rms_norm_eps": "norm_eps", "sliding_window": "sliding_window"},
    constants={"hidden_act": "silu", "attention_dropout": 0.0, "use_cache": True},
    weights=(_EMBEDDING, *_ATTENTION, *_NORMS, *_SWIGLU, _OUTPUT),
    ignored={"sliding_window": "llama.cpp"},
)

_WINDOW_IN_ALL_LAYERS: Mapping[str, Callable[[ModelShape], Any]] = {  # or in none
    "use_sliding_window": lambda shape: shape.sliding_window is not None,
    "max_window_layers": lambda shape: shape.num_layers if shape.sliding_window is None else 0,
    "layer_types": lambda shape: (
        ["full_attention" if shape.sliding_window is None else "sliding_attention"] * shape.num_layers
    ),
}

_QWEN2 = PublishedModel(
    architecture="Qwen2ForCausalLM",
    model_type="qwen2",
    options=_SIZES | {"rms_norm_eps": "norm_eps", "sliding_window": "sliding_window"},
    constants={"hidden_act": "silu", "attention_dropout": 0.0, "use_cache": True},
    weights=(_EMBEDDING, *_ATTENTION, *_NORMS, *_SWIGLU, _OUTPUT),
    derived=_WINDOW_IN_ALL_LAYERS,
    ignored={"sliding_window": "llama.cpp"},
)

_QK_NORM = (
    Weight("blocks.{i}.attention.q_norm.weight", ("model.layers.{i}.self_attn.q_norm.weight",)),
    Weight("blocks.{i}.attention.k_norm.weight", ("model.layers.{i}.self_attn.k_norm.weight",)),
)

_QWEN3 = PublishedModel(
    architecture="Qwen3ForCausalLM",
    model_type="qwen3",
    options=_SIZES
    | {
        "head_dim": "head_dim",
        "rms_norm_eps": "norm_eps",
        "attention_bias": "attention_bias",
        "sliding_window": "sliding_window",
    },
    constants={"hidden_act": "silu", "attention_dropout": 0.0, "use_cache": True},
    weights=(
        _EMBEDDING,
        *_ATTENTION,
        *_QK_NORM,
        *_NORMS,
        *_SWIGLU,
        _OUTPUT,
    ),
    derived=_WINDOW_IN_ALL_LAYERS,
    ignored={"sliding_window": "llama.cpp"},
)

_OLMO2 = PublishedModel(
    architecture="Olmo2ForCausalLM",
    model_type="olmo2",
    options=_SIZES | {"rms_norm_eps": "norm_eps", "attention_bias": "attention_bias"},
    constants={"hidden_act": "silu", "attention_dropout": 0.0, "use_cache": True},
    weights=(
        _EMBEDDING,
        *_ATTENTION,
        *_QK_NORM,
        Weight("blocks.{i}.attention_norm.weight", ("model.layers.{i}.post_attention_layernorm.weight",)),
        Weight("blocks.{i}.ffn_norm.weight", ("model.layers.{i}.post_feedforward_layernorm.weight",)),
        Weight("final_norm.weight", ("model.norm.weight",)),
        *_SWIGLU,
        _OUTPUT,
    ),
)

_STABLELM = PublishedModel(
    architecture="StableLmForCausalLM",
    model_type="stablelm",
    options=_SIZES | {"layer_norm_eps": "norm_eps", "partial_rotary_factor": "rope_fraction"},
    constants={
        "hidden_act": "silu",
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        "use_parallel_residual": False,
        "qk_layernorm": False,
        "use_cache": True,
    },
    weights=(_EMBEDDING, *_ATTENTION, *_NORMS, *_SWIGLU, _OUTPUT),
    derived={"use_qkv_bias": lambda shape: shape.attention_bias == "qkv"},
)

_STARCODER2 = PublishedModel(
    architecture="Starcoder2ForCausalLM",
    model_type="starcoder2",
    options=_SIZES | {"norm_epsilon": "norm_eps", "use_bias": "ffn_bias", "sliding_window": "sliding_window"},
    constants={
        "hidden_act": "gelu_pytorch_tanh",
        "attention_dropout": 0.0,
        "embedding_dropout": 0.0,
        "residual_dropout": 0.0,
        "use_cache": True,
    },
    weights=(
        _EMBEDDING,
        *_ATTENTION,
        *_NORMS,
        *_weight_and_bias("blocks.{i}.ffn.up", ["model.layers.{i}.mlp.c_fc"]),
        *_weight_and_bias("blocks.{i}.ffn.down", ["model.layers.{i}.mlp.c_proj"]),
        _OUTPUT,
    ),
    ignored={"sliding_window": "llama.cpp"},
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
        _OUTPUT,
    ),
)

ROPE_SCALING: Mapping[str, Mapping[str, str]] = {  # key in `rope_scaling` -> option of `model.rope_scaling`, by type
    "linear": {"factor": "factor"},
    "llama3": {
        "factor": "factor",
        "original_max_position_embeddings": "original_seq_len",
        "low_freq_factor": "low_freq_factor",
        "high_freq_factor": "high_freq_factor",
    },
    "yarn": {
        "factor": "factor",
        "original_max_position_embeddings": "original_seq_len",
        "beta_fast": "beta_fast",
        "beta_slow": "beta_slow",
        "attention_factor": "attention_factor",
    },
}

PUBLISHED_MODELS: Mapping[str, PublishedModel] = {
    "llama": _LLAMA,
    "mistral": _MISTRAL,
    "qwen2": _QWEN2,
    "qwen3": _QWEN3,
    "olmo2": _OLMO2,
    "stablelm": _STABLELM,
    "starcoder2": _STARCODER2,
    "gpt2": _GPT2,
}
