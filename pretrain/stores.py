"""Where prepared corpora lie that are in no local folder: object stores and web servers, by fsspec, and commands.

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
from itertools import count
from typing import Any, TypeVar
from urllib.parse import urlsplit, urlunsplit

from pretrain.errors import DataError

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
_NO_HOPE = (
    FileNotFoundError,
    PermissionError,
    IsADirectoryError,
    ImportError,
    NotImplementedError,
    TypeError,
    ValueError,
)
_MAY_PASS = (408, 425, 429)  # of the statuses 400 to 499
_MISSING = (404, 410)
_T = TypeVar("_T")


class StoreError(Exception):
    """One attempt to read a file failed; the text says how."""

    def __init__(self, text: str, is_final: bool = False) -> None:
        """Take what happened, and whether trying again is in vain."""
        super().__init__(text)
        self.is_final = is_final


class WrongContentError(StoreError):
    """A download ended without an error and is not the file that it should be."""

    def __init__(self, text: str, content: str = "") -> None:
        """Take what is wrong, and a hash of what came: twice the same is what the store has, not a fault of the way."""
        super().__init__(text)
        self.content = content or text


class MissingFileError(StoreError):
    """The store answers, and has no such file."""


class LostFileError(DataError):
    """A store that works has a file no more, or another one in its place: waiting does not bring it back.

    Attributes:
        name: The file's path in the corpus.
        reason: What is wrong, without where and what to do.
    """

    def __init__(self, text: str, name: str = "", reason: str = "") -> None:
        """Take the message, and what of it programs need."""
        super().__init__(text)
        self.name, self.reason = name, reason


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


class Store:
    """The files of one corpus, by their path in it; any number of threads may read at a time.

    Attributes:
        url: What `data.sources[].shards` or a command line says.
    """

    def __init__(
        self, url: str, limit_seconds: float, stall_seconds: float | None = None, is_from_config: bool = True
    ) -> None:
        """Open the store; nothing is read.

        Args:
            url: A URL of fsspec's, or `pipe:` and a shell command whose `{}` becomes a file's path in the corpus.
            limit_seconds: How long a file that cannot be read is tried again.
            stall_seconds: After so long without a byte an attempt has failed; `STALL_SECONDS` if None.
            is_from_config: Whether a config gives the URL and the limit, as errors then say; else a command line does,
                the URL alone.

        Raises:
            DataError: The URL is of no kind that is installed.
        """
        self.url = url if url.startswith(PIPE) else url.rstrip("/")
        self._limit, self._is_from_config = limit_seconds, is_from_config
        self._stall = min(STALL_SECONDS if stall_seconds is None else stall_seconds, limit_seconds)
        self._closing = threading.Event()
        if not url.startswith(PIPE):
            self._filesystem, self._root, self._open_options = _open_filesystem(self.url, self._stall)

    def location(self, name: str) -> str:
        """Where a file lies, as messages say it."""
        if self.url.startswith(PIPE):
            return self.url.replace("{}", shlex.quote(name))
        return shown(_join(self.url, name))

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
        failing_since = 0.0
        wrong: list[str] = []  # what came instead of the file
        for attempt in count(1):
            reading = _Reading(self._stall)
            try:
                return receive(self._chunks(name, reading))
            except StoreError as error:
                failing_since = failing_since or reading.progress_at
                if isinstance(error, WrongContentError):
                    wrong.append(error.content)
                left = failing_since + self._limit - time.monotonic()
                if error.is_final or not is_patient or left <= 0 or len(wrong) >= MAX_WRONG or self._closing.is_set():
                    is_lost = isinstance(error, MissingFileError) or len(wrong) > len(set(wrong))
                    raise self._failure(name, error, attempt, time.monotonic() - failing_since, is_lost) from error
                longest = min(LONGEST_PAUSE_SECONDS, FIRST_PAUSE_SECONDS * 2 ** (attempt - 1))
                pause = min(longest * _jitter.uniform(0.5, 1.0), left)  # ranks and nodes that failed together spread
                logger.warning(
                    "%s: %s; attempt %d, the next in %.1f s, for up to %.0f s more",
                    self.location(name), error, attempt, pause, left,
                )  # fmt: skip
                self._closing.wait(pause)
        raise AssertionError

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

    def _failure(self, name: str, error: StoreError, attempt: int, seconds: float, is_lost: bool) -> DataError:
        if self._closing.is_set():
            return DataError(f"{self.location(name)}: the stream was closed while it was read")
        tried = f"tried {attempt} times in {seconds:.0f} s" if attempt > 1 else "tried once"
        if error.is_final:
            advice = (
                f"Correct {'data.sources[].shards' if self._is_from_config else 'the URL'}, or the rights to read it"
            )
        elif isinstance(error, WrongContentError):
            advice = "Upload the corpus again, whole, as `prepare` made it"
        else:
            advice = "Mend the store or the network"
            if self._is_from_config:
                advice += f", or raise data.retry_seconds ({self._limit:.0f})"
        text = f"{self.location(name)} cannot be read: {error}; {tried}. {advice}, and run again."
        return LostFileError(text, name, str(error)) if is_lost else DataError(text)

    def _chunks(self, name: str, reading: _Reading) -> Iterator[bytes]:
        """Yield a file's chunks, which another thread reads: libraries' own time limits do not cover every stall."""
        if self.url.startswith(PIPE):
            source = _read_pipe(self.location(name)[len(PIPE) :], reading)
        else:
            source = _read_file(self._filesystem, _join(self._root, name), self._open_options)
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
            raise _as_store_error(chunk) from chunk
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


def _as_store_error(error: Exception) -> StoreError:
    if isinstance(error, StoreError):
        return error
    status = _status_of(error)
    if status is not None:
        if status in _MISSING:
            return MissingFileError("there is no such file", is_final=True)
        is_final = 400 <= status < 500 and status not in _MAY_PASS
        return StoreError(f"the server answered {status}", is_final)
    if isinstance(error, FileNotFoundError):
        return MissingFileError("there is no such file", is_final=True)
    text = " ".join(str(error).split())[:300]
    is_final = isinstance(error, _NO_HOPE) or "Credentials" in type(error).__name__
    return StoreError(f"{type(error).__name__}{': ' if text else ''}{text}", is_final)


def _status_of(error: Exception) -> int | None:
    """The HTTP status in an error of aiohttp's (status), gcsfs's (code) or huggingface_hub's (response.status_code)."""
    for holder, name in ((error, "status"), (error, "code"), (getattr(error, "response", None), "status_code")):
        number = str(getattr(holder, name, ""))
        if number.isdigit():
            return int(number)
    return None


def _join(root: str, name: str) -> str:
    """Put a name behind the path of a URL, before its query if it has one."""
    path, mark, query = root.partition("?") if root.startswith("http") else (root, "", "")
    return f"{path.rstrip('/')}/{name}{mark}{query}"


def _open_filesystem(url: str, stall_seconds: float) -> tuple[Any, str, dict[str, Any]]:
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
        filesystem, root = fsspec.core.url_to_fs(url, **options)
    except ImportError as error:
        package = _INSTALL.get(protocol, f"fsspec[{protocol}]")
        raise DataError(f"{shown(url)}: {error}. Install what reads {protocol}: pip install '{package}'") from error
    except ValueError as error:
        raise DataError(
            f"{shown(url)} cannot be opened: {error}. Use a folder, s3://, gs://, hf://, https:// or pipe:"
        ) from error
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
