"""The families as llama.cpp calls them: architectures, keys and tensors of GGUF, in tables beside `published.py`.

Source: llama.cpp's `src/models/*.cpp` (what each architecture reads and computes) and `src/llama-model.cpp` (the keys),
as vendored in llama-cpp-python 0.3.36; gguf's `constants.py` (their names).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from kernels.rope import RopeScaling, rope_frequencies
from pretrain.errors import ExportError
from pretrain.options.families import ModelShape


@dataclass(frozen=True)
class GgufModel:
    """A family in GGUF.

    Attributes:
        architecture: llama.cpp's name of it.
        norm_key: key of the norms' epsilon.
        keys: further keys behind the architecture's name -> option of `ModelShape`.
        constants: further keys that every model of the family has.
        names: our parameter -> the tensors that hold it, stacked along its first axis; `{i}` stands for the layer.
        interleaved: queries and keys are rotated as neighbouring pairs: their rows are reordered.
        needs_output: a tied model must bring its output layer all the same.
        rope_scaling: kinds of `model.rope_scaling` that the architecture computes.
        refused: options that it loads without computing them -> what it does instead.
    """

    architecture: str
    norm_key: str
    names: Mapping[str, tuple[str, ...]]
    keys: Mapping[str, str] = field(default_factory=dict)
    constants: Mapping[str, Any] = field(default_factory=dict)
    interleaved: bool = False
    needs_output: bool = False
    rope_scaling: tuple[str, ...] = ("linear", "yarn")
    refused: Mapping[str, str] = field(default_factory=dict)


_RMS, _LAYER = "attention.layer_norm_rms_epsilon", "attention.layer_norm_epsilon"
_HEADS = {"attention.key_length": "head_dim", "attention.value_length": "head_dim"}
_NO_WINDOW = {"sliding_window": "attends to all tokens before each one"}
_NAMES: dict[str, tuple[str, ...]] = {
    "embedding": ("token_embd",),
    "blocks.{i}.attention_norm": ("blk.{i}.attn_norm",),
    "blocks.{i}.attention.qkv": ("blk.{i}.attn_q", "blk.{i}.attn_k", "blk.{i}.attn_v"),
    "blocks.{i}.attention.output": ("blk.{i}.attn_output",),
    "blocks.{i}.ffn_norm": ("blk.{i}.ffn_norm",),
    "blocks.{i}.ffn.down": ("blk.{i}.ffn_down",),
    "final_norm": ("output_norm",),
    "output": ("output",),
}
_GATED = {"blocks.{i}.ffn.gate_up": ("blk.{i}.ffn_gate", "blk.{i}.ffn_up")}
_FUSED_QKV = {"blocks.{i}.attention.qkv": ("blk.{i}.attn_qkv",)}
_UNGATED = {"blocks.{i}.ffn.up": ("blk.{i}.ffn_up",)}
_QK_NORMS = {
    "blocks.{i}.attention.q_norm": ("blk.{i}.attn_q_norm",),
    "blocks.{i}.attention.k_norm": ("blk.{i}.attn_k_norm",),
}
_BEHIND = {  # norms of what a sublayer adds
    "blocks.{i}.attention_norm": ("blk.{i}.post_attention_norm",),
    "blocks.{i}.ffn_norm": ("blk.{i}.post_ffw_norm",),
}

GGUF_MODELS: Mapping[str, GgufModel] = {
    "llama": GgufModel(
        "llama", _RMS, _NAMES | _GATED, keys=_HEADS | {"vocab_size": "vocab_size"}, interleaved=True,
        rope_scaling=("linear", "llama3", "yarn"),
    ),
    "qwen3": GgufModel("qwen3", _RMS, _NAMES | _GATED | _QK_NORMS, keys=_HEADS, refused=_NO_WINDOW),
    "stablelm": GgufModel(
        "stablelm", _LAYER, _NAMES | _GATED, constants={"use_parallel_residual": False}, needs_output=True
    ),
    "mistral": GgufModel(
        "llama", _RMS, _NAMES | _GATED, keys=_HEADS | {"vocab_size": "vocab_size"}, interleaved=True,
        rope_scaling=("linear", "llama3", "yarn"), refused=_NO_WINDOW,
    ),
    "qwen2": GgufModel("qwen2", _RMS, _NAMES | _GATED, refused=_NO_WINDOW),
    "olmo2": GgufModel("olmo2", _RMS, _NAMES | _GATED | _QK_NORMS | _BEHIND),
    "starcoder2": GgufModel("starcoder2", _LAYER, _NAMES | _UNGATED, refused=_NO_WINDOW),
    "gpt2": GgufModel(
        "gpt2",
        _LAYER,
        _NAMES | _UNGATED | _FUSED_QKV | {"position_embedding": ("position_embd",)},
    ),
}  # fmt: skip
_ALWAYS_FP32 = ("position_embd.weight", "rope_freqs.weight")


def check_gguf(shape: ModelShape, where: str) -> None:
    """Refuse a model that llama.cpp would load and compute wrongly.

    Args:
        shape: the model's shape.
        where: the run, for the message.

    Raises:
        ExportError: naming the option and what llama.cpp does with it.
    """
    family = GGUF_MODELS.get(shape.family)
    if family is None:
        raise ExportError(
            f"{where}: model.family is {shape.family}; expected one that is exported to GGUF: "
            f"{', '.join(GGUF_MODELS)}. Export to Hugging Face's format (--to hf)."
        )
    scaling = shape.rope_scaling
    problem = ""
    for option, does in family.refused.items():
        if (value := getattr(shape, option)) is not None:
            problem = f"model.{option} is {value}; expected null, because llama.cpp's {family.architecture} {does}"
    if scaling is not None and scaling.type not in family.rope_scaling:
        problem = (
            f"model.rope_scaling.type is {scaling.type}; expected {' or '.join(family.rope_scaling)}, because "
            f"llama.cpp's {family.architecture} does not read the factors of {scaling.type}"
        )
    if problem:
        raise ExportError(f"{where}: {problem}. Export to Hugging Face's format (--to hf).")


def gguf_keys(shape: ModelShape) -> dict[str, Any]:
    """Return the keys that describe the model, with the architecture's name before them: counts, floats, texts."""
    family = GGUF_MODELS[shape.family]
    keys: dict[str, Any] = {
        "context_length": shape.seq_len,
        "embedding_length": shape.dim,
        "block_count": shape.num_layers,
        "feed_forward_length": shape.ffn_dim,
        "attention.head_count": shape.num_heads,
        "attention.head_count_kv": shape.num_kv_heads,
        family.norm_key: float(shape.norm_eps),
    }
    keys |= {key: getattr(shape, option) for key, option in family.keys.items()} | dict(family.constants)
    if shape.positions == "rope":
        keys |= {"rope.dimension_count": shape.rope_dim, "rope.freq_base": float(shape.rope_theta)}
    if (scaling := shape.rope_scaling) is not None and scaling.type != "llama3":  # whose factors are a tensor
        keys |= {"rope.scaling.type": scaling.type, "rope.scaling.factor": float(scaling.factor)}
        if scaling.type == "yarn":
            keys |= {
                "rope.scaling.original_context_length": scaling.original_seq_len,
                "rope.scaling.yarn_beta_fast": float(scaling.beta_fast),
                "rope.scaling.yarn_beta_slow": float(scaling.beta_slow),
            }
            if scaling.attention_factor is not None:  # over what llama.cpp computes by itself
                own = dataclasses.replace(_scaling(shape), attention_factor=None)
                _, magnitude = rope_frequencies(shape.rope_dim, shape.rope_theta, own)
                keys["rope.scaling.attn_factor"] = scaling.attention_factor / magnitude
    return {f"{family.architecture}.{key}": value for key, value in keys.items()}


