"""What is in no local folder: object stores and web servers, by fsspec, and commands. Reading it is here.

A store hands out whole files, in chunks. What fails for a while is tried again, with growing pauses; what stalls counts
as failed; what cannot succeed, such as a file that is not there, fails at once.
"""

from __future__ import annotations

import logging
import os
import queue
import random
import re
import shlex
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from typing import Any, TypeVar
from urllib.parse import urlsplit, urlunsplit

from pretrain.errors import DataError
from pretrain.storage.store_errors import LostFileError, MissingFileError, StoreError, WrongContentError, as_store_error

logger = logging.getLogger("longhaul")
_jitter = random.Random()  # of its own: threads must not move the generator that others seed

PIPE = "pipe:"
CHUNK_BYTES = 1 << 20
CONNECT_SECONDS = 30.0
STALL_SECONDS = 60.0  # without a byte, a connection counts as lost
FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 1.0, 60.0
MAX_WRONG = 3  # downloads of one file that are complete and not what the manifest says
_BLOCK_BYTES = 16 << 20  # of one request, where a store reads files by ranges
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:(?::|//)")
_INSTALL = {"s3": "longhaul[s3]", "s3a": "longhaul[s3]", "gs": "longhaul[gs]", "gcs": "longhaul[gs]"}
_T = TypeVar("_T")


def is_remote(shards: str) -> bool:
    """Whether a source's `shards` are elsewhere than in a folder."""
    return shards.startswith(PIPE) or _URL.match(shards) is not None


def shown(url: str) -> str:
    """A URL without the passwords and signatures that may be in it."""
    if url.startswith(PIPE) or "@" not in url and "?" not in url:
        return url
    parts = urlsplit(url)
    query = "…" if parts.query else ""
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, query, ""))


def has_credentials(url: str) -> bool:
    """Whether a URL has a password, or a query, which may be a signature."""
    return "?" in url or urlsplit(url).password is not None


class Patience:
    """How long what fails is tried again: with growing pauses, and from the first failure on for a limited time.

    Attributes:
        num_attempts: How many have failed.
    """

    def __init__(self, limit_seconds: float) -> None:
        """Take the limit; 0 tries once."""
        self.num_attempts = 0
        self._limit, self._failing_since = limit_seconds, 0.0

    def pause_after(self, error: StoreError, progress_at: float) -> float | None:
        """Return the seconds until the next attempt, or None if that would be in vain or too late.

        Args:
            error: What ended the attempt.
            progress_at: When the attempt last got on, by the monotonic clock.
        """
        self.num_attempts += 1
        self._failing_since = self._failing_since or progress_at
        left = self.left_seconds
        if error.is_final or left <= 0:
            return None
        longest = min(LONGEST_PAUSE_SECONDS, FIRST_PAUSE_SECONDS * 2 ** (self.num_attempts - 1))
        return min(longest * _jitter.uniform(0.5, 1.0), left)  # ranks and nodes that failed together spread

    @property
    def left_seconds(self) -> float:
        """For how long it is still tried."""
        return self._failing_since + self._limit - time.monotonic()

    def __str__(self) -> str:
        seconds = time.monotonic() - self._failing_since
        return f"tried {self.num_attempts} times in {seconds:.0f} s" if self.num_attempts > 1 else "tried once"


