"""The folder of states on a disk: what can be used, and what is left."""

from __future__ import annotations

import errno
import os

import pytest

from pretrain.errors import ConfigError
from pretrain.swapped_states import prepare_folder, remove_states
from tests.test_deepspeed_settings import config_of


def on_disk(folder):
    return config_of(parallel={"zero_stage": 3, "offload": "optimizer", "nvme_dir": str(folder)})


def test_a_folder_is_made_and_emptied(tmp_path):
    assert prepare_folder(config_of(parallel={"zero_stage": 3})) is None
    folder = prepare_folder(on_disk(tmp_path / "new"))
    assert folder.parent == tmp_path / "new" and list(folder.iterdir()) == []
    for rank in (0, 1):
        states = folder / "zero_stage_3/optimizer" / f"rank{rank}"
        states.mkdir(parents=True)
        (states / "0_1.tensor.swp").write_bytes(b"1")
    remove_states(folder, 0)
    remove_states(folder, 2)
    assert [path.parent.name for path in folder.rglob("*.swp")] == ["rank1"]


@pytest.mark.parametrize("failure", [errno.EACCES, errno.EINVAL])  # not writable; no direct access, as in memory
def test_a_folder_that_cannot_be_used_is_an_error(tmp_path, monkeypatch, failure):
    def fail(*_):
        raise OSError(failure, os.strerror(failure))

    monkeypatch.setattr(os, "open", fail)
    with pytest.raises(ConfigError) as caught:
        prepare_folder(on_disk(tmp_path))
    assert str(caught.value) == (
        f"parallel.nvme_dir is {tmp_path}, which cannot be used ([Errno {failure}] {os.strerror(failure)}); expected a "
        "folder on a disk of each node, writable and not in memory. Name one, such as a folder of the node's NVMe disk."
    )
