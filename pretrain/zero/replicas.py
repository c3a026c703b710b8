"""Silent corruption: what several ranks hold alike, or one rank holds twice, is compared, bit for bit.

Memory and processors err now and then without saying so. What ZeRO leaves whole on every rank is there as often as
there are ranks: each hashes its own, the hashes are gathered, and those that differ name the rank and the parameter.
From stage 1 on the weights are the rounded masters, which the rank that has both compares with them.

A hash is the sum of a tensor's bits, taken as whole numbers, each times an odd constant of its place, modulo 2^64. Any
single flipped bit changes it for certain, and any other difference does but for bad luck. The order of the additions
does not matter, so that every device computes the same. Source: multilinear hashing (Dietzfelbinger 1996).
"""

from __future__ import annotations

import platform
from collections import Counter
from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

from pretrain.errors import CorruptionError
from pretrain.ranks.distributed import Ranks
from pretrain.zero.engine import MASTER, Engine, Fragment

_ROW = 1 << 14  # elements that are multiplied by the same constants
_ROWS_AT_ONCE = {"cpu": 4, "cuda": 256}  # whose products, 8 bytes each, fit into a cache
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def hash_tensor(tensor: Tensor) -> Tensor:
    """Return the hash of a tensor's bits as a whole number on its device, without waiting for it.

    Args:
        tensor: contiguous, of any dtype and shape.
    Returns:
        a scalar, int64.
    """
    bits = tensor.detach().view(-1).view(_BITS[tensor.element_size()])
    num_rows, device = len(bits) // _ROW, tensor.device
    at_once = _ROWS_AT_ONCE.get(device.type, 1)
    constants, row_constants = _constants(device), _odd_numbers(0, num_rows + 1, device)
    total = torch.zeros((), dtype=torch.int64, device=device)
    for first in range(0, num_rows, at_once):
        end = min(first + at_once, num_rows)
        rows = bits[first * _ROW : end * _ROW].view(-1, _ROW)
        total += ((rows * constants).sum(1) * row_constants[first:end]).sum()
    rest = bits[num_rows * _ROW :]
    return total + (rest * constants[: len(rest)]).sum() * row_constants[-1]


@cache
def _constants(device: torch.device) -> Tensor:
    return _odd_numbers(1 << 32, (1 << 32) + _ROW, device)  # far from the numbers of rows


def _odd_numbers(first: int, end: int, device: torch.device) -> Tensor:
    """Return for each whole number an odd one `[end - first]`, int64, that looks random and is the same everywhere.

    Source: SplitMix64 (Steele, Lea and Flood 2014); torch's shifts keep the sign, which the masks take away.
    """
    x = (torch.arange(first, end, device=device) + 1) * _signed(0x9E3779B97F4A7C15)
    x = (x ^ (x >> 30 & (1 << 34) - 1)) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> 27 & (1 << 37) - 1)) * _signed(0x94D049BB133111EB)
    return x ^ (x >> 31 & (1 << 33) - 1) | 1


def _signed(number: int) -> int:
    return number - (1 << 64) if number >> 63 else number


def check_when_due(engine: Engine, ranks: Ranks, step: int, every: int) -> None:
    """Do `check_replicas` before update number `step` + 1 if that is a multiple of `every`.

    Before it, and not after: what corrupted weights gave as gradients is not applied then.
    """
    if every and (step + 1) % every == 0:
        check_replicas(engine, ranks, step, every)


def check_replicas(engine: Engine, ranks: Ranks, step: int, every: int) -> None:
    """Compare what should be equal bit for bit; all ranks call it together, between two updates.

    Args:
        engine: whose tensors.
        ranks: all.
        step: updates done, for the message.
        every: `guard.check_replicas_every`; 0 compares nothing.
    Raises:
        CorruptionError: on all ranks, naming what differs and where.
    """
    if not every:
        return
    replicas = dict(engine.replicas()) if ranks.world_size > 1 else {}
    rounded = [fragment for fragment in engine.fragments() if fragment.weight is not None]
    if ranks.world_size == 1 and not rounded:
        return
    num_wrong = torch.zeros((), dtype=torch.int64, device=ranks.device)
    for fragment in rounded:
        num_wrong += _differs(fragment).to(ranks.device)
    own = torch.stack([*(hash_tensor(tensor) for tensor in replicas.values()), num_wrong])
    table = ranks.gather_tensor(own).tolist()
    columns = {name: [row[index] for row in table] for index, name in enumerate(replicas)}
    unlike = {name: hashes for name, hashes in columns.items() if len(set(hashes)) > 1}
    if not unlike and not any(row[-1] for row in table):
        return
    not_rounded = ranks.gather([fragment.name for fragment in rounded if _differs(fragment)])
    error = CorruptionError(
        _describe(step, unlike, not_rounded, ranks.gather(platform.node()))
        + " Nothing of it was saved: the same command goes on from the newest checkpoint. If the same rank or host is "
        "named again, take its node out, and test its memory and its GPU."
    )
    error.agreed = True
    raise error


def _differs(fragment: Fragment) -> Tensor:
    """Whether the weights of a fragment are not its masters, rounded, bit for bit."""
    assert fragment.weight is not None
    master, weight = fragment.tensors[MASTER].detach(), fragment.weight.detach()
    kind = _BITS[weight.element_size()]
    rounded = master.to(weight.dtype)
    return (rounded.view(kind) != weight.to(master.device).view(kind)).any()


def _describe(
    step: int, unlike: dict[str, list[int]], not_rounded: Sequence[Sequence[str]], hosts: Sequence[str]
) -> str:
    """Say which ranks' tensors differ.

    Args:
        step: updates done.
        unlike: of each tensor that differs, the hash on every rank.
        not_rounded: of each rank, the parameters whose weights are not the rounded masters.
        hosts: of each rank.
    """
    odd = {rank for values in unlike.values() for rank in _minority(values)}
    cannot_tell = any(not _minority(values) for values in unlike.values())
    parts = []
    if unlike:
        where = f"{_named(sorted(odd), hosts)} {'has' if len(odd) == 1 else 'have'} others than most ranks"
        if cannot_tell:
            where = f"which of the ranks ({_named(range(len(hosts)), hosts)}) are wrong cannot be told"
        parts.append(f"{_listed(list(unlike))} should be equal on all ranks, and {where}.")
    for rank, names in enumerate(not_rounded):
        if names:
            parts.append(
                f"On {_named([rank], hosts)} the weights are not the rounded fp32 masters of {_listed(list(names))}."
            )
    return f"step {step}: memory is corrupted. {' '.join(parts)}"


def _minority(values: Sequence[int]) -> list[int]:
    """The ranks that differ from what more than half of all have; none if there is no such majority."""
    value, count = Counter(values).most_common(1)[0]
    return [rank for rank, found in enumerate(values) if found != value] if 2 * count > len(values) else []


def _named(ranks: Sequence[int], hosts: Sequence[str]) -> str:
    shown = ", ".join(f"rank {rank} on {hosts[rank]}" for rank in list(ranks)[:4])
    return shown if len(ranks) <= 4 else f"{shown} and {len(ranks) - 4} more"


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(f"'{name}'" for name in names[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"
