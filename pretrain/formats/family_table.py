"""From our parameters and options to those of the published architecture, and back.

The family's table in `published.py` drives both directions: `export_tensors` and `import_tensors` read the same rows,
and both fail on a tensor that no row names, so nothing is dropped or invented on the way.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from pretrain.errors import ExportError
from pretrain.formats.published import PUBLISHED_MODELS, ROPE_SCALING, Weight
from pretrain.options.families import ModelShape, nearest_exported


def check_exported(shape: ModelShape, where: str) -> None:
    """Refuse a model of a family that is exported as nothing.

    Args:
        shape: the model's shape.
        where: the run, for the message.

    Raises:
        ExportError: naming the nearest family that is exported, and what differs from it.
    """
    if shape.family in PUBLISHED_MODELS:
        return
    nearest, differences = nearest_exported(shape)
    fix = f"It differs in: {', '.join(differences)}. Train without that under model.family {nearest}."
    if not differences:
        fix = f"It takes every option: go on with model.family={nearest} and 'run.allow_changes=[model.family]'."
    raise ExportError(
        f"{where}: model.family is {shape.family}; expected one that is exported. The nearest is {nearest}. {fix}"
    )


def ignored_options(shape: ModelShape) -> dict[str, str]:
    """Return the options of this model that some clients load without honouring them, with the clients' names."""
    table = PUBLISHED_MODELS[shape.family].ignored
    return {option: clients for option, clients in table.items() if getattr(shape, option) is not None}


def published_config(shape: ModelShape) -> dict[str, Any]:
    """Return the keys of `config.json` that describe the model: the family's constants and the shape's options.

    RoPE's options are written twice: transformers 5 reads `rope_parameters`, transformers 4 and Ollama `rope_theta` and
    `rope_scaling` at the top, and each falls back to 10000 and no scaling without a word where its own are missing.
    """
    family = PUBLISHED_MODELS[shape.family]
    config: dict[str, Any] = {"architectures": [family.architecture], "model_type": family.model_type}
    config |= {key: getattr(shape, option) for key, option in family.options.items()}
    config |= family.constants
    config |= {key: derive(shape) for key, derive in family.derived.items()}
    if shape.positions == "rope":
        partial = {key: config[key] for key in ("partial_rotary_factor",) if key in config}
        scaling = _published_scaling(shape)
        config["rope_theta"] = shape.rope_theta
        if scaling["rope_type"] != "default":
            config["rope_scaling"] = scaling
        config["rope_parameters"] = scaling | {"rope_theta": shape.rope_theta} | partial
    return config


def _published_scaling(shape: ModelShape) -> dict[str, Any]:
    if shape.rope_scaling is None:
        return {"rope_type": "default"}
    values = {key: getattr(shape.rope_scaling, option) for key, option in ROPE_SCALING[shape.rope_scaling.type].items()}
    # Only yarn's attention_factor may be null; clients then compute the same default.
    return {"rope_type": shape.rope_scaling.type} | {key: value for key, value in values.items() if value is not None}


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
        tensors: every tensor of the published model, each read when it is its turn; one that is tied to another is left
            out.

    Yields:
        Our name and the parameter; rows that pad the vocabulary are 0.

    Raises:
        ExportError: a tensor is in no row of the table, part of a parameter is missing, or a size does not fit.
    """
    left = dict.fromkeys(tensors)
    for name, weight in _weights_of_layers(shape).items():
        found = [theirs for theirs in weight.theirs if theirs in left]
        for theirs in found:
            del left[theirs]
        parts = {theirs: tensors[theirs] for theirs in found}
        if parts:  # else a bias or output layer that the model does not have
            yield name, _join(weight, parts, shape)
    if left:
        raise ExportError(
            f"{next(iter(left))}: the tensor ({len(left)} such) has no counterpart; expected only those in the table "
            f"of family {shape.family!r}. The model is of another architecture."
        )


def published_layers(shape: ModelShape, name: str) -> list[tuple[str, int, bool]]:
    """Return the published layers that a linear layer of ours is.

    Args:
        shape: the model's shape.
        name: of our layer's weight.

    Returns:
        Their names; the rows of each, 0 where it has all; and whether the published matrix is transposed.
    """
    weight = _weights_of_layers(shape)[name]
    rows = _num_rows(weight, shape) or [0]
    return [
        (theirs.removesuffix(".weight"), num, weight.transposed)
        for theirs, num in zip(weight.theirs, rows, strict=True)
    ]


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
