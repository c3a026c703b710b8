"""A prepared corpus that lies in a store, seen as a local folder whose files come when they are needed.

The node's cache has a folder for the manifest and one for each row table, named by the hash of the corpus's URL and of
what is in them; and one for the shards of all versions of the corpus, where a shard's name has its sha256 in it: a
corpus that was prepared again, or grew, keeps what did not change. Every shard is compared with its sha256 before it
gets its name.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from pretrain.data.node_cache import CacheFile, NodeCache, is_at
from pretrain.data.row_table import IDENTITY_NAME, array_paths, listed_file, table_folder
from pretrain.data.shards import MANIFEST_NAME, Manifest, Shard, file_sha256, index_path
from pretrain.errors import ConfigError, DataError
from pretrain.options.config import DataSection
from pretrain.redaction import redact
from pretrain.storage.store_errors import LostFileError, StoreError, WrongContentError
from pretrain.storage.stores import PIPE, STALL_SECONDS, Store, is_remote, shown

_MAX_TRIES = 5  # to hold a file that other processes evict as soon as it is there


def open_remote(shards: str, data: DataSection) -> RemoteCorpus | None:
    """Open what `data.sources[].shards` names, or return None if that is a local folder.

    Raises:
        ConfigError: It is a command, and the config does not allow it.
        DataError: The store cannot be read.
    """
    if not is_remote(shards):
        return None
    if shards.startswith(PIPE) and not data.allow_pipe:
        raise ConfigError(
            f"data.sources: shards is {redact(shards)}, which runs what follows pipe: in a shell; expected "
            "data.allow_pipe=true for that. Set it if you trust whoever wrote the config (launch/evaluate.py has "
            "--allow-pipe), or use a folder or a URL."
        )
    return RemoteCorpus(Store(shards, data.retry_seconds), open_cache(data))


def open_cache(data: DataSection) -> NodeCache:
    """Open the node's cache of files from elsewhere, which all processes of the node share.

    Raises:
        DataError: Its folder cannot be used.
    """
    folder = Path(data.cache_dir or Path(tempfile.gettempdir(), f"longhaul-cache-{os.getuid()}"))
    return NodeCache(folder.absolute(), data.cache_bytes, data.retry_seconds + 2 * STALL_SECONDS)


class RemoteCorpus:
    """The files of one corpus, from its store through the cache.

    Attributes:
        store: Where they come from.
        cache: Where they go.
        folder: The manifest's folder in the cache.
    """

    def __init__(self, store: Store, cache: NodeCache) -> None:
        """Read the manifest; it is read at every start, so that its content is what decides.

        Raises:
            DataError: There is no manifest, or the store cannot be read.
        """
        self.store, self.cache = store, cache
        self._manifest = content = store.read(MANIFEST_NAME, check=json.loads)
        self.folder = self._folder_of(content)
        self._shard_folder = self._folder_of(b"shards")
        self._lost: dict[str, tuple[str, str, str]] = {}  # the LostFileError of a shard, by its name
        self._held: list[int] = []
        self._checked: set[str] = set()  # shards whose index was compared with its sha256 by this process
        self._lock = threading.Lock()
        self._keep(self.folder / MANIFEST_NAME, len(content), lambda file: file.write(content))

    def __str__(self) -> str:
        return shown(self.store.url)

    def fetch_rows(self, manifest: Manifest, split: str, seq_len: int, packing: str = "best_fit") -> Path:
        """Download the row table of a split and keep it in the cache.

        Returns:
            The folder to open the table in.

        Raises:
            DataError: The corpus has no rows of this `seq_len` and packing, or the store cannot be read.
        """
        name = table_folder("", seq_len, packing).name
        try:
            identity = self.store.read(f"{name}/{IDENTITY_NAME}", check=json.loads)
        except DataError as error:
            kind = f"data.seq_len {seq_len}{'' if packing == 'best_fit' else f' and data.packing {packing}'}"
            raise DataError(
                f"{error} Rows of {kind} are made by `prepare`, in the folder {name}: upload it too."
            ) from error
        folder = self._folder_of(self.folder.name.encode() + identity)
        self._keep(folder / name / IDENTITY_NAME, len(identity), lambda file: file.write(identity))
        num_slots = sum(shard.num_tokens - shard.num_documents for shard in manifest.shards(split))
        listed = json.loads(identity)
        for array, path in array_paths(folder / name, split).items():
            num_bytes, sha256 = listed_file(listed, path.name) if isinstance(listed, dict) else (None, None)
            check = _check_segments(num_slots) if array == "segments" else _check_array
            write = self._downloader(f"{name}/{path.name}", num_bytes, sha256, check, IDENTITY_NAME)
            self._keep(path, num_bytes, write)
        return folder

    def cached(self, shard: Shard) -> tuple[Path, Shard]:
        """The folder that a shard is in once it is in the cache, and the shard by its name there."""
        version = hashlib.sha256(f"{shard.sha256} {shard.index_sha256}".encode()).hexdigest()
        return self._shard_folder, replace(shard, name=f"{shard.name}.{version[:16]}")

    def location(self, shard: Shard) -> str:
        """Where a shard's tar lies, as messages say it."""
        return self.store.location(f"{shard.name}.tar")

    def is_lost(self, shard: Shard) -> bool:
        """Whether `open` has found that the store does not have the shard any more."""
        return shard.name in self._lost

    def open(self, shard: Shard) -> int:
        """Open a shard's tar, downloaded if need be; it and its index stay until the descriptor is closed.

        Raises:
            CacheFullError: There is no room for it.
            LostFileError: The store does not have it any more, or a damaged one; it is not looked for again.
            DataError: It cannot be had, or the store has another version of the corpus by now.
        """
        if shard.name not in self._lost:
            try:
                return self._open(shard)
            except LostFileError as error:
                self._check_there(error)
                self._lost[shard.name] = str(error), error.name, error.reason
        raise LostFileError(*self._lost[shard.name])

    def _check_there(self, error: LostFileError) -> None:
        """Tell the loss of a file from that of the corpus, which ends a run whatever `data.max_damaged_fraction` is."""
        try:
            content = self.store.read(MANIFEST_NAME, check=json.loads)
        except LostFileError as other:
            raise DataError(f"{error} The manifest is gone too: {other}") from error
        if content != self._manifest:
            raise DataError(
                f"{error} The manifest there is another one than at the start: the corpus was replaced while it was "
                "read. Put the old one back, or start the run again with the new one."
            ) from error

    def _open(self, shard: Shard) -> int:
        path = self._tar(shard)
        for _ in range(_MAX_TRIES):
            self.add(shard)
            descriptor = self.cache.hold(path)
            if descriptor is None:
                continue
            try:
                if os.fstat(descriptor).st_size == shard.num_bytes:
                    self._check_index(shard)
                    self._add_index(shard)
                    return descriptor
                path.unlink(missing_ok=True)
            except BaseException:
                os.close(descriptor)
                raise
            os.close(descriptor)
        raise DataError(
            f"{path}: it is gone as soon as it is downloaded; expected it to stay while it is read. Is something else "
            "deleting files in data.cache_dir? If not, raise data.cache_bytes."
        )

    def add(self, shard: Shard, until: threading.Event | None = None) -> bool:
        """Download a shard if it is not there.

        Args:
            shard: The shard.
            until: For downloads ahead of need: they do not wait for others that download the same, do not try again
                what fails, leave in the cache what is needed, and end when this is set.

        Returns:
            Whether it is there; False only if another one is downloading it and this one does not wait.

        Raises:
            CacheFullError: There is no room for it.
            DataError: It cannot be had.
        """
        write = self._downloader(f"{shard.name}.tar", shard.num_bytes, shard.sha256, until=until)
        there = self.cache.add(self._tar(shard), shard.num_bytes, write, until is not None)
        return there and self._add_index(shard, until)

    def files_of(self, shard: Shard) -> tuple[Path, Path]:
        """Where a shard's tar and index are once they are in the cache."""
        return self._tar(shard), self._index(shard)

    def renew_if_damaged(self, descriptor: int, shard: Shard) -> None:
        """Drop a shard from the cache if it is no longer what the manifest says; what the store has is downloaded next.

        Args:
            descriptor: The tar as it was read.
            shard: The shard.
        """
        path = self._tar(shard)
        if not is_at(descriptor, path):
            return  # another process has found it before
        try:
            is_damaged = file_sha256(path) != shard.sha256
        except OSError:
            is_damaged = True
        if is_damaged:
            path.unlink(missing_ok=True)

    def close(self) -> None:
        """End downloads, and let go of what was kept."""
        self.store.close()
        while self._held:
            os.close(self._held.pop())

    def _tar(self, shard: Shard) -> Path:
        folder, cached = self.cached(shard)
        return folder / f"{cached.name}.tar"

    def _index(self, shard: Shard) -> Path:
        folder, cached = self.cached(shard)
        return index_path(folder, cached.name)

    def _folder_of(self, version: bytes) -> Path:
        """A folder for one part or version of the corpus."""
        key = hashlib.sha256(self.store.url.encode() + b"\n" + version).hexdigest()
        return self.cache.folder / key[:40]

    def _keep(self, path: Path, num_bytes: int | None, write: Callable[[CacheFile], object]) -> None:
        """Put a file into the cache and hold it until `close`."""
        for _ in range(_MAX_TRIES):
            self.cache.add(path, num_bytes, write)
            descriptor = self.cache.hold(path)
            if descriptor is not None:
                self._held.append(descriptor)
                return
        raise DataError(
            f"{path}: it is gone as soon as it is there. Raise data.cache_bytes, or clear {self.cache.folder}."
        )

    def _check_index(self, shard: Shard) -> None:
        """Compare an index that is there with the manifest, once a process; a damaged one is removed."""
        with self._lock:
            path = self._index(shard)
            if shard.name not in self._checked and path.exists() and file_sha256(path) != shard.index_sha256:
                path.unlink()
            self._checked.add(shard.name)

    def _add_index(self, shard: Shard, until: threading.Event | None = None) -> bool:
        name = index_path(Path(), shard.name).name
        write = self._downloader(name, None, shard.index_sha256, until=until)
        return self.cache.add(self._index(shard), None, write, until is not None, spare=self._tar(shard))

    def _downloader(
        self,
        name: str,
        num_bytes: int | None = None,
        sha256: str | None = None,
        check: Callable[[Path], object] = lambda _: None,
        listed_in: str = MANIFEST_NAME,
        until: threading.Event | None = None,
    ) -> Callable[[CacheFile], object]:
        """What fills a file of the cache from the store, until it is what it should be."""

        def receive(file: CacheFile, chunks: Iterator[bytes]) -> None:
            file.rewind()
            digest, size = hashlib.sha256(), 0
            for chunk in chunks:
                size += len(chunk)
                if num_bytes is not None and size > num_bytes:
                    break
                if until is not None and until.is_set():
                    raise StoreError("it is not wanted any more", is_final=True)
                file.write(chunk)
                digest.update(chunk)
            if num_bytes is not None and size > num_bytes:
                raise WrongContentError(f"it has more than {num_bytes} bytes; expected no more")
            if num_bytes is not None and size < num_bytes:
                raise WrongContentError(f"it has only {size} bytes; expected {num_bytes}", digest.hexdigest())
            if sha256 is not None and digest.hexdigest() != sha256:
                raise WrongContentError(f"its sha256 differs from that in {listed_in}", digest.hexdigest())
            file.end()
            check(file.path)

        return lambda file: self.store.fetch(name, lambda chunks: receive(file, chunks), until is None)


def _check_array(path: Path) -> np.ndarray:
    """Check that a `.npy` file is as long as it says, and return what it holds."""
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
        num_bytes = array.offset + array.nbytes
    except (OSError, ValueError, EOFError, AttributeError) as error:
        raise WrongContentError(f"it is not a whole .npy file: {error}") from error
    if num_bytes != path.stat().st_size:
        raise WrongContentError(f"it has {path.stat().st_size} bytes; expected {num_bytes}")
    return array


def _check_segments(num_slots: int) -> Callable[[Path], None]:
    """Check that the rows hold every token of the split once: of tables without a sha256 no more is known."""

    def check(path: Path) -> None:
        array = _check_array(path)
        total = int(array["length"].sum(dtype=np.uint64)) if array.dtype.names else -1
        if total != num_slots:
            raise WrongContentError(f"its rows hold {total} tokens; expected {num_slots}, as in the manifest")

    return check


def min_cache_bytes(shards: Sequence[Shard], window_shards: int) -> int:
    """What the cache must hold of one corpus so that the rows of a window are not downloaded over and over."""
    sizes = sorted((shard.num_bytes for shard in shards), reverse=True)
    return sum(sizes[:window_shards])
