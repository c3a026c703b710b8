"""A checkpoint of adapters and the one that they stand beside: where that lies, and both as one model.

Adapters are a hundredth of a model, so their checkpoints hold nothing else and name the base, with the sha256 of its
manifest: what is read back is that base or an error.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path

import torch

from pretrain.checkpoints.checkpoint_files import MANIFEST, CheckpointReader, manifest_digest, step_of
from pretrain.checkpoints.checkpoint_store import StorePlace
from pretrain.errors import CheckpointError
from pretrain.options.config import DataSection, LoraSection
from pretrain.storage.stores import is_remote
from pretrain.transformer.lora import delta
from pretrain.transformer.lora_layers import A, B, scale_of

BASE = "base"  # in what resuming needs: the reference


def reference_to(reader: CheckpointReader, run_path: Path) -> dict[str, str]:
    """Return what a run's checkpoints keep of their base: where it lies, seen from the run too, and what it is."""
    reference = {"checkpoint": str(reader.folder), "sha256": manifest_digest(reader.manifest)}
    if isinstance(reader.folder, Path):
        path = reader.folder.absolute()
        reference |= {"checkpoint": str(path), "relative": os.path.relpath(path, run_path.absolute())}
    return reference


def open_base(reference: dict[str, str], run_path: Path, data: DataSection, also: str = "") -> CheckpointReader:
    """Open the base of a run's adapters; if that has adapters itself, it is not merged with its own base yet.

    Args:
        reference: as `reference_to` gave it.
        run_path: the run folder.
        data: the config's, whose node cache serves bases from elsewhere.
        also: the `resume.from` of the run folder's config, where it may lie too.

    Raises:
        CheckpointError: it is not there any more, or another one is.
    """
    problems = []
    for place in _places(reference, run_path, also):
        try:
            reader = _open(place, data)
        except CheckpointError as error:
            problems.append(str(error).partition("; expected")[0])
            continue
        if manifest_digest(reader.manifest) == reference["sha256"]:
            return reader
        problems.append(f"{place} is another checkpoint than when tuning began")
    raise CheckpointError(
        f"{run_path}: its adapters stand beside the weights of {reference['checkpoint']}, which cannot be had "
        f"({'; '.join(dict.fromkeys(problems))}); expected that checkpoint as it was. Put it back, or name "
        "where it is now by resume.from; checkpoint.keep_every of its run keeps one for ever."
    )


def _places(reference: dict[str, str], run_path: Path, also: str) -> Iterator[str]:
    name = os.path.basename(reference["checkpoint"])
    yield reference["checkpoint"]
    if "relative" in reference:
        yield str((run_path / reference["relative"]).resolve())
    if also and not is_remote(also):
        yield from (str(path) for path in (Path(also), Path(also, "checkpoints", name)) if (path / MANIFEST).is_file())


def _open(place: str, data: DataSection) -> CheckpointReader:
    if not is_remote(place):
        return CheckpointReader(Path(place))
    above, _, name = place.rpartition("/")
    step = step_of(name)
    assert step is not None, place
    return StorePlace(above, data).open(step)


def merged(reader: CheckpointReader, run_path: Path, data: DataSection, also: str = "") -> CheckpointReader:
    """Return a checkpoint as one of the whole model: itself, or its adapters merged into their base.

    Args:
        reader: of the checkpoint.
        run_path, data, also: as `open_base` takes them.

    Raises:
        CheckpointError: the base is not there any more, or is damaged.
    """
    if BASE not in reader.training:
        return reader
    base = open_base(reader.training[BASE], run_path, data, also)
    base.verify()
    folder = base.folder
    base_run = folder.parent.parent if isinstance(folder, Path) else run_path
    return MergedCheckpoint(reader, merged(base, base_run, data))


class MergedCheckpoint(CheckpointReader):
    """Adapters and their base, read as the masters of one model."""

    def __init__(self, adapter: CheckpointReader, base: CheckpointReader) -> None:
        """Take both, open and verified; what is said of the checkpoint is said of the adapters."""
        self._adapter, self._base = adapter, base
        self.folder, self.manifest, self.training = adapter.folder, adapter.manifest, adapter.training
        self.shapes = base.shapes
        self.states = {name: ["master"] for name in base.shapes}
        self._scale = scale_of(LoraSection(**adapter.manifest["about"]["config"]["train"]["lora"]))

    def verify_file(self, name: str) -> str | None:
        """As `CheckpointReader` says, of the adapters' files."""
        return self._adapter.verify_file(name)

    def read(self, name: str, state: str, start: int, length: int) -> torch.Tensor:
        """As `CheckpointReader` says; of what an adapter adds, the rows that are asked for are computed."""
        weight = self._base.read(name, state, start, length)
        layer = name.removesuffix(".weight")
        if f"{layer}.{A}" not in self._adapter.shapes or layer == name:
            return weight
        rank, columns = self._adapter.shapes[f"{layer}.{A}"]
        first, last = start // columns, math.ceil((start + length) / columns)
        rows = self._adapter.read(f"{layer}.{B}", "master", first * rank, (last - first) * rank).view(-1, rank)
        added = delta(rows, self._adapter.read_whole(f"{layer}.{A}"), self._scale).flatten()
        return weight + added[start - first * columns :][:length]

    def read_into(self, target: torch.Tensor, name: str, state: str, start: int) -> None:
        """As `CheckpointReader` says, but for the memory."""
        target.copy_(self.read(name, state, start, len(target)))

    def close(self) -> None:
        """As `CheckpointReader` says."""
        self._adapter.close()
        self._base.close()
