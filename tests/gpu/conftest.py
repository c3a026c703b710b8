"""What the tests of one GPU need of the process, and how those that need much of its memory wait for each other."""

from __future__ import annotations

import fcntl
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

# Read at the first matrix product: without it, torch refuses all of them where a test asks for determinism.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


@pytest.fixture
def much_memory() -> Iterator[None]:
    """Have the memory of the GPU while the other processes of `pytest -n 8` do small things, and give it back."""
    with open(Path(tempfile.gettempdir()) / f"longhaul-gpu-tests-{os.getuid()}", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
        torch.cuda.empty_cache()


@pytest.fixture
def exact_products() -> Iterator[None]:
    """Multiply fp32 matrices in fp32; by hand, because what monkeypatch undoes is no attribute to this object."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = before
