"""Finds what makes the host wait for a GPU: reads of single values and operators whose result's size is data."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

WAITING = (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default,
           torch.ops.aten.masked_select.default, torch.ops.aten.unique_consecutive.default)  # fmt: skip


class HostReads(TorchDispatchMode):
    """Collects, for each such operator within, the function outside of torch that called it.

    Attributes:
        callers: `file:function`, each with the operator's name.
    """

    def __init__(self) -> None:
        super().__init__()
        self.callers: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in WAITING:
            frame = sys._getframe(1)
            while frame is not None and "/torch/" in frame.f_code.co_filename:
                frame = frame.f_back
            name = "/".join(frame.f_code.co_filename.split("/")[-3:]) if frame else "?"
            self.callers.append(f"{name}:{frame.f_code.co_name if frame else '?'} {func}")
        return func(*args, **(kwargs or {}))
