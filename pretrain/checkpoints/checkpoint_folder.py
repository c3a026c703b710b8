"""Checkpoints in a folder: written under another name, synced and renamed.

Whatever is killed at whatever moment, a folder named `step-NNNNNNNN` is whole.
"""

from __future__ import annotations

import hashlib
import os
import secrets
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from pretrain.checkpoints.checkpoint_files import (
    DAMAGED,
    MANIFEST,
    CheckpointReader,
    folder_name,
    has_checkpoints,
    list_steps,
)
from pretrain.checkpoints.checkpoint_owner import OWNER, Ownership
from pretrain.errors import CheckpointError, ConfigError
from pretrain.storage.tensor_files import check_space, write_tensors
from pretrain.storage.whole_file import sync_folder, write_text

_FILES_A_RANK = 2  # its share, and a note of it


class FolderPlace:
    """A folder of this machine, or one that all nodes share; as `Place` says."""

    longest_poll_seconds = 0.05

    def __init__(self, folder: Path, is_in_run: bool = True) -> None:
        """Take the folder; nothing is read or made.

        Args:
            folder: that the checkpoints are in.
            is_in_run: it is part of the run folder, whose lock protects it.
        """
        self.folder = folder
        self._ownership = None if is_in_run else Ownership(str(folder), self._read_owner, self._write_owner)
        self._start = ""

    def __str__(self) -> str:
        return str(self.folder)

    def claim(self, run_id: str, run_path: Path) -> str:
        """As `Place` says."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            record = self._ownership.claim(run_id, run_path) if self._ownership else secrets.token_hex(8)
        except OSError as error:
            raise ConfigError(
                f"checkpoint.dir is {self.folder}; expected a folder that can be written ({error}). Use another one."
            ) from None
        for leftover in self.folder.glob(".tmp-*"):
            shutil.rmtree(leftover, ignore_errors=True)
        self.join(record)
        return record

    def join(self, record: str) -> None:
        """As `Place` says."""
        # A rank that outlives its job, on another node, must not write into the save of the job that follows.
        self._start = hashlib.sha256(record.encode()).hexdigest()[:8]
        if self._ownership:
            self._ownership.join(record)

    def is_of(self, run_id: str) -> bool:
        """Whether no other run than this one has claimed the folder."""
        return self._ownership is None or self._ownership.is_of(run_id)

    def list_steps(self) -> list[int]:
        """As `Place` says."""
        return list_steps(self.folder)

    def list_claimed(self) -> list[int]:
        """As `Place` says: a folder that has lost its manifest, too."""
        return list_steps(self.folder, without_manifest=True)

    def has_any(self) -> bool:
        """As `Place` says."""
        return has_checkpoints(self.folder)

    def has(self, step: int) -> bool:
        """As `Place` says."""
        return (self._path(step) / MANIFEST).is_file()

    def open(self, step: int) -> CheckpointReader:
        """As `Place` says."""
        return CheckpointReader(self._path(step))

    def begin(self, step: int, num_bytes: int, num_ranks: int) -> None:
        """As `Place` says, if there is space."""
        num_files = _FILES_A_RANK * num_ranks + 2  # and the manifest, and the folder
        check_space(self.folder, num_bytes, num_files)
        if self._ownership:
            self._ownership.check()
        self._unfinished(step).mkdir(parents=True)

    def write_tensors(
        self, step: int, name: str, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]
    ) -> tuple[int, str]:
        """As `Place` says."""
        return write_tensors(self._unfinished(step) / name, tensors, metadata)

    def write_note(self, step: int, name: str, text: str) -> None:
        """As `Place` says."""
        write_text(self._unfinished(step) / name, text)

    def list_notes(self, step: int, suffix: str) -> list[str]:
        """As `Place` says."""
        return sorted(path.name for path in self._unfinished(step).glob(f"*{suffix}") if path.name[0] != ".")

    def take_notes(self, step: int, names: Sequence[str]) -> list[str]:
        """As `Place` says."""
        paths = [self._unfinished(step) / name for name in names]
        notes = [path.read_text(encoding="utf-8") for path in paths]
        for path in paths:
            path.unlink()
        return notes

    def complete(self, step: int, manifest: str) -> None:
        """As `Place` says."""
        if self._ownership:
            self._ownership.check()
        write_text(self._unfinished(step) / MANIFEST, manifest)
        os.rename(self._unfinished(step), self._path(step))
        sync_folder(self.folder)

    def abandon(self, step: int) -> None:
        """As `Place` says."""
        shutil.rmtree(self._unfinished(step), ignore_errors=True)

    def set_aside(self, step: int) -> None:
        """As `Place` says: it is renamed to `step-NNNNNNNN.damaged`."""
        folder = self._path(step)
        number = 1
        while (aside := folder.with_name(f"{folder.name}{DAMAGED}{'' if number == 1 else f'-{number}'}")).exists():
            number += 1
        try:
            folder.rename(aside)
        except OSError as error:
            raise CheckpointError(
                f"{folder}: is damaged and cannot be renamed ({error}); expected a writable folder. Move it away."
            ) from None

    def remove(self, step: int) -> None:
        """As `Place` says."""
        folder = self._path(step)
        doomed = folder.with_name(f".tmp-removed-{folder.name}")  # renamed first: half a folder is never seen
        folder.rename(doomed)
        shutil.rmtree(doomed, ignore_errors=True)

    def _path(self, step: int) -> Path:
        return self.folder / folder_name(step)

    def _unfinished(self, step: int) -> Path:
        return self.folder / f".tmp-{self._start}-{folder_name(step)}"

    def _read_owner(self) -> str | None:
        path = self.folder / OWNER
        return path.read_text(encoding="utf-8") if path.exists() else None

    def _write_owner(self, record: str) -> None:
        write_text(self.folder / OWNER, record)
