"""Files of tensors: safetensors, written so that they are on disk when the call returns, and read by range."""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import safetensors
import torch
from safetensors import SafetensorError

from pretrain.errors import CheckpointError

_FIXES = {
    errno.ENOSPC: "Free space or inodes there, or keep fewer checkpoints (checkpoint.keep_last, keep_every).",
    errno.EDQUOT: "Free space within this user's quota, or have it raised.",
    errno.EROFS: "Have the file system mounted writable again; the machine's log says why it is not.",
    errno.EACCES: "Give this user the right to write there.",
    errno.EPERM: "Give this user the right to write there.",
}
_ANY_FIX = "See the log of the machine that has this disk."
_DTYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}  # safetensors' words
_CHUNK_BYTES = 16 << 20


def explain(error: OSError) -> str:
    """Say why something could not be written, and how to mend it."""
    return f"{error}; expected a writable folder with enough space. {_FIXES.get(error.errno or 0, _ANY_FIX)}"


def check_space(folder: Path, num_bytes: int, num_files: int) -> None:
    """Check that a file system has space: one that is filled takes other programs down too.

    Raises:
        CheckpointError: it has not.
    """
    disk = os.statvfs(folder)
    if (free := disk.f_bavail * disk.f_frsize) < num_bytes:
        raise CheckpointError(f"it takes {num_bytes:,} bytes, and {free:,} are free. {_FIXES[errno.ENOSPC]}")
    if disk.f_files and disk.f_favail < num_files:  # some file systems have no limit, and say 0
        raise CheckpointError(f"it takes {num_files} inodes, and {disk.f_favail:,} are free. {_FIXES[errno.ENOSPC]}")


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> tuple[int, str]:
    """Write CPU tensors to a new file and sync it to disk.

    Returns:
        The file's size in bytes and its sha256: of what was to be written, whatever the disk makes of it.
    Raises:
        OSError: the disk is full, read-only or gone.
    """
    content = TensorBytes(tensors, metadata)
    try:
        with open(path, "wb") as file:
            for chunk in content.chunks():
                file.write(chunk)
            file.flush()
            os.fsync(file.fileno())
        path.chmod(path.parent.stat().st_mode & 0o666)  # whoever may read the folder may read the file
    except OSError:
        path.unlink(missing_ok=True)
        raise
    return content.num_bytes, content.sha256


def safetensors_head(tensors: Sequence[tuple[str, torch.Tensor]], metadata: Mapping[str, str]) -> bytes:
    """Return what a safetensors file begins with: lengths, and places of the tensors that follow in this order.

    Args:
        tensors: names and tensors; their dtypes and shapes are looked at, and they may be on the meta device.
        metadata: for the header.
    """
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    end = 0
    for key, tensor in tensors:
        begin, end = end, end + tensor.nbytes
        header[key] = {"dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # so that the tensors are aligned
    return len(text).to_bytes(8, "little") + text


def bytes_of(tensor: torch.Tensor) -> memoryview:
    """Return the bytes of a contiguous tensor on the CPU, without a copy."""
    return tensor.reshape(-1).view(torch.uint8).numpy().data if tensor.numel() else memoryview(b"")


class TensorBytes:
    """The bytes of a safetensors file of tensors in memory, which are not copied.

    The library's own writer copies every tensor first, into memory that a rank does not have a second time, and what it
    has written must be read again to be hashed.

    Attributes:
        num_bytes: Size of the file.
        sha256: Of what was last taken from `chunks`, once all was.
    """

    def __init__(self, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> None:
        """Take contiguous tensors on the CPU, which must not change any more."""
        self._tensors = [tensors[key] for key in sorted(tensors)]
        assert all(one.is_contiguous() and one.device.type == "cpu" for one in self._tensors)
        self._head = safetensors_head([(key, tensors[key]) for key in sorted(tensors)], metadata)
        end = sum(tensor.nbytes for tensor in self._tensors)
        self.num_bytes, self.sha256 = len(self._head) + end, ""

    def chunks(self) -> Iterator[memoryview]:
        """Yield the file from its beginning."""
        digest = hashlib.sha256()
        buffers = [memoryview(self._head), *map(bytes_of, self._tensors)]
        for buffer in buffers:
            for begin in range(0, len(buffer), _CHUNK_BYTES):
                part = buffer[begin : begin + _CHUNK_BYTES]
                digest.update(part)
                yield part
        self.sha256 = digest.hexdigest()


def sha256_of(path: Path) -> str:
    """Return the sha256 of a file's bytes, in hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class TensorFile:
    """An open safetensors file, memory-mapped: a range costs its own bytes only."""

    def __init__(self, path: Path) -> None:
        try:
            self._file = safetensors.safe_open(path, framework="pt", device="cpu")
        except (OSError, SafetensorError) as error:
            raise CheckpointError(
                f"{path}: is not readable ({error}); expected a safetensors file. Use another checkpoint (--step)."
            ) from None

    def read(self, key: str, start: int, stop: int) -> torch.Tensor:
        """Return elements [start, stop) of a flat tensor."""
        return self._file.get_slice(key)[start:stop]

    def names(self) -> list[str]:
        """Names of the tensors."""
        return list(self._file.keys())

    def read_whole(self, key: str) -> torch.Tensor:
        """Return a tensor in its own shape and dtype."""
        return self._file.get_tensor(key)

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield each tensor with its name; the bytes stay in the file until they are looked at."""
        for key in self._file.keys():
            yield key, self._file.get_tensor(key)
