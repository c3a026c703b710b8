"""Small files that are whole at every moment, and folders whose renames survive a crash.

It imports no torch, unlike `tensor_files`.
"""

from __future__ import annotations

import os
from pathlib import Path


def sync_folder(path: str | Path) -> None:
    """Sync a folder's entries, so that a rename in it survives a crash of the machine."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    """Write a file that others may be writing too: it is the old one or a new one, whole."""
    _write(path, text.encode(), path.with_name(f".{path.name}.tmp-{os.getpid()}"))


def write_atomically(path: str | Path, content: bytes) -> None:
    """Write a file that nobody else writes, complete or absent; what a crash leaves has a name known beforehand."""
    path = Path(path)
    _write(path, content, path.with_name(f".{path.name}.tmp"))


def _write(path: Path, content: bytes, temporary: Path) -> None:
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:  # a full disk, Ctrl-C
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)
