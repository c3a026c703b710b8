"""Where the checkpoints of a run lie: in a folder or in an object store, behind one protocol."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

import torch

from pretrain.checkpoints.checkpoint_files import CheckpointReader
from pretrain.checkpoints.checkpoint_folder import FolderPlace
from pretrain.checkpoints.checkpoint_store import StorePlace
from pretrain.options.config import DataSection
from pretrain.options.run_options import CheckpointSection
from pretrain.storage.stores import is_remote


class Place(Protocol):
    """The checkpoints of one run, each complete or absent; its `str` is how messages call it.

    A save is begun by one rank, written to by all, and completed or abandoned by one. What fails raises OSError,
    CheckpointError or StoreAccessError; that the place is another run's, ConfigError.

    Attributes:
        longest_poll_seconds: between looks for other ranks' notes.
    """

    longest_poll_seconds: float

    def claim(self, run_id: str, run_path: Path) -> str:
        """Make the place this start's, and remove what killed saves left; on one rank. What it returns, all `join`."""

    def join(self, record: str) -> None:
        """Take part in what another rank has claimed."""

    def list_steps(self) -> list[int]:
        """Return the steps of the complete checkpoints, oldest first."""

    def list_claimed(self) -> list[int]:
        """Return the steps that a checkpoint seems to be of, even one that has lost its manifest, oldest first."""

    def has_any(self) -> bool:
        """Whether there is any checkpoint, be it damaged: a run that has some never begins anew by itself."""

    def has(self, step: int) -> bool:
        """Whether the checkpoint of a step is complete; quick, on the rank that begins saves."""

    def open(self, step: int) -> CheckpointReader:
        """Open a checkpoint."""

    def begin(self, step: int, num_bytes: int, num_ranks: int) -> None:
        """Begin a save of about so many bytes by so many ranks; quick, for training waits."""

    def write_tensors(
        self, step: int, name: str, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]
    ) -> tuple[int, str]:
        """Write a file of a save; return its size in bytes and its sha256."""

    def write_note(self, step: int, name: str, text: str) -> None:
        """Leave a small text for the rank that completes the save."""

    def list_notes(self, step: int, suffix: str) -> list[str]:
        """Return the names of the notes so far, sorted."""

    def take_notes(self, step: int, names: Sequence[str]) -> list[str]:
        """Return what is in notes, and remove them."""

    def complete(self, step: int, manifest: str) -> None:
        """Write the manifest, which makes the checkpoint complete."""

    def abandon(self, step: int) -> None:
        """Remove what a save that has failed left, as far as that is possible."""

    def set_aside(self, step: int) -> None:
        """Make a damaged checkpoint one that does not count, so that its step can be saved again."""

    def remove(self, step: int) -> None:
        """Remove a complete checkpoint."""


def open_place(section: CheckpointSection, run_path: Path, data: DataSection) -> Place:
    """Open the place that a config gives; nothing is read.

    Args:
        section: the config's `checkpoint`.
        run_path: the run folder.
        data: the config's `data`, whose node cache and patience also serve checkpoints.
    Raises:
        DataError: the URL is of no kind that is installed.
    """
    if not section.dir:
        return FolderPlace(run_path / "checkpoints")
    if is_remote(section.dir):
        return StorePlace(section.dir, data)
    return FolderPlace(Path(section.dir), is_in_run=False)
