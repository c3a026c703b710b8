"""What the machine can do at most, for model FLOPs utilisation, and how much memory is used."""

from __future__ import annotations

import resource
import time

import torch

# Dense peak FLOP/s: (bf16 and fp16 with matrix units and fp32 sums, fp32 without TF32). Source: the makers' data
# sheets, whose figures "with sparsity" are twice these. The longest key that the device's name contains counts.
GPU_PEAK_FLOPS = {
    "GB200": (2500e12, 80e12),
    "B200": (2250e12, 75e12),
    "B300": (2250e12, 75e12),
    "GH200": (989e12, 67e12),
    "H200": (989e12, 67e12),
    "H200 NVL": (835e12, 60e12),
    "H100": (989e12, 67e12),
    "H100 NVL": (835e12, 60e12),
    "H100 PCIe": (756e12, 51e12),
    "H800": (989e12, 67e12),
    "H20": (148e12, 44e12),
    "A100": (312e12, 19.5e12),
    "A800": (312e12, 19.5e12),
    "A40": (149.7e12, 37.4e12),
    "A30": (165e12, 10.3e12),
    "A10": (125e12, 31.2e12),
    "A10G": (70e12, 31.5e12),
    "L40S": (362e12, 91.6e12),
    "L40": (181e12, 90.5e12),
    "L4": (121e12, 30.3e12),
    "RTX A6000": (154.8e12, 38.7e12),
    "RTX 6000 Ada": (364.2e12, 91.1e12),
    "RTX 5090": (209.5e12, 104.8e12),
    "RTX 4090": (165e12, 82.6e12),
    "RTX 3090": (71e12, 35.6e12),
    "V100": (125e12, 15.7e12),
    "MI300X": (1307.4e12, 163.4e12),
    "MI325X": (1307.4e12, 163.4e12),
}


_SLOW_FLOPS = 10e9  # of a CPU without instructions for a dtype, as most have none for bf16


def peak_flops(device: torch.device, precision: str) -> float | None:
    """Return the most FLOP/s that one rank's device can do in this precision.

    For a GPU it is the data sheet's figure, None if the GPU is not in the table. A CPU has none: the fastest of
    several large matrix products with this process's threads is taken, so CPU utilisation is relative to that.
    """
    if device.type == "cpu":
        return _measure_matmul(torch.bfloat16 if precision == "bf16" else torch.float32)
    name = torch.cuda.get_device_name(device)
    key = max((key for key in GPU_PEAK_FLOPS if key in name), key=len, default=None)
    if key is None:
        return None
    low, single = GPU_PEAK_FLOPS[key]
    return single if precision == "fp32" else low


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
