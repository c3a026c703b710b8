"""How ranks tell each other of their beats: one TCP connection from every rank to rank 0.

Connections of its own, and not the process group's store: what waits for a store waits in C++, for ever if rank 0 is
stopped, and a store does not say that a process has ended. The kernel closes a dead process's connections at once.
"""

from __future__ import annotations

import json
import secrets
import selectors
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from typing import Any

from pretrain.ranks.heartbeat import Beat

_MAX_LINE_BYTES = 65536
_CONNECT_SECONDS = 60.0
Message = dict[str, Any]


@dataclass
class _Connection:
    """One connection to rank 0, and what has been read of the line that is to come."""

    socket: socket.socket
    rank: int | None = None  # unknown until it has introduced itself
    rest: bytes = b""

    def read(self) -> list[Message] | None:
        """The messages that have arrived; None at the end of the connection, or if they are not ours."""
        try:
            data = self.socket.recv(_MAX_LINE_BYTES)
        except BlockingIOError:
            return []
        except OSError:
            return None
        *lines, self.rest = (self.rest + data).split(b"\n")
        try:
            messages = [json.loads(line) for line in lines]
        except ValueError:
            return None
        if not data or len(self.rest) > _MAX_LINE_BYTES or not all(isinstance(one, dict) for one in messages):
            return None
        return messages

    def send(self, message: Message) -> None:
        """Send a message, unless who should read it has not read for long."""
        try:
            self.socket.send(json.dumps(message).encode() + b"\n")
        except OSError:  # full, or closed: reading will say so
            pass


@dataclass
class News:
    """What a rank has heard.

    Attributes:
        beats: by rank; on other ranks than rank 0 that of rank 0.
        is_over: on other ranks: rank 0 has ended, as all do.
        verdict: of rank 0, as a message.
        left: ranks that have done all that there was to do.
        ended: ranks whose connection has ended without a word.
        failed: by rank, the exit status and the reason that it gave before it ended.
    """

    beats: dict[int, Beat] = field(default_factory=dict)
    is_over: bool = False
    verdict: Message | None = None
    left: list[int] = field(default_factory=list)
    ended: list[int] = field(default_factory=list)
    failed: dict[int, tuple[int, str]] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.verdict or self.ended or self.failed or self.is_over)


class _Link:
    """A selector that other threads can wake."""

    def __init__(self) -> None:
        self._selector = selectors.DefaultSelector()
        self._wake_reader, self._wake_writer = socket.socketpair()
        self._selector.register(self._wake_reader, selectors.EVENT_READ)
        self._is_woken = False

    def wake(self) -> None:
        """Have `exchange` return at once; from any thread."""
        self._is_woken = True
        with suppress(OSError):  # it is closed: its thread has ended by itself, as when rank 0 left first
            self._wake_writer.send(b"x")

    def _ready(self, until: float) -> Iterator[selectors.SelectorKey]:
        """Yield what can be read, until a time of the monotonic clock or `wake`."""
        while not self._is_woken and (left := until - time.monotonic()) > 0:
            yield from (key for key, _ in self._selector.select(left) if key.fileobj is not self._wake_reader)

    def close(self) -> None:
        """Close all sockets."""
        for key in list(self._selector.get_map().values()):
            key.fileobj.close()  # type: ignore[union-attr]
        for one in (self._wake_reader, self._wake_writer, self._selector):
            one.close()


