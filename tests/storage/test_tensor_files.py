"""Writing files that are whole or absent."""

from __future__ import annotations

import errno
import hashlib
import os
from types import SimpleNamespace

import pytest
import torch

from pretrain.errors import CheckpointError
from pretrain.storage.tensor_files import TensorFile, check_space, explain, sha256_of, write_tensors
from pretrain.storage.whole_file import write_text
from tests.helpers.data_helpers import file_size_limit


def test_tensors_come_back_by_range_and_the_digest_is_of_the_bytes(tmp_path):
    path = tmp_path / "x.safetensors"
    num_bytes, digest = write_tensors(path, {"a": torch.arange(10.0)}, {"k": "v"})
    assert num_bytes == path.stat().st_size
    assert digest == hashlib.sha256(path.read_bytes()).hexdigest() == sha256_of(path)
    assert TensorFile(path).read("a", 3, 6).tolist() == [3.0, 4.0, 5.0]


def test_a_file_that_cannot_be_written_is_an_os_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        write_tensors(tmp_path / "absent" / "x.safetensors", {"a": torch.ones(1)}, {})
    with file_size_limit(100), pytest.raises(OSError, match="File too large") as raised:
        write_tensors(tmp_path / "x.safetensors", {"a": torch.ones(1000)}, {})
    assert raised.value.errno == errno.EFBIG and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("number", "fix"),
    [(errno.ENOSPC, "Free space or inodes"), (errno.EDQUOT, "quota"), (errno.EROFS, "mounted writable again"),
     (errno.EACCES, "the right to write"), (errno.EIO, "See the log of the machine")],
)  # fmt: skip
def test_each_cause_has_its_own_fix(number, fix):
    text = explain(OSError(number, os.strerror(number), "x"))
    assert text.startswith(f"[Errno {number}] {os.strerror(number)}: 'x'; expected a writable folder") and fix in text


def test_space_and_inodes_are_checked_before_writing(tmp_path, monkeypatch):
    check_space(tmp_path, 1, 1)
    with pytest.raises(CheckpointError, match=r"it takes 9,000,000,000,000,000 bytes, and .* are free. Free space"):
        check_space(tmp_path, 9_000_000_000_000_000, 1)
    real = os.statvfs(tmp_path)
    fake = {name: getattr(real, name) for name in ("f_bavail", "f_frsize", "f_files", "f_favail")}
    monkeypatch.setattr(os, "statvfs", lambda _: SimpleNamespace(**fake | {"f_files": 100, "f_favail": 3}))
    with pytest.raises(CheckpointError, match="it takes 4 inodes, and 3 are free. Free space or inodes"):
        check_space(tmp_path, 1, 4)
    monkeypatch.setattr(os, "statvfs", lambda _: SimpleNamespace(**fake | {"f_files": 0, "f_favail": 0}))
    check_space(tmp_path, 1, 4)  # a file system without a limit


def test_garbage_is_refused(tmp_path):
    (tmp_path / "x.safetensors").write_bytes(b"not tensors")
    with pytest.raises(CheckpointError, match="expected a safetensors file"):
        TensorFile(tmp_path / "x.safetensors")


def test_text_replaces_whole(tmp_path):
    write_text(tmp_path / "status.json", "old")
    write_text(tmp_path / "status.json", "new")
    assert (tmp_path / "status.json").read_text() == "new"
    with file_size_limit(2), pytest.raises(OSError, match="File too large"):
        write_text(tmp_path / "status.json", "newest")
    assert (tmp_path / "status.json").read_text() == "new"
    assert [p.name for p in tmp_path.iterdir()] == ["status.json"]
