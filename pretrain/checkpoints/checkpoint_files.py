"""What a checkpoint is on disk, and reading one without DeepSpeed or other ranks.

The format is described for strangers in `docs/checkpoint-format.md`. A checkpoint is complete if and only if its
folder is named `step-NNNNNNNN` and holds `manifest.json`, which comes there last.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from pretrain.errors import CheckpointError, ConfigError
from pretrain.storage.tensor_files import TensorFile, sha256_of

FORMAT_VERSION = 2
MANIFEST = "manifest.json"
DAMAGED = ".damaged"  # behind the name of a checkpoint that did not verify at a start
_NAME = re.compile(r"step-(\d{8,})")
_SHA256 = re.compile(r"[0-9a-f]{64}")


def folder_name(step: int) -> str:
    """Name of the folder of the checkpoint after update number `step`."""
    return f"step-{step:08d}"


def list_steps(checkpoints: Path, *, without_manifest: bool = False) -> list[int]:
    """Return the steps of the complete checkpoints in a folder, oldest first.

    Args:
        checkpoints: the folder.
        without_manifest: also of those that are damaged so; no save leaves such a folder.
    """
    if not checkpoints.is_dir():
        return []
    steps = (
        step_of(entry.name) for entry in checkpoints.iterdir()
        if (entry.is_dir() if without_manifest else (entry / MANIFEST).is_file())
    )  # fmt: skip
    return sorted(step for step in steps if step is not None)


def step_of(name: str) -> int | None:
    """The update number that a checkpoint's folder is named by; None for other names."""
    match = _NAME.fullmatch(name)
    return int(match.group(1)) if match else None


def has_checkpoints(checkpoints: Path) -> bool:
    """Whether a folder holds any checkpoint, be it damaged: a run that has some never begins anew by itself."""
    return bool(list_steps(checkpoints, without_manifest=True)) or any(checkpoints.glob(f"step-*{DAMAGED}*"))


def tensor_key(parameter: str, state: str, start: int) -> str:
    """Key of a fragment in its safetensors file."""
    return f"{parameter}/{state}/{start}"


