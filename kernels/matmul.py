"""Matrix products whose results are fp32 whatever their factors are."""

from __future__ import annotations

import torch
from torch import Tensor

_HALVES = (torch.bfloat16, torch.float16)


def _has_wide_result(a: Tensor, b: Tensor) -> bool:
    """Tell whether the GPU's library multiplies these into fp32: NVIDIA's, in half precision."""
    return a.is_cuda and not torch.version.hip and a.dtype == b.dtype and a.dtype in _HALVES


def matmul_fp32(a: Tensor, b: Tensor) -> Tensor:
    """Multiply matrices into fp32: by the GPU's matrix units with an fp32 result, on a CPU from fp32 copies.

    Args:
        a: `[M, K]`.
        b: `[K, N]`.
    """
    if a.dtype == torch.float32 and b.dtype == torch.float32:
        return a @ b
    if _has_wide_result(a, b):
        return torch.mm(a, b, out_dtype=torch.float32)
    if a.dtype != torch.bfloat16 or b.dtype != torch.bfloat16:
        return torch.mm(a.float(), b.float())
    # The copies hold bf16 values, so bf16 matrix units, where the CPU has them, lose nothing and are faster
    # (2048 x 256 x 4096 with AMX, forward and backward: 105 ms against 196 ms).
    settings = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = settings.fp32_precision
    settings.fp32_precision = "bf16"
    try:
        return torch.mm(a.float(), b.float())
    finally:
        settings.fp32_precision = before


def matmul_into(out: Tensor, a: Tensor, b: Tensor) -> None:
    """Multiply matrices into memory that is there, without any of its own where the GPU's library can.

    Args:
        out: fp32 `[M, N]`, rows contiguous.
        a: `[M, K]`.
        b: `[K, N]`.
    """
    if a.dtype == torch.float32 and b.dtype == torch.float32:
        torch.mm(a, b, out=out)
    elif _has_wide_result(a, b):
        torch.mm(a, b, out_dtype=torch.float32, out=out)
    else:
        out.copy_(matmul_fp32(a, b))


def add_matmul(out: Tensor, a: Tensor, b: Tensor) -> None:
    """Add a product of matrices to `out`; arguments as in `matmul_into`.

    PyTorch takes an fp32 matrix to add beside factors of half its width since 2.10 (pytorch#167931).
    """
    if a.dtype == torch.float32 and b.dtype == torch.float32:
        torch.addmm(out, a, b, out=out)
    elif _has_wide_result(a, b):
        torch.addmm(out, a, b, out_dtype=torch.float32, out=out)
    else:
        out.add_(matmul_fp32(a, b))
