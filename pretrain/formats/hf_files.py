"""The files of an export in Hugging Face's format, all written by our own hand.

transformers' `save_pretrained` changes the tokenizer's class, drops `tokenizer.model` and writes only one of the two
styles of RoPE's options. Weights stream from the checkpoint, one parameter at a time.
"""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from pretrain.checkpoints.saved_run import SavedRun
from pretrain.errors import ExportError
from pretrain.formats.family_table import export_tensors, published_config
from pretrain.formats.partial_export import Part, PartialExport
from pretrain.formats.provenance import metadata_of
from pretrain.options.families import ModelShape
from pretrain.storage.tensor_files import bytes_of, safetensors_head
from pretrain.tokenizers.chat import stop_ids
from pretrain.tokenizers.tokenizer import Tokenizer

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
INDEX = "model.safetensors.index.json"
LIBRARIES = ("torch", "transformers", "tokenizers", "safetensors", "sentencepiece")


def write_weights(
    saved: SavedRun, export: PartialExport, dtype: torch.dtype, max_shard_bytes: int
) -> dict[str, dict[str, Any]]:
    """Write `model.safetensors`, or shards and their index.

    The tensors of a parameter stay together, so a shard is larger than the limit only if a parameter is.

    Args:
        saved: the checkpoint.
        export: the folder.
        dtype: of the weights.
        max_shard_bytes: size of the tensors in a file.

    Returns:
        Size and sha256 of each file.

    Raises:
        ExportError: a weight is not finite, or the disk has no room.
        CheckpointError: a parameter cannot be read.
        OSError: a file could not be written.
    """
    shards: list[list[tuple[str, list[tuple[str, Tensor]]]]] = [[]]  # parameters, each with its tensors, without data
    for name, size in saved.shapes.items():
        tensors = list(export_tensors(saved.shape, [(name, torch.empty(size, dtype=dtype, device="meta"))]))
        if shards[-1] and _num_bytes([*shards[-1], (name, tensors)]) > max_shard_bytes:
            shards.append([])
        shards[-1].append((name, tensors))
    many = f"-of-{len(shards):05}" if len(shards) > 1 else ""
    names = [
        f"model-{number:05}{many}.safetensors" if many else "model.safetensors" for number in range(1, len(shards) + 1)
    ]
    metadata = {"format": "pt", **metadata_of(saved, LIBRARIES)}
    files = {}
    for file, shard in zip(names, shards, strict=True):
        head = safetensors_head([tensor for _, tensors in shard for tensor in tensors], metadata)
        parts = [Part(len(head), partial(list, [head]), is_head=True)]
        parts += [Part(_num_bytes([one]), partial(_make, saved, one[0], dtype)) for one in shard]
        files[file] = parts
    described = export.write(files)
    if many:
        weight_map = {
            name: file for file, shard in zip(names, shards, strict=True) for _, tensors in shard for name, _ in tensors
        }
        index = {"metadata": {"total_size": sum(map(_num_bytes, shards))}, "weight_map": weight_map}
        write_json(export, INDEX, index)
    return described


def _num_bytes(parameters: list[tuple[str, list[tuple[str, Tensor]]]]) -> int:
    return sum(tensor.nbytes for _, tensors in parameters for _, tensor in tensors)


def _make(saved: SavedRun, name: str, dtype: torch.dtype) -> Iterator[memoryview]:
    """Yield the bytes of a parameter's tensors: these are cast, not a module, whose RoPE would be cast with it."""
    parameter = cast_weight(name, saved.read(name), dtype)
    for _, tensor in export_tensors(saved.shape, [(name, parameter)]):
        yield bytes_of(tensor.contiguous())


def cast_weight(name: str, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Round a weight to a dtype.

    Raises:
        ExportError: it is not finite then.
    """
    cast = weight.to(dtype)
    if not torch.isfinite(cast).all():
        raise ExportError(
            f"{name}: holds NaN or infinity as {dtype}; expected finite weights. Export as fp32 or bf16 (--dtype), "
            "and if that fails too, an earlier checkpoint (--step)."
        )
    return cast


def hf_config(shape: ModelShape, tokenizer: Tokenizer, dtype: torch.dtype) -> dict[str, Any]:
    """Return what `config.json` holds, in the words of transformers 4 and 5."""
    dtype_name = str(dtype).removeprefix("torch.")
    return {
        **published_config(shape),
        "bos_token_id": tokenizer.bos_id,
        "eos_token_id": tokenizer.eos_id,
        "pad_token_id": tokenizer.pad_id,
        "dtype": dtype_name,  # transformers 5
        "torch_dtype": dtype_name,  # transformers 4 and llama.cpp
        "transformers_version": importlib.metadata.version("transformers"),
    }


def generation_config(tokenizer: Tokenizer) -> dict[str, Any]:
    """Return what `generation_config.json` holds: where to stop, and that nothing is drawn unless asked for."""
    ends = stop_ids(tokenizer)
    return {
        "bos_token_id": tokenizer.bos_id,
        "eos_token_id": ends if len(ends) > 1 else ends[0],
        "pad_token_id": tokenizer.pad_id,
        "do_sample": False,
        "transformers_version": importlib.metadata.version("transformers"),
    }


def write_json(export: PartialExport, name: str, value: object) -> None:
    """Write a small file of JSON.

    Raises:
        OSError: it could not be written.
    """
    (export.folder / name).write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
