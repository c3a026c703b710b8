"""A checkpoint of weights alone, written by one process: what an import begins a run folder with."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pretrain import __version__
from pretrain.checkpoints.checkpoint_files import (
    FORMAT_VERSION,
    MANIFEST,
    Piece,
    folder_name,
    manifest_text,
    tensor_key,
)
from pretrain.errors import ExportError
from pretrain.options.config import Config
from pretrain.redaction import storable
from pretrain.storage.tensor_files import write_tensors
from pretrain.storage.whole_file import sync_folder, write_text

FILE_BYTES = 128 << 20  # at which the next file begins: what is held in memory beside the tensor at hand
_MASTER = "master"


def write_weights(
    checkpoints: Path,
    tensors: Iterable[tuple[str, Tensor]],
    shapes: Mapping[str, tuple[int, ...]],
    config: Config,
    tokenizer: str,
    imported: Mapping[str, Any],
) -> Path:
    """Write the checkpoint of step 0, one tensor after the other.

    Args:
        checkpoints: the folder that the checkpoint's comes to lie in, which nobody else writes to.
        tensors: name and value of every parameter, each read when the one before has been written.
        shapes: of every parameter.
        config: of the run.
        tokenizer: its fingerprint.
        imported: where the weights are from.

    Returns:
        The checkpoint's folder.

    Raises:
        ExportError: a parameter is missing, of another shape, or not finite.
        OSError: the disk is full.
    """
    folder = checkpoints / folder_name(0)
    folder.mkdir(parents=True)
    files: dict[str, dict[str, Any]] = {}
    parameters: dict[str, dict[str, Any]] = {}
    held: dict[str, Tensor] = {}

    def write_held() -> None:
        name = f"weights-{len(files):05d}.safetensors"
        num_bytes, sha256 = write_tensors(folder / name, held, {"format": "pt"})
        files[name] = {"bytes": num_bytes, "sha256": sha256}
        held.clear()

    for name, tensor in tensors:
        if tuple(tensor.shape) != shapes.get(name):
            raise ExportError(
                f"{name}: is of shape {list(tensor.shape)}; expected "
                f"{list(shapes.get(name, ())) or 'no such parameter'}. "
                "The weights are of another model than config.json says."
            )
        if not torch.stack(torch.aminmax(tensor)).isfinite().all():  # which no copy is made for
            raise ExportError(f"{name}: holds NaN or infinity; expected finite weights. Copy the model again.")
        if held and sum(other.nbytes for other in held.values()) + 4 * tensor.numel() > FILE_BYTES:
            write_held()
        flat = tensor.to(torch.float32).contiguous().view(-1)
        held[tensor_key(name, _MASTER, 0)] = flat
        piece = Piece(f"weights-{len(files):05d}.safetensors", 0, math.prod(tensor.shape))
        parameters[name] = {
            "shape": list(tensor.shape),
            "states": [_MASTER],
            "fragments": [piece.as_json()],
        }
        del tensor, flat
    write_held()
    if missing := [name for name in shapes if name not in parameters]:
        raise ExportError(
            f"{missing[0]}: the parameter ({len(missing)} such) has no tensor; expected one for each. The weights are "
            "of "
            "another model than config.json says, or are not whole."
        )
    manifest = {
        "format_version": FORMAT_VERSION, "step": 0, "parameters": parameters, "files": files,
        "training": {"progress": {}, "num_tokens": 0, "optimizer_step": 0, "loss_scale": None},
        "about": {"config": storable(config.model_dump(mode="json")), "tokenizer": tokenizer, "longhaul": __version__,
                  "torch": torch.__version__, "imported": dict(imported)},
    }  # fmt: skip
    write_text(folder / MANIFEST, manifest_text(manifest))
    sync_folder(checkpoints)
    return folder
