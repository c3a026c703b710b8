"""A folder on the node's own disk that holds files from elsewhere, up to a size, for all processes of the node.

Locks are `flock`s on the files themselves, which end with the process that holds them, however it ends:

- who downloads a file holds its temporary name exclusively, writes, syncs and renames it; what is left of one that was
  killed is not locked, and the next one begins anew in its place;
- who reads a file holds it shared, and what is held is not evicted;
- room is made under one lock for the whole folder. A temporary file has its final size from the beginning, so that what
  is still to be downloaded counts as well.
"""

from __future__ import annotations

import errno
import fcntl
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from pretrain.errors import DataError
from pretrain.storage.whole_file import sync_folder

_LOCK_NAME = ".lock"
_INDEX_SUFFIX = ".index.npy"
_GROWTH_BYTES = 16 << 20  # by which room is made for a file whose size is not known before
_POLL_SECONDS = 0.02


class CacheFullError(DataError):
    """There is no room for a file, because everything else in the cache is in use."""


class CacheFile:
    """A file on its way into the cache.

    Attributes:
        path: Its temporary name.
    """

    def __init__(self, file: BinaryIO, path: Path, make_room: Callable[[int, int], None]) -> None:
        """Take the open file, and what makes room for it to grow from one size to another."""
        self.path = path
        self._file, self._make_room, self._num_reserved = file, make_room, 0

    def rewind(self) -> None:
        """Begin anew; the room stays."""
        self._file.seek(0)

    def reserve(self, num_bytes: int) -> None:
        """Make room for so many bytes in all.

        Raises:
            CacheFullError: There is none.
        """
        if num_bytes > self._num_reserved:
            self._make_room(self._num_reserved, num_bytes)
            self._num_reserved = num_bytes

    def write(self, data: bytes) -> None:
        """Append bytes; makes room for them if that was not done before."""
        end = self._file.tell() + len(data)
        if end > self._num_reserved:
            try:
                self.reserve(min(2 * end, end + _GROWTH_BYTES))
            except CacheFullError:
                self.reserve(end)
        self._file.write(data)

    def end(self) -> None:
        """Cut the file off behind what was written, so that it is what it will be."""
        self._file.flush()
        os.ftruncate(self._file.fileno(), self._file.tell())


