"""A file that is hashed while it is written."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import BinaryIO


class HashedFile:
    """A file that is hashed while it is written; after `discard` it takes writes without effect."""

    def __init__(self, path: Path) -> None:
        """Create the file, or empty it."""
        self.path = path
        self.num_bytes = 0
        self._sha256 = hashlib.sha256()
        self._file: BinaryIO | None = open(path, "wb")

    def write(self, data: bytes) -> int:
        """Append bytes; return how many."""
        if self._file is not None:
            self._file.write(data)
            self._sha256.update(data)
            self.num_bytes += len(data)
        return len(data)

    def sync(self) -> str:
        """Force the bytes to disk, close the file and return its sha256."""
        assert self._file is not None
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        return self._sha256.hexdigest()

    def discard(self) -> None:
        """Delete the file. tarfile's stream writes once more when it is collected: that must not fail."""
        file, self._file = self._file, None
        if file is not None:
            try:
                file.close()
            except OSError:
                pass  # a full disk fails the flush too; the file is deleted anyway
        self.path.unlink(missing_ok=True)
