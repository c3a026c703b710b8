"""Activation offload: what blocks keep for the backward pass lies in the host's memory until then.

On a GPU both ways run on a stream of their own, into and out of pinned memory: what one block keeps is copied away
while the next one computes, and what the block before needs is fetched while this one's backward pass runs.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from pretrain.errors import ConfigError


def check_checkpointing(mode: str, device: torch.device) -> None:
    """Check that there is another memory than the host's to keep less in.

    Raises:
        ConfigError: `train.activation_checkpointing` is `offload` and there is not.
    """
    if mode == "offload" and device.type == "cpu":
        raise ConfigError(
            "train.activation_checkpointing is offload; expected none, selective or full on a CPU, whose memory is the "
            "host's. Use train.activation_checkpointing=full, which computes the same."
        )


@dataclass
class _Kept:
    """A tensor in the host's memory; `fetched` and `arrived` once it is on its way back."""

    on_host: Tensor
    device: torch.device
    block: int
    fetched: Tensor | None = None
    arrived: torch.cuda.Event | None = None


class KeptOnHost:
    """What the blocks of one forward pass keep, from the first block to the last."""

    def __init__(self) -> None:
        """Begin a forward pass."""
        self._blocks: list[list[_Kept]] = []

    @contextmanager
    def of_block(self) -> Iterator[None]:
        """Enclose the forward pass of the next block: what autograd keeps of it is kept in the host's memory."""
        block = len(self._blocks)
        self._blocks.append([])
        with torch.autograd.graph.saved_tensors_hooks(lambda tensor: self._store(tensor, block), self._fetch):
            yield

    def _store(self, tensor: Tensor, block: int) -> _Kept:
        kept = _Kept(_to_host(tensor), tensor.device, block)
        self._blocks[block].append(kept)
        return kept

    def _fetch(self, kept: _Kept) -> Tensor:
        if kept.device.type != "cuda":
            return kept.on_host.to(kept.device)
        _begin_fetch(kept)
        fetched, arrived = kept.fetched, kept.arrived
        kept.fetched = kept.arrived = None
        assert fetched is not None and arrived is not None
        consumer = torch.cuda.current_stream(kept.device)
        consumer.wait_event(arrived)
        fetched.record_stream(consumer)
        for earlier in self._blocks[kept.block - 1] if kept.block else ():
            _begin_fetch(earlier)
        return fetched


def _to_host(tensor: Tensor) -> Tensor:
    """Begin to copy a tensor to the host; its memory is free for others once that is done."""
    if tensor.device.type != "cuda":
        return tensor.detach().clone()
    on_host = torch.empty_like(tensor, device="cpu", pin_memory=True)
    stream = _copy_stream(tensor.device)
    stream.wait_stream(torch.cuda.current_stream(tensor.device))
    with torch.cuda.stream(stream):
        on_host.copy_(tensor.detach(), non_blocking=True)
    tensor.record_stream(stream)
    return on_host


def _begin_fetch(kept: _Kept) -> None:
    if kept.fetched is not None:
        return
    with torch.cuda.stream(_copy_stream(kept.device)):  # behind the copy to the host, which was in the same stream
        kept.fetched = kept.on_host.to(kept.device, non_blocking=True)
        kept.arrived = torch.cuda.Event()
        kept.arrived.record()


@cache
def _copy_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)
