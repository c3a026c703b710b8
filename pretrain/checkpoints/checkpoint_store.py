"""Checkpoints in an object store, which has no folders and no renaming.

What makes a checkpoint complete is its manifest, written last and removed first. A rank's share goes there in parts
out of the copy in memory, with no disk between; reading takes whole files into the node's cache, checked, for all its
ranks.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path

import torch

from pretrain.checkpoints.checkpoint_files import MANIFEST, CheckpointReader, folder_name, step_of
from pretrain.checkpoints.checkpoint_owner import OWNER, Ownership
from pretrain.data.node_cache import CacheFile, NodeCache
from pretrain.data.remote_corpus import open_cache
from pretrain.errors import DataError, LonghaulError, StoreAccessError
from pretrain.options.config import DataSection
from pretrain.storage.store_errors import LostFileError, WrongContentError
from pretrain.storage.tensor_files import TensorBytes, TensorFile, sha256_of
from pretrain.storage.writable_store import WritableStore

logger = logging.getLogger("longhaul")
DAMAGED_MANIFEST = "manifest.damaged.json"
SAVE_SECONDS = 120.0  # that a request which fails is tried again: without the save the run goes on, and the next comes
HASTY_SECONDS = 10.0  # likewise, where training waits
_MAX_TRIES = 5  # to hold a file that other processes evict as soon as it is there


class StorePlace:
    """A URL of an object store; as `Place` says."""

    longest_poll_seconds = 5.0

    def __init__(self, url: str, data: DataSection) -> None:
        """Open the store; nothing is read.

        Args:
            url: that the checkpoints are under.
            data: whose node cache and patience also serve checkpoints.
        Raises:
            DataError: the URL is of no kind that is installed.
        """
        option = "checkpoint.dir"
        self._store = WritableStore(url, min(SAVE_SECONDS, data.retry_seconds), option)
        self._hasty = WritableStore(url, min(HASTY_SECONDS, data.retry_seconds), option)
        self._patient = WritableStore(url, data.retry_seconds, option)
        self._data = data
        self._ownership = Ownership(str(self), partial(_read_owner, self._store), self._write_owner)
        self._complete: set[int] = set()
        self._unclean: set[int] = set()  # steps whose folders hold something, but no manifest
        self._whole: set[tuple[int, int]] = set()  # files of the cache that this process has checked: device, inode

    def __str__(self) -> str:
        return self._store.location("").rstrip("/")

    def claim(self, run_id: str, run_path: Path) -> str:
        """As `Place` says."""
        record = self._ownership.claim(run_id, run_path)
        files = self._store.list_files()
        self._complete = _steps_with(MANIFEST, files)
        damaged = _steps_with(DAMAGED_MANIFEST, files) - self._complete
        found = {step for name in files if (step := step_of(name.partition("/")[0])) is not None}
        for step in sorted(found - self._complete - damaged):
            self._store.remove_folder(folder_name(step))
        self._unclean = damaged
        return record

    def join(self, record: str) -> None:
        """As `Place` says."""
        self._ownership.join(record)

    def list_steps(self) -> list[int]:
        """As `Place` says."""
        self._complete = _steps_with(MANIFEST, self._store.list_files())
        return sorted(self._complete)

    def list_claimed(self) -> list[int]:
        """As `Place` says: what has no manifest is a leftover here."""
        return self.list_steps()

    def has_any(self) -> bool:
        """As `Place` says."""
        files = self._store.list_files()
        return bool(_steps_with(MANIFEST, files) | _steps_with(DAMAGED_MANIFEST, files))

    def has(self, step: int) -> bool:
        """As `Place` says; known without asking the store, for a step of training waits for the answer."""
        return step in self._complete

    def open(self, step: int) -> CheckpointReader:
        """As `Place` says."""
        return CheckpointReader(StoredFiles(self._patient, self._cache, folder_name(step), self._whole))

    def begin(self, step: int, num_bytes: int, num_ranks: int) -> None:
        """As `Place` says; the store is asked only if something is known to be in the way."""
        if step in self._unclean:
            self._check_idle(step)
            self._ownership.check(partial(_read_owner, self._hasty))
            self._clear(step, self._hasty)
            self._unclean.discard(step)

    def write_tensors(
        self, step: int, name: str, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]
    ) -> tuple[int, str]:
        """As `Place` says."""
        self._check_idle(step)
        self._ownership.check()
        content = TensorBytes(tensors, metadata)
        self._store.upload(f"{folder_name(step)}/{name}", content.num_bytes, content.chunks)
        return content.num_bytes, content.sha256

    def write_note(self, step: int, name: str, text: str) -> None:
        """As `Place` says."""
        self._store.write(f"{folder_name(step)}/{name}", text.encode())

    def list_notes(self, step: int, suffix: str) -> list[str]:
        """As `Place` says."""
        names = self._store.list_files(folder_name(step))
        return sorted(name.rpartition("/")[2] for name in names if name.endswith(suffix))

    def take_notes(self, step: int, names: Sequence[str]) -> list[str]:
        """As `Place` says."""
        paths = [f"{folder_name(step)}/{name}" for name in names]
        notes = self._store.read_all(paths)
        self._store.remove(paths)
        return [notes[path].decode() for path in paths]

    def complete(self, step: int, manifest: str) -> None:
        """As `Place` says."""
        self._ownership.check()
        self._store.write(f"{folder_name(step)}/{MANIFEST}", manifest.encode())
        self._complete.add(step)

    def abandon(self, step: int) -> None:
        """As `Place` says; what cannot be removed now is when the step is saved again, or at the next start."""
        self._unclean.add(step)
        try:
            self._ownership.check(partial(_read_owner, self._hasty))
            self._clear(step, self._hasty)
            self._unclean.discard(step)
        except LonghaulError as error:
            logger.warning("what a failed save left is still there: %s", error)

    def set_aside(self, step: int) -> None:
        """As `Place` says: its manifest is renamed to `manifest.damaged.json`."""
        manifest = f"{folder_name(step)}/{MANIFEST}"
        self._store.write(f"{folder_name(step)}/{DAMAGED_MANIFEST}", self._store.read_if_there(manifest) or b"")
        self._store.remove([manifest])
        self._complete.discard(step)
        self._unclean.add(step)

    def remove(self, step: int) -> None:
        """As `Place` says."""
        self._complete.discard(step)
        self._unclean.add(step)
        self._clear(step, self._store)
        self._unclean.discard(step)

    def _check_idle(self, step: int) -> None:
        """Make sure that no request of an earlier save of this step hangs: done late, it would spoil this one."""
        if self._store.is_busy(folder_name(step)) or self._hasty.is_busy(folder_name(step)):
            raise StoreAccessError(
                f"{self._store.location(folder_name(step))}: requests of an earlier save of this step still hang; "
                "expected none. A later step can be saved."
            )

    def _clear(self, step: int, store: WritableStore) -> None:
        store.remove([f"{folder_name(step)}/{MANIFEST}"])  # first: half a checkpoint is never seen
        store.remove_folder(folder_name(step))

    @cached_property
    def _cache(self) -> NodeCache:
        return open_cache(self._data)

    def _write_owner(self, record: str) -> None:
        self._store.write(OWNER, record.encode())


class StoredFiles:
    """The files of one checkpoint in a store; as `Files` says."""

    def __init__(self, store: WritableStore, cache: NodeCache, name: str, whole: set[tuple[int, int]]) -> None:
        """Take the store, where copies go, the checkpoint's folder, and which copies are known to be whole."""
        self._store, self._cache, self._name, self._whole = store, cache, name, whole
        self._held: list[int] = []

    def __str__(self) -> str:
        return self._store.location(self._name)

    @property
    def name(self) -> str:
        """As `Files` says."""
        return self._name

    def read_manifest(self) -> str:
        """As `Files` says."""
        content = self._store.read_if_there(f"{self._name}/{MANIFEST}")
        if content is None:
            raise FileNotFoundError("there is no such file")
        return content.decode()

    def find_problem(self, name: str, num_bytes: int, sha256: str) -> str | None:
        """As `Files` says; the copy stays in the cache."""
        size = self._store.size(f"{self._name}/{name}")
        if size is None:
            return f"{name} is missing"
        if size != num_bytes:
            return f"{name} has {size} bytes, not {num_bytes}"
        try:
            os.close(self._hold(name, num_bytes, sha256)[1])
        except LostFileError as error:
            return f"{name}: {error.reason}"
        return None

    def open_tensors(self, name: str, num_bytes: int, sha256: str) -> TensorFile:
        """As `Files` says; what is opened is not evicted from the cache before `close`."""
        path, descriptor = self._hold(name, num_bytes, sha256)
        self._held.append(descriptor)
        return TensorFile(path)

    def close(self) -> None:
        """As `Files` says."""
        while self._held:
            os.close(self._held.pop())

    def _hold(self, name: str, num_bytes: int, sha256: str) -> tuple[Path, int]:
        """Have a whole copy in the cache, and return its path and what keeps it there."""
        path = self._cache.folder / "checkpoints" / f"{sha256}.safetensors"
        for _ in range(_MAX_TRIES):
            self._cache.add(path, num_bytes, partial(self._download, name, sha256))
            if (descriptor := self._cache.hold(path)) is None:
                continue  # evicted as soon as it was there
            state = os.fstat(descriptor)
            identity = state.st_dev, state.st_ino
            if identity in self._whole or sha256_of(path) == sha256:
                self._whole.add(identity)
                return path, descriptor
            path.unlink(missing_ok=True)  # a copy of an earlier process, on a disk that has lost it
            os.close(descriptor)
        where = self._store.location(f"{self._name}/{name}")
        raise StoreAccessError(
            f"{path}: does not stay in the node's cache; expected a copy of {where}. "
            "Raise data.cache_bytes, or set data.cache_dir to another disk."
        )

    def _download(self, name: str, sha256: str, file: CacheFile) -> None:
        def receive(chunks: Iterator[bytes]) -> None:
            digest = hashlib.sha256()
            file.rewind()
            for chunk in chunks:
                digest.update(chunk)
                file.write(chunk)
            if digest.hexdigest() != sha256:
                raise WrongContentError("its sha256 is another than when it was written", digest.hexdigest())

        try:
            self._store.fetch(f"{self._name}/{name}", receive)
        except LostFileError:
            raise
        except DataError as error:
            raise StoreAccessError(str(error)) from error
        state = os.stat(file.path)
        self._whole.add((state.st_dev, state.st_ino))


def _read_owner(store: WritableStore) -> str | None:
    content = store.read_if_there(OWNER)
    return None if content is None else content.decode(errors="replace")


def _steps_with(name: str, files: Mapping[str, int]) -> set[int]:
    """The steps whose folders hold a file of that name."""
    parts = (path.partition("/") for path in files)
    return {step for folder, _, rest in parts if rest == name and (step := step_of(folder)) is not None}
