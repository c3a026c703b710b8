"""What a `config.json` says of a model, in our options: every key understood, known to mean nothing, or refused."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pretrain.errors import ConfigError
from pretrain.formats.family_table import published_config
from pretrain.formats.published import PUBLISHED_MODELS, ROPE_SCALING, PublishedModel
from pretrain.options.families import ModelShape, resolve_shape
from pretrain.options.model_options import ModelSection

FAMILY_OF = {model.model_type: family for family, model in PUBLISHED_MODELS.items()}
# Keys that change nothing that is computed from the weights and ids.
_MEANINGLESS = frozenset(
    "architectures model_type torch_dtype dtype transformers_version _name_or_path bos_token_id eos_token_id"
    " pad_token_id unk_token_id use_cache return_dict output_hidden_states output_attentions id2label label2id"
    " num_labels problem_type task_specific_params auto_map tokenizer_class gradient_checkpointing is_llama_config"
    " transformers.js_config _attn_implementation _commit_hash keys_to_ignore_at_inference summary_type"
    " summary_use_proj summary_activation summary_proj_to_labels summary_first_dropout rope_theta rope_scaling"
    " rope_parameters unsloth_version _flash_attn_2_enabled use_flash_attn use_flash_attention max_length do_sample"
    " temperature top_k top_p repetition_penalty".split()
)  # fmt: skip
# Keys that some configs have beside those of the tables; with another value the model is another one.
_EXPECTED: Mapping[str, Any] = {
    "mlp_type": "default", "norm_type": "layer_norm", "use_mrope": False, "rope_interleaved": False,
    "is_encoder_decoder": False, "add_cross_attention": False, "chunk_size_feed_forward": 0, "clip_qkv": None,
    "rope_ratio": 1.0,
}  # fmt: skip
_DROPOUTS = (
    "attention_dropout", "hidden_dropout", "embedding_dropout", "residual_dropout", "attn_pdrop", "embd_pdrop",
    "resid_pdrop",
)  # fmt: skip
_SAME_ACTIVATION = {"swish": "silu", "gelu_pytorch_tanh": "gelu_new"}  # two names of one formula


@dataclass(frozen=True)
class PublishedConfig:
    """A published model in our words.

    Attributes:
        options: of `model`, by name; those that are left out have the family's or our default.
        seq_len: tokens in its longest row.
        vocab_size: rows of its embedding.
        notes: what was left behind, in sentences.
    """

    options: dict[str, Any]
    seq_len: int
    vocab_size: int
    notes: tuple[str, ...] = ()


def family_of(raw: Mapping[str, Any], where: str) -> str:
    """Return the family of a published model, whose class and keys are known.

    Raises:
        ConfigError: they are not, or the weights are quantized.
    """
    family = FAMILY_OF.get(str(raw.get("model_type")))
    if family is None:
        raise ConfigError(
            f"{where}: model_type is {raw.get('model_type')!r}; expected one of {', '.join(sorted(FAMILY_OF))}. Models "
            "of "
            "other architectures cannot be imported."
        )
    _check_keys(raw, PUBLISHED_MODELS[family], where)
    return family


def read_config(raw: Mapping[str, Any], resolved: Mapping[str, Any], where: str) -> PublishedConfig:
    """Understand a published config.

    Args:
        raw: `config.json` as it stands.
        resolved: as transformers reads it: with every default, and RoPE's options in `rope_parameters`.
        where: the file, for messages.

    Raises:
        ConfigError: the architecture is unknown, or an option is that changes what the model computes.
    """
    family = family_of(raw, where)
    published = PUBLISHED_MODELS[family]
    rope = dict(resolved.get("rope_parameters") or {})
    read: dict[str, Any] = {
        key: rope.get(key) if resolved.get(key) is None else resolved[key] for key in published.options
    }
    options = {option: read[key] for key, option in published.options.items() if read[key] is not None}
    seq_len, vocab_size = options.pop("seq_len"), options.pop("vocab_size")
    if "use_qkv_bias" in published.derived:
        options["attention_bias"] = "qkv" if resolved["use_qkv_bias"] else False
    if resolved.get("use_sliding_window") is False or set(resolved.get("layer_types") or ()) == {"full_attention"}:
        options.pop("sliding_window", None)
    notes = []
    if rope:
        options["rope_theta"] = rope.pop("rope_theta")
        bases = [raw.get("rope_theta"), (raw.get("rope_parameters") or {}).get("rope_theta")]
        if None not in bases and bases[0] != bases[1]:
            raise ConfigError(
                f"{where}: rope_theta is {bases[0]}, and {bases[1]} in rope_parameters; expected one value, "
                "since transformers 4 reads the first and 5 the second. Keep the one that the model was trained with."
            )
        if "partial_rotary_factor" in published.options:
            rope.pop("partial_rotary_factor", None)
        if scaling := _scaling(rope, seq_len, where):
            options["rope_scaling"] = scaling
        if scaling and scaling["type"] == "yarn" and seq_len != scaling["factor"] * scaling["original_seq_len"]:
            notes.append(f"max_position_embeddings was {seq_len}, and is what YaRN makes of the original rows")
            seq_len = int(scaling["factor"] * scaling["original_seq_len"])
    if (options.get("sliding_window") or 0) >= seq_len:
        notes.append(f"sliding_window was {options.pop('sliding_window')}, which is no less than a row")
    dropped = {key: resolved[key] for key in _DROPOUTS if resolved.get(key)}
    if dropped:
        notes.append(f"{', '.join(f'{key} was {value:g}' for key, value in dropped.items())} in its training; 0 here")
    return PublishedConfig({"family": family} | options, seq_len, vocab_size, tuple(notes))


def check_config(found: PublishedConfig, resolved: Mapping[str, Any], vocab_size: int, where: str) -> ModelShape:
    """Build the shape of a published model, and compare what we would publish of it with what was read.

    Args:
        found: from `read_config`.
        resolved: as there.
        vocab_size: ids of the tokenizer.
        where: the file, for messages.

    Raises:
        ConfigError: the family does not take an option, or a constant of its table is another one.
    """
    try:
        shape = resolve_shape(ModelSection(**found.options), vocab_size, found.seq_len)
    except ConfigError as error:  # whose mends are for a config of ours
        problem, _, rule = str(error).splitlines()[0].partition("; expected ")
        rule = rule.partition(". ")[0]
        raise ConfigError(f"{where}: {problem}; expected {rule}. The model cannot be imported.") from None
    except ValueError as error:  # pydantic's, of several lines
        name, _, problem = str(error).partition("\n")[2].partition("\n")
        problem = problem.partition("[type=")[0].strip()
        raise ConfigError(
            f"{where}: model.{name} would be out of its range ({problem}); expected another value there. Correct the "
            "file."
        ) from None
    free = {"vocab_size", "use_cache", "rope_theta", "rope_scaling", "rope_parameters", "architectures", *_DROPOUTS}
    if shape.sliding_window is None:  # then they say nothing
        free |= {"use_sliding_window", "max_window_layers", "sliding_window"}
    rope = resolved.get("rope_parameters") or {}
    for key, expected in published_config(shape).items():
        got = resolved.get(key, rope.get(key))
        if key in free or (got is None and key in ("n_ctx", "n_inner", "head_dim")):  # null: the usual size
            continue
        if key == "max_position_embeddings" and shape.rope_scaling is not None and shape.rope_scaling.type == "yarn":
            continue
        names = [_SAME_ACTIVATION.get(str(value), value) for value in (got, expected)]
        if names[0] != names[1]:
            raise ConfigError(
                f"{where}: {key} is {_short(got)}; expected {_short(expected)}, which family {shape.family} always "
                "has. "
                "The model cannot be imported."
            )
    return shape


def _check_keys(raw: Mapping[str, Any], published: PublishedModel, where: str) -> None:
    """Refuse what is of another class, quantized, or has a key that nobody here knows."""
    architectures = raw.get("architectures") or [published.architecture]
    if published.architecture not in architectures and not set(architectures) & {
        published.architecture.replace("ForCausalLM", "Model"), published.architecture.replace("LMHeadModel", "Model")
    }:  # fmt: skip
        raise ConfigError(
            f"{where}: architectures is {architectures}; expected {published.architecture}. Only language models can "
            "be "
            "imported."
        )
    if raw.get("quantization_config"):
        raise ConfigError(
            f"{where}: quantization_config is given; expected none, because quantized weights cannot be trained. Use "
            "the "
            "checkpoint that it was made from."
        )
    known = {*published.options, *published.constants, *published.derived, *_MEANINGLESS, *_DROPOUTS}
    for key, value in raw.items():
        if key in known or value is None:
            continue
        if key not in _EXPECTED:
            raise ConfigError(
                f"{where}: {key} is {_short(value)}; expected no such key, since its meaning for "
                f"{published.model_type} is "
                "not known here. If it does not change what the model computes, remove it from the file."
            )
        if value != _EXPECTED[key]:
            raise ConfigError(
                f"{where}: {key} is {_short(value)}; expected {_short(_EXPECTED[key])}. The model cannot be imported."
            )


def _scaling(rope: Mapping[str, Any], seq_len: int, where: str) -> dict[str, Any] | None:
    """Turn RoPE's parameters, without its base, into `model.rope_scaling`."""
    kind = rope.get("rope_type", "default")
    given = {key: value for key, value in rope.items() if key not in ("rope_type", "type") and value is not None}
    names = ROPE_SCALING.get(kind, {})
    if kind != "default" and not names:
        raise ConfigError(
            f"{where}: rope_type is {kind!r}; expected default, {', '.join(ROPE_SCALING)}. The model cannot be "
            "imported."
        )
    for key, value in given.items():
        if key not in names and not (key == "partial_rotary_factor" and value == 1):
            raise ConfigError(
                f"{where}: {key} of RoPE is {_short(value)}; expected none for type {kind}. The model cannot be "
                "imported."
            )
    if not names:
        return None
    options = {option: given[key] for key, option in names.items() if key in given}
    if "original_seq_len" in names.values():
        options.setdefault("original_seq_len", seq_len)  # what transformers takes where it is not given
    return {"type": kind} | options


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
