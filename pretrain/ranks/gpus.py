"""What GPUs can do at most, by their data sheets, and what they are assumed to do. The one table of GPUs."""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass

from pretrain.errors import ConfigError

GIB = 2**30


@dataclass(frozen=True, slots=True)
class Gpu:
    """One kind of GPU.

    Args:
        flops: dense FLOP/s in bf16 and fp16 with matrix units and fp32 sums.
        flops_fp32: likewise in fp32, without TF32.
        memory_gib: that programs find; data sheets say a little more.
        bandwidth: of its memory, GB/s.
        link: to the other GPUs of its node, GB/s in one direction.
        network: to other nodes, GB/s in one direction and for each GPU, as such machines usually have.
        price: US dollars an hour, an assumption of the order of on-demand prices; None: not offered like this.
        matmul: of `flops`, what large matrix products reach.
        capability: CUDA's compute capability; 0 for AMD's.
    """

    flops: float
    flops_fp32: float
    memory_gib: float
    bandwidth: float
    link: float
    network: float
    price: float | None
    matmul: float = 0.8
    capability: float = 9.0

    @property
    def has_bf16(self) -> bool:
        """Whether its matrix units multiply bf16."""
        return self.capability == 0 or self.capability >= 8.0

    @property
    def memory_bytes(self) -> int:
        """Memory that programs find."""
        return int(self.memory_gib * GIB)


# Source: the makers' data sheets; FLOP/s there "with sparsity" are twice these, NVLink's GB/s are of both directions
# together. Of memory, 1 to 2% less than the sheet is found (measured by others: H100 79.2 GiB, A100 79.25, L40S 44.4,
# RTX 4090 23.5, RTX 5090 31.4: kevinmusgrave.github.io/pytorch-metric-learning, "GPU benchmarks 3.0.0"). `matmul` is
# measured by others for A100, H100, MI300X and RTX 4090 (github.com/mag-/gpu_benchmark: 268, 792, 758 and 178 TFLOP/s)
# and assumed elsewhere. Networks and prices are assumptions (docs/planning.md).
GPUS: dict[str, Gpu] = {
    "GB200": Gpu(2500e12, 80e12, 184, 8000, 900, 50, 6.5, capability=10.0),
    "B300": Gpu(2250e12, 75e12, 268, 8000, 900, 100, 7.0, capability=10.3),
    "B200": Gpu(2250e12, 75e12, 178, 8000, 900, 50, 5.5, capability=10.0),
    "GH200": Gpu(989e12, 67e12, 94.5, 4000, 450, 50, 2.0),
    "H200": Gpu(989e12, 67e12, 139.8, 4800, 450, 50, 3.5),
    "H200 NVL": Gpu(835e12, 60e12, 139.8, 4800, 450, 25, 3.0),
    "H100": Gpu(989e12, 67e12, 79.2, 3350, 450, 50, 2.5),
    "H100 NVL": Gpu(835e12, 60e12, 93.1, 3900, 300, 25, 2.4),
    "H100 PCIe": Gpu(756e12, 51e12, 79.2, 2000, 64, 25, 2.0),
    "H800": Gpu(989e12, 67e12, 79.2, 3350, 200, 50, None),
    "H20": Gpu(148e12, 44e12, 95.0, 4000, 450, 50, None),
    "A100": Gpu(312e12, 19.5e12, 79.25, 2039, 300, 25, 1.5, 0.86, 8.0),
    "A100 40GB": Gpu(312e12, 19.5e12, 39.4, 1555, 300, 25, 1.1, 0.86, 8.0),
    "A100 PCIe": Gpu(312e12, 19.5e12, 79.25, 1935, 32, 12.5, 1.3, 0.82, 8.0),
    "A800": Gpu(312e12, 19.5e12, 79.25, 2039, 200, 25, None, 0.86, 8.0),
    "A40": Gpu(149.7e12, 37.4e12, 44.4, 696, 32, 12.5, 0.5, capability=8.6),
    "A30": Gpu(165e12, 10.3e12, 23.5, 933, 32, 12.5, 0.4, capability=8.0),
    "A10": Gpu(125e12, 31.2e12, 22.0, 600, 32, 6.25, 0.75, capability=8.6),
    "A10G": Gpu(70e12, 31.5e12, 22.0, 600, 32, 6.25, 1.0, capability=8.6),
    "L40S": Gpu(362e12, 91.6e12, 44.4, 864, 32, 25, 1.0, capability=8.9),
    "L40": Gpu(181e12, 90.5e12, 44.4, 864, 32, 12.5, 0.9, capability=8.9),
    "L4": Gpu(121e12, 30.3e12, 22.0, 300, 32, 6.25, 0.5, capability=8.9),
    "RTX A6000": Gpu(154.8e12, 38.7e12, 47.4, 768, 32, 12.5, 0.6, capability=8.6),
    "RTX 6000 Ada": Gpu(364.2e12, 91.1e12, 47.4, 960, 32, 12.5, 0.8, capability=8.9),
    "RTX 5090": Gpu(209.5e12, 104.8e12, 31.4, 1792, 64, 6.25, 0.7, capability=12.0),
    "RTX 4090": Gpu(165e12, 82.6e12, 23.5, 1008, 32, 6.25, 0.4, 1.0, 8.9),
    "RTX 3090": Gpu(71e12, 35.6e12, 23.5, 936, 32, 6.25, 0.25, capability=8.6),
    "V100": Gpu(125e12, 15.7e12, 31.7, 900, 150, 12.5, 0.6, capability=7.0),
    "V100 16GB": Gpu(125e12, 15.7e12, 15.8, 900, 150, 12.5, 0.5, capability=7.0),
    "T4": Gpu(65e12, 8.1e12, 14.6, 320, 16, 3.1, 0.35, capability=7.5),
    "MI300X": Gpu(1307.4e12, 163.4e12, 191.0, 5300, 448, 50, 2.5, 0.58, 0.0),
    "MI325X": Gpu(1307.4e12, 163.4e12, 255.0, 6000, 448, 50, 3.0, 0.58, 0.0),
}


