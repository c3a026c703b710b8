"""One rank's share of a checkpoint, written beside training.

The optimizer's tensors are copied first, on a thread of its own, while forward and backward run, which only read
them; the update waits for the copy. Writing, syncing and hashing then go on beside the steps that follow. What a rank
wrote it notes in a small file beside it, so that rank 0 completes the checkpoint without a collective: training may go
on meanwhile, or have failed.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from pretrain.checkpoints.checkpoint_files import tensor_key
from pretrain.checkpoints.checkpoint_places import Place
from pretrain.errors import CheckpointError
from pretrain.zero.engine import Fragment

_SHARE_SUFFIX = ".share.json"
_FIRST_POLL_SECONDS = 0.05
# As many times as long as it took to look for notes is waited until the next look: of thousands of ranks it takes a
# while, which the first rank's training would feel.
_RESTS, _LONGEST_REST_SECONDS = 10, 5.0


class Task:
    """Something done by a thread of its own; what it raises is kept for `result`."""

    def __init__(self, action: Callable[[], None]) -> None:
        """Begin."""
        self._action = action
        self._problem: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="longhaul-checkpoint", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._action()
        except BaseException as error:  # nobody sees a thread's exception
            self._problem = error

    def is_done(self) -> bool:
        """Whether `result` would not wait."""
        return not self._thread.is_alive()

    def has_failed(self) -> bool:
        """Whether it has ended, and `result` would raise."""
        return self.is_done() and self._problem is not None

    def wait(self, timeout_seconds: float | None = None) -> bool:
        """Wait for the end, at most so long; return whether it has come."""
        self._thread.join(timeout_seconds)
        return self.is_done()

    def result(self) -> None:
        """Wait for the end.

        Raises:
            BaseException: what the action raised.
        """
        self._thread.join()
        if self._problem is not None:
            raise self._problem


class ShareWriter:
    """Copies and writes what this rank owns."""

    def __init__(self, device: torch.device, rank: int, *, asynchronous: bool = True) -> None:
        """Take this rank's device and number, and whether training goes on while a save is written.

        If it does not, tensors that the host has are written as they are, without a second share in memory.
        """
        self._device, self._rank, self._asynchronous = device, rank, asynchronous
        self._buffers: dict[str, torch.Tensor] = {}
        self._copied = threading.Event()
        self._copied.set()

    def start(self, fragments: Sequence[Fragment], place: Place, step: int, on_disk: bool = False) -> Task:
        """Begin to write fragments to the save of a step; they must not change before `wait_for_copy` returns.

        Args:
            fragments: of this rank.
            place: that the checkpoint is written to.
            step: of the checkpoint.
            on_disk: they lie on a disk for want of memory: they are written as they are, without a copy.
        Returns:
            The task; it raises what `Place` says if the disk is full, or the store fails.
        """
        self._copied.clear()
        ready = None
        if self._device.type == "cuda":
            ready = torch.cuda.Event()
            ready.record()  # behind the update that the tensors are to be copied after
        return Task(lambda: self._write(fragments, place, step, ready, copies=self._asynchronous and not on_disk))

    def wait_for_copy(self) -> None:
        """Wait until the tensors may change again."""
        self._copied.wait()

    def _write(
        self, fragments: Sequence[Fragment], place: Place, step: int, ready: torch.cuda.Event | None, copies: bool
    ) -> None:
        name = f"rank-{self._rank:05d}"
        held = [(one.name, one.start, one.length, tuple(one.tensors)) for one in fragments]
        metadata = {"format": "longhaul", "rank": str(self._rank)}
        try:
            tensors = _views(fragments)
            if copies or any(view.device.type != "cpu" for view in tensors.values()):
                tensors = self._copy(tensors, ready)
                self._copied.set()
            num_bytes, sha256 = place.write_tensors(step, f"{name}.safetensors", tensors, metadata)
        finally:
            self._copied.set()
        share = {"file": f"{name}.safetensors", "bytes": num_bytes, "sha256": sha256, "fragments": held}
        place.write_note(step, f"{name}{_SHARE_SUFFIX}", json.dumps(share))

    def _copy(self, views: dict[str, torch.Tensor], ready: torch.cuda.Event | None) -> dict[str, torch.Tensor]:
        """Copy the tensors to memory that is used again: to get as much anew takes as long as the copy itself."""
        on_gpu = ready is not None
        for key, view in views.items():
            if key not in self._buffers:  # pinned, or a GPU could not write to it by itself
                self._buffers[key] = torch.empty(view.shape, dtype=view.dtype, pin_memory=on_gpu)
        if ready is None:
            for key, view in views.items():
                self._buffers[key].copy_(view)
        else:
            torch.cuda.set_device(self._device)  # of this thread
            stream = torch.cuda.Stream(self._device)
            stream.wait_event(ready)
            with torch.cuda.stream(stream):
                for key, view in views.items():
                    self._buffers[key].copy_(view, non_blocking=True)
            stream.synchronize()  # the host waits for these copies, and not for the step that runs
        return {key: self._buffers[key] for key in views}


def _views(fragments: Sequence[Fragment]) -> dict[str, torch.Tensor]:
    """The tensors of fragments, each by its key in the file."""
    return {
        tensor_key(fragment.name, state, fragment.start): view.detach()
        for fragment in fragments
        for state, view in fragment.tensors.items()
    }


def collect_shares(place: Place, step: int, world_size: int, give_up_at: Callable[[], float]) -> list[dict[str, Any]]:
    """Wait until every rank has left a note of what it wrote, and take these notes away.

    Args:
        place: that the checkpoint is written to.
        step: of the checkpoint.
        world_size: number of ranks.
        give_up_at: until when to wait, by the monotonic clock; asked again and again.
    Returns:
        For each rank its file, that one's bytes and sha256, and its fragments: name, start, length and states.
    Raises:
        CheckpointError: it waited for too long.
    """
    pause = _FIRST_POLL_SECONDS
    while True:
        began = time.monotonic()
        names = place.list_notes(step, _SHARE_SUFFIX)
        if len(names) >= world_size:
            break
        if time.monotonic() > give_up_at():
            raise CheckpointError(
                f"only {len(names)} of {world_size} ranks have written their share; expected all. See the others' logs."
            )
        time.sleep(max(pause, min(_RESTS * (time.monotonic() - began), _LONGEST_REST_SECONDS)))
        pause = min(1.5 * pause, place.longest_poll_seconds)
    return [json.loads(note) for note in place.take_notes(step, names)]
