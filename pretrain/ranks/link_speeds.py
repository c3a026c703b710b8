"""What the links between ranks carry, measured in a ring and in a sum over all ranks."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist

from pretrain.ranks.distributed import Ranks

SLOW_RATIO = 0.5  # of a link's speed to that of good ones of its kind
_SIZES = {"cpu": (2**18, 2**22), "cuda": (2**18, 2**22, 2**26, 2**28)}  # bytes
_LONG_ENOUGH_SECONDS = 0.02  # a message that takes so long tells the speed
_REPEATS = 3


@dataclass(frozen=True)
class Link:
    """Two neighbours in the ring of ranks.

    Attributes:
        ranks, hosts: of its two ends.
        bytes_per_second: each way, both at once.
    """

    ranks: tuple[int, int]
    hosts: tuple[str, str]
    bytes_per_second: float

    @property
    def is_inside(self) -> bool:
        """Whether both ends are on one node."""
        return self.hosts[0] == self.hosts[1]


@dataclass(frozen=True)
class LinkSpeeds:
    """What was measured.

    Attributes:
        all_reduce_bytes_per_second: bus bandwidth of a sum over all ranks: what each rank sends a second if the sum
            is made in a ring, 2 (n - 1) / n of its size.
        links: of each rank to the next one.
        on_gpus: between GPUs; within a node CPUs have no links, only copies that wait for a processor.
    """

    all_reduce_bytes_per_second: float
    links: Sequence[Link]
    on_gpus: bool

    def slow(self) -> list[str]:
        """Say which links are slow beside the others of their kind, and which node if all of its links are."""
        texts = []
        for inside in (True, False) if self.on_gpus else (False,):
            links = [link for link in self.links if link.is_inside == inside]
            if len(links) < 3:  # of two nobody can say which one is wrong
                continue
            good = sorted((link.bytes_per_second for link in links), reverse=True)[len(links) // 4]
            bad = [link for link in links if link.bytes_per_second < SLOW_RATIO * good]
            texts += self._name(bad, links, good, inside)
        return texts

    def _name(self, bad: Sequence[Link], links: Sequence[Link], good: float, inside: bool) -> list[str]:
        texts, named = [], set()
        for host in dict.fromkeys(host for link in bad for host in link.hosts):
            own = [link for link in links if host in link.hosts]
            if not inside and len(own) > 1 and all(link in bad for link in own):
                named |= {link.ranks for link in own}
                texts.append(f"{host} is slow: its links to other nodes carry {_rates(own)}, where good ones carry "
                             f"{_rate(good)}. Look at its cable, port or interface, or leave it out")  # fmt: skip
        for link in bad:
            if link.ranks not in named:
                ends = f"{link.hosts[0]} (rank {link.ranks[0]}) and {link.hosts[1]} (rank {link.ranks[1]})"
                texts.append(f"the link between {ends} carries {_rate(link.bytes_per_second)}, where good ones "
                             f"{'within a node ' if inside else ''}carry {_rate(good)}")  # fmt: skip
        return texts

    def __str__(self) -> str:
        parts = [f"all-reduce {_rate(self.all_reduce_bytes_per_second)}"]
        for inside, name in ((True, "within nodes"), (False, "between nodes")):
            if links := [link for link in self.links if link.is_inside == inside]:
                parts.append(f"{name} {_rates(links)}")
        return ", ".join(parts)

    def as_json(self) -> dict[str, Any]:
        """The same for programs: what the sum carries, and the slowest links, at most 16."""
        slowest = sorted(self.links, key=lambda link: link.bytes_per_second)[:16]
        return {
            "all_reduce_bytes_per_second": self.all_reduce_bytes_per_second,
            "slowest_links": [
                {"ranks": link.ranks, "hosts": link.hosts, "bytes_per_second": link.bytes_per_second}
                for link in slowest
            ],
        }


def _rate(bytes_per_second: float) -> str:
    return f"{bytes_per_second / 1e9:.3g} GB/s"


def _rates(links: Sequence[Link]) -> str:
    rates = [link.bytes_per_second for link in links]
    low, high = _rate(min(rates)), _rate(max(rates))
    return low if low == high else f"{low.removesuffix(' GB/s')} to {high}"


def measure_links(ranks: Ranks, hosts: Sequence[str]) -> LinkSpeeds:
    """Measure, all ranks together.

    Args:
        ranks: two at least.
        hosts: name of each rank's node.
    """
    num = ranks.world_size
    all_reduced = _bytes_per_second(ranks, lambda tensor: dist.all_reduce(tensor)) * 2 * (num - 1) / num
    speeds = LinkSpeeds(all_reduced, _measure_ring(ranks, hosts), ranks.device.type == "cuda")
    if speeds.slow():  # a busy processor may have been why: what is slow twice is
        again = _measure_ring(ranks, hosts)
        best = [max(pair, key=lambda link: link.bytes_per_second) for pair in zip(speeds.links, again, strict=True)]
        speeds = replace(speeds, links=best)
    return speeds


def _measure_ring(ranks: Ranks, hosts: Sequence[str]) -> list[Link]:
    """Measure the links of all ranks to the next, in rounds of pairs that have no rank in common."""
    num, rank = ranks.world_size, ranks.rank
    measured: dict[int, float] = {}  # by the link's first rank
    for first_ranks in rounds(num):
        first = rank if rank in first_ranks else (rank - 1) % num
        partner = (first + 1) % num if first == rank else first
        takes_part = first in first_ranks
        speed = _bytes_per_second(ranks, lambda tensor, to=partner if takes_part else None: _swap(tensor, to))  # type: ignore[misc]
        if takes_part:
            measured[first] = speed
    told = ranks.gather(measured)
    ends = [(first, (first + 1) % num) for first in sorted({first for one in told for first in one})]
    return [
        Link((a, b), (hosts[a], hosts[b]), min(told[a][a], told[b][a])) for a, b in ends
    ]  # the slower end has it right: the other had the message before it looked


def rounds(num_ranks: int) -> list[list[int]]:
    """Divide the links of a ring, named by their first ranks, into rounds in which no rank has two."""
    if num_ranks == 2:
        return [[0]]
    even, odd = list(range(0, num_ranks - 1, 2)), list(range(1, num_ranks - 1, 2))
    return [even, [*odd, num_ranks - 1]] if num_ranks % 2 == 0 else [even, odd, [num_ranks - 1]]


def _swap(tensor: torch.Tensor, partner: int | None) -> None:
    if partner is None:
        return
    received = torch.empty_like(tensor)
    swap = [dist.P2POp(dist.isend, tensor, partner), dist.P2POp(dist.irecv, received, partner)]
    for work in dist.batch_isend_irecv(swap):
        work.wait()


def _bytes_per_second(ranks: Ranks, send: Callable[[torch.Tensor], Any]) -> float:
    """Return bytes per second of a message that is large enough to tell; all ranks send as many.

    Messages grow until they take long enough on the slowest rank: a link that is very slow does not make the start so.
    """
    ranks.barrier()
    _seconds(ranks, send, 1)  # connects
    for size in _SIZES[ranks.device.type]:
        seconds = _seconds(ranks, send, size)
        if _slowest(ranks, seconds) >= _LONG_ENOUGH_SECONDS:
            break
    return size / min([seconds, *(_seconds(ranks, send, size) for _ in range(_REPEATS - 1))])


def _seconds(ranks: Ranks, send: Callable[[torch.Tensor], Any], size: int) -> float:
    tensor = torch.ones(size, dtype=torch.uint8, device=ranks.device)
    _synchronize(ranks.device)
    begin = time.perf_counter()
    with ranks.heartbeat.waiting():
        send(tensor)
        _synchronize(ranks.device)
    return time.perf_counter() - begin


def _slowest(ranks: Ranks, seconds: float) -> float:
    worst = torch.tensor(seconds, device=ranks.device)
    dist.all_reduce(worst, dist.ReduceOp.MAX)
    return worst.item()


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
