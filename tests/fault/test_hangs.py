"""Ranks that are killed, stopped, cut off, slow, or hang: the run ends within a bound and says who, or it goes on."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from tests.helpers.hosts import Hosts, ip, require
from tests.helpers.rank_helpers import ROOT, losses, metric_lines, newest, state_hash

pytestmark = [pytest.mark.slow, pytest.mark.launches, pytest.mark.timeout(300)]
LIMIT = 3  # parallel.timeout_seconds
ENDLESS = ["train.num_steps=100000", "checkpoint.every_steps=0", f"parallel.timeout_seconds={LIMIT}"]


def hook(name: str, **details: object) -> list[tuple[str, dict]]:
    return [(f"tests.fault.hangs:{name}", details)]


def wait_for_step(run: Path, step: int, ranks, seconds: float = 60) -> None:
    give_up = time.monotonic() + seconds
    while not (run / "metrics.jsonl").exists() or not losses_of(run)[step:]:
        assert time.monotonic() < give_up and ranks.is_running(), ranks.log()
        time.sleep(0.02)


def losses_of(run: Path) -> list[str]:
    return [line for line in (run / "metrics.jsonl").read_text().splitlines() if '"loss"' in line]


def check_end(run: Path, ranks, began: float, speaker: int, reason: str, within: float, status: int = 69) -> float:
    """All ranks but stopped ones have ended with a status, in time, and the same reason is wherever people look."""
    while any(one is None for rank, one in enumerate(ranks.statuses()) if not is_stopped(ranks.pids[rank])):
        assert time.monotonic() - began < within, ranks.log()
        time.sleep(0.01)
    took = time.monotonic() - began
    written = json.loads((run / "status.json").read_text())
    assert (written["status"], written["exit_status"]) == ("failed", status), written
    assert re.search(reason, written["reason"]), written["reason"]
    where = "error: " if speaker == 0 else f"error on rank {speaker}: "
    assert where + written["reason"] in ranks.log(speaker)
    print(f"ended after {took:.1f} s")
    return took


def is_stopped(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_STOPPED
    except psutil.NoSuchProcess:
        return False


@pytest.mark.parametrize("lost", [0, 1])
def test_a_killed_rank_ends_the_others_at_once(start, tmp_path, lost):
    run = tmp_path / "run"
    ranks = start(run, *ENDLESS)
    wait_for_step(run, 5, ranks)
    began = time.monotonic()
    ranks.send(signal.SIGKILL, lost)
    reason = (
        rf"^step \d+: rank {lost} on \S+ has ended without a word, last heard of in phase '.+'; expected it to go on"
    )
    check_end(run, ranks, began, 1 - lost, reason, within=10)
    assert ranks.statuses()[1 - lost] == 69 and "Traceback" not in ranks.log()


@pytest.mark.parametrize("stopped", [0, 1])
def test_a_stopped_rank_is_named_and_the_others_end(start, tmp_path, stopped):
    run = tmp_path / "run"
    ranks = start(run, *ENDLESS)
    wait_for_step(run, 5, ranks)
    began = time.monotonic()
    ranks.send(signal.SIGSTOP, stopped)
    reason = rf"^step \d+: rank {stopped} on \S+ has not been heard of for [345] s, last in phase '.+'; expected"
    check_end(run, ranks, began, 1 - stopped, reason, within=LIMIT + 10)
    log = run / ("log-rank00001.txt" if stopped == 0 else "log.txt")
    assert "This rank's threads:" in log.read_text() and "in train_step" in log.read_text()
    ranks.send(signal.SIGCONT, stopped)  # as if somebody had looked at it in a debugger
    assert ranks.wait(30)[stopped] == 69


def test_a_rank_that_hangs_reading_is_named_and_the_one_that_waits_for_it_is_not(start, tmp_path):
    run, fifo = tmp_path / "run", tmp_path / "fifo"
    os.mkfifo(fifo)
    ranks = start(run, *ENDLESS, hooks=hook("open_fifo", at_rank=1, number=200, fifo=str(fifo)))
    wait_for_step(run, 2, ranks)
    while len(losses_of(run)) != (_ := time.sleep(0.5) or len(losses_of(run))):
        pass  # until no step comes any more
    began = time.monotonic()
    reason = r"^step \d+: rank 1 on \S+ has not got on for [345] s, in phase 'data'; .* The others wait for it\."
    check_end(run, ranks, began, 0, reason, within=LIMIT + 10)
    assert ranks.statuses() == [69, 69]
    assert "hangs.py" in (run / "log-rank00001.txt").read_text()  # the thread that reads, in open
    assert "in train_step" in (run / "log.txt").read_text()  # all ranks say what they did


def test_a_network_that_goes_down_ends_both_sides(start, tmp_path):
    run = tmp_path / "run"
    require()
    with Hosts(2) as hosts:
        enter = hook("enter_hosts", namespaces=hosts.namespaces, names=hosts.names)
        ranks = start(run, *ENDLESS, hooks=enter, MASTER_ADDR=hosts.addresses[0], LOCAL_WORLD_SIZE="1")
        wait_for_step(run, 5, ranks)
        began = time.monotonic()
        ip("-n", hosts.namespaces[1], "link", "set", "eth0", "down")
        assert ranks.wait(LIMIT + 10) == [69, 69]
        print(f"ended after {time.monotonic() - began:.1f} s")
        words = r" on \S+ has not been heard of for [345] s.* its node or the network to it is down"
        assert re.search(rf"error: step \d+: rank 1{words}", ranks.log(0))  # each side blames the other
        assert re.search(rf"error on rank 1: step \d+: rank 0{words}", ranks.log(1))
        assert json.loads((run / "status.json").read_text())["exit_status"] == 69


def test_a_slow_rank_is_named_and_not_killed(start, tmp_path):
    run = tmp_path / "run"
    hooks = hook("slow_down", at_rank=1, seconds=0.15, num_steps=60)
    ranks = start(run, "train.num_steps=110", "parallel.timeout_seconds=2", "checkpoint.every_steps=0", hooks=hooks)
    assert ranks.wait(120) == [0, 0], ranks.log()
    said = [line for line in metric_lines(run) if line.get("event") == "straggler"]
    assert re.match(
        r"rank 1 on \S+ takes 0\.\d+ s for its own part of a step, [\d.]+ times as long", said[0]["message"]
    )
    assert 15 <= said[0]["step"] <= 60
    assert [line["message"].partition(" takes ")[0].partition(" is about")[0] for line in said] == [
        said[0]["message"].partition(" takes ")[0]
    ] * len(said)
    assert len(said) <= 2  # once, and perhaps once more when it has recovered


def test_what_is_only_slow_is_no_hang(start, tmp_path):
    """A first step (a compiler), and writing a checkpoint (a disk), that take longer than the limit."""
    run = tmp_path / "run"
    hooks = [*hook("slow_down", at_rank=1, seconds=4, num_steps=1), *hook("slow_save", at_rank=1, seconds=4)]
    limits = ["parallel.timeout_seconds=2", "parallel.start_timeout_seconds=60"]
    ranks = start(run, *limits, "train.num_steps=4", "checkpoint={every_steps: 2, asynchronous: false}", hooks=hooks)
    assert ranks.wait(60) == [0, 0], ranks.log()
    assert len(losses(run)) == 4


def test_a_checkpoint_that_is_never_written_is_a_hang(start, tmp_path):
    run = tmp_path / "run"
    limits = ["parallel.timeout_seconds=1", "parallel.start_timeout_seconds=8"]
    ranks = start(run, *limits, hooks=hook("slow_save", at_rank=1, seconds=300))
    wait_for_step(run, 5, ranks)
    reason = r"rank 1 on \S+ has not got on for .* in phase 'saving'; .* within parallel.start_timeout_seconds \(8\)"
    check_end(run, ranks, time.monotonic(), 0, reason, within=25)
    for left in (run / "checkpoints").glob(".tmp-*"):  # the next start removes it
        shutil.rmtree(left)


def test_an_error_of_one_rank_is_everybodys_and_no_reason_to_try_again(start, tmp_path):
    run = tmp_path / "run"
    ranks = start(run, *ENDLESS, hooks=hook("fail", at_rank=1, number=9))
    check_end(run, ranks, time.monotonic(), 0, r"^rank 1 on \S+: division by zero$", within=15, status=1)
    assert ranks.statuses() == [1, 1]
    assert "ZeroDivisionError" in ranks.log(1) and "Traceback" not in ranks.log(0)


def test_a_signal_in_the_start_ends_it_before_the_first_step(start, tmp_path):
    run = tmp_path / "run"
    ranks = start(run, hooks=hook("signal_in_the_start", at_rank=1))
    assert ranks.wait(60) == [75, 75], ranks.log()
    written = json.loads((run / "status.json").read_text())
    assert (written["status"], written["exit_status"], written["step"]) == ("stopped", 75, 0)
    assert losses_of(run) == [] and "Traceback" not in ranks.log()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_while_other_ranks_are_missing_ends_at_once(start, tmp_path, number):
    ranks = start(tmp_path / "run", num_ranks=1, WORLD_SIZE="2", LOCAL_WORLD_SIZE="2", log=tmp_path / "log")
    time.sleep(2)  # it waits in C++ by now
    assert ranks.is_running()
    began = time.monotonic()
    ranks.send(number)
    assert ranks.wait(5) == [75] and time.monotonic() - began < 2
    assert ranks.log() == f"stopped by {signal.Signals(number).name} before training began; nothing is lost.\n"


def test_a_signal_while_python_imports_ends_at_once(tiny_config, tmp_path):
    command = [sys.executable, "-X", "importtime", "launch/pretrain.py", str(tiny_config), f"run.dir={tmp_path}/run"]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    imports = []
    for line in process.stderr:
        imports.append(line)
        if "pretrain.options.settings" in line:  # what comes next is torch
            process.send_signal(signal.SIGTERM)
            break
    rest = process.stderr.read()
    process.stderr.close()
    assert process.wait(30) == 75
    assert "stopped by SIGTERM before training began; nothing is lost.\n" in rest and "Traceback" not in rest
    assert not (tmp_path / "run").exists()


def test_torchrun_heals_a_killed_rank_bit_for_bit(start, tiny_config, tmp_path, undisturbed: Callable):
    run = tmp_path / "run"
    arguments = [str(tiny_config), f"run.dir={run}", "train.micro_batch_size=4", "train.num_steps=12",
                 "checkpoint={every_steps: 3, keep_last: 9}"]  # fmt: skip
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--max-restarts=3",
               "--standalone", "launch/pretrain.py", *arguments]  # fmt: skip
    # else the agent's store still has the addresses of the ranks that have ended: 3 of 6 starts met them (torch 2.13)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    with open(tmp_path / "output", "w") as output:
        launcher = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=output, stderr=output)
    try:
        while not (run / "metrics.jsonl").exists() or not losses_of(run)[4:]:
            assert launcher.poll() is None, (tmp_path / "output").read_text()
            time.sleep(0.005)
        workers = [
            child for child in psutil.Process(launcher.pid).children() if "launch/pretrain.py" in child.cmdline()
        ]
        workers[-1].kill()
        assert launcher.wait(120) == 0, (tmp_path / "output").read_text()
    finally:
        for process in psutil.Process(launcher.pid).children(recursive=True) if launcher.poll() is None else []:
            process.kill()
        launcher.kill()
        launcher.wait()
    assert len(json.loads((run / "environment.json").read_text())["starts"]) == 2
    assert (state_hash(newest(run)), losses(run)) == undisturbed()


FAKETIME = [
    Path(f"/usr/lib/{folder}/faketime/libfaketime.so.1") for folder in ("x86_64-linux-gnu", "aarch64-linux-gnu")
]


def test_a_clock_that_is_set_is_no_hang(tiny_config, tmp_path):
    """By an hour ahead and back again, thrice the limit and more."""
    library = next((path for path in FAKETIME if path.exists()), None)
    if library is None:
        pytest.skip("libfaketime is not installed: apt-get install libfaketime")
    run, clock = tmp_path / "run", tmp_path / "clock"
    clock.write_text("+0\n")
    environment = os.environ | {
        "LD_PRELOAD": str(library), "FAKETIME_TIMESTAMP_FILE": str(clock), "FAKETIME_NO_CACHE": "1",
        "FAKETIME_DONT_FAKE_MONOTONIC": "1", "DONT_FAKE_MONOTONIC": "1", "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    command = [sys.executable, "launch/pretrain.py", str(tiny_config), f"run.dir={run}", "train.num_steps=60",
               "checkpoint.every_steps=20", f"parallel.timeout_seconds={LIMIT}"]  # fmt: skip
    with open(tmp_path / "output", "w") as output:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=output, stderr=output)
    try:
        for step, offset in ((10, "+3600"), (25, "-3600"), (40, "+0")):
            while not (run / "metrics.jsonl").exists() or not losses_of(run)[step:]:
                assert process.poll() is None, (tmp_path / "output").read_text()
                time.sleep(0.05)
            clock.write_text(f"{offset}\n")
        assert process.wait(120) == 0, (tmp_path / "output").read_text()
    finally:
        process.kill()
        process.wait()
        for left in Path("/dev/shm").glob(f"*faketime_*_{process.pid}"):  # it stays where os._exit ends a process
            left.unlink()
    stamps = [line["timestamp"] for line in metric_lines(run) if "loss" in line]
    jumps = [after - before for before, after in zip(stamps, stamps[1:], strict=False)]
    assert max(jumps) > 3000 and min(jumps) < -3000  # it did see them
