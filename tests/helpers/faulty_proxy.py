"""A proxy for tests before an HTTP server that fails on purpose: which reading of which file fails how is said beforehand."""

from __future__ import annotations

import threading
from collections import defaultdict
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

_PER_CONNECTION = ("connection", "keep-alive", "transfer-encoding", "content-length", "expect")


class FaultyProxy:
    """Passes requests on to a server.

    Attributes:
        url: Where it is reached.
        faults: What happens to the GET requests for a file, in order, by the path's end: `drop`, `stall`, `short`,
            `corrupt` or `503`; then they are passed on.
        writes: What happens to every request that would change a file, by a part of its path: `drop`, `stall` (while it
            stands here), or the status that it is refused with.
        requests: Method and path of every request that was passed on, in order.
    """

    def __init__(self, target: str) -> None:
        self.faults: dict[str, list[str]] = defaultdict(list)
        self.writes: dict[str, str] = {}
        self.requests: list[tuple[str, str]] = []
        self._target = urlsplit(target).netloc
        self._lock = threading.Lock()
        self._ending = threading.Event()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"  # who sends a body waits to be told to (100-continue)

            def handle_any(self) -> None:
                outer._pass_on(self)

            do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = handle_any

            def log_message(self, *_: object) -> None:
                pass

        class Server(ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, *_: object) -> None:
                pass  # clients that gave up

        self._server = Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()

    def close(self) -> None:
        """End it, with the requests that stall."""
        self._ending.set()
        self._server.shutdown()
        self._server.server_close()

    def _fault_of(self, request: BaseHTTPRequestHandler) -> str | None:
        path = request.path.partition("?")[0]
        with self._lock:
            waiting = next((faults for end, faults in self.faults.items() if path.endswith(end) and faults), None)
            return waiting.pop(0) if waiting and request.command == "GET" else None

    def _refuses(self, request: BaseHTTPRequestHandler) -> bool:
        """Whether a request that would change something is not to be passed on; answers it."""
        fault = next((fault for part, fault in self.writes.items() if part in request.path), None)
        if fault is None or request.command in ("GET", "HEAD"):
            return False
        if fault == "stall":
            while fault in self.writes.values() and not self._ending.wait(0.05):
                pass
        elif fault != "drop":
            request.rfile.read(int(request.headers.get("Content-Length", 0)))
            request.send_error(int(fault))
        return True

    def _pass_on(self, request: BaseHTTPRequestHandler) -> None:
        request.close_connection = True
        if self._refuses(request):
            return
        fault = self._fault_of(request)
        if fault == "503":
            request.send_error(503)
            return
        body = request.rfile.read(int(request.headers.get("Content-Length", 0)))
        with self._lock:
            self.requests.append((request.command, request.path))
        connection = HTTPConnection(self._target, timeout=30)
        headers = {name: value for name, value in request.headers.items() if name.lower() not in _PER_CONNECTION}
        connection.request(request.command, request.path, body, headers)
        answer = connection.getresponse()
        content = answer.read()
        connection.close()
        if fault == "corrupt":
            content = content[:-1] + bytes([content[-1] ^ 1])
        if fault == "short":  # complete, as far as HTTP goes
            content = content[: len(content) // 2]
        request.send_response(answer.status)
        for name, value in answer.getheaders():
            if name.lower() not in _PER_CONNECTION:
                request.send_header(name, value)
        length = answer.getheader("Content-Length", "0") if request.command == "HEAD" else str(len(content))
        request.send_header("Content-Length", length)
        request.send_header("Connection", "close")
        request.end_headers()
        if request.command == "HEAD":
            return
        if fault in ("drop", "stall"):
            request.wfile.write(content[: len(content) // 2])
            request.wfile.flush()
            if fault == "stall":
                self._ending.wait(60)
            return
        request.wfile.write(content)
