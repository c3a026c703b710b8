"""Reading single documents out of shards: one `pread` each, checked against the index's crc32."""

from __future__ import annotations

import os
import time
import zlib
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import numpy as np

from pretrain.errors import DataError
from pretrain.node_cache import CacheFullError
from pretrain.remote_corpus import RemoteCorpus
from pretrain.shards import Shard, file_sha256, index_path, load_index, repair_advice

_ROOM_SECONDS, _ROOM_POLL_SECONDS = 60.0, 0.2  # for which a full cache is waited for
_MIN_DAMAGED_FOR_REPLACED = 8  # fewer damaged documents than this never condemn a whole shard


class DamagedDocumentError(DataError):
    """One document's bytes do not have the checksum of its index, also when read again."""


def check_shards(folder: str | Path, shards: tuple[Shard, ...]) -> None:
    """Check that every tar and index is there, and every tar of the size that the manifest lists.

    Raises:
        DataError: Names the first shard that is missing, truncated or replaced, and how to mend it.
    """
    for shard in shards:
        tar_path = Path(folder) / f"{shard.name}.tar"
        parts = ((tar_path, f"{shard.num_bytes} bytes"), (index_path(Path(folder), shard.name), "the shard's index"))
        for path, expected in parts:
            if not path.exists():
                raise DataError(f"{path} is missing; expected {expected}. {repair_advice(Path(folder))}")
        _check_size(tar_path, tar_path.stat().st_size, shard)


def _check_size(path: Path, num_bytes: int, shard: Shard) -> None:
    if num_bytes != shard.num_bytes:
        state = "truncated" if num_bytes < shard.num_bytes else "replaced or appended to"
        raise DataError(
            f"{path}: size is {num_bytes} bytes; expected {shard.num_bytes}, as in the manifest: it was {state}. "
            f"{repair_advice(path.parent)}"
        )


