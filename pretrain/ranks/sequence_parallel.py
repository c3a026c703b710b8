"""Sequence parallelism: ranks that share rows, each with a part of every row's slots and, in attention, of the heads.

Everything but attention treats tokens one by one, and so runs on a part of the row. Before attention the ranks of a
group exchange slots for heads: each then has whole rows of its heads, where documents, windows and dropout are what
they are on one rank. After it they exchange back. The gradient of an exchange is the exchange the other way.

Source: Jacobs et al. 2023, "DeepSpeed Ulysses"; key heads that are fewer than ranks are repeated, as in
`deepspeed.runtime.sequence_parallel.ulysses_sp`. Why the exchange is not DeepSpeed's: docs/notes/0030.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

Exchange = Callable[..., Any]  # as torch.distributed.all_to_all_single
_EXCHANGES: dict[str, tuple[Exchange, dist.ProcessGroup]] = {}  # by the name of the group


@dataclass(frozen=True)
class SequenceGroup:
    """The ranks that share this rank's rows, and its place among them.

    Args:
        size: how many they are; 1: nothing is shared.
        index: of this rank, which has the index-th part of the slots and of the heads.
        name: of the process group.
    """

    size: int = 1
    index: int = 0
    name: str = ""

    def own(self, count: int) -> slice:
        """Return this rank's part of so many slots, or heads."""
        each = count // self.size
        return slice(self.index * each, (self.index + 1) * each)

    def slots_to_heads(self, q_BTHC: Tensor, k_BTKC: Tensor, v_BTKC: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Give up other ranks' heads for other ranks' slots.

        Args:
            q_BTHC: queries of this rank's slots, all heads.
            k_BTKC, v_BTKC: keys and values likewise; fewer heads than ranks divide these, more are divided by them.

        Returns:
            Queries `[B, T x size, H / size, C]`, keys and values `[B, T x size, max(K / size, 1), C]`.
        """
        repeats = max(self.size // k_BTKC.shape[2], 1)
        if repeats > 1:  # several ranks need the same head; the gradients of its copies are summed
            k_BTKC, v_BTKC = (x.repeat_interleave(repeats, dim=2) for x in (k_BTKC, v_BTKC))
        parts = [x.unflatten(2, (self.size, -1)) for x in (q_BTHC, k_BTKC, v_BTKC)]
        heads = [part.shape[3] for part in parts]
        sent = torch.cat([part.permute(2, 0, 1, 3, 4) for part in parts], dim=3)  # one exchange for all three
        got = exchange_parts(sent, self.name).transpose(0, 1).flatten(1, 2)
        q, k, v = got.split(heads, dim=2)
        return q, k, v

    def heads_to_slots(self, x_BTHC: Tensor) -> Tensor:
        """Give back what `slots_to_heads` got: `[B, T x size, H / size, C]` to `[B, T, H, C]`."""
        sent = x_BTHC.unflatten(1, (self.size, -1)).transpose(0, 1).contiguous()
        return exchange_parts(sent, self.name).permute(1, 2, 0, 3, 4).flatten(2, 3)


ALONE = SequenceGroup()


@cache
def join_sequence_group(
    size: int, rank: int, world_size: int, timeout_seconds: int, exchange: Exchange = dist.all_to_all_single
) -> SequenceGroup:
    """Make groups of `size` neighbouring ranks, and return this rank's; all ranks call this together.

    Args:
        size: divides `world_size`.
        rank: of this process.
        world_size: number of ranks.
        timeout_seconds: of a collective in these groups.
        exchange: what exchanges the parts of a tensor, called as `exchange(output, input, group=…)`.
    """
    if size == 1:
        return ALONE
    own = None
    for first in range(0, world_size, size):
        group = dist.new_group(list(range(first, first + size)), timeout=timedelta(seconds=timeout_seconds))
        own = group if first <= rank < first + size else own
    assert own is not None, "size divides world_size"
    name = own.group_name
    _EXCHANGES[name] = exchange, own
    return SequenceGroup(size, rank % size, name)


# An operator of its own: `torch.compile` takes it as it is, and `train.activation_checkpointing: selective` keeps what
# it returns. A group cannot be an argument of one, its name can.
@torch.library.custom_op("longhaul::exchange_parts", mutates_args=())
def exchange_parts(parts: Tensor, group_name: str) -> Tensor:
    """Send the n-th part of a contiguous tensor `[size, …]` to rank n of a group; return what all of them sent here."""
    exchange, group = _EXCHANGES[group_name]
    received = torch.empty_like(parts)
    exchange(received, parts, group=group)
    return received


@exchange_parts.register_fake
def _(parts: Tensor, group_name: str) -> Tensor:
    return torch.empty_like(parts)


def _keep_name(ctx: Any, inputs: tuple[Tensor, str], output: Tensor) -> None:
    ctx.group_name = inputs[1]


def _exchange_back(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
    return exchange_parts(grad.contiguous(), ctx.group_name), None


exchange_parts.register_autograd(_exchange_back, setup_context=_keep_name)
