"""What makes a rank hang, slow or fail, as hooks of the fork server: called in every rank before the command."""

from __future__ import annotations

import ctypes
import os
import platform
import signal
import socket
import time
from typing import Any

CLONE_NEWNET, CLONE_NEWUTS = 0x40000000, 0x04000000


def enter_hosts(rank: int, namespaces: list[str], names: list[str]) -> None:
    """Let every rank live on a host of its own, as far as network and name go; see `tests/helpers/hosts.py`."""
    descriptor = os.open(f"/run/netns/{namespaces[rank]}", os.O_RDONLY)
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.setns(descriptor, CLONE_NEWNET) == 0, os.strerror(ctypes.get_errno())
    os.close(descriptor)
    assert libc.unshare(CLONE_NEWUTS) == 0, os.strerror(ctypes.get_errno())
    socket.sethostname(names[rank])
    platform.uname.__globals__["_uname_cache"] = None  # of the process that has forked this one


def open_fifo(rank: int, at_rank: int, number: int, fifo: str) -> None:
    """Let the `number`-th document that a rank reads come from a pipe into which nobody writes."""
    from pretrain.data.shard_reader import ShardReader

    if rank == at_rank:
        _at_call(ShardReader, "read", number, lambda: open(fifo, "rb").close())


def slow_down(rank: int, at_rank: int, seconds: float, num_steps: int) -> None:
    """Let a rank take so much longer over each of its first forward passes."""
    from pretrain.zero.engine import Engine

    forward, done = Engine.forward, [0]

    def slow(*args: Any) -> Any:
        done[0] += 1
        if rank == at_rank and done[0] <= num_steps:
            time.sleep(seconds)
        return forward(*args)

    Engine.forward = slow  # type: ignore[method-assign]


def slow_save(rank: int, at_rank: int, seconds: float) -> None:
    """Let a rank take so much longer to write its share of a checkpoint."""
    from pretrain.checkpoints import checkpoint_folder

    if rank == at_rank:
        write = checkpoint_folder.write_tensors
        checkpoint_folder.write_tensors = lambda *args: (time.sleep(seconds), write(*args))[1]


def fail(rank: int, at_rank: int, number: int) -> None:
    """Let a rank's `number`-th forward pass fail, as a bug of ours would."""
    from pretrain.zero.engine import Engine

    if rank == at_rank:
        _at_call(Engine, "forward", number, lambda: 1 / 0)


def signal_in_the_start(rank: int, at_rank: int) -> None:
    """Send a rank SIGTERM while it builds its engine."""
    from pretrain.zero.engine import Engine

    if rank == at_rank:
        _at_call(Engine, "fragments", 1, lambda: os.kill(os.getpid(), signal.SIGTERM))


def _at_call(holder: Any, name: str, number: int, action: Any) -> None:
    """Do something before the `number`-th call of a method."""
    method, done = getattr(holder, name), [0]

    def counted(*args: Any, **kwargs: Any) -> Any:
        done[0] += 1
        if done[0] == number:
            action()
        return method(*args, **kwargs)

    setattr(holder, name, counted)