class Hub(_Link):
    """Rank 0's end."""

    def __init__(self, world_size: int, master_address: str) -> None:
        """Listen on a free port, if there are other ranks.

        Args:
            world_size: number of ranks.
            master_address: by which other ranks reach this host.
        """
        super().__init__()
        self.port, self.token = 0, secrets.token_hex(8)
        self._connections: dict[int, _Connection] = {}
        self._listener = None
        if world_size > 1:
            self._listener = _listen(master_address, world_size)
            self._listener.setblocking(False)
            self.port = self._listener.getsockname()[1]
            self._selector.register(self._listener, selectors.EVENT_READ)

    def exchange(self, seconds: float, read: Callable[[], Beat]) -> News:
        """Hear the other ranks for so long, or until one of them ends; tell who is heard what `read` returns."""
        news = News()
        for key in self._ready(time.monotonic() + seconds):
            if key.fileobj is self._listener:
                self._accept()
            else:
                self._hear(key.data, read, news)
            if news:
                break
        return news

    def tell(self, message: Message) -> None:
        """Send a message to all other ranks."""
        for connection in self._connections.values():
            connection.send(message)

    def await_farewells(self, seconds: float) -> None:
        """Wait until the other ranks have closed their connections, at most so long."""
        for other in (self._wake_reader, self._listener):
            if other:
                self._selector.unregister(other)
        until = time.monotonic() + seconds
        while self._connections and (left := until - time.monotonic()) > 0:
            for key, _ in self._selector.select(left):
                if key.data.read() is None:
                    self._forget(key.data)

    def close(self) -> None:
        """Close all sockets."""
        super().close()
        if self._listener:
            self._listener.close()

    def _accept(self) -> None:
        assert self._listener
        try:
            found, _ = self._listener.accept()
        except OSError:  # it has gone again
            return
        found.setblocking(False)
        self._selector.register(found, selectors.EVENT_READ, _Connection(found))

    def _hear(self, connection: _Connection, read: Callable[[], Beat], news: News) -> None:
        messages = connection.read()
        for message in messages or []:
            if connection.rank is None:
                if message.get("token") != self.token:  # a stranger
                    messages = None
                    break
                connection.rank = int(message["rank"])
                self._connections[connection.rank] = connection
            elif "beat" in message:
                news.beats[connection.rank] = Beat(**message["beat"])
                connection.send({"beat": asdict(read())})
            elif "farewell" in message:
                self._forget(connection)
                if message["farewell"]:
                    news.failed[connection.rank] = tuple(message["farewell"])
                else:
                    news.left.append(connection.rank)
                return
        if messages is None:
            self._forget(connection)
            if connection.rank is not None:
                news.ended.append(connection.rank)

    def _forget(self, connection: _Connection) -> None:
        self._selector.unregister(connection.socket)
        connection.socket.close()
        if connection.rank is not None:
            self._connections.pop(connection.rank, None)


class Spoke(_Link):
    """Another rank's end."""

    def __init__(self, address: tuple[str, int], token: str, rank: int) -> None:
        """Connect to rank 0.

        Raises:
            OSError: it cannot be reached.
        """
        super().__init__()
        self._hub = _Connection(socket.create_connection(address, timeout=_CONNECT_SECONDS))
        self._hub.socket.setblocking(False)
        self._hub.send({"token": token, "rank": rank})
        self._selector.register(self._hub.socket, selectors.EVENT_READ)

    def exchange(self, seconds: float, read: Callable[[], Beat]) -> News:
        """Tell rank 0 what `read` returns, and hear it for so long or until it says that something is wrong."""
        self._hub.send({"beat": asdict(read())})
        news = News()
        for _ in self._ready(time.monotonic() + seconds):
            messages = self._hub.read()
            for message in messages or []:
                news.verdict = message.get("verdict", news.verdict)
                if "beat" in message:
                    news.beats[0] = Beat(**message["beat"])
                if "farewell" in message:
                    news.is_over = not message["farewell"]
                    news.failed |= {} if news.is_over else {0: tuple(message["farewell"])}
            if messages is None:
                news.ended.append(0)
            if news:
                break
        return news

    def tell(self, message: Message) -> None:
        """Send a message to rank 0."""
        self._hub.send(message)


def _listen(master_address: str, backlog: int) -> socket.socket:
    """Listen on a free port of all interfaces, or of the loopback one if all ranks are on this host."""
    if master_address in ("localhost", "127.0.0.1"):
        return socket.create_server(("127.0.0.1", 0), backlog=backlog)
    try:
        return socket.create_server(("::", 0), family=socket.AF_INET6, dualstack_ipv6=True, backlog=backlog)
    except (OSError, ValueError):  # no IPv6 here
        return socket.create_server(("", 0), backlog=backlog)
