"""Which table and tile a GPU gets, and what runs where no table is for it. GPUs are made up."""

from __future__ import annotations

import json
import warnings
from types import SimpleNamespace

import pytest
import torch

from kernels import attention, tile_table
from kernels.tile_table import Tile, block_of_width, find_tile, shape_class, table_name

CUDA = torch.device("cuda", 0)


def pretend(monkeypatch, name, capability, hip=None):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.version, "hip", hip)
    tile_table._device_table.cache_clear()


@pytest.fixture(autouse=True)
def forget():
    yield
    tile_table._device_table.cache_clear()


def queries(T=2048, C=128, dtype=torch.bfloat16):
    return SimpleNamespace(is_cuda=True, dtype=dtype, device=CUDA, shape=(1, T, 16, C))


@pytest.mark.parametrize(
    ("name", "capability", "expected"),
    [
        ("NVIDIA A100-SXM4-80GB", (8, 0), "sm_80"),
        ("NVIDIA A10G", (8, 6), "sm_86"),
        ("NVIDIA L4", (8, 9), "sm_86"),
        ("NVIDIA H200", (9, 0), "sm_90"),
        ("NVIDIA B200", (10, 0), "sm_100"),
        ("NVIDIA GeForce RTX 5090", (12, 0), "sm_86"),
    ],
)
def test_a_gpu_gets_the_table_of_its_generation(monkeypatch, name, capability, expected):
    pretend(monkeypatch, name, capability)
    assert table_name(CUDA) == expected


def test_an_amd_gpu_gets_its_own(monkeypatch):
    pretend(monkeypatch, "AMD Instinct MI300X", (9, 4), hip="7.0")
    assert table_name(CUDA) == "gfx942"


def test_a_tuned_table_goes_before_that_of_the_generation(monkeypatch, tmp_path):
    monkeypatch.setattr(tile_table, "FOLDER", tmp_path)
    tiles = {kernel: {"128 long": [64, 32, 4, 3]} for kernel in tile_table.KERNELS}
    table = {"gpu": "made up", "tuned": None, "tiles": tiles}
    (tmp_path / "nvidia-h100-80gb-hbm3.json").write_text(json.dumps(table), encoding="utf-8")
    pretend(monkeypatch, "NVIDIA H100 80GB HBM3", (9, 0))
    assert find_tile("forward", queries(), 2048, False) == Tile(64, 32, 4, 3)


def test_tiles_of_shape_classes(monkeypatch):
    pretend(monkeypatch, "NVIDIA H200", (9, 0))
    tiles = json.loads((tile_table.FOLDER / "sm_90.json").read_text(encoding="utf-8"))["tiles"]
    for T, S, extra, length in ((2048, 2048, False, "long"), (512, 512, False, "short"), (1, 9000, False, "few"),
                                (2048, 2048, True, "extra"), (1, 9, True, "extra")):  # fmt: skip
        assert shape_class(80, T, S, extra) == f"128 {length}"
        assert find_tile("forward", queries(T, 80), S, extra) == Tile(*tiles["forward"][f"128 {length}"])
    # the backward pass of few queries is that of a short row
    assert find_tile("grad_q", queries(1, 64), 9000, False) == Tile(*tiles["grad_q"]["64 short"])


@pytest.mark.parametrize(("head_dim", "block"), [(1, 32), (32, 32), (40, 64), (64, 64), (80, 128), (256, 256)])
def test_blocks_of_widths(head_dim, block):
    assert block_of_width(head_dim) == block


@pytest.mark.parametrize(
    ("capability", "head_dim", "dtype", "hip", "expected"),
    [
        ((9, 0), 128, torch.bfloat16, None, None),
        ((8, 0), 256, torch.float16, None, None),
        ((9, 4), 128, torch.bfloat16, "7.0", None),
        (
            (7, 5),
            64,
            torch.float16,
            None,
            "attention: compute capability (7, 5): PyTorch's attention runs, with a mask",
        ),
        ((9, 0), 320, torch.bfloat16, None, "attention: heads of 320: PyTorch's attention runs"),
        ((9, 0), 64, torch.float32, None, "attention: fp32: PyTorch's attention runs"),
    ],
)
def test_a_gpu_without_programs_is_told_what_runs(monkeypatch, capability, head_dim, dtype, hip, expected):
    pretend(monkeypatch, "a GPU", capability, hip)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert attention._has_programs(queries(C=head_dim), dtype, head_dim) is (expected is None)
    assert [str(warning.message).startswith(expected or "") for warning in caught] == ([True] if expected else [])
