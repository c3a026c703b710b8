"""Peak rates and memory."""

from __future__ import annotations

import time

import pytest
import torch

from pretrain.ranks.hardware import best_device, peak_flops, peak_memory_bytes


def test_a_cpu_is_measured():
    rate = peak_flops(torch.device("cpu"), "fp32")
    assert 1e8 < rate < 1e14


def test_a_cpu_is_not_measured_for_long_where_it_has_no_instructions_for_a_dtype(monkeypatch):
    sizes = []

    def slow_mm(a, b):
        sizes.append(len(a))
        time.sleep(0.005)

    monkeypatch.setattr(torch, "mm", slow_mm)
    assert peak_flops(torch.device("cpu"), "bf16") == pytest.approx(2 * 256**3 / 0.005, rel=0.5)
    assert set(sizes) == {256}


def test_a_gpu_is_looked_up_by_the_most_particular_name(monkeypatch):
    device = torch.device("cuda", 0)
    for name, low, single in (
        ("NVIDIA H100 80GB HBM3", 989e12, 67e12),
        ("NVIDIA H100 PCIe", 756e12, 51e12),
        ("NVIDIA A100-SXM4-80GB", 312e12, 19.5e12),
        ("NVIDIA A10", 125e12, 31.2e12),
        ("NVIDIA L40S", 362e12, 91.6e12),
        ("NVIDIA L4", 121e12, 30.3e12),
        ("NVIDIA L40", 181e12, 90.5e12),
        ("NVIDIA A10G", 70e12, 31.5e12),
        ("NVIDIA H20", 148e12, 44e12),
        ("NVIDIA H200", 989e12, 67e12),
        ("NVIDIA GH200 480GB", 989e12, 67e12),
        ("NVIDIA GB200", 2500e12, 80e12),
        ("NVIDIA B200", 2250e12, 75e12),
        ("AMD Instinct MI300X", 1307.4e12, 163.4e12),
    ):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda _, name=name: name)
        assert (peak_flops(device, "bf16"), peak_flops(device, "fp32")) == (low, single)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Unknown 9000")
    assert peak_flops(device, "bf16") is None


def test_memory_is_at_least_what_is_held():
    held = torch.ones(2**24)
    assert peak_memory_bytes(torch.device("cpu")) > held.nbytes
    assert best_device().type in ("cpu", "cuda")
