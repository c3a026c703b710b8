"""Reading single documents out of shards: one `pread` each, checked against the index's crc32."""

from __future__ import annotations

import os
import time
import zlib
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import numpy as np

from pretrain.data.node_cache import CacheFullError
from pretrain.data.remote_corpus import RemoteCorpus
from pretrain.data.shards import MANIFEST_NAME, Shard, file_sha256, index_path, load_index, repair_advice
from pretrain.errors import DataError
from pretrain.storage.store_errors import LostFileError

_ROOM_SECONDS, _ROOM_POLL_SECONDS = 60.0, 0.2  # for which a full cache is waited for
_MIN_DAMAGED_FOR_LOST = 8  # fewer damaged documents than this never count as the loss of a whole shard


class DamagedDocumentError(DataError):
    """A document cannot be had as it was written, also when it is read again.

    Attributes:
        reason: What is wrong, in words.
        num_tokens: Tokens of the document; of its shard if that is lost.
        is_shard_lost: Nothing of its shard can be read, or most of what was read is damaged.
    """

    def __init__(self, text: str, reason: str = "", num_tokens: int = 0, is_shard_lost: bool = False) -> None:
        """Take the message, and what of it programs need."""
        super().__init__(text)
        self.reason, self.num_tokens, self.is_shard_lost = reason, num_tokens, is_shard_lost


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
                raise DataError(
                    f"{path}{link_target(path)} is missing; expected {expected}. {repair_advice(Path(folder))}"
                )
        if problem := _size_problem(tar_path.stat().st_size, shard):
            raise DataError(f"{tar_path}: {problem}. {repair_advice(tar_path.parent)}")


def link_target(path: Path) -> str:
    """Where a link leads, for messages; empty for what is no link."""
    return f" (a link to {os.path.realpath(path)})" if path.is_symlink() else ""


def _size_problem(num_bytes: int, shard: Shard) -> str:
    """What is wrong with the size of a tar; empty if nothing is."""
    if num_bytes == shard.num_bytes:
        return ""
    state = "truncated" if num_bytes < shard.num_bytes else "replaced or appended to"
    return f"size is {num_bytes} bytes; expected {shard.num_bytes}, as in the manifest: it was {state}"