class Store:
    """Files by their path below a URL; any number of threads may read at a time.

    Attributes:
        url: What the config or a command line says.
    """

    _caches_listings = True
    _limit_option = "data.retry_seconds"
    _remedy = "Upload the corpus again, whole, as `prepare` made it"  # of a file that comes wrong

    def __init__(
        self,
        url: str,
        limit_seconds: float,
        stall_seconds: float | None = None,
        option: str = "data.sources[].shards",
    ) -> None:
        """Open the store; nothing is read.

        Args:
            url: A URL of fsspec's, or `pipe:` and a shell command whose `{}` becomes a file's path in the store.
            limit_seconds: How long a file that cannot be read is tried again.
            stall_seconds: After so long without a byte an attempt has failed; `STALL_SECONDS` if None.
            option: Of the config, that gives the URL, as errors say; empty if a command line does.

        Raises:
            DataError: The URL is of no kind that is installed.
        """
        self.url = url if url.startswith(PIPE) else url.rstrip("/")
        self._limit, self._option = limit_seconds, option
        self._stall = min(STALL_SECONDS if stall_seconds is None else stall_seconds, limit_seconds)
        self._closing = threading.Event()
        if not url.startswith(PIPE):
            self._filesystem, self._root, self._open_options = _open_filesystem(
                self.url, self._stall, self._caches_listings
            )

    def location(self, name: str) -> str:
        """Where a file lies, as messages say it."""
        if self.url.startswith(PIPE):
            return self.url.replace("{}", shlex.quote(name))
        return shown(join(self.url, name))

    def close(self) -> None:
        """End what is being read, in whatever thread: it fails soon."""
        self._closing.set()

    def fetch(self, name: str, receive: Callable[[Iterator[bytes]], _T], is_patient: bool = True) -> _T:
        """Read a file, as often as it takes.

        Args:
            name: Its path in the corpus.
            receive: Takes the file's chunks, from the beginning in every attempt, and returns the result; raises
                `WrongContentError` if they are not what they should be.
            is_patient: Try again, for up to the limit; else fail at the first failure.

        Raises:
            DataError: The file cannot be had; names where it lies, what was tried, and what to do.
        """
        patience = Patience(self._limit if is_patient else 0)
        wrong: list[str] = []  # what came instead of the file
        while True:
            reading = _Reading(self._stall)
            try:
                return receive(self._chunks(name, reading))
            except StoreError as error:
                if isinstance(error, WrongContentError):
                    wrong.append(error.content)
                pause = patience.pause_after(error, reading.progress_at)
                if pause is None or len(wrong) >= MAX_WRONG or self._closing.is_set():
                    is_lost = isinstance(error, MissingFileError) or len(wrong) > len(set(wrong))
                    raise self._failure(name, error, patience, is_lost) from error
                self._wait(name, error, patience, pause)

    def read(self, name: str, check: Callable[[bytes], object] = len) -> bytes:
        """Read a small file into memory.

        Args:
            name: Its path in the corpus.
            check: Raises ValueError if the content is not whole.

        Raises:
            DataError: As `fetch`.
        """

        def receive(chunks: Iterator[bytes]) -> bytes:
            content = b"".join(chunks)
            try:
                check(content)
            except ValueError as error:
                raise WrongContentError(f"its content is broken: {error}") from error
            return content

        return self.fetch(name, receive)

    def _wait(self, name: str, error: StoreError, patience: Patience, pause: float) -> None:
        logger.warning(
            "%s: %s; attempt %d, the next in %.1f s, for up to %.0f s more",
            self.location(name), error, patience.num_attempts, pause, patience.left_seconds,
        )  # fmt: skip
        self._closing.wait(pause)

    def _failure(self, name: str, error: StoreError, patience: Patience, is_lost: bool) -> DataError:
        if self._closing.is_set():
            return DataError(f"{self.location(name)}: the stream was closed while it was read")
        if error.is_final:
            advice = f"Correct {self._option or 'the URL'}, or the rights to read it"
        elif isinstance(error, WrongContentError):
            advice = self._remedy
        else:
            advice = "Mend the store or the network"
            if self._option and self._limit_option:
                advice += f", or raise {self._limit_option} ({self._limit:.0f})"
        text = f"{self.location(name)} cannot be read: {error}; {patience}. {advice}, and run again."
        return LostFileError(text, name, str(error)) if is_lost else DataError(text)

    def _chunks(self, name: str, reading: _Reading) -> Iterator[bytes]:
        """Yield a file's chunks, which another thread reads: libraries' own time limits do not cover every stall."""
        if self.url.startswith(PIPE):
            source = _read_pipe(self.location(name)[len(PIPE) :], reading)
        else:
            source = _read_file(self._filesystem, join(self._root, name), self._open_options)
        if self._closing.is_set():
            raise StoreError("the stream was closed", is_final=True)
        with closing(reading):
            threading.Thread(target=reading.run, args=(source,), name="longhaul-download", daemon=True).start()
            while (chunk := reading.take()) is not None:
                if self._closing.is_set():
                    raise StoreError("the stream was closed", is_final=True)
                yield chunk


class _Reading:
    """One attempt: a thread that reads, and who takes what it has read."""

    def __init__(self, stall_seconds: float) -> None:
        self.progress_at = time.monotonic()
        self.kill: Callable[[], object] = lambda: None
        self._stall = stall_seconds
        self._chunks: queue.Queue[bytes | Exception | None] = queue.Queue(maxsize=4)
        self._is_over = threading.Event()

    @property
    def is_over(self) -> bool:
        return self._is_over.is_set()

    def run(self, source: Iterator[bytes]) -> None:
        try:
            for chunk in source:
                self._put(chunk)
                if self.is_over:
                    break
            else:
                self._put(None)
        except Exception as error:
            self._put(error)
        finally:
            with suppress(Exception):
                source.close()  # type: ignore[attr-defined]  # a generator: closes the connection

    def take(self) -> bytes | None:
        try:
            chunk = self._chunks.get(timeout=self._stall)
        except queue.Empty:
            raise StoreError(f"nothing came for {self._stall:.0f} s") from None
        if isinstance(chunk, Exception):
            raise as_store_error(chunk) from chunk
        self.progress_at = time.monotonic()
        return chunk

    def close(self) -> None:
        self._is_over.set()
        self.kill()

    def _put(self, item: bytes | Exception | None) -> None:
        while not self.is_over:
            with suppress(queue.Full):
                self._chunks.put(item, timeout=0.2)
                return


