"""`launch/slurm/pretrain.sbatch` on a real SLURM cluster of two nodes: time limit, preemption, lost node, failure."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.rank_helpers import losses, metric_lines, newest, start_ranks
from tests.slurm.cluster import NODES, Cluster, why_not

pytestmark = [pytest.mark.slow, pytest.mark.slurm, pytest.mark.launches, pytest.mark.timeout(900)]
NUM_STEPS = 60
SIZES = [f"train.num_steps={NUM_STEPS}", "train.global_batch_size=128", "train.micro_batch_size=4",
         "checkpoint.every_steps=9"]  # fmt: skip


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    if reason := why_not():
        if os.environ.get("LONGHAUL_REQUIRE_SLURM"):  # .ci/run does not let it pass
            pytest.fail(reason)
        pytest.skip(reason)
    with Cluster() as cluster:
        yield cluster


@pytest.fixture(scope="module")
def undisturbed(tiny_config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run on two ranks without SLURM."""
    folder = tmp_path_factory.mktemp("slurm")
    arguments = [str(tiny_config), f"run.dir={folder}/whole", *SIZES]
    processes = start_ranks("launch/pretrain.py", arguments, 2, folder / "output")
    statuses = [process.wait(300) for process in processes]
    assert statuses == [0, 0], (folder / "output-0").read_text()
    return folder / "whole"


def submit(cluster: Cluster, folder: Path, options: list[str], arguments: list[str]) -> str:
    """Submit the script as a user with CPUs does; return the job's number."""
    return cluster.call(
        "sbatch", "--parsable", "--gpus-per-node=0", "--cpus-per-task=1", f"--output={folder}/%j.log",
        f"--export=ALL,PYTHON={sys.executable},OMP_NUM_THREADS=1", *options, "launch/slurm/pretrain.sbatch", *arguments,
    )  # fmt: skip


def last_step(run: Path, attempt: int) -> int:
    """The newest step of this attempt, or -1 before its first."""
    if not (run / "metrics.jsonl").exists():
        return -1
    steps = []
    for line in (run / "metrics.jsonl").read_text().splitlines(keepends=True)[-3:]:
        if line.endswith("\n") and (values := json.loads(line)).get("attempt") == attempt:
            steps.append(values["step"])
    return max(steps, default=-1)


def test_a_run_goes_on_after_everything_that_slurm_does_to_it(cluster, tiny_config, tmp_path, undisturbed):
    run = tmp_path / "run"
    arguments = [str(tiny_config), f"run.dir={run}", *SIZES]
    job = submit(cluster, tmp_path, ["--ntasks-per-node=1"], arguments)
    log = tmp_path / f"{job}.log"

    def wait_for_attempt(attempt: int, first_step: int) -> None:
        cluster.wait(lambda: last_step(run, attempt) >= first_step, f"step {first_step} of attempt {attempt}")

    try:
        wait_for_attempt(1, 6)
        assert cluster.tasks(job) == {"0": NODES[0], "1": NODES[1]}
        cluster.call("scancel", "--signal=USR1", job)  # to the same processes as --signal before the time limit
        cluster.wait(lambda: "status 75; requeued" in log.read_text(), "requeue after the signal")
        stopped = newest(run).manifest["step"]
        assert 6 <= stopped < NUM_STEPS - 30 and stopped % 9
        assert json.loads((run / "status.json").read_text())["exit_status"] == 75
        assert f"status 75; requeued, to go on after step {stopped}\n" in log.read_text()
        assert "0: " in log.read_text() and "Traceback" not in log.read_text()

        wait_for_attempt(2, stopped + 6)
        cluster.call("scontrol", "requeue", job)  # what a preemption does: SIGTERM, and SIGKILL after KillWait
        cluster.wait(lambda: cluster.job(job)["Restarts"] == "2", "requeue while running")
        cluster.wait(lambda: "SLURM ends this job" in log.read_text(), "end of the preempted attempt")
        preempted = newest(run).manifest["step"]
        assert stopped + 6 <= preempted < NUM_STEPS - 15

        wait_for_attempt(3, preempted + 3)
        cluster.call("scontrol", "update", f"NodeName={NODES[1]}", "State=DOWN", "Reason=test")  # a lost node
        cluster.wait(lambda: cluster.job(job)["Restarts"] == "3", "requeue after a lost node")
        cluster.wait(lambda: not cluster.tasks(job), "end of the tasks")
        cluster.attempt("scontrol", "update", f"NodeName={NODES[1]}", "State=RESUME")  # fails if it is back already

        cluster.wait(lambda: cluster.job(job)["JobState"] == "COMPLETED", "end of the run")
    except AssertionError:
        print(log.read_text() if log.exists() else "no log")
        raise
    assert json.loads((run / "status.json").read_text())["status"] == "done"
    assert (cluster.job(job)["Restarts"], cluster.job(job)["ExitCode"]) == ("3", "0:0")
    starts = json.loads((run / "environment.json").read_text())["starts"]
    assert [start["world_size"] for start in starts] == [2, 2, 2, 2]
    reasons = [line["message"] for line in metric_lines(run) if line.get("event") == "stopped"]
    assert "SIGUSR1" in reasons[0] and "SIGTERM" in reasons[1]
    assert [line["step"] for line in metric_lines(run) if "loss" in line] == list(range(1, NUM_STEPS + 1))
    assert losses(run) == losses(undisturbed)
    one, other = newest(run), newest(undisturbed)
    for name in one.shapes:
        assert torch.equal(one.read_whole(name), other.read_whole(name)), name
    assert len((run / "attempts.txt").read_text().splitlines()) == 1  # SLURM's own requeues are not the script's


def test_a_run_that_cannot_start_ends_at_once(cluster, tiny_config, tmp_path):
    arguments = [str(tiny_config), f"run.dir={tmp_path}/run", "train.global_batch_size=6", "train.micro_batch_size=1"]
    job = submit(cluster, tmp_path, ["--ntasks-per-node=2"], arguments)
    cluster.wait(lambda: cluster.job(job)["JobState"] == "FAILED", "failure")
    assert (cluster.job(job)["ExitCode"], cluster.job(job)["Restarts"]) == ("2:0", "0")
    log = (tmp_path / f"{job}.log").read_text()
    assert "on 4 ranks: train.global_batch_size is 6" in log  # two nodes of two tasks
    assert "failed with status 2; the newest checkpoint is of step 0" in log


def test_requeueing_that_is_switched_off_leaves_a_stopped_run(cluster, tiny_config, tmp_path):
    run = tmp_path / "run"
    job = submit(
        cluster, tmp_path, ["--ntasks-per-node=1", "--no-requeue"], [str(tiny_config), f"run.dir={run}", *SIZES]
    )
    cluster.wait(lambda: last_step(run, 1) >= 2, "second step")
    cluster.call("scancel", "--signal=USR1", job)
    cluster.wait(lambda: cluster.job(job)["JobState"] == "FAILED", "end of the job")
    assert cluster.job(job)["ExitCode"] == "75:0"
    assert "SLURM does not requeue this job. Submit the same command again" in (tmp_path / f"{job}.log").read_text()
    assert json.loads((run / "status.json").read_text())["status"] == "stopped"
