"""The folder of states on a disk: what can be used, and what is left."""

from __future__ import annotations

import errno
import os
from types import SimpleNamespace

import pytest

from pretrain.errors import ConfigError
from pretrain.zero.swapped_states import prepare_folder, remove_states
from tests.zero.test_deepspeed_settings import config_of


def on_disk(folder):
    return config_of(parallel={"zero_stage": 3, "offload": "optimizer", "nvme_dir": str(folder)})


def prepare(config, rank=0, problem=None):
    """Prepare a rank's folder, where DeepSpeed's operators are there or cannot be compiled."""

    def load(_):
        if problem:
            raise problem

    builders = SimpleNamespace(AsyncIOBuilder=type("Builder", (), {"load": load}))
    ranks = SimpleNamespace(agree=lambda action: action(), local_rank=rank, is_first=rank == 0)
    return prepare_folder(config, builders, ranks)


def leave_states(folder, ranks):
    for rank in ranks:
        states = folder / "zero_stage_3/optimizer" / f"rank{rank}"
        states.mkdir(parents=True)
        (states / "0_1.tensor.swp").write_bytes(b"1")


def test_a_folder_is_made_and_emptied(tmp_path, capsys):
    assert prepare(config_of(parallel={"zero_stage": 3})) is None and capsys.readouterr().err == ""
    folder = prepare(on_disk(tmp_path / "new"))
    assert "the first time DeepSpeed compiles them, minutes\n" in capsys.readouterr().err
    assert folder.parent == tmp_path / "new" and list(folder.iterdir()) == []
    leave_states(folder, (0, 1))
    remove_states(folder, 0)
    remove_states(folder, 2)
    assert [path.parent.name for path in folder.rglob("*.swp")] == ["rank1"]
    remove_states(folder, 1)
    assert list((tmp_path / "new").iterdir()) == []


def test_what_a_start_that_was_killed_left_is_removed(tmp_path):
    folder = prepare(on_disk(tmp_path))
    leave_states(folder, (0, 1, 2, 3))
    assert prepare(on_disk(tmp_path), rank=1) == folder and len(list(folder.rglob("*.swp"))) == 4
    assert prepare(on_disk(tmp_path)) == folder and list(folder.iterdir()) == []


@pytest.mark.parametrize(
    ("problem", "reason"),
    [
        (RuntimeError("Error building extension 'async_io': [1/2] g++ -c a.cpp\nFAILED: a.o\n"
                      "a.cpp:3:10: fatal error: libaio.h: No such file\nninja: stopped"),
         "a.cpp:3:10: fatal error: libaio.h: No such file"),
        (RuntimeError("Unable to JIT load the async_io op due to ninja not being installed."),
         "Unable to JIT load the async_io op due to ninja not being installed."),
        (ImportError("libaio.so.1: cannot open shared object file"), "libaio.so.1: cannot open shared object file"),
    ],
    ids=["header", "ninja", "library"],
)  # fmt: skip
def test_operators_that_cannot_be_compiled_are_an_error_of_one_line(tmp_path, problem, reason):
    with pytest.raises(ConfigError) as caught:
        prepare(on_disk(tmp_path / "new"), problem=problem)
    assert str(caught.value) == (
        f"parallel.nvme_dir is {tmp_path}/new; expected DeepSpeed's operators `async_io` and `pin_memory`, which cannot "
        f"be compiled here ({reason}). Install g++, ninja and libaio-dev (on Fedora and RHEL gcc-c++, ninja-build and "
        "libaio-devel), or leave it out."
    )
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("failure", [errno.EACCES, errno.EINVAL])  # not writable; no direct access, as in memory
def test_a_folder_that_cannot_be_used_is_an_error(tmp_path, monkeypatch, failure):
    def fail(*_):
        raise OSError(failure, os.strerror(failure))

    monkeypatch.setattr(os, "open", fail)
    with pytest.raises(ConfigError) as caught:
        prepare(on_disk(tmp_path))
    assert str(caught.value) == (
        f"parallel.nvme_dir is {tmp_path}, which cannot be used ([Errno {failure}] {os.strerror(failure)}); expected a "
        "folder on a disk of each node, writable and not in memory. Name one, such as a folder of the node's NVMe disk."
    )
