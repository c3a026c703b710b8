"""Forked ranks are those that the command starts: the same bits, the same ends; and nothing outlives the server."""

from __future__ import annotations

import signal
import time

import psutil
import pytest

from tests.helpers.fork_server import ForkServer
from tests.helpers.rank_helpers import losses, newest, start_ranks, state_hash

pytestmark = [pytest.mark.slow, pytest.mark.launches]


def fail(rank: int) -> None:
    """A hook that fails on rank 0."""
    if rank == 0:
        raise RuntimeError("as a bug would")


def sleep(rank: int) -> None:
    """A hook that takes for ever."""
    time.sleep(1000)


def test_a_forked_run_is_bit_for_bit_one_that_was_started_by_itself(tiny_config, tmp_path, fork_server):
    overrides = ["train.micro_batch_size=4", "model.dropout=0.1", "model.attention_dropout=0.1", "train.num_steps=8"]
    alone, forked = tmp_path / "alone", [tmp_path / "forked", tmp_path / "forked-again"]
    arguments = [str(tiny_config), f"run.dir={alone}", *overrides]
    processes = start_ranks("launch/pretrain.py", arguments, 2, tmp_path / "log")
    assert [process.wait(100) for process in processes] == [0, 0]
    for run in forked:
        assert fork_server.start([tiny_config, f"run.dir={run}", *overrides], 2, tmp_path / "forks").wait() == [0, 0]
        assert losses(run) == losses(alone) and len(losses(run)) == 8
        assert state_hash(newest(run)) == state_hash(newest(alone))


def test_ranks_end_as_the_command_does(tiny_config, tmp_path, fork_server):
    wrong = fork_server.start([tiny_config, "optim.lr=-1"], 1, tmp_path / "wrong")
    assert wrong.wait() == [2] and wrong.log().startswith("error: ") and "Traceback" not in wrong.log()
    buggy = fork_server.start([tiny_config], 1, tmp_path / "buggy", hooks=[("tests.helpers.test_fork_server:fail", {})])
    assert buggy.wait() == [1] and "RuntimeError: as a bug would" in buggy.log()
    killed = fork_server.start(
        [tiny_config], 2, tmp_path / "killed", hooks=[("tests.helpers.test_fork_server:sleep", {})]
    )
    killed.send(signal.SIGKILL, rank=1)
    while killed.statuses() != [None, -signal.SIGKILL]:
        time.sleep(0.01)
    assert killed.kill() == [-signal.SIGKILL] * 2
    assert fork_server.descendants() == []


def test_its_end_is_the_end_of_what_it_started(tiny_config, tmp_path):
    server = ForkServer()
    server.start([tiny_config], 2, tmp_path / "log", hooks=[("tests.helpers.test_fork_server:sleep", {})])
    ranks = server.descendants()
    assert len(ranks) == 2
    server.close()
    assert psutil.wait_procs(ranks, timeout=10)[1] == []
