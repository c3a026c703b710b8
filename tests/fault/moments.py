"""Hooks of the fork server: what a rank does at an exact moment of its run.

A save is a sequence of calls of the operating system by threads of their own. `at_call` does something just before one
of them, `at_step` before a step; `log_calls` tells what calls there are.
"""

from __future__ import annotations

import builtins
import errno
import gc
import json
import os
import signal
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

CALLS = ("open", "mkdir", "rename", "replace", "fsync", "unlink", "rmdir", "write_tensors")
SAVING = "longhaul-checkpoint"  # name of the threads that save


def watch_calls(before: Callable[[str], None]) -> None:
    """Call `before` with the name of each of `CALLS` that a thread that saves is about to make."""
    from pretrain.checkpoints import checkpoint_folder

    holders: dict[str, Any] = {"open": builtins, "write_tensors": checkpoint_folder}

    def watch(name: str) -> None:
        holder = holders.get(name, os)
        original = getattr(holder, name)

        def watched(*args: Any, **keywords: Any) -> Any:
            if threading.current_thread().name == SAVING:
                before(name)
            return original(*args, **keywords)

        setattr(holder, name, watched)

    for name in CALLS:
        watch(name)


def log_calls(rank: int, path: str) -> None:
    """Write the names of the calls that this rank's saves make to `path-RANK`, one a line."""
    file = open(f"{path}-{rank}", "a", buffering=1)
    watch_calls(lambda name: print(name, file=file))


def act(action: str, path: str, after: float = 0.0) -> None:
    """Do what a hook was asked to.

    Args:
        action: `kill` this rank, `kill_all` ranks, `no_space` (the call fails as on a full disk), `hold` (wait until
            the file `path`, which this makes, is gone), `fill` the disk of `path` by this file, or `free` it again, or `stop`
            (SIGTERM to this rank).
        path: of a file.
        after: seconds for which a kill comes later.
    """
    if action in ("kill", "kill_all"):
        timer = threading.Timer(after, (os.kill if action == "kill" else os.killpg), [
            os.getpid() if action == "kill" else os.getpgid(0), signal.SIGKILL,
        ])  # fmt: skip
        timer.run() if after == 0 else timer.start()
    elif action == "no_space":
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    elif action == "stop":
        os.kill(os.getpid(), signal.SIGTERM)
    elif action == "hold":
        Path(path).touch()
        while os.path.exists(path):
            time.sleep(0.005)
    elif action == "fill":
        file = os.open(path, os.O_CREAT | os.O_WRONLY)
        for size in (1 << 16, 1):
            with suppress(OSError):
                while True:
                    os.write(file, bytes(size))
        os.close(file)
    else:
        assert action == "free"
        os.remove(path)


def at_call(
    rank: int, action: str, number: int = 1, call: str | None = None, at_rank: int | None = None, after: float = 0.0,
    path: str = "",
) -> None:  # fmt: skip
    """Do something just before a call that saving makes.

    Args:
        rank: of this process.
        action, path, after: as for `act`.
        number: which one of the calls, from 1.
        call: only calls of this name count; None for all of `CALLS`.
        at_rank: the rank that does it; None for each.
    """
    if at_rank not in (None, rank):
        return
    count, lock = 0, threading.Lock()

    def before(name: str) -> None:
        nonlocal count
        if call in (None, name):
            with lock:
                count += 1
                is_it = count == number
            if is_it:
                act(action, path, after)

    watch_calls(before)


def at_step(
    rank: int, action: str, step: int, at_rank: int | None = None, after: float = 0.0, path: str = ""
) -> None:  # fmt: skip
    """Do something just before an update, from 1; the rest as for `at_call`."""
    from pretrain.training import train

    original = train.train_step

    def train_step(run: Any) -> bool:
        if run.progress.step + 1 == step and at_rank in (None, rank):
            act(action, path, after)
        return original(run)

    train.train_step = train_step


def at_evaluation(rank: int, action: str, at_rank: int | None = None, path: str = "") -> None:
    """Do something just before an evaluation; the rest as for `act`."""
    from pretrain.training import train

    original = train.evaluate

    def evaluate(*args: Any, **keywords: Any) -> Any:
        if at_rank in (None, rank):
            act(action, path)
        return original(*args, **keywords)

    train.evaluate = evaluate


def measure(rank: int, path: str, steps: list[int]) -> None:
    """Write what this process holds just before some updates to `path-RANK`, as a line of JSON each."""
    import psutil

    from pretrain.training import train

    original, process = train.train_step, psutil.Process()

    def train_step(run: Any) -> bool:
        if run.progress.step + 1 in steps:
            run.checkpoints.finish_save()  # what saves hold is no leak
            gc.collect()
            held = {"descriptors": process.num_fds(), "threads": process.num_threads(),
                    "resident_bytes": process.memory_info().rss}  # fmt: skip
            with open(f"{path}-{rank}", "a") as file:
                print(json.dumps(held), file=file)
        return original(run)

    train.train_step = train_step
