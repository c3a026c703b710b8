"""Files that a run appends to beside training: a full disk delays what is written to them, and ends nothing."""

from __future__ import annotations

from io import FileIO
from pathlib import Path

from pretrain.console import counted, warn

MAX_WAITING_BYTES = 64 << 20  # of one file, in memory: about 60,000 lines of metrics.jsonl


class PatientFile:
    """A file that whole records are appended to: lines, or events of TensorBoard.

    What cannot be written waits in memory and is written first when that is possible again, so that nothing is lost or
    torn. Beyond `MAX_WAITING_BYTES` new records are dropped and counted. Both is said once on stderr.
    """

    def __init__(self, path: Path) -> None:
        """Open the file at the first record; it and its folder are made if they are not there."""
        self._path = path
        self._file: FileIO | None = None
        self._waiting = bytearray()
        self._num_dropped, self._is_failing = 0, False

    def append(self, record: bytes) -> None:
        """Write a record, or let it wait."""
        if len(self._waiting) + len(record) > MAX_WAITING_BYTES:
            self._num_dropped += 1
        else:
            self._waiting += record
        self._write()

    def _write(self) -> None:
        try:
            if self._file is None:
                self._path.parent.mkdir(exist_ok=True)
                self._file = FileIO(self._path, "ab")
            while self._waiting:
                del self._waiting[: self._file.write(self._waiting)]
        except OSError as error:
            if not self._is_failing:
                warn(
                    f"{self._path}: cannot be written ({error.strerror}); expected a disk with space. Training goes on "
                    "and what is to be written waits in memory: free space there."
                )
            self._is_failing = True
            return
        if self._is_failing:
            lost = f"; {counted(self._num_dropped, 'record')} dropped" if self._num_dropped else ""
            warn(f"{self._path}: is written again{lost}")
        self._num_dropped, self._is_failing = 0, False

    def close(self) -> None:
        """Try once more to write what waits, and close the file."""
        self._write()
        if self._waiting:
            warn(f"{self._path}: its last {len(self._waiting):,} bytes could not be written, and are lost")
        if self._file:
            self._file.close()