def join(root: str, name: str) -> str:
    """Put a name behind the path of a URL, before its query if it has one."""
    path, mark, query = root.partition("?") if root.startswith("http") else (root, "", "")
    return f"{path.rstrip('/')}/{name}{mark}{query}"


def check_installed(url: str) -> None:
    """Check that what reads a URL is there; nothing is opened.

    Raises:
        DataError: nobody reads such URLs, or it is not installed.
    """
    if url.startswith(PIPE):
        return
    import fsspec

    protocol = ""
    try:
        for part in url.split("::"):  # such as simplecache::s3://bucket
            protocol = part.partition(":")[0].lower()
            fsspec.get_filesystem_class(protocol)
    except (ImportError, ValueError) as error:
        raise _not_opened(url, protocol, error) from error


def _not_opened(url: str, protocol: str, error: Exception) -> DataError:
    if isinstance(error, ImportError):
        package = _INSTALL.get(protocol, f"fsspec[{protocol}]")
        return DataError(f"{shown(url)}: {error}. Install what reads {protocol}: pip install '{package}'")
    return DataError(
        f"{shown(url)} cannot be opened: {error}. Use a folder or s3://, gs:// and the like; data may also be at "
        "hf://, https:// and pipe:"
    )


def _open_filesystem(url: str, stall_seconds: float, caches_listings: bool) -> tuple[Any, str, dict[str, Any]]:
    """Return fsspec's file system for a URL, the root in it, and the options with which it opens a file."""
    protocol = url.partition(":")[0].lower()
    options: dict[str, Any] = {}
    opening: dict[str, Any] = {}
    try:
        import fsspec.core

        if protocol in ("http", "https"):
            import aiohttp

            # aiohttp's own limit is 5 minutes a file, however fast it comes; proxies are those of the environment
            timeout = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_SECONDS, sock_read=stall_seconds)
            options = {"client_kwargs": {"timeout": timeout, "trust_env": True}}
            opening = {"block_size": 0, "size": 1}  # one GET: no HEAD before, and no ranges
        elif protocol in ("s3", "s3a"):
            options = {"config_kwargs": {"connect_timeout": CONNECT_SECONDS, "read_timeout": stall_seconds}}
            opening = {"block_size": _BLOCK_BYTES}
        elif protocol in ("gs", "gcs"):
            opening = {"block_size": _BLOCK_BYTES}
        elif protocol == "hf":
            opening = {"block_size": 0}
        elif protocol in ("file", "local"):
            options = {"auto_mkdir": True}
        if not caches_listings:
            options["use_listings_cache"] = False
        filesystem, root = fsspec.core.url_to_fs(url, **options)
    except (ImportError, ValueError) as error:
        raise _not_opened(url, protocol, error) from error
    return filesystem, root, opening


def _read_file(filesystem: Any, path: str, options: dict[str, Any]) -> Iterator[bytes]:
    with filesystem.open(path, "rb", **options) as file:
        while chunk := file.read(CHUNK_BYTES):
            yield chunk


def _read_pipe(command: str, reading: _Reading) -> Iterator[bytes]:
    """Yield what a shell command writes; it must end with status 0."""
    with tempfile.TemporaryFile() as messages:
        process = subprocess.Popen(
            command, shell=True, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=messages,
            start_new_session=True,
        )  # fmt: skip

        def kill() -> None:
            if process.poll() is None:
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)  # with whatever the command started

        reading.kill = kill
        assert process.stdout is not None
        try:
            while chunk := process.stdout.read(CHUNK_BYTES):
                yield chunk
        finally:
            process.stdout.close()
            if reading.is_over:
                kill()
            status = process.wait()
        if status:
            messages.seek(0)
            said = messages.read()[-300:].decode(errors="replace").strip().replace("\n", "; ")
            # 126 and 127 are the shell's: there is no such program
            raise StoreError(
                f"the command ended with status {status}: {said or 'it said nothing'}", status in (126, 127)
            )
