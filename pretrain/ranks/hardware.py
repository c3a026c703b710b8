"""What the machine can do at most, for model FLOPs utilisation, and how much memory is used."""

from __future__ import annotations

import resource
import time

import torch

from pretrain.ranks.gpus import gpu_of_device

_SLOW_FLOPS = 10e9  # of a CPU without instructions for a dtype, as most have none for bf16


def peak_flops(device: torch.device, precision: str) -> float | None:
    """Return the most FLOP/s that one rank's device can do in this precision.

    For a GPU it is the data sheet's figure, None if the GPU is not in the table. A CPU has none: the fastest of
    several large matrix products with this process's threads is taken, so CPU utilisation is relative to that.
    """
    if device.type == "cpu":
        return _measure_matmul(torch.bfloat16 if precision == "bf16" else torch.float32)
    found = gpu_of_device(torch.cuda.get_device_name(device))
    if found is None:
        return None
    return found[1].flops_fp32 if precision == "fp32" else found[1].flops


def _measure_matmul(dtype: torch.dtype, repeats: int = 8) -> float:
    best = 0.0
    for size in (256, 768):
        a, b = torch.ones(size, size, dtype=dtype), torch.ones(size, size, dtype=dtype)
        for _ in range(repeats):
            begin = time.perf_counter()
            torch.mm(a, b)
            best = max(best, 2 * size**3 / (time.perf_counter() - begin))
        if best < _SLOW_FLOPS:  # larger ones would take seconds, and be no faster
            break
    return best


def peak_memory_bytes(device: torch.device) -> int:
    """Return the most memory that this process has used so far: of the GPU, or resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def best_device() -> torch.device:
    """The GPU if there is one, else the CPU."""
    return torch.device("cuda") if torch.cuda.is_available() else torch.device("cpu")
