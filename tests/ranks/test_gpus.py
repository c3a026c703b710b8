"""The table of GPUs, and finding one in it."""

from __future__ import annotations

import re

import pytest

from pretrain.errors import ConfigError
from pretrain.ranks.gpus import GPUS, find_gpu, gpu_of_device


@pytest.mark.parametrize(
    ("device", "key"),
    [
        ("NVIDIA A100-SXM4-80GB", "A100"), ("NVIDIA A100-SXM4-40GB", "A100 40GB"), ("NVIDIA A100 80GB PCIe", "A100 PCIe"),
        ("NVIDIA H100 80GB HBM3", "H100"), ("NVIDIA H100 PCIe", "H100 PCIe"), ("NVIDIA H100 NVL", "H100 NVL"),
        ("NVIDIA H200", "H200"), ("NVIDIA GB200", "GB200"), ("NVIDIA L40S", "L40S"), ("NVIDIA A10G", "A10G"),
        ("NVIDIA GeForce RTX 4090", "RTX 4090"), ("NVIDIA RTX 6000 Ada Generation", "RTX 6000 Ada"), ("Tesla T4", "T4"),
        ("Tesla V100-SXM2-32GB", "V100"), ("Tesla V100-SXM2-16GB", "V100 16GB"), ("AMD Instinct MI300X", "MI300X"),
    ],
)  # fmt: skip
def test_a_device_is_found_by_its_words(device: str, key: str) -> None:
    found = gpu_of_device(device)
    assert found == (key, GPUS[key])


def test_a_name_that_only_contains_one_is_not_it() -> None:
    assert gpu_of_device("NVIDIA RTX A4000") is None  # not the A40
    assert gpu_of_device("") is None


@pytest.mark.parametrize(
    "text", ["NVIDIA H100 MIG 1g.10gb", "H100 64GB", "H100 94GB", "A100 20 GB", "NVIDIA GeForce RTX 4090 Laptop GPU"]
)
def test_another_memory_or_a_part_is_another_gpu(text: str) -> None:
    assert gpu_of_device(text) is None
    with pytest.raises(ConfigError, match=re.escape(f"--gpu: GPU is {text}; expected one of")):
        find_gpu(text)
    assert gpu_of_device("NVIDIA GH200 480GB") == ("GH200", GPUS["GH200"])  # of its CPU


@pytest.mark.parametrize(
    ("text", "key"),
    [("h100", "H100"), ("H100 SXM5", "H100"), ("a100-40gb", "A100 40GB"), ("A100-80GB", "A100"), ("rtx4090", "RTX 4090"),
     ("h100_pcie", "H100 PCIe"), ("A100 40 GB", "A100 40GB"), ("NVIDIA B200", "B200")],
)  # fmt: skip
def test_a_user_may_write_it_otherwise(text: str, key: str) -> None:
    assert find_gpu(text)[0] == key


@pytest.mark.parametrize(
    ("text", "near"), [("H10", "H100"), ("A1000", "A100"), ("4090", "RTX 4090"), ("MI300", "MI300X")]
)
def test_an_unknown_one_names_the_nearest(text: str, near: str) -> None:
    with pytest.raises(ConfigError, match=rf"--gpu: GPU is {text}; expected one of GB200, .*Nearest: .*\b{near}\b"):
        find_gpu(text)


def test_one_like_no_other_names_the_page() -> None:
    with pytest.raises(ConfigError, match=r"GPU is zzz; expected one of .* See docs/planning.md\."):
        find_gpu("zzz")


def test_the_numbers_are_of_the_right_kind() -> None:
    for name, gpu in GPUS.items():
        assert gpu.flops_fp32 < gpu.flops < 1e16, name
        assert 10 < gpu.memory_gib < 500 and 100 < gpu.bandwidth < 1e4 and 1 < gpu.network <= gpu.bandwidth, name
        assert 0.5 < gpu.matmul <= 1 and (gpu.price is None or 0 < gpu.price < 20), name
    assert not GPUS["V100"].has_bf16 and not GPUS["T4"].has_bf16
    assert GPUS["A100"].has_bf16 and GPUS["MI300X"].has_bf16
