"""A store that is written to: checkpoints go there, in chunks out of memory, and are removed again.

As in reading, what fails for a while is tried again, what stalls counts as failed, and what cannot succeed fails at
once. An attempt that hangs is left behind, and may yet do what it was to do: `is_busy` tells where.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Any, TypeVar

from pretrain.errors import DataError, StoreAccessError
from pretrain.storage.store_errors import LostFileError, MissingFileError, StoreError, as_store_error
from pretrain.storage.stores import Patience, Store, join

PART_BYTES = 16 << 20  # of a file, that are sent at once
_MAX_PARTS = 9_000  # S3 takes 10,000 of one file
_T = TypeVar("_T")


class WritableStore(Store):
    """A store that this process may write to; any number of threads may at a time."""

    _caches_listings = False  # other ranks write too
    _limit_option = ""
    _remedy = "Look for what changes it on the way"

    def __init__(self, url: str, limit_seconds: float, option: str, stall_seconds: float | None = None) -> None:
        """Open the store; nothing is read or written.

        Args:
            url: A URL of fsspec's.
            limit_seconds: How long what fails is tried again.
            option: Of the config, that gives the URL.
            stall_seconds: After so long without progress an attempt has failed.

        Raises:
            DataError: The URL is of no kind that is installed.
        """
        super().__init__(url, limit_seconds, stall_seconds, option)
        self._left_behind: list[tuple[str, _Attempt]] = []

    def list_files(self, folder: str = "") -> dict[str, int]:
        """Return the size of each file in a folder of the store and below, by its path in the store.

        Raises:
            StoreAccessError: The store cannot be read.
        """
        return self._do(folder, "listed", lambda _: self._list(folder))

    def _list(self, folder: str) -> dict[str, int]:
        found = self._filesystem.find(join(self._root, folder) if folder else self._root, detail=True)
        skipped = len(self._root.rstrip("/")) + 1
        return {path[skipped:]: entry["size"] for path, entry in found.items()}

    def list_top(self) -> list[str]:
        """Return the names of what lies directly in the store.

        Raises:
            StoreAccessError: The store cannot be read.
        """
        found = self._do("", "listed", lambda _: self._filesystem.ls(self._root, detail=False))
        return sorted(str(path).rstrip("/").rpartition("/")[2] for path in found)

    def read_if_there(self, name: str) -> bytes | None:
        """Read a small file; None if the store has no such file.

        Raises:
            StoreAccessError: It cannot be read for another reason.
        """
        try:
            return self.read(name)
        except LostFileError:
            return None
        except DataError as error:
            raise StoreAccessError(str(error)) from error

    def read_all(self, names: Iterable[str]) -> dict[str, bytes]:
        """Read small files, many at a time.

        Raises:
            StoreAccessError: One of them cannot be read.
        """
        paths = {name: join(self._root, name) for name in names}
        found = self._do("", "read", lambda _: self._filesystem.cat(list(paths.values())))
        return {name: found[path] for name, path in paths.items()}

    def write(self, name: str, content: bytes) -> None:
        """Write a small file; on object stores it is there whole or not at all.

        Raises:
            StoreAccessError: It cannot be written.
        """

        def put(_: _Attempt) -> None:
            self._filesystem.pipe_file(join(self._root, name), content)

        self._do(name, "written", put)

    def upload(
        self,
        name: str,
        num_bytes: int,
        chunks: Callable[[], Iterable[memoryview]],
    ) -> None:
        """Write a file of any size, a part at a time, and compare the size that it has there.

        Args:
            name: Its path in the store.
            num_bytes: Its size.
            chunks: Yields its content, anew for every attempt, no more at a time than memory has room for twice.

        Raises:
            StoreAccessError: It cannot be written.
        """
        path, part_bytes = join(self._root, name), max(PART_BYTES, -(-num_bytes // _MAX_PARTS))

        def send(attempt: _Attempt) -> None:
            file = self._filesystem.open(path, "wb", block_size=part_bytes)
            try:
                for chunk in chunks():
                    attempt.go_on()
                    file.write(chunk)
                file.close()
            except BaseException:
                _discard(file)
                raise
            attempt.go_on()
            if (size := self._filesystem.info(path)["size"]) != num_bytes:
                raise StoreError(f"{size} bytes have arrived, not {num_bytes}")

        self._do(name, "written", send)

    def size(self, name: str) -> int | None:
        """Return a file's size; None if the store has no such file.

        Raises:
            StoreAccessError: The store cannot be read.
        """

        def ask(_: _Attempt) -> int | None:
            try:
                return self._filesystem.info(join(self._root, name))["size"]
            except FileNotFoundError:
                return None

        return self._do(name, "read", ask)

    def remove(self, names: Iterable[str]) -> None:
        """Remove files; those that are not there are no error.

        Raises:
            StoreAccessError: One of them is still there.
        """
        names = list(names)

        def remove_all(attempt: _Attempt) -> None:
            for name in names:
                attempt.go_on()
                with suppress(FileNotFoundError):
                    self._filesystem.rm_file(join(self._root, name))

        self._do(names[0] if names else "", "removed", remove_all)

    def remove_folder(self, folder: str) -> None:
        """Remove a folder with all that is in it.

        Raises:
            StoreAccessError: Something is still there.
        """
        assert folder.strip("/"), "not the whole store"

        def remove_all(attempt: _Attempt) -> None:
            with suppress(FileNotFoundError):
                self._filesystem.rm(join(self._root, folder), recursive=True)
            attempt.go_on()
            if left := self._list(folder):  # S3's library does not say which of many it could not remove
                raise StoreError(f"{len(left)} of its files are still there")

        self._do(folder, "removed", remove_all)

    def is_busy(self, folder: str) -> bool:
        """Whether something that was left behind may still change a file in a folder."""
        self._left_behind = [(name, attempt) for name, attempt in self._left_behind if not attempt.is_done()]
        return any(f"{name}/".startswith(f"{folder}/") for name, _ in self._left_behind)

    def _do(self, name: str, done: str, action: Callable[[_Attempt], _T]) -> _T:
        """Do something, as often as it takes."""
        patience = Patience(self._limit)
        while True:
            attempt = _Attempt(self._stall)
            try:
                return attempt.run(action)
            except StoreError as error:
                if not attempt.is_done():
                    self._left_behind.append((name, attempt))
                pause = patience.pause_after(error, attempt.progress_at)
                if pause is None or self._closing.is_set():
                    raise self._refusal(name, done, error, patience) from error
                self._wait(name, error, patience, pause)

    def _refusal(self, name: str, done: str, error: StoreError, patience: Patience) -> StoreAccessError:
        said: object = error
        if isinstance(error, MissingFileError):
            said = "there is no such bucket or folder"
        advice = f"Correct {self._option}, or the rights there" if error.is_final else "Mend the store or the network"
        where = self.location(name) if name else self.location("").rstrip("/")
        return StoreAccessError(f"{where} cannot be {done}: {said}; {patience}. {advice}.")


class _Attempt:
    """Something done by a thread of its own, which is left behind where it does not get on."""

    def __init__(self, stall_seconds: float) -> None:
        self.progress_at = time.monotonic()
        self._stall = stall_seconds
        self._is_over, self._is_done = threading.Event(), threading.Event()
        self._result: Any = None
        self._problem: Exception | None = None

    def go_on(self) -> None:
        """Note that it gets on; ends an attempt that was left behind."""
        if self._is_over.is_set():
            raise StoreError("the attempt was left behind", is_final=True)
        self.progress_at = time.monotonic()

    def is_done(self) -> bool:
        """Whether it has ended, well or not."""
        return self._is_done.is_set()

    def run(self, action: Callable[[_Attempt], _T]) -> _T:
        """Return what the action returns.

        Raises:
            StoreError: It failed, or did not get on.
        """
        threading.Thread(target=self._run, args=(action,), name="longhaul-store", daemon=True).start()
        while not self._is_done.wait(max(0.0, self.progress_at + self._stall - time.monotonic())):
            if time.monotonic() >= self.progress_at + self._stall:
                self._is_over.set()
                raise StoreError(f"nothing went on for {self._stall:.0f} s")
        if self._problem is not None:
            raise as_store_error(self._problem) from self._problem
        return self._result

    def _run(self, action: Callable[[_Attempt], Any]) -> None:
        try:
            self._result = action(self)
        except Exception as error:
            self._problem = error
        finally:
            self._is_done.set()


def _discard(file: Any) -> None:
    """Close a file without keeping it: closed as usual, half of it would become an object."""
    try:
        file.discard()
        file.closed = True  # else it is closed as usual when it is forgotten
    except Exception:  # of a disk: what is there is not kept by a manifest
        with suppress(Exception):
            file.close()
