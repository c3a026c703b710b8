"""A rank's share: what is copied, and until when the tensors must stay as they are."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from pretrain.checkpoints.checkpoint_folder import FolderPlace
from pretrain.checkpoints.share_writer import ShareWriter
from pretrain.zero.engine import Fragment


@pytest.mark.parametrize("asynchronous", [True, False])
def test_the_file_is_what_the_tensors_were(tmp_path: Path, asynchronous: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    place = FolderPlace(tmp_path / "checkpoints")
    place.claim("run", tmp_path)
    place.begin(1, 1000, 1)
    may_write, given = threading.Event(), []
    write_tensors = place.write_tensors

    def write_later(step, name, tensors, metadata):
        given.extend(tensors.values())
        assert may_write.wait(30)
        return write_tensors(step, name, tensors, metadata)

    monkeypatch.setattr(place, "write_tensors", write_later)
    master = torch.arange(6.0)
    writer = ShareWriter(torch.device("cpu"), 0, asynchronous=asynchronous)
    share = writer.start([Fragment("weight", (3, 2), 0, 6, {"master": master})], place, 1)
    waiter = threading.Thread(target=writer.wait_for_copy)
    waiter.start()
    waiter.join(30 if asynchronous else 0.5)
    assert waiter.is_alive() is not asynchronous  # without a copy, the update waits for the writing
    if asynchronous:
        master.zero_()
    may_write.set()
    share.result()
    waiter.join(30)
    (path,) = tmp_path.rglob("rank-00000.safetensors")
    (written,) = load_file(path).values()
    assert torch.equal(written, torch.arange(6.0))
    assert (given[0].data_ptr() == master.data_ptr()) is not asynchronous
