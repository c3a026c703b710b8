"""Hooks of the fork server: what a rank does at an exact moment of its run.

A save is a sequence of calls of the operating system by threads of their own. `at_call` lets a rank be killed, be held
up or find the disk full just before one of them; `log_calls` tells how many there are.
"""

from __future__ import annotations

import builtins
import errno
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

CALLS = ("open", "mkdir", "rename", "replace", "fsync", "unlink", "rmdir", "save_file")
SAVING = "longhaul-checkpoint"  # name of the threads that save


def watch_calls(before: Callable[[str], None], thread: str = SAVING) -> None:
    """Call `before` with the name of each of `CALLS` that is about to be made by threads of a name."""
    from pretrain import tensor_files

    holders: dict[str, Any] = {"open": builtins, "save_file": tensor_files}

    def watch(name: str) -> None:
        holder = holders.get(name, os)
        original = getattr(holder, name)

        def watched(*args: Any, **keywords: Any) -> Any:
            if threading.current_thread().name == thread:
                before(name)
            return original(*args, **keywords)

        setattr(holder, name, watched)

    for name in CALLS:
        watch(name)


def log_calls(rank: int, path: str) -> None:
    """Write the names of the calls that this rank's saves make to `path-RANK`, one a line."""
    file = open(f"{path}-{rank}", "a", buffering=1)  # noqa: SIM115 - open until the process ends
    watch_calls(lambda name: print(name, file=file))


def at_call(
    rank: int, action: str, number: int = 1, call: str | None = None, at_rank: int | None = None, after: float = 0.0,
    mark: str = "",
) -> None:  # fmt: skip
    """Do something just before a call that saving makes.

    Args:
        rank: of this process.
        action: `kill` this rank, `kill_all` ranks, `no_space` (the call fails as on a full disk), `hold`
            (wait until the file `mark`, which this makes, is gone), or `slow` (every call from this on takes a while).
        number: which one of the calls, from 1.
        call: only calls of this name count; None for all of `CALLS`.
        at_rank: the rank that does it; None for each.
        after: seconds for which a kill comes later than the call.
        mark: path of a file.
    """
    if at_rank not in (None, rank):
        return
    count, lock = 0, threading.Lock()

    def kill(send: Callable[[int], None]) -> None:
        if after:
            threading.Timer(after, send, [signal.SIGKILL]).start()
        else:
            send(signal.SIGKILL)

    def before(name: str) -> None:
        nonlocal count
        if call not in (None, name):
            return
        with lock:
            count += 1
            is_it = count == number
        if action == "slow" and count >= number:
            time.sleep(0.02)
        elif is_it and action == "kill":
            kill(lambda number: os.kill(os.getpid(), number))
        elif is_it and action == "kill_all":
            kill(lambda number: os.killpg(0, number))
        elif is_it and action == "no_space":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        elif is_it and action == "hold":
            Path(mark).touch()
            while os.path.exists(mark):
                time.sleep(0.005)

    watch_calls(before)
