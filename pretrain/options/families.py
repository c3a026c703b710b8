"""The published architectures that a model can be, and the arithmetic of a resolved one.

`FAMILIES` is data: what each family allows, its default first. A new family is a new entry.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Set
from dataclasses import dataclass
from typing import Any

from pretrain.errors import ConfigError
from pretrain.options.model_options import ModelSection, RopeScalingSection

VOCAB_MULTIPLE = 128  # padded width of embedding and output: whole tiles for the matrix units of every GPU


@dataclass(frozen=True)
class Family:
    """What one published architecture allows.

    Each tuple holds the allowed values of the option of that name, the default first.
    """

    norm: tuple[str, ...]
    activation: tuple[str, ...]
    positions: tuple[str, ...]
    attention_bias: tuple[bool | str, ...]
    ffn_bias: tuple[bool, ...]
    tie_embeddings: tuple[bool, ...]
    qk_norm: tuple[bool | str, ...] = (False,)
    grouped_heads: bool = True  # num_kv_heads may differ from num_heads
    free_head_dim: bool = False  # head_dim may differ from dim / num_heads
    partial_rope: bool = False  # rope_fraction may be less than 1
    sliding_window: bool = False
    attention_softcap: bool = False
    logit_softcap: bool = False
    json_tokenizer: bool = False  # clients take its tokenizer for a byte-level one
    exported: bool = True


FAMILIES: dict[str, Family] = {
    "llama": Family(
        norm=("rmsnorm",),
        activation=("swiglu",),
        positions=("rope",),
        attention_bias=(False, True),
        ffn_bias=(False, True),
        tie_embeddings=(False, True),
        free_head_dim=True,
    ),
    "mistral": Family(
        norm=("rmsnorm",),
        activation=("swiglu",),
        positions=("rope",),
        attention_bias=(False,),
        ffn_bias=(False,),
        tie_embeddings=(False, True),
        free_head_dim=True,
        sliding_window=True,
    ),
    "qwen2": Family(
        norm=("rmsnorm",),
        activation=("swiglu",),
        positions=("rope",),
        attention_bias=("qkv",),
        ffn_bias=(False,),
        tie_embeddings=(False, True),
        sliding_window=True,
        json_tokenizer=True,
    ),
    "qwen3": Family(
        norm=("rmsnorm",),
        activation=("swiglu",),
        positions=("rope",),
        attention_bias=(False,),  # transformers has it, and llama.cpp does not load it
        ffn_bias=(False,),
        tie_embeddings=(False, True),
        qk_norm=(True,),
        free_head_dim=True,
        sliding_window=True,
    ),
    "olmo2": Family(
        norm=("reordered_rmsnorm",),
        activation=("swiglu",),
        positions=("rope",),
        attention_bias=(False,),
        ffn_bias=(False,),
        tie_embeddings=(False,),  # transformers can tie them, and llama.cpp does not load that
        qk_norm=("full",),
    ),
    "stablelm": Family(
        norm=("layernorm",),
        activation=("swiglu",),
        positions=("rope",),
        attention_bias=(False, "qkv"),
        ffn_bias=(False,),
        tie_embeddings=(False, True),
        partial_rope=True,
    ),
    "starcoder2": Family(
        norm=("layernorm",),
        activation=("gelu",),
        positions=("rope",),
        attention_bias=(True,),  # transformers can do without biases, and llama.cpp does not load that
        ffn_bias=(True,),
        tie_embeddings=(True, False),
        sliding_window=True,
    ),
    "gpt2": Family(
        norm=("layernorm",),
        activation=("gelu",),
        positions=("learned",),
        attention_bias=(True,),
        ffn_bias=(True,),
        tie_embeddings=(True, False),
        grouped_heads=False,
    ),
    "custom": Family(
        norm=("rmsnorm", "layernorm", "reordered_rmsnorm"),
        activation=("swiglu", "gelu"),
        positions=("rope", "learned"),
        attention_bias=(False, True, "qkv"),
        ffn_bias=(False, True),
        tie_embeddings=(False, True),
        qk_norm=(False, True, "full"),
        free_head_dim=True,
        partial_rope=True,
        sliding_window=True,
        attention_softcap=True,
        logit_softcap=True,
        exported=False,
    ),
}
CHOICES = ("norm", "activation", "positions", "attention_bias", "ffn_bias", "qk_norm", "tie_embeddings")
EXTRAS = ("sliding_window", "attention_softcap", "logit_softcap")  # null, or for families that have them
FFN_RATIO = {"swiglu": (8, 3, 64), "gelu": (4, 1, 1)}  # default ffn_dim / dim as a fraction, and its multiple


@dataclass(frozen=True)
class ModelShape:
    """Every option of a model, resolved: what `Transformer` is built from."""

    family: str
    dim: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    ffn_dim: int
    norm: str
    norm_eps: float
    activation: str
    positions: str
    rope_theta: float
    rope_fraction: float
    rope_scaling: RopeScalingSection | None
    qk_norm: bool | str
    sliding_window: int | None
    attention_softcap: float | None
    logit_softcap: float | None
    attention_bias: bool | str
    ffn_bias: bool
    tie_embeddings: bool
    dropout: float
    attention_dropout: float
    init_std: float
    vocab_size: int
    padded_vocab_size: int
    seq_len: int

    @property
    def rope_dim(self) -> int:
        """Dimensions of a head that RoPE turns."""
        return int(self.head_dim * self.rope_fraction)


def resolve_shape(model: ModelSection, vocab_size: int, seq_len: int) -> ModelShape:
    """Fill in the family's values and check that the family takes every option that is set.

    Args:
        model: the options as configured.
        vocab_size: token ids of the tokenizer.
        seq_len: tokens in a row, which is also the number of learned positions.

    Returns:
        The shape, with `vocab_size` padded to a multiple of 128 in `padded_vocab_size`.

    Raises:
        ConfigError: one line for every option that the family does not take or that does not fit the others.
    """
    family = FAMILIES[model.family]
    chosen: dict[str, Any] = {name: getattr(model, name) for name in CHOICES}
    chosen |= {name: getattr(family, name)[0] for name, value in chosen.items() if value is None}
    head_dim = model.head_dim or model.dim // model.num_heads
    wanted = chosen | {name: getattr(model, name) for name in ("dim", "num_heads", "rope_fraction", *EXTRAS)}
    wanted |= {"num_kv_heads": model.num_kv_heads or model.num_heads, "head_dim": head_dim}
    given = {name for name in wanted if getattr(model, name) is not None}
    problems = [
        f"model.{name} is {_text(wanted[name])}; expected {expected} for family {model.family}. Remove model.{name}, "
        f"or use {_nearest_with(name, wanted, given)}."
        for name, expected in _refused(family, wanted).items()
    ]
    problems += _head_problems(model, family, chosen["positions"])
    problems += _position_problems(model, wanted, given, seq_len)
    if problems:
        raise ConfigError("\n".join(problems))
    above, below, multiple = FFN_RATIO[chosen["activation"]]
    ffn_dim = model.ffn_dim or _round_up(_round_up(model.dim * above, below) // below, multiple)
    return ModelShape(
        family=model.family,
        num_layers=model.num_layers,
        ffn_dim=ffn_dim,
        norm_eps=model.norm_eps,
        rope_theta=model.rope_theta,
        rope_scaling=model.rope_scaling,
        dropout=model.dropout,
        attention_dropout=model.attention_dropout,
        init_std=model.init_std,
        vocab_size=vocab_size,
        padded_vocab_size=_round_up(vocab_size, VOCAB_MULTIPLE),
        seq_len=seq_len,
        **wanted,
    )


def nearest_exported(shape: ModelShape) -> tuple[str, list[str]]:
    """Find the exported family that a model differs least from.

    Returns:
        Its name, and each difference: `model.norm is layernorm (llama: rmsnorm)`.
    """
    wanted = vars(shape)
    exported = [name for name in FAMILIES if FAMILIES[name].exported]
    name = min(exported, key=lambda name: len(_refused(FAMILIES[name], wanted)))
    refused = _refused(FAMILIES[name], wanted)
    return name, [f"model.{key} is {_text(wanted[key])} ({name}: {expected})" for key, expected in refused.items()]


def num_parameters(shape: ModelShape) -> int:
    """Count the parameters of the model, the padding of the vocabulary included."""
    norm = shape.dim * (2 if shape.norm == "layernorm" else 1)
    qkv_outputs = (shape.num_heads + 2 * shape.num_kv_heads) * shape.head_dim
    up_outputs = shape.ffn_dim * (2 if shape.activation == "swiglu" else 1)
    block = _block_matrices(shape) + 2 * norm
    block += qkv_outputs if shape.attention_bias is not False else 0
    block += shape.dim if shape.attention_bias is True else 0
    heads = shape.num_heads + shape.num_kv_heads if shape.qk_norm == "full" else 2
    block += heads * shape.head_dim if shape.qk_norm else 0
    block += up_outputs + shape.dim if shape.ffn_bias else 0
    embeddings = shape.padded_vocab_size * shape.dim * (1 if shape.tie_embeddings else 2)
    embeddings += shape.seq_len * shape.dim if shape.positions == "learned" else 0
    return embeddings + shape.num_layers * block + norm


def flops_per_token(shape: ModelShape, causal: bool, frozen: bool = False) -> float:
    """Floating-point operations that training spends on one token, forward and backward.

    6 per weight that is multiplied (2 forward, 4 backward) and 12 L H C T for attention's two products. The
    embedding is looked up, not multiplied, and does not count; the output layer does, tied or not, without
    the padding of the vocabulary. Norms, biases and activations do not count, nor does recomputation. A sliding
    window is ignored, by the same convention, although it leaves less to compute.

    Args:
        shape: the model.
        causal: count only the half of attention that a causal mask leaves: 6 L H C T.
        frozen: the weights have no gradients, 4 per weight; small adapters beside them do not count.

    Source: Chowdhery et al. 2022 (PaLM), appendix B.
    """
    matrices = shape.num_layers * _block_matrices(shape) + shape.vocab_size * shape.dim
    attention = 12 * shape.num_layers * shape.num_heads * shape.head_dim * shape.seq_len
    return (4.0 if frozen else 6.0) * matrices + (attention / 2 if causal else float(attention))


def _block_matrices(shape: ModelShape) -> int:
    heads = 2 * shape.num_heads + 2 * shape.num_kv_heads  # queries and output, keys and values
    ffn = 3 if shape.activation == "swiglu" else 2
    return shape.dim * (heads * shape.head_dim + ffn * shape.ffn_dim)


def _refused(family: Family, wanted: Mapping[str, Any]) -> dict[str, str]:
    """Return the options whose values a family does not take, each with what it takes instead."""
    refused = {
        name: " or ".join(_text(value) for value in getattr(family, name))
        for name in CHOICES
        if wanted[name] not in getattr(family, name)
    }
    width = wanted["dim"] // wanted["num_heads"]
    if not family.free_head_dim and wanted["head_dim"] != width:
        refused["head_dim"] = f"dim / num_heads ({width})"
    if not family.grouped_heads and wanted["num_kv_heads"] != wanted["num_heads"]:
        refused["num_kv_heads"] = f"num_heads ({wanted['num_heads']})"
    if not family.partial_rope and wanted["positions"] == "rope" and wanted["rope_fraction"] != 1:
        refused["rope_fraction"] = "1"
    return refused | {name: "null" for name in EXTRAS if wanted[name] is not None and not getattr(family, name)}


def _nearest_with(option: str, wanted: Mapping[str, Any], given: Set[str]) -> str:
    """Name the family that takes an option's value and the most of the others, above all of those that were given.

    An exported one, if there is one.
    """
    refused = {name: _refused(family, wanted) for name, family in FAMILIES.items()}
    takers = [name for name in FAMILIES if option not in refused[name]]
    nearest = min(
        takers, key=lambda name: (not FAMILIES[name].exported, len(refused[name].keys() & given), len(refused[name]))
    )
    return f"model.family {nearest}" + ("" if FAMILIES[nearest].exported else ", which is not exported")


def _head_problems(model: ModelSection, family: Family, positions: str) -> Iterator[str]:
    """Check that the numbers of heads and their width divide as they must."""
    dim, num_heads, num_kv_heads = model.dim, model.num_heads, model.num_kv_heads
    head_dim = model.head_dim or dim // num_heads
    if dim % num_heads and (model.head_dim is None or not family.free_head_dim):
        low = dim // num_heads * num_heads
        fix = f"Use {low} or {low + num_heads}" if low else f"Use {num_heads}"
        yield f"model.dim is {dim}; expected a multiple of model.num_heads ({num_heads}). {fix}."
    elif positions == "rope" and head_dim % 2:
        name = "model.head_dim" if model.head_dim else "dim / num_heads"
        near = f"{head_dim - 1} or {head_dim + 1}" if head_dim > 1 else "2"
        yield f"{name} is {head_dim}; expected an even number for positions rope. Set model.head_dim to {near}."
    elif positions == "rope" and ((turned := int(head_dim * model.rope_fraction)) < 2 or turned % 2):
        yield (
            f"model.rope_fraction is {model.rope_fraction:g}, which is {turned} of {head_dim} dimensions; expected an "
            f"even number, at least 2. Use {max(turned // 2 * 2, 2) / head_dim:g}."
        )
    if family.grouped_heads and num_kv_heads is not None and num_heads % num_kv_heads:
        near = " or ".join(str(n) for n in _nearest_divisors(num_heads, num_kv_heads))
        wanted = f"a divisor of model.num_heads ({num_heads})"
        yield f"model.num_kv_heads is {num_kv_heads}; expected {wanted}. Use {near}."


def _position_problems(model: ModelSection, wanted: Mapping[str, Any], given: Set[str], seq_len: int) -> Iterator[str]:
    """Check the options of RoPE and the window against the kind of positions and the length of rows."""
    # Compared with the default, not looked up in model_fields_set: the config.yaml of a run folder sets every field.
    for name in ("rope_theta", "rope_fraction", "rope_scaling"):
        value = getattr(model, name)
        if wanted["positions"] != "rope" and value != ModelSection.model_fields[name].default:
            text = value.type if isinstance(value, RopeScalingSection) else _text(value)
            fit = _nearest_with("positions", {**wanted, "positions": "rope"}, given)
            yield (
                f"model.{name} is {text}; expected no value for positions {wanted['positions']}, where it does "
                f"nothing. Remove model.{name}, or use {fit}."
            )
    if model.sliding_window is not None and model.sliding_window >= seq_len:
        yield (
            f"model.sliding_window is {model.sliding_window}; expected less than data.seq_len ({seq_len}), because "
            "a row has no more. Remove model.sliding_window."
        )
    if wanted["positions"] == "rope" and model.rope_scaling is not None:
        yield from _scaling_problems(model.rope_scaling, seq_len, FAMILIES[model.family].exported)


def _scaling_problems(scaling: RopeScalingSection, seq_len: int, exported: bool) -> Iterator[str]:
    """Check the options of `model.rope_scaling` against each other and the length of rows."""
    where, original = "model.rope_scaling", scaling.original_seq_len
    if scaling.type == "linear":
        return
    if original is None:
        yield (
            f"{where}.original_seq_len is null; expected the data.seq_len before scaling, for {scaling.type}. Set it, "
            f"for example to {max(int(seq_len / scaling.factor), 1)}."
        )
    elif scaling.type == "yarn" and exported and original >= seq_len:
        yield f"{where}.original_seq_len is {original}; expected less than data.seq_len ({seq_len}). Lower it."
    elif scaling.type == "yarn" and exported and scaling.factor != (ratio := seq_len / original):
        yield (
            f"{where}.factor is {scaling.factor}; expected data.seq_len / original_seq_len ({ratio}), which some "
            f"versions of transformers 4 take for it. Use {ratio}, or model.family custom."
        )
    for low, high, kind in (("low_freq_factor", "high_freq_factor", "llama3"), ("beta_slow", "beta_fast", "yarn")):
        least, value = getattr(scaling, low), getattr(scaling, high)
        if scaling.type == kind and not value > least:
            yield f"{where}.{high} is {value:g}; expected more than {low} ({least:g}). Use {4 * least:g}."


def _nearest_divisors(number: int, wanted: int) -> list[int]:
    divisors = [n for n in range(1, number + 1) if number % n == 0]
    below, above = [n for n in divisors if n < wanted], [n for n in divisors if n > wanted]
    return below[-1:] + above[:1]


def _text(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else f"{value:g}" if isinstance(value, float) else str(value)


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
