"""Bytes of tensors that live at once, counted at every operator: memory as a GPU's allocator would see it, on a CPU."""

from __future__ import annotations

from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


class LiveTensors(TorchDispatchMode):
    """Counts what operators allocate while this is entered, in the forward and the backward pass.

    Attributes:
        peak_bytes: most that lived at once.
        now_bytes: what lives now.
    """

    def __init__(self) -> None:
        """Count nothing yet."""
        super().__init__()
        self._live: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak_bytes = self.now_bytes = 0

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        known = {x.untyped_storage()._cdata for x in tree_iter((args, kwargs)) if hasattr(x, "untyped_storage")}
        out = operator(*args, **(kwargs or {}))
        for x in tree_iter(out):
            if hasattr(x, "untyped_storage") and (storage := x.untyped_storage())._cdata not in known:
                self._live[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self.count()
        return out

    def count(self) -> int:
        """Return the bytes that live now."""
        self._live = {key: item for key, item in self._live.items() if not item[0].expired()}
        self.now_bytes = sum(size for _, size in self._live.values())
        self.peak_bytes = max(self.peak_bytes, self.now_bytes)
        return self.now_bytes