class ShardReader:
    """Reads single documents of one shard, each checked against its crc32."""

    def __init__(
        self,
        folder: str | Path,
        shard: Shard,
        dtype: str,
        verify_index: bool = True,
        remote: RemoteCorpus | None = None,
    ) -> None:
        """Open the tar and map the index.

        Args:
            folder: Folder of the corpus.
            shard: The shard as the manifest describes it.
            dtype: `uint16` or `uint32`.
            verify_index: Compare the index with its sha256.
            remote: Where the shard's files come from, if not from `folder`.

        Raises:
            CacheFullError: There is no room for files from elsewhere.
            DataError: A file is missing, of another size, or the index is damaged.
        """
        self._folder, self._shard, self._remote = Path(folder), shard, remote
        self._dtype = np.dtype(dtype).newbyteorder("<")
        self._path = self._folder / f"{shard.name}.tar"
        self._num_intact = 0  # successful reads
        self._damaged: set[int] = set()
        self._descriptor = -1
        self._open()
        try:
            self._index = self._adopt(self._load_index(verify_index), index_path(self._folder, shard.name))
        except DataError:
            self.close()
            raise

    def read(self, document: int, begin: int = 0, end: int | None = None) -> np.ndarray:
        """Return the ids of one document, bos and eos included, from the `begin`-th to the `end`-th.

        Raises:
            DamagedDocumentError: The document is damaged on disk.
            DataError: The shard cannot be read, or most of it is damaged.
        """
        offset, num_tokens, crc32 = self._index[document].tolist()
        for attempt in range(2):
            if attempt:
                if self._remote:
                    self._remote.renew_if_damaged(self._descriptor, self._shard)
                self._open()  # a network file system may serve another copy to a new descriptor
            data = self._read_bytes(num_tokens * self._dtype.itemsize, offset)
            if zlib.crc32(data) == crc32 and len(data) == num_tokens * self._dtype.itemsize:
                self._num_intact += 1
                return np.frombuffer(data, dtype=self._dtype)[begin:end]
        self._damaged.add(document)
        if len(self._damaged) >= _MIN_DAMAGED_FOR_REPLACED and len(self._damaged) > self._num_intact:
            raise DataError(
                f"{self._path}: {len(self._damaged)} documents are damaged and {self._num_intact} are not, so far; "
                f"expected the file that the manifest describes. {repair_advice(self._folder)}"
            )
        raise DamagedDocumentError(
            f"{self._path}: document {document} (bytes {offset} to {offset + num_tokens * self._dtype.itemsize}) "
            f"is damaged: its crc32 differs from the index, also when read again. {repair_advice(self._folder)}"
        )

    def close(self) -> None:
        """Give the file descriptor back."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def _adopt(self, index: np.ndarray, path: Path) -> np.ndarray:
        """What `read` goes by, of `INDEX_DTYPE`: the index that lies at a path, in a shard of ids."""
        return index

    def _load_index(self, verify: bool) -> np.ndarray:
        index = np.asarray(load_index(self._folder, self._shard))  # a plain view of the map: quicker to index
        path = index_path(self._folder, self._shard.name)
        if verify and file_sha256(path) != self._shard.index_sha256:
            raise DataError(f"{path}: its sha256 differs from the manifest's. {repair_advice(self._folder)}")
        return index

    def _open(self) -> None:
        self.close()
        if self._remote:
            self._descriptor = self._remote.open(self._shard)
            return
        try:
            self._descriptor = os.open(self._path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise DataError(
                f"{self._path} cannot be opened: {error.strerror}. {repair_advice(self._folder)}"
            ) from error
        _check_size(self._path, os.fstat(self._descriptor).st_size, self._shard)

    def _read_bytes(self, num_bytes: int, offset: int) -> bytes:
        try:
            return os.pread(self._descriptor, num_bytes, offset)
        except OSError:  # a bad sector or a stale handle: reading again decides
            return b""


class ShardCache:
    """Keeps the shards that are in use open, at most `capacity` of them: each takes two file descriptors."""

    def __init__(self, capacity: int = 128) -> None:
        """Begin empty."""
        self._capacity = capacity
        self._readers: OrderedDict[tuple[Path, str], ShardReader] = OrderedDict()
        self._verified: set[tuple[Path, str]] = set()
        self._from_elsewhere: set[tuple[Path, str]] = set()  # open, and keep their place in the node's cache
        self._used: set[tuple[Path, str]] = set()  # of these, since `release_unused`

    def reader(
        self, folder: Path, shard: Shard, dtype: str, remote: RemoteCorpus | None = None,
        open_shard: Callable[..., ShardReader] = ShardReader,
    ) -> ShardReader:  # fmt: skip
        """Return an open reader, made by `open_shard` as by `ShardReader`; the one unused for longest makes room."""
        key = (folder, shard.name)
        reader = self._readers.get(key)
        if reader is None:
            reader = self._open(key, shard, dtype, remote, open_shard)
            self._verified.add(key)
            if remote:
                self._from_elsewhere.add(key)
            self._readers[key] = reader
            if len(self._readers) > self._capacity:
                self._close(next(iter(self._readers)))
        if remote is not None:
            self._used.add(key)
        self._readers.move_to_end(key)
        return reader

    def release_unused(self) -> None:
        """Close the shards from elsewhere that were not read since the last call, so that they can be evicted."""
        if self._from_elsewhere:
            for key in self._from_elsewhere - self._used:
                self._close(key)
            self._used.clear()

    def close(self) -> None:
        """Close all."""
        while self._readers:
            self._close(next(iter(self._readers)))

    def _open(
        self, key: tuple[Path, str], shard: Shard, dtype: str, remote: RemoteCorpus | None,
        open_shard: Callable[..., ShardReader],
    ) -> ShardReader:  # fmt: skip
        give_up_at = time.monotonic() + _ROOM_SECONDS
        while True:
            try:
                return open_shard(key[0], shard, dtype, key not in self._verified, remote)
            except CacheFullError:
                oldest = next((other for other in self._readers if other in self._from_elsewhere), None)
                if oldest is not None:
                    self._close(oldest)
                elif time.monotonic() > give_up_at:
                    raise
                else:
                    time.sleep(_ROOM_POLL_SECONDS)  # other ranks of the node get on, and let go of theirs

    def _close(self, key: tuple[Path, str]) -> None:
        self._from_elsewhere.discard(key)
        self._readers.pop(key).close()
