"""Makes bf16 right in Triton's interpreter, which otherwise truncates casts and computes garbage, both silently.

bf16 values are held as uint16 there. Kernels of this project only load, store, cast and multiply matrices of bf16, so
only casts and products are mended; anything else raises.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

_cast, _binary, _convert, _dot = (
    InterpreterBuilder.cast_impl,
    InterpreterBuilder.binary_op,
    InterpreterBuilder.create_fp_to_fp,
    InterpreterBuilder.create_dot,
)


def _to_fp32(handle: TensorHandle) -> np.ndarray:
    bits = np.ascontiguousarray(handle.data).view(np.int16)
    return torch.from_numpy(bits).view(torch.bfloat16).float().numpy()


def _to_bf16(values: np.ndarray) -> np.ndarray:
    rounded = torch.from_numpy(np.ascontiguousarray(values, np.float32)).bfloat16()
    return rounded.view(torch.int16).numpy().view(np.uint16)


def _cast_impl(self: InterpreterBuilder, source: TensorHandle, target: Any) -> TensorHandle:
    from_bf16, to_bf16 = source.dtype.scalar == tl.bfloat16, target.scalar == tl.bfloat16
    if from_bf16 and not to_bf16:
        return _cast(self, TensorHandle(_to_fp32(source), tl.float32), target)
    if to_bf16 and not from_bf16:
        return TensorHandle(_to_bf16(source.data), tl.bfloat16)
    return _cast(self, source, target)


def _create_fp_to_fp(self: InterpreterBuilder, source: TensorHandle, target: Any, mode: Any) -> TensorHandle:
    if tl.bfloat16 in (source.dtype.scalar, target.scalar):
        return _cast_impl(self, source, target)
    return _convert(self, source, target, mode)


def _binary_op(self: InterpreterBuilder, left: TensorHandle, right: TensorHandle, op: Callable) -> TensorHandle:
    if tl.bfloat16 in (left.dtype.scalar, right.dtype.scalar):
        raise NotImplementedError(f"{op} in bf16: cast to fp32 first")
    return _binary(self, left, right, op)


def _create_dot(
    self: InterpreterBuilder, left: TensorHandle, right: TensorHandle, added: TensorHandle, *rest: Any
) -> TensorHandle:
    if tl.bfloat16 in (left.dtype.scalar, right.dtype.scalar):
        left, right = (TensorHandle(_to_fp32(side), tl.float32) for side in (left, right))
    return _dot(self, left, right, added, *rest)


def install() -> None:
    """Replace the interpreter's casts for the rest of the process."""
    InterpreterBuilder.cast_impl = _cast_impl
    InterpreterBuilder.create_fp_to_fp = _create_fp_to_fp
    InterpreterBuilder.binary_op = _binary_op
    InterpreterBuilder.create_dot = _create_dot