class NodeCache:
    """The cache of one node; any number of processes and threads use one folder.

    Attributes:
        folder: Where.
        max_bytes: Size that all files in it together do not exceed.
        needed: Files that this process needs soon, and in what order; they are evicted last, the latest ones first.
    """

    def __init__(self, folder: Path, max_bytes: int, wait_seconds: float) -> None:
        """Make the folder if it is missing.

        Args:
            folder: On a disk of this node.
            max_bytes: Size that all files in it together do not exceed.
            wait_seconds: How long another process that downloads a file may write nothing before waiting for it ends.

        Raises:
            DataError: The folder cannot be used.
        """
        self.folder, self.max_bytes = folder, max_bytes
        self.needed: Mapping[Path, int] = {}
        self._wait_seconds = wait_seconds
        with self._named_errors():
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            if not os.access(folder, os.R_OK | os.W_OK | os.X_OK):
                raise PermissionError(errno.EACCES, "it belongs to another user")

    def add(
        self,
        path: Path,
        num_bytes: int | None,
        write: Callable[[CacheFile], object],
        ahead: bool = False,
        spare: Path | None = None,
    ) -> bool:
        """Put a file into the cache, if it is not there, once on the whole node.

        Args:
            path: Its place in the cache.
            num_bytes: Its size; None if it is not known.
            write: Writes its content and checks it; an exception leaves nothing behind.
            ahead: It is not needed yet: what is `needed` does not make room for it, and nobody is waited for.
            spare: A file that does not make room for it either.

        Returns:
            Whether the file is there; False only if another one is downloading it and it is not needed yet.

        Raises:
            CacheFullError: There is no room.
            DataError: The disk fails, or the other process does nothing.
        """
        temporary = path.with_name(f".{path.name}.tmp")
        with self._named_errors():
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            while not path.exists():
                descriptor = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
                with open(descriptor, "r+b") as file:  # closing it ends the lock
                    if not self._lock(file, temporary, not ahead):
                        return False
                    if not is_at(descriptor, temporary):
                        continue  # the one before has renamed it, or it was evicted
                    if path.exists():
                        temporary.unlink()  # came into being after the rename
                    else:
                        self._fill(file, temporary, path, num_bytes, write, ahead, spare)
        return True

    def hold(self, path: Path) -> int | None:
        """Open a file of the cache for reading; it is not evicted before the descriptor is closed.

        Returns:
            The descriptor, or None if the file is not there.
        """
        with self._named_errors():
            try:
                descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            except FileNotFoundError:
                return None
            fcntl.flock(descriptor, fcntl.LOCK_SH)  # held otherwise for moments only: by who renamed it or may evict it
            if not is_at(descriptor, path):
                os.close(descriptor)
                return None
            with suppress(PermissionError):
                os.utime(descriptor)  # eviction goes by this time; access times are often not kept
            return descriptor

    def _fill(
        self,
        file: BinaryIO,
        temporary: Path,
        path: Path,
        num_bytes: int | None,
        write: Callable[[CacheFile], object],
        ahead: bool,
        spare: Path | None,
    ) -> None:
        def make_room(old_bytes: int, new_bytes: int) -> None:
            with self._alone():
                self._make_room(new_bytes - old_bytes, ahead, spare)
                os.ftruncate(file.fileno(), new_bytes)

        try:
            os.ftruncate(file.fileno(), 0)  # what a killed process left does not count
            target = CacheFile(file, temporary, make_room)
            target.reserve(num_bytes or 0)
            write(target)
            target.end()
            os.fsync(file.fileno())
            with self._alone():  # who counts the files at this moment would see it under neither name
                os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        sync_folder(path.parent)

    def _lock(self, file: BinaryIO, temporary: Path, waits: bool) -> bool:
        """Lock a temporary file, or wait until it is none any more; who holds it is waited for as long as it writes."""
        written, give_up_at = 0, 0.0
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return True
            except BlockingIOError:
                if not is_at(file.fileno(), temporary):
                    return True  # renamed, and held by its readers, perhaps to the end of the run
                if not waits:
                    return False
            now = os.fstat(file.fileno()).st_mtime_ns
            if now != written:
                written, give_up_at = now, time.monotonic() + self._wait_seconds
            elif time.monotonic() > give_up_at:
                raise DataError(
                    f"{temporary}: another process is downloading it, and has written nothing for "
                    f"{self._wait_seconds:.0f} s. Look for a process that hangs on this node "
                    "(`fuser` names it), end it, and run again."
                )
            time.sleep(_POLL_SECONDS)

    @contextmanager
    def _alone(self) -> Iterator[None]:
        with open(self.folder / _LOCK_NAME, "a+b") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def _make_room(self, num_bytes: int, ahead: bool, spare: Path | None) -> None:
        """Evict what was used longest ago until so many bytes more fit; the whole folder's lock must be held."""
        if num_bytes > self.max_bytes:
            raise CacheFullError(self._full(num_bytes, 0))
        files = list(self._files())
        excess = sum(size for _, size, _ in files) + num_bytes - self.max_bytes
        if excess <= 0:
            return
        needed = {str(path): place for path, place in self.needed.items()}
        files.sort(key=lambda file: (-needed.get(file[2], len(needed)), file[0]))
        for _, _, name in files:
            if name != str(spare) and not (ahead and name in needed):
                excess -= self._evict(Path(name))
                if excess <= 0:
                    return
        raise CacheFullError(self._full(num_bytes, self.max_bytes + excess - num_bytes))

    def _full(self, num_bytes: int, num_used: int) -> str:
        used = f", and {num_used} of them are in use" if num_used else ""
        return (
            f"data.cache_bytes is {self.max_bytes}{used}; expected room for {num_bytes} more in {self.folder}. "
            "Raise it, or set data.cache_dir to a larger disk"
        )

    def _files(self) -> Iterator[tuple[int, int, str]]:
        """Yield the time of last use, size and path of every file."""
        folders = [str(self.folder)]
        while folders:
            with suppress(FileNotFoundError), os.scandir(folders.pop()) as entries:
                for entry in entries:
                    if entry.is_dir(follow_symlinks=False):
                        folders.append(entry.path)
                    elif entry.name != _LOCK_NAME:
                        with suppress(FileNotFoundError):  # renamed or removed since
                            state = entry.stat(follow_symlinks=False)
                            yield state.st_mtime_ns, state.st_size, entry.path

    def _evict(self, path: Path) -> int:
        """Delete a file that nobody holds, and return how many bytes that frees; a tar takes its index with it."""
        if (
            path.name.endswith(_INDEX_SUFFIX)
            and path.with_name(path.name.removesuffix(_INDEX_SUFFIX) + ".tar").exists()
        ):
            return 0
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError:
            return 0
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not is_at(descriptor, path):
                return 0
            freed = os.fstat(descriptor).st_size
            path.unlink()
            if path.suffix == ".tar":
                index = path.with_name(path.stem + _INDEX_SUFFIX)
                with suppress(FileNotFoundError):
                    freed += index.stat().st_size
                    index.unlink()
            return freed
        except BlockingIOError:
            return 0
        finally:
            os.close(descriptor)

    @contextmanager
    def _named_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if error.errno in (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP):
                what = "its file system has no locks; expected a disk of this node. Set data.cache_dir to one"
            elif error.errno in (errno.ENOSPC, errno.EDQUOT):
                what = (
                    f"its disk is full, and data.cache_bytes is {self.max_bytes}; expected that much room. Lower it,"
                    " free some space, or set data.cache_dir to another disk"
                )
            else:
                what = f"{error.strerror or error}. Mend this, or set data.cache_dir to another folder"
            raise DataError(f"{self.folder}: {what}.") from error


def is_at(descriptor: int, path: Path) -> bool:
    """Whether an open file still lies under a path."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False