def gguf_tensors(shape: ModelShape, parameters: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """Turn our parameters into GGUF's tensors, one at a time.

    Args:
        shape: the model's shape.
        parameters: names and tensors of parameters.

    Yields:
        Name and tensor, which may be a view of the parameter.

    Raises:
        ExportError: a parameter is in no row of the family's table.
    """
    family = GGUF_MODELS[shape.family]
    for name, parameter in parameters:
        names = _names_of(family, name)
        tensor = parameter[: shape.vocab_size] if name in ("embedding.weight", "output.weight") else parameter
        parts = tensor.split(_num_rows(shape, names)) if len(names) > 1 else [tensor]
        for theirs, part in zip(names, parts, strict=True):
            yield theirs, _reorder(part, shape.head_dim, "interleave") if _is_rotated(family, theirs) else part
        if name == "embedding.weight" and shape.tie_embeddings and family.needs_output:
            yield "output.weight", tensor


def parameters_of(shape: ModelShape, tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Turn GGUF's tensors into our parameters, one at a time, without the padding of the vocabulary.

    Raises:
        ExportError: a tensor is in no row of the family's table, or part of a parameter is missing.
    """
    family, left = GGUF_MODELS[shape.family], dict(tensors)
    left.pop("rope_freqs.weight", None)
    if shape.tie_embeddings and family.needs_output:
        left.pop("output.weight", None)
    for pattern in family.names:
        for layer in range(shape.num_layers) if "{i}" in pattern else (0,):
            for kind in ("weight", "bias"):
                ours = f"{pattern.replace('{i}', str(layer))}.{kind}"
                names = [one for one in _names_of(family, ours) if one in left]
                if not names:  # a bias or output layer that the model does not have
                    continue
                parts = [left.pop(one) for one in names]
                parts = [_reorder(part, shape.head_dim, "half") if _is_rotated(family, one) else part
                         for one, part in zip(names, parts, strict=True)]  # fmt: skip
                yield ours, torch.cat(parts) if len(parts) > 1 else parts[0]
    if left:
        raise ExportError(
            f"{next(iter(left))}: the tensor ({len(left)} such) has no counterpart; expected only those of "
            f"family {shape.family!r}."
        )


def extra_tensors(shape: ModelShape) -> dict[str, Tensor]:
    """Return tensors that are no parameters: what divides each frequency of RoPE, where it is scaled as Llama 3's."""
    if shape.rope_scaling is None or shape.rope_scaling.type != "llama3":
        return {}
    plain, _ = rope_frequencies(shape.head_dim, shape.rope_theta, None)
    scaled, _ = rope_frequencies(shape.head_dim, shape.rope_theta, _scaling(shape))
    return {"rope_freqs.weight": plain / scaled}


def is_always_fp32(name: str, tensor: Tensor) -> bool:
    """Whether a tensor is kept in fp32 whatever the precision of the file: vectors, and what llama.cpp adds as fp32."""
    return tensor.dim() == 1 or name in _ALWAYS_FP32


def _scaling(shape: ModelShape) -> RopeScaling:
    assert shape.rope_scaling is not None
    return RopeScaling(**shape.rope_scaling.model_dump())


def _names_of(family: GgufModel, parameter: str) -> list[str]:
    """The tensors that hold a parameter, which is called by its layer's number."""
    owner, _, kind = parameter.rpartition(".")
    words = owner.split(".")
    layer = words[1] if words[0] == "blocks" else ""
    pattern = ".".join(["blocks", "{i}", *words[2:]]) if layer else owner
    if pattern not in family.names:
        raise ExportError(
            f"{parameter}: the parameter has no counterpart; expected one in llama.cpp's {family.architecture}. This "
            "model cannot be exported to GGUF without loss."
        )
    return [f"{name.replace('{i}', layer)}.{kind}" for name in family.names[pattern]]


def _num_rows(shape: ModelShape, names: list[str]) -> list[int]:
    key = shape.num_kv_heads * shape.head_dim
    sizes = {"attn_q": shape.num_heads * shape.head_dim, "attn_k": key, "attn_v": key}
    return [sizes.get(name.split(".")[2], shape.ffn_dim) for name in names]


def _is_rotated(family: GgufModel, name: str) -> bool:
    return family.interleaved and name.split(".")[-2] in ("attn_q", "attn_k")


def _reorder(rows: Tensor, head_dim: int, order: str) -> Tensor:
    """Reorder the rows of each head between RoPE's two layouts: pairs (i, i + C/2) and pairs (2i, 2i + 1)."""
    first, second = (2, head_dim // 2) if order == "interleave" else (head_dim // 2, 2)
    return rows.view(-1, first, second, *rows.shape[1:]).transpose(1, 2).reshape(rows.shape)
