"""The published architectures that a model can be, and the arithmetic of a resolved one.

`FAMILIES` is data: what each family allows, its default first. A new family is a new entry.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pretrain.config import ModelSection
from pretrain.errors import ConfigError

VOCAB_MULTIPLE = 128  # padded width of embedding and output: whole tiles for the matrix units of every GPU


@dataclass(frozen=True)
class Family:
    """What one published architecture allows.

    Each tuple holds the allowed values of the option of that name, the default first.
    """

    norm: tuple[str, ...]
    activation: tuple[str, ...]
    positions: tuple[str, ...]
    attention_bias: tuple[bool, ...]
    ffn_bias: tuple[bool, ...]
    tie_embeddings: tuple[bool, ...]
    grouped_heads: bool  # num_kv_heads may differ from num_heads
    free_head_dim: bool  # head_dim may differ from dim / num_heads
    ffn_ratio: tuple[int, int]  # default ffn_dim / dim, as a fraction
    ffn_multiple: int  # the default ffn_dim is rounded up to a multiple of this


FAMILIES: dict[str, Family] = {
    "llama": Family(
        norm=("rmsnorm",),
        activation=("swiglu",),
        positions=("rope",),
        attention_bias=(False, True),
        ffn_bias=(False, True),
        tie_embeddings=(False, True),
        grouped_heads=True,
        free_head_dim=True,
        ffn_ratio=(8, 3),
        ffn_multiple=64,
    ),
    "gpt2": Family(
        norm=("layernorm",),
        activation=("gelu",),
        positions=("learned",),
        attention_bias=(True,),
        ffn_bias=(True,),
        tie_embeddings=(True, False),
        grouped_heads=False,
        free_head_dim=False,
        ffn_ratio=(4, 1),
        ffn_multiple=1,
    ),
}
CHOICES = ("norm", "activation", "positions", "attention_bias", "ffn_bias", "tie_embeddings")


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
    attention_bias: bool
    ffn_bias: bool
    tie_embeddings: bool
    dropout: float
    attention_dropout: float
    init_std: float
    vocab_size: int
    padded_vocab_size: int
    seq_len: int
    logit_softcap: float | None = None  # logits are bounded to +- this


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
    chosen: dict[str, Any] = {}
    problems: list[str] = []
    for name in CHOICES:
        value, allowed = getattr(model, name), getattr(family, name)
        chosen[name] = allowed[0] if value is None else value
        if chosen[name] not in allowed:
            problems.append(_refuse(model, name, _text(allowed[0]), _families_with(name, value)))
    problems += _unused_options(model, chosen["positions"])
    head_dim, head_problems = _resolve_heads(model, family, chosen["positions"])
    problems += head_problems
    if problems:
        raise ConfigError("\n".join(problems))
    above, below = family.ffn_ratio
    ffn_dim = model.ffn_dim or _round_up(_round_up(model.dim * above, below) // below, family.ffn_multiple)
    return ModelShape(
        family=model.family,
        dim=model.dim,
        num_layers=model.num_layers,
        num_heads=model.num_heads,
        num_kv_heads=model.num_kv_heads or model.num_heads,
        head_dim=head_dim,
        ffn_dim=ffn_dim,
        norm_eps=model.norm_eps,
        rope_theta=model.rope_theta,
        dropout=model.dropout,
        attention_dropout=model.attention_dropout,
        init_std=model.init_std,
        vocab_size=vocab_size,
        padded_vocab_size=_round_up(vocab_size, VOCAB_MULTIPLE),
        seq_len=seq_len,
        **chosen,
    )


def num_parameters(shape: ModelShape) -> int:
    """Count the parameters of the model, the padding of the vocabulary included."""
    norm = shape.dim * (2 if shape.norm == "layernorm" else 1)
    attention_outputs = (shape.num_heads + 2 * shape.num_kv_heads) * shape.head_dim + shape.dim
    up_outputs = shape.ffn_dim * (2 if shape.activation == "swiglu" else 1)
    block = _block_matrices(shape) + 2 * norm
    block += attention_outputs if shape.attention_bias else 0
    block += up_outputs + shape.dim if shape.ffn_bias else 0
    embeddings = shape.padded_vocab_size * shape.dim * (1 if shape.tie_embeddings else 2)
    embeddings += shape.seq_len * shape.dim if shape.positions == "learned" else 0
    return embeddings + shape.num_layers * block + norm


def flops_per_token(shape: ModelShape, causal: bool) -> float:
    """Floating-point operations that training spends on one token, forward and backward.

    6 per weight that is multiplied (2 forward, 4 backward) and 12 L H C T for attention's two products. The
    embedding is looked up, not multiplied, and does not count; the output layer does, tied or not, without
    the padding of the vocabulary. Norms, biases and activations do not count, nor does recomputation.

    Args:
        shape: the model.
        causal: count only the half of attention that a causal mask leaves: 6 L H C T.

    Source: Chowdhery et al. 2022 (PaLM), appendix B.
    """
    matrices = shape.num_layers * _block_matrices(shape) + shape.vocab_size * shape.dim
    attention = 12 * shape.num_layers * shape.num_heads * shape.head_dim * shape.seq_len
    return 6.0 * matrices + (attention / 2 if causal else float(attention))


def _block_matrices(shape: ModelShape) -> int:
    heads = 2 * shape.num_heads + 2 * shape.num_kv_heads  # queries and output, keys and values
    ffn = 3 if shape.activation == "swiglu" else 2
    return shape.dim * (heads * shape.head_dim + ffn * shape.ffn_dim)


def _resolve_heads(model: ModelSection, family: Family, positions: str) -> tuple[int, list[str]]:
    problems = []
    dim, num_heads, num_kv_heads = model.dim, model.num_heads, model.num_kv_heads
    head_dim = model.head_dim or dim // num_heads
    if dim % num_heads and (model.head_dim is None or not family.free_head_dim):
        low = dim // num_heads * num_heads
        fix = f"Use {low} or {low + num_heads}" if low else f"Use {num_heads}"
        problems.append(f"model.dim is {dim}; expected a multiple of model.num_heads ({num_heads}). {fix}.")
    elif not family.free_head_dim and head_dim != dim // num_heads:
        problems.append(_refuse(model, "head_dim", f"dim / num_heads ({dim // num_heads})", _free_head_dim()))
    elif positions == "rope" and head_dim % 2:
        name = "model.head_dim" if model.head_dim else "dim / num_heads"
        near = f"{head_dim - 1} or {head_dim + 1}" if head_dim > 1 else "2"
        problems.append(
            f"{name} is {head_dim}; expected an even number for positions rope. Set model.head_dim to {near}."
        )
    if num_kv_heads is not None and num_kv_heads != num_heads:
        if not family.grouped_heads:
            wanted = f"num_heads ({num_heads})"
            problems.append(_refuse(model, "num_kv_heads", wanted, _grouped_heads()))
        elif num_heads % num_kv_heads:
            near = " or ".join(str(n) for n in _nearest_divisors(num_heads, num_kv_heads))
            wanted = f"a divisor of model.num_heads ({num_heads})"
            problems.append(f"model.num_kv_heads is {num_kv_heads}; expected {wanted}. Use {near}.")
    return head_dim, problems


def _unused_options(model: ModelSection, positions: str) -> list[str]:
    # Compared with the default, not looked up in model_fields_set: the config.yaml of a run folder sets every field.
    default = ModelSection.model_fields["rope_theta"].default
    if positions == "rope" or model.rope_theta == default:
        return []
    return [
        f"model.rope_theta is {model.rope_theta:g}; expected no value for positions {positions}, where it does "
        f"nothing. Remove model.rope_theta, or use {_families_with('positions', 'rope')}."
    ]


def _refuse(model: ModelSection, name: str, expected: str, families: str) -> str:
    choice = f", or use {families}" if families else ""
    value = _text(getattr(model, name))
    return (
        f"model.{name} is {value}; expected {expected} for family {model.family}. Remove model.{name}{choice}."
    )  # fmt: skip


def _families_with(name: str, value: object) -> str:
    return _listed(key for key, family in FAMILIES.items() if value in getattr(family, name))


def _free_head_dim() -> str:
    return _listed(key for key, family in FAMILIES.items() if family.free_head_dim)


def _grouped_heads() -> str:
    return _listed(key for key, family in FAMILIES.items() if family.grouped_heads)


def _listed(names: Any) -> str:
    return " or ".join(f"model.family {name}" for name in names)


def _nearest_divisors(number: int, wanted: int) -> list[int]:
    divisors = [n for n in range(1, number + 1) if number % n == 0]
    below, above = [n for n in divisors if n < wanted], [n for n in divisors if n > wanted]
    return below[-1:] + above[:1]


def _text(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
