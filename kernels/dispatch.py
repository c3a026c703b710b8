"""Where it is decided which implementation of an operation runs, and how Triton programs are laid out.

Triton kernels run on tensors of a GPU, and anywhere under `TRITON_INTERPRET=1`, which tests use; otherwise the
plain PyTorch truth beside each kernel runs.
"""

from __future__ import annotations

import os

import torch
import triton
from torch import Tensor

INTERPRETER_PROGRAMS = 3  # few, so that tests make one program loop over several rows


def use_triton(x: Tensor) -> bool:
    """Tell whether operations on `x` run as Triton kernels."""
    return x.is_cuda or os.environ.get("TRITON_INTERPRET") == "1"


def rows_of(x: Tensor) -> Tensor:
    """View `x` as rows `[N, D]` whose last dimension is contiguous; copies only where no view exists.

    Args:
        x: any shape `[..., D]`, any strides.
    """
    rows = x.reshape(-1, x.shape[-1])
    # A dimension of size 1 may carry any stride, and contiguous() would leave it as it is: harmless, since only
    # index 0 is read along it.
    return rows if rows.stride(-1) == 1 else rows.contiguous()


def row_block(width: int) -> tuple[int, int]:
    """Choose the tile of a kernel that holds one row in registers.

    Args:
        width: elements of the row.

    Returns:
        Tile width, a power of two, and warps. 16 elements a thread at most up to 8192 columns, so that the four fp32
        arrays of a norm's backward stay in registers (compiled for sm_80 and sm_90 without spills by the tests).
    """
    block = max(triton.next_power_of_2(width), 32)
    return block, min(max(block // 512, 1), 16 if block <= 8192 else 32)


def num_programs(x: Tensor, num_rows: int, num_warps: int) -> int:
    """Count the programs of a persistent grid: enough to fill the GPU, each looping over rows.

    Args:
        x: a tensor on the device that will run them.
        num_rows: rows to be shared out.
        num_warps: warps of one program.
    """
    if not x.is_cuda:
        return min(num_rows, INTERPRETER_PROGRAMS)
    # An SM holds 64 warps; more than 8 programs on one only lengthen the reduction of their partial sums.
    per_processor = min(8, 64 // num_warps)
    return min(num_rows, torch.cuda.get_device_properties(x.device).multi_processor_count * per_processor)


def check_norm(x: Tensor, residual: Tensor | None, *parameters: Tensor | None) -> None:
    """Refuse arguments of a norm that a kernel would read past their end, or that PyTorch would broadcast.

    Raises:
        ValueError: if the residual is not of the shape and dtype of `x`, or a parameter is not `[D]`.
    """
    if residual is not None and (residual.shape != x.shape or residual.dtype != x.dtype):
        raise ValueError(
            f"residual is {tuple(residual.shape)} {residual.dtype}; expected the shape and dtype of x, "
            f"{tuple(x.shape)} {x.dtype}."
        )
    for parameter in parameters:
        if parameter is not None and parameter.shape != x.shape[-1:]:
            raise ValueError(f"a norm's parameter is {tuple(parameter.shape)}; expected {tuple(x.shape[-1:])}.")