def gpu_of_device(name: str) -> tuple[str, Gpu] | None:
    """Return the entry whose words are all in a device's name, the most particular one; None if there is none.

    A memory in the name must be the entry's. A part of a GPU (MIG) and a laptop's are others than the table's.

    Args:
        name: as CUDA gives it, such as `NVIDIA A100-SXM4-40GB`.
    """
    words = re.findall(r"[a-z0-9]+", re.sub(r"\b(\d+) ?gb\b", r"\1gb", name.lower()))
    sizes = [int(word.removesuffix("gb")) for word in words if re.fullmatch(r"\d{2,3}(gb)?", word)]
    if {"mig", "laptop", "max", "mobile"} & set(words):
        return None
    found = [key for key in GPUS if set(words).issuperset(key.lower().split())]
    key = max(found, key=len, default=None)
    if key is None or (sizes and key != "GH200" and abs(GPUS[key].memory_gib / sizes[0] - 1) > 0.1):
        return None  # a GH200's name has the memory of its CPU
    return key, GPUS[key]


def find_gpu(name: str) -> tuple[str, Gpu]:
    """Return the entry that a user means, by its name in the table, however it is written, or a device's name.

    Raises:
        ConfigError: there is none; it names the nearest.
    """
    plain = {_plain(key): key for key in GPUS}
    if _plain(name) in plain:
        key = plain[_plain(name)]
        return key, GPUS[key]
    if found := gpu_of_device(name):
        return found
    near = [plain[one] for one in difflib.get_close_matches(_plain(name), plain, n=3, cutoff=0.6)]
    near += [key for key in GPUS if _plain(name) and _plain(name) in _plain(key) and key not in near]
    advice = f"Nearest: {', '.join(near)}." if near else "See docs/planning.md."
    raise ConfigError(f"--gpu: GPU is {name}; expected one of {', '.join(GPUS)}. {advice}")


def _plain(name: str) -> str:
    return "".join(re.findall(r"[a-z0-9]+", name.lower()))
