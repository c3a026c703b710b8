"""Tile shapes of the attention programs: read from a table of the GPU, never searched for during training.

Each file of `kernels/tiles/` is the table of one GPU, by its name, or of a generation, by its compute capability.
`benchmarks/tune.py` writes them. All ranks on GPUs of one kind read the same numbers, so they run the same programs.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
import triton

FOLDER = Path(__file__).parent / "tiles"
KERNELS = ("forward", "grad_kv_atomic", "grad_kv", "grad_q")
FEW_QUERIES = 16  # generation with a cache
SHORT_KEYS = 1024
# Shared memory of a program, by which a GPU without a table of its own gets that of another.
_TABLE_OF_MAJOR = {9: "sm_90", 10: "sm_100", 11: "sm_86", 12: "sm_86"}


@dataclass(frozen=True)
class Tile:
    """The shape of one program.

    Args:
        block_q: queries of a tile.
        block_k: keys of a tile.
        num_warps: warps of a program.
        num_stages: tiles in flight from memory.
    """

    block_q: int
    block_k: int
    num_warps: int
    num_stages: int


INTERPRETED = Tile(32, 16, 4, 1)


def own_name(gpu: str) -> str:
    """Name the table that is of this GPU alone, by the name that the driver gives it."""
    return re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-")


def table_name(device: torch.device) -> str:
    """Name the table of a GPU: its own where there is one, else that of its generation."""
    own = own_name(torch.cuda.get_device_name(device))
    if (FOLDER / f"{own}.json").exists():
        return own
    if torch.version.hip:
        return "gfx942"
    major, minor = torch.cuda.get_device_capability(device)
    return _TABLE_OF_MAJOR.get(major, "sm_80" if (major, minor) == (8, 0) else "sm_86")


@cache
def read_table(name: str) -> dict[str, Any]:
    """Read a table: `gpu`, `tuned` (when, with what; null: never), and `tiles` by program and shape class."""
    return json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))


def shape_class(head_dim: int, num_queries: int, num_keys: int, has_extra: bool) -> str:
    """Name the shapes that share a tile: width of heads, as a power of two, and length.

    Args:
        head_dim: C.
        num_queries: T.
        num_keys: S.
        has_extra: there is a soft-cap or dropout, whose registers leave room for smaller tiles only.
    """
    length = "few" if num_queries <= FEW_QUERIES else "short" if num_keys <= SHORT_KEYS else "long"
    return f"{block_of_width(head_dim)} {'extra' if has_extra else length}"


def block_of_width(head_dim: int) -> int:
    """Round the width of a head up to what a tile holds."""
    return max(32, triton.next_power_of_2(head_dim))


@cache
def _device_table(index: int) -> dict[str, Any]:
    return read_table(table_name(torch.device("cuda", index)))["tiles"]


def find_tile(kernel: str, q_BTHC: torch.Tensor, num_keys: int, has_extra: bool) -> Tile:
    """Find the tile shape of a program.

    Args:
        kernel: one of `KERNELS`.
        q_BTHC: the queries.
        num_keys: S.
        has_extra: there is a soft-cap or dropout.
    """
    if not q_BTHC.is_cuda:
        return INTERPRETED
    _, T, _, C = q_BTHC.shape
    tiles = _device_table(q_BTHC.device.index)[kernel]
    name = shape_class(C, T, num_keys, has_extra)
    # backward of few queries is that of a short row
    return Tile(*tiles.get(name) or tiles[name.replace("few", "short")])