class ShardReader:
    """Reads single documents of one shard, each checked against its crc32.

    What has become of the file since it was written does not matter to a document whose own bytes are right.
    """

    def __init__(
        self,
        folder: str | Path,
        shard: Shard,
        dtype: str,
        verify_index: bool = True,
        remote: RemoteCorpus | None = None,
    ) -> None:
        """Open the tar and map the index; if one is missing or damaged, `read` says so of every document.

        Args:
            folder: Folder of the corpus.
            shard: The shard as the manifest describes it.
            dtype: `uint16` or `uint32`.
            verify_index: Compare the index with its sha256.
            remote: Where the shard's files come from, if not from `folder`.

        Raises:
            CacheFullError: There is no room for files from elsewhere.
            DataError: The whole corpus is gone, or where it lies cannot be read.
        """
        self._folder, self._shard, self._remote = Path(folder), shard, remote
        self._dtype = np.dtype(dtype).newbyteorder("<")
        self._itemsize = self._dtype.itemsize
        self._path = self._folder / f"{shard.name}.tar"
        self._place = remote.location(shard) if remote else str(self._path)
        self._num_intact = 0  # successful reads
        self._damaged: set[int] = set()
        self._descriptor = -1
        self._problem = ""  # what is wrong with the files, if anything is
        # Two integers a document, the second one tokens and crc32: three times quicker to read than a record.
        self._records: np.ndarray | None = None
        self._open()
        try:
            self._map_index(verify_index)
        except DataError:
            self.close()
            raise

    def read(self, document: int, begin: int = 0, end: int | None = None) -> np.ndarray:
        """Return the ids of one document, bos and eos included, from the `begin`-th to the `end`-th.

        Raises:
            DamagedDocumentError: The document is damaged where it lies, or its shard is missing.
            DataError: The whole corpus is gone, or where it lies cannot be read.
        """
        if self._records is None:
            raise self._failure(document, self._problem, 0, is_shard_lost=True)
        offset, tokens_and_crc32 = self._records[document].tolist()
        num_tokens, crc32 = tokens_and_crc32 & 0xFFFFFFFF, tokens_and_crc32 >> 32
        num_bytes = num_tokens * self._itemsize
        for attempt in range(2):
            if attempt:
                if self._remote and self._descriptor >= 0:
                    self._remote.renew_if_damaged(self._descriptor, self._shard)
                self._open()  # a network file system may serve another copy to a new descriptor
            try:
                data = os.pread(self._descriptor, num_bytes, offset)
            except OSError:  # a bad sector, a stale handle or no file at all: reading again decides
                continue
            if zlib.crc32(data) == crc32 and len(data) == num_bytes:
                self._num_intact += 1
                return np.frombuffer(data, self._dtype)[begin:end]
        self._damaged.add(document)
        is_lost = self._descriptor < 0 or (
            len(self._damaged) >= _MIN_DAMAGED_FOR_LOST and len(self._damaged) > self._num_intact
        )
        reason = self._problem or (
            f"bytes {offset} to {offset + num_bytes} have another crc32 than in the index, also when read again"
        )
        raise self._failure(document, reason, num_tokens, is_lost)

    def close(self) -> None:
        """Give the file descriptor back."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def _failure(self, document: int, reason: str, num_tokens: int, is_shard_lost: bool) -> DamagedDocumentError:
        text = f"{self._place}: document {document} is damaged: {reason}. {repair_advice(self._folder)}"
        num_tokens = self._shard.num_tokens if is_shard_lost else num_tokens
        return DamagedDocumentError(text, reason, num_tokens, is_shard_lost)

    def _map_index(self, verify: bool) -> None:
        folder, shard = self._remote.cached(self._shard) if self._remote else (self._folder, self._shard)
        path = index_path(folder, shard.name)
        for attempt in range(2):
            if self._remote and self._descriptor < 0:
                return  # `_problem` says why there is nothing
            try:
                index = np.asarray(load_index(folder, shard))
                if verify and file_sha256(path) != shard.index_sha256:
                    raise DataError(f"{path}: its sha256 differs from the manifest's. {repair_advice(folder)}")
            except DataError as error:
                if self._remote:
                    raise
                if attempt:
                    self._check_there()
                    self._problem = str(error).removesuffix(f". {repair_advice(folder)}")
            else:
                self._records = self._adopt(index, path).view("<u8").reshape(-1, 2)
                return

    def _adopt(self, index: np.ndarray, path: Path) -> np.ndarray:
        """What `read` goes by, of `INDEX_DTYPE`: the index that lies at a path, in a shard of ids."""
        return index

    def _open(self) -> None:
        self.close()
        self._problem = ""
        try:
            if self._remote:
                self._descriptor = self._remote.open(self._shard)
            else:
                self._descriptor = os.open(self._path, os.O_RDONLY | os.O_CLOEXEC)
                self._problem = _size_problem(os.fstat(self._descriptor).st_size, self._shard)
        except LostFileError as error:
            is_tar = error.name == f"{self._shard.name}.tar"
            self._problem = error.reason if is_tar else f"{error.name}: {error.reason}"
        except OSError as error:
            self._check_there()
            self._problem = f"it cannot be opened: {error.strerror}{link_target(self._path)}"

    def _check_there(self) -> None:
        """Tell the loss of a file from that of the folder, such as a disk that is not mounted any more."""
        manifest = self._folder / MANIFEST_NAME
        if not manifest.exists():
            raise DataError(
                f"{manifest} is gone; expected the corpus to stay where it is while it is read. Put it back (is its "
                "disk mounted?) and run the same command again."
            )


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
