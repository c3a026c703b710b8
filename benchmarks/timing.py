"""Timing of single operations: the device's own time, from a cold cache; on a CPU also beside each other, in turns."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import torch
from torch import Tensor

T = TypeVar("T")

_SPIN_CYCLES = 2_000_000  # about 1.1 ms on an H100: longer than a host needs to launch what is timed


class Timer:
    """Medians of repeated runs on one device.

    On a GPU every run is enclosed by two events. Before it the L2 cache is overwritten, and the device spins while the
    host launches the operation, so that neither cached inputs nor the host's launches are in the number.

    Args:
        device: where the operations run.
        repeats: timed runs.
        warm_up: runs before them, for compilation and the allocator.
    """

    def __init__(self, device: torch.device, repeats: int, warm_up: int) -> None:
        self.device, self.repeats, self.warm_up = device, repeats, warm_up
        if device.type == "cuda":
            size = max(4 * torch.cuda.get_device_properties(device).L2_cache_size, 2**28)
            self._flush = torch.empty(size, dtype=torch.int8, device=device)

    def median_seconds(self, run: Callable[[T], object], prepare: Callable[[], T]) -> float:
        """Time `run(prepare())`, without `prepare`, which is called before each run."""
        for _ in range(self.warm_up):
            run(prepare())
        measure = self._on_gpu if self.device.type == "cuda" else self._on_cpu
        return statistics.median(measure(run, prepare))

    def _on_gpu(self, run: Callable[[T], object], prepare: Callable[[], T]) -> list[float]:
        pairs = []
        for _ in range(self.repeats):
            state = prepare()
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            self._flush.zero_()
            torch.cuda._sleep(_SPIN_CYCLES)
            begin.record()
            run(state)
            end.record()
            pairs.append((begin, end))
        torch.cuda.synchronize()
        return [begin.elapsed_time(end) / 1e3 for begin, end in pairs]

    def _on_cpu(self, run: Callable[[T], object], prepare: Callable[[], T]) -> list[float]:
        seconds = []
        for _ in range(self.repeats):
            state = prepare()
            begin = time.perf_counter()
            run(state)
            seconds.append(time.perf_counter() - begin)
        return seconds

    def copy_bandwidth(self, num_bytes: int) -> float:
        """Return the bytes that a copy of `num_bytes` reads and writes in a second: the ceiling of this session."""
        source = torch.randint(-100, 100, (num_bytes,), dtype=torch.int8, device=self.device)
        target = torch.empty_like(source)
        return 2 * num_bytes / self.median_seconds(lambda _: target.copy_(source), lambda: None)


def time_in_turns(
    functions: Mapping[str, Callable[..., Tensor | tuple[Tensor, ...]]],
    tensors: Sequence[Tensor],
    grads: Sequence[Tensor],
    seconds: float,
) -> dict[str, list[tuple[float, float]]]:
    """Time functions on a CPU in turn, forward and backward, for about `seconds`, at least twice after a first round.

    What else the machine does meets all of them, and changes slowly: compare the times of the same round.

    Args:
        functions: by name; each is called with all tensors.
        tensors: that gradients are computed of.
        grads: of the outputs.
        seconds: after which no round begins.

    Returns:
        Pairs of seconds and seconds of the processor, of each round, by name.
    """
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in functions}
    begin = time.perf_counter()
    for number in range(1000):
        for name, function in functions.items():
            start = time.perf_counter(), time.process_time()
            torch.autograd.grad(function(*tensors), tensors, grads)
            if number > 0:
                times[name].append((time.perf_counter() - start[0], time.process_time() - start[1]))
        if number >= 2 and time.perf_counter() - begin > seconds:
            break
    return times


def median_ratio(ours: list[tuple[float, float]], others: list[tuple[float, float]], kind: int) -> float:
    """Return the median over the rounds of our time divided by another's; kind 0 is time, 1 the processor's."""
    return statistics.median(one[kind] / other[kind] for one, other in zip(ours, others, strict=True))
