"""A web server for tests that fails on purpose: which request of which file fails how is said beforehand."""

from __future__ import annotations

import threading
import time
from collections import Counter, defaultdict
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

FAULTS = ("drop", "refuse", "stall", "truncate", "short", "corrupt", "503")


class StoreServer:
    """Serves a folder on this machine.

    Attributes:
        url: Where.
        requests: How often each file was asked for, by its path.
        faults: What happens to the requests for a file, in order, by the path's end; then they succeed.
        always: What happens to every request from now on, or None.
        delay: Seconds before each 64 KiB.
    """

    def __init__(self, folder: Path) -> None:
        self.requests: Counter[str] = Counter()
        self.faults: dict[str, list[str | None]] = defaultdict(list)
        self.always: str | None = None
        self.delay = 0.0
        self._lock = threading.Lock()
        self._ending = threading.Event()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                name = self.path.lstrip("/").partition("?")[0]
                outer._answer(self, folder / name, outer._fault_of(name))

            def log_message(self, *_: object) -> None:
                pass

        class Server(ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, *_: object) -> None:
                pass  # clients that were killed

        self._server = Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()

    def close(self) -> None:
        """End it, with the requests that stall."""
        self._ending.set()
        self._server.shutdown()
        self._server.server_close()

    def _fault_of(self, name: str) -> str | None:
        with self._lock:
            self.requests[name] += 1
            waiting = next((faults for end, faults in self.faults.items() if name.endswith(end) and faults), None)
            return waiting.pop(0) if waiting else self.always

    def _answer(self, request: BaseHTTPRequestHandler, path: Path, fault: str | None) -> None:
        request.close_connection = True
        if fault == "refuse":
            return
        if fault == "503":
            request.send_error(503)
            return
        if not path.is_file():
            request.send_error(404)
            return
        content = path.read_bytes()
        if fault == "corrupt":
            content = content[:-1] + bytes([content[-1] ^ 1])
        if fault == "short":  # complete, as far as HTTP goes
            content = content[: len(content) // 2]
        request.send_response(200)
        if fault != "truncate":  # without a length, the end of the connection is the end of the file
            request.send_header("Content-Length", str(len(content)))
        request.end_headers()
        if fault in ("drop", "stall", "truncate"):
            request.wfile.write(content[: len(content) // 2])
            request.wfile.flush()
            if fault == "stall":
                self._ending.wait(60)
            return
        for begin in range(0, len(content), 65536):
            if self.delay:
                time.sleep(self.delay)
            request.wfile.write(content[begin : begin + 65536])
