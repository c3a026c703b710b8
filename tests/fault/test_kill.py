"""What the `deepspeed` launcher makes of signals and of a rank that dies; the runs that it starts go on bit for bit."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.fault.conftest import Starter
from tests.helpers.rank_helpers import ROOT, free_port, losses, metric_lines, newest, state_hash

pytestmark = [pytest.mark.slow, pytest.mark.launches, pytest.mark.timeout(600)]
LAST, OVERRIDES = 60, ["train.num_steps=60", "checkpoint={every_steps: 7, keep_last: 3}"]


def launch(config: Path, run: Path) -> subprocess.Popen:
    command = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", "2", "--master_port", str(free_port())]
    arguments = ["launch/pretrain.py", str(config), f"run.dir={run}", "train.micro_batch_size=4", *OVERRIDES]
    with open(run.with_suffix(".log"), "a") as log:
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        return subprocess.Popen([*command, *arguments], cwd=ROOT, env=environment, stdout=log, stderr=log)


def wait_for_step(process: subprocess.Popen, run: Path, step: int, timeout: float = 120) -> None:
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        assert process.poll() is None, run.with_suffix(".log").read_text()
        if (run / "metrics.jsonl").exists():
            lines = (run / "metrics.jsonl").read_text().splitlines()
            if any(json.loads(line).get("loss") and json.loads(line)["step"] >= step for line in lines[-3:-1]):
                return
        time.sleep(0.01)
    raise AssertionError(f"no step {step} within {timeout} s")


def family(process: subprocess.Popen) -> list[psutil.Process]:
    top = psutil.Process(process.pid)
    return [top, *top.children(recursive=True)]


def check_goes_on(start: Starter, undisturbed, run: Path) -> None:
    start.finish(run, *OVERRIDES)
    assert (state_hash(newest(run)), losses(run)) == undisturbed(*OVERRIDES)
    assert [line["step"] for line in metric_lines(run) if "loss" in line] == list(range(1, LAST + 1))
    assert not list((run / "checkpoints").glob(".tmp-*"))


@pytest.mark.parametrize("way", ["SIGTERM to all, as SLURM sends it", "SIGTERM to the node's launcher", "Ctrl-C"])
def test_a_signal_saves_and_says_resumable(start, tiny_config, tmp_path, undisturbed, way):
    run = tmp_path / "stopped"
    process = launch(tiny_config, run)
    wait_for_step(process, run, 10)
    begin = time.monotonic()
    number = signal.SIGINT if way == "Ctrl-C" else signal.SIGTERM  # a terminal sends Ctrl-C to every process
    members = family(process)
    for member in members[1:2] if "launcher" in way else members:
        member.send_signal(number)
    psutil.wait_procs(members, timeout=120)
    process.wait(10)
    assert time.monotonic() - begin < 60
    status = json.loads((run / "status.json").read_text())
    assert (status["status"], status["exit_status"]) == ("stopped", 75), run.with_suffix(".log").read_text()
    assert newest(run).manifest["step"] == status["step"] >= 10
    assert "Traceback" not in run.with_suffix(".log").read_text().split("stopped: a signal")[0]
    check_goes_on(start, undisturbed, run)


def test_one_rank_killed_ends_the_others_and_is_resumable(start, tiny_config, tmp_path, undisturbed):
    run = tmp_path / "orphaned"
    process = launch(tiny_config, run)
    wait_for_step(process, run, 20)
    ranks = [p for p in family(process) if "launch/pretrain.py" in p.cmdline() and "--num_gpus" not in p.cmdline()]
    workers = [p for p in ranks if not p.children()]
    begin = time.monotonic()
    workers[-1].send_signal(signal.SIGKILL)
    assert process.wait(90) != 0
    assert not [p for p in ranks if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]
    print(f"ended in {time.monotonic() - begin:.1f} s")
    check_goes_on(start, undisturbed, run)
