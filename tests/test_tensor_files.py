"""Writing files that are whole or absent."""

from __future__ import annotations

import hashlib

import pytest
import torch

from pretrain.errors import CheckpointError
from pretrain.tensor_files import TensorFile, sha256_of, write_tensors, write_text


def test_tensors_come_back_by_range_and_the_digest_is_of_the_bytes(tmp_path):
    path = tmp_path / "x.safetensors"
    num_bytes, digest = write_tensors(path, {"a": torch.arange(10.0)}, {"k": "v"})
    assert num_bytes == path.stat().st_size
    assert digest == hashlib.sha256(path.read_bytes()).hexdigest() == sha256_of(path)
    assert TensorFile(path).read("a", 3, 6).tolist() == [3.0, 4.0, 5.0]


def test_a_file_that_cannot_be_written_is_an_os_error(tmp_path):
    with pytest.raises(OSError, match=r"."):
        write_tensors(tmp_path / "absent" / "x.safetensors", {"a": torch.ones(1)}, {})


def test_garbage_is_refused(tmp_path):
    (tmp_path / "x.safetensors").write_bytes(b"not tensors")
    with pytest.raises(CheckpointError, match="expected a safetensors file"):
        TensorFile(tmp_path / "x.safetensors")


def test_text_replaces_whole(tmp_path):
    write_text(tmp_path / "status.json", "old")
    write_text(tmp_path / "status.json", "new")
    assert (tmp_path / "status.json").read_text() == "new"
    assert [p.name for p in tmp_path.iterdir()] == ["status.json"]
