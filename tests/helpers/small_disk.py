"""A file system of a few hundred KiB, or of few inodes, to run out of."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


@contextmanager
def small_disk(path: Path, kibibytes: int, num_inodes: int | None = None) -> Iterator[Path]:
    """Mount a tmpfs of that size at `path`; skips the test where this is not allowed."""
    path.mkdir(parents=True)
    if os.geteuid() != 0:
        pytest.skip("mounting a small file system needs root")
    options = f"size={kibibytes}k" + (f",nr_inodes={num_inodes}" if num_inodes else "")
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(path)], capture_output=True, text=True
    )
    if mounted.returncode != 0:
        pytest.skip(f"a small file system cannot be mounted here: {mounted.stderr.strip()}")
    try:
        yield path
    finally:
        subprocess.run(["umount", "--lazy", str(path)], check=True)  # also where a failed test left it in use


def remount(path: Path, options: str) -> None:
    """Change a mounted small disk: `size=4m`, `nr_inodes=100`, `ro`, `rw`."""
    subprocess.run(["mount", "-o", f"remount,{options}", str(path)], check=True)