def manifest_digest(manifest: dict[str, Any]) -> str:
    """Return the sha256 of a manifest without its `sha256` entry, written with sorted keys and no spaces."""
    text = json.dumps(manifest, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def manifest_text(manifest: dict[str, Any]) -> str:
    """Return what is written of a manifest: with its `sha256`, and a line for each parameter and file.

    Many ranks have millions of fragments together, at whose indenting Python would be busy for long.
    """
    sealed = manifest | {"sha256": manifest_digest(manifest)}
    return "{\n" + ",\n".join(f"{json.dumps(key)}: {_lines(value)}" for key, value in sealed.items()) + "\n}\n"


def _lines(value: Any) -> str:
    if not isinstance(value, dict) or not value:
        return json.dumps(value, allow_nan=False)
    return (
        "{\n "
        + ",\n ".join(f"{json.dumps(key)}: {json.dumps(one, allow_nan=False)}" for key, one in value.items())
        + "}"
    )


def _migrate_from_1(manifest: dict[str, Any]) -> None:
    """Version 1 had one list of states for all parameters; since version 2 each has its own."""
    states = manifest.pop("states")
    for entry in manifest["parameters"].values():
        entry["states"] = states


@dataclass(frozen=True)
class Piece:
    """Where flat elements [start, start + length) of a parameter are: the name of the file that holds them."""

    file: str
    start: int
    length: int

    def as_json(self) -> list[str | int]:
        """What a manifest has of it."""
        return [self.file, self.start, self.length]


class Files(Protocol):
    """The files of one checkpoint; their `str` says where they lie."""

    @property
    def name(self) -> str:
        """Name of the checkpoint's folder."""

    def read_manifest(self) -> str:
        """Return what is in the manifest.

        Raises:
            OSError: it cannot be read.
            StoreAccessError: the store that it lies in cannot be read.
        """

    def find_problem(self, name: str, num_bytes: int, sha256: str) -> str | None:
        """Return its name and what is wrong with one of the files; None if its bytes are those that were written.

        Raises:
            LonghaulError: that cannot be found out.
        """

    def open_tensors(self, name: str, num_bytes: int, sha256: str) -> TensorFile:
        """Open one of the files.

        Raises:
            LonghaulError: it cannot be read.
        """

    def close(self) -> None:
        """Let go of what was opened."""


class FolderFiles:
    """The files of a checkpoint in a folder."""

    def __init__(self, folder: Path) -> None:
        """Take the folder; nothing is read."""
        self._folder = folder

    def __str__(self) -> str:
        return str(self._folder)

    @property
    def name(self) -> str:
        """As `Files` says."""
        return self._folder.name

    def read_manifest(self) -> str:
        """As `Files` says."""
        return (self._folder / MANIFEST).read_text(encoding="utf-8")

    def find_problem(self, name: str, num_bytes: int, sha256: str) -> str | None:
        """As `Files` says."""
        path = self._folder / name
        try:
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != num_bytes:
                return f"{name} has {path.stat().st_size} bytes, not {num_bytes}"
            if sha256_of(path) != sha256:
                return f"{name} has another sha256 than when it was written"
        except OSError as error:
            return f"{name} cannot be read ({error.strerror})"
        return None

    def open_tensors(self, name: str, num_bytes: int, sha256: str) -> TensorFile:
        """As `Files` says."""
        return TensorFile(self._folder / name)

    def close(self) -> None:
        """As `Files` says; the files are closed when they are forgotten."""


def _why(error: Exception) -> str:
    """Say in words why a manifest cannot be used."""
    if isinstance(error, KeyError):
        return f"it lacks {error}"
    return f"it is not JSON: {error}" if isinstance(error, json.JSONDecodeError) else str(error)


class CheckpointReader:
    """A complete checkpoint: its manifest and any range of any tensor."""

    def __init__(self, folder: Path | Files) -> None:
        """Read the manifest.

        Raises:
            CheckpointError: it is missing or damaged.
            ConfigError: it is of a newer format.
            StoreAccessError: the store that it lies in cannot be read.
        """
        self.folder = folder
        self._source: Files = FolderFiles(folder) if isinstance(folder, Path) else folder
        self._opened: dict[str, TensorFile] = {}
        try:
            self.manifest: dict[str, Any] = json.loads(self._source.read_manifest())
            if self.manifest.pop("sha256") != manifest_digest(self.manifest):
                raise ValueError("its sha256 is not the one that was written")
            version = self.manifest["format_version"]
            if version not in (1, FORMAT_VERSION):
                raise ConfigError(  # not damage: it must not be passed over
                    f"{folder}: format version is {version}; expected at most {FORMAT_VERSION}. Use the Longhaul that "
                    "wrote it."
                )
            if version == 1:
                _migrate_from_1(self.manifest)
            self.shapes = {name: tuple(entry["shape"]) for name, entry in self.manifest["parameters"].items()}
            self._pieces = {
                name: sorted((Piece(*piece) for piece in entry["fragments"]), key=lambda piece: piece.start)
                for name, entry in self.manifest["parameters"].items()
            }
            self.states: dict[str, list[str]] = {
                name: entry["states"] for name, entry in self.manifest["parameters"].items()
            }
            self.training: dict[str, Any] = self.manifest["training"]
            for name, entry in self.manifest["files"].items():
                if name != os.path.basename(name) or not _SHA256.fullmatch(entry["sha256"]):
                    raise ValueError(f"{name!r} is no file of a checkpoint")
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(
                f"{folder}/{MANIFEST}: is not readable ({_why(error)}); expected a checkpoint's manifest. "
                "Use another checkpoint (--step), or remove this folder."
            ) from None

    def verify_file(self, name: str) -> str | None:
        """Return its name and what is wrong with one of the files; None if its bytes are those that were written."""
        expected = self.manifest["files"][name]
        return self._source.find_problem(name, expected["bytes"], expected["sha256"])

    def verify(self) -> None:
        """Check every file's size and sha256.

        Raises:
            CheckpointError: naming each file that differs.
        """
        problems = [problem for name in self.manifest["files"] if (problem := self.verify_file(name))]
        if problems:
            raise CheckpointError(f"{self.folder}: is damaged: {'; '.join(problems)}. Use another checkpoint (--step).")

    def read(self, name: str, state: str, start: int, length: int) -> torch.Tensor:
        """Return flat fp32 elements [start, start + length) of a parameter's state, touching only their bytes.

        Raises:
            CheckpointError: the checkpoint lacks the parameter, the state or part of the range.
        """
        result = torch.empty(length, dtype=torch.float32)
        self.read_into(result, name, state, start)
        return result

    def read_into(self, target: torch.Tensor, name: str, state: str, start: int) -> None:
        """Fill a flat fp32 tensor with the elements from `start` on, without memory for them between.

        Raises:
            CheckpointError: as `read`.
        """
        if state not in self.states.get(name, ()):
            raise CheckpointError(
                f"{self.folder}: has no '{state}' of '{name}'; expected it for this model and optimizer. "
                "Use the config that wrote it."
            )
        length, filled = len(target), 0
        for piece in self._pieces[name]:
            first, last = max(start, piece.start), min(start + length, piece.start + piece.length)
            if first < last:
                key = tensor_key(name, state, piece.start)
                target[first - start : last - start] = self._open(piece.file).read(
                    key, first - piece.start, last - piece.start
                )
                filled += last - first
        if filled != length:
            raise CheckpointError(f"{self.folder}: '{name}' has {filled} of the {length} elements from {start}.")

    def _open(self, name: str) -> TensorFile:
        if name not in self._opened:
            expected = self.manifest["files"][name]
            self._opened[name] = self._source.open_tensors(name, expected["bytes"], expected["sha256"])
        return self._opened[name]

    def close(self) -> None:
        """Let go of the files; what was read stays."""
        self._opened.clear()
        self._source.close()

    def read_whole(self, name: str, state: str = "master") -> torch.Tensor:
        """Return a parameter's whole state, fp32, in its own shape."""
        shape = self.shapes[name]
        return self.read(name, state, 0, math.prod(shape)).view(shape)


def find_uncovered(shapes: dict[str, tuple[int, ...]], pieces: dict[str, list[Piece]]) -> list[str]:
    """Return a sentence for each parameter whose fragments do not cover it exactly once."""
    problems = []
    for name, shape in shapes.items():
        position = 0
        for piece in sorted(pieces.get(name, []), key=lambda piece: piece.start):
            if piece.start != position:
                break
            position += piece.length
        if position != math.prod(shape):
            problems.append(f"'{name}' is covered up to element {position} of {math.prod(shape)}")
    return problems
