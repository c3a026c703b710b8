"""`launch/submit.py` on a real SLURM cluster of two nodes: time limit, preemption, lost node, chains, status, failure."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from tests.helpers.rank_helpers import losses, metric_lines, newest, start_ranks
from tests.slurm.cluster import NODES, Cluster

pytestmark = [pytest.mark.slow, pytest.mark.slurm, pytest.mark.launches, pytest.mark.timeout(900)]
NUM_STEPS = 60
SIZES = [f"train.num_steps={NUM_STEPS}", "train.global_batch_size=128", "train.micro_batch_size=4",
         "checkpoint.every_steps=9"]  # fmt: skip


@pytest.fixture(scope="module")
def undisturbed(tiny_config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run on two ranks without SLURM."""
    folder = tmp_path_factory.mktemp("slurm")
    arguments = [str(tiny_config), f"run.dir={folder}/whole", *SIZES]
    processes = start_ranks("launch/pretrain.py", arguments, 2, folder / "output")
    statuses = [process.wait(300) for process in processes]
    assert statuses == [0, 0], (folder / "output-0").read_text()
    return folder / "whole"


def submit(cluster: Cluster, arguments: list[str], *options: str, tasks: int = 1) -> str:
    """Submit a run as a user with CPUs does; return the job's number."""
    said = cluster.call(
        sys.executable, "launch/submit.py", *arguments, "--json", "--nodes=2", "--gpus-per-node=0",
        f"--tasks-per-node={tasks}", "--cpus-per-task=1", "--env=OMP_NUM_THREADS=1", *options,
    )  # fmt: skip
    return json.loads(said)["job"]


def status(cluster: Cluster, run: Path) -> dict:
    """What `--status` says."""
    return json.loads(cluster.call(sys.executable, "launch/submit.py", "--status", str(run), "--json"))


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
    run = tmp_path / "a run"  # with a space
    arguments = [str(tiny_config), f"run.dir={run}", *SIZES]
    job = submit(cluster, arguments, "--time=1-0")
    log = run / f"slurm-{job}.log"

    def wait_for_attempt(attempt: int, first_step: int) -> None:
        cluster.wait(lambda: last_step(run, attempt) >= first_step, f"step {first_step} of attempt {attempt}")

    try:
        wait_for_attempt(1, 6)
        assert cluster.tasks(job) == {"0": NODES[0], "1": NODES[1]}
        state = status(cluster, run)
        assert (state["state"], state["num_steps"], state["num_restarts"]) == ("running", NUM_STEPS, 0)
        assert state["next_save_step"] - state["step"] in range(1, 10) and state["next_save_step"] % 9 == 0
        assert 86000 < state["job"]["seconds_left"] < 86400 and state["tokens_per_second"] > 0
        again = cluster.refused(sys.executable, "launch/submit.py", *arguments, "--nodes=1", "--gpus-per-node=0",
                                "--tasks-per-node=2")  # fmt: skip
        assert f"whose run is running (job {job}); expected one that nothing trains in" in again
        cluster.call("scancel", "--signal=USR1", job)  # to the same processes as --signal before the time limit
        cluster.wait(lambda: "status 75; requeued" in log.read_text(), "requeue after the signal")
        stopped = newest(run).manifest["step"]
        assert 6 <= stopped < NUM_STEPS - 30 and f"asked to stop after step {stopped};" in log.read_text()
        assert json.loads((run / "status.json").read_text())["exit_status"] == 75
        assert f"status 75; requeued, to go on after step {stopped}\n" in log.read_text()
        assert "0: " in log.read_text() and "Traceback" not in log.read_text()

        wait_for_attempt(2, stopped + 6)
        urgent = cluster.call(
            "sbatch", "--parsable", "--partition=urgent", "--ntasks=2", "--output=/dev/null", "--wrap=true"
        )
        cluster.wait(lambda: cluster.job(job)["Restarts"] == "2", "requeue after a preemption")
        preempted = newest(run).manifest["step"]
        assert stopped + 6 <= preempted < NUM_STEPS - 15
        cluster.wait(lambda: cluster.job(urgent)["JobState"] == "COMPLETED", "the job that took the nodes")

        wait_for_attempt(3, preempted + 3)
        cluster.call("scontrol", "update", f"NodeName={NODES[1]}", "State=DOWN", "Reason=test")  # a lost node
        cluster.wait(lambda: cluster.job(job)["Restarts"] == "3", "requeue after a lost node")
        cluster.wait(lambda: not cluster.tasks(job), "end of the tasks")
        cluster.wait(lambda: "SLURM ends this job" in log.read_text(), "word of the batch script")
        cluster.attempt("scontrol", "update", f"NodeName={NODES[1]}", "State=RESUME")  # fails if it is back already

        cluster.wait(lambda: cluster.job(job)["JobState"] == "COMPLETED", "end of the run")
    except AssertionError:
        print(log.read_text() if log.exists() else "no log")
        raise
    assert (cluster.job(job)["Restarts"], cluster.job(job)["ExitCode"]) == ("3", "0:0")
    state = status(cluster, run)
    assert (state["state"], state["step"], state["num_restarts"], state["job"]["state"]) == (
        "done", NUM_STEPS, 3, "COMPLETED",
    )  # fmt: skip
    starts = json.loads((run / "environment.json").read_text())["starts"]
    assert [(start["world_size"], start["slurm_job"]) for start in starts] == [(2, job)] * 4
    reasons = [line["message"] for line in metric_lines(run) if line.get("event") == "stopped"]
    assert "SIGUSR1" in reasons[0] and "SIGTERM" in reasons[1]
    assert [line["step"] for line in metric_lines(run) if "loss" in line] == list(range(1, NUM_STEPS + 1))
    assert losses(run) == losses(undisturbed)
    one, other = newest(run), newest(undisturbed)
    for name in one.shapes:
        assert torch.equal(one.read_whole(name), other.read_whole(name)), name
    attempts = (run / "attempts.txt").read_text().splitlines()  # by the script: the time limit and the preemption
    assert [line.partition(",")[0] for line in attempts] == [
        f"job {job} ended at step {s}" for s in (stopped, preempted)
    ]


def test_a_job_that_cannot_start_ends_at_once_and_takes_its_chain_along(cluster, tiny_config, tmp_path):
    run = tmp_path / "run"
    sizes = ["train.micro_batch_size=4", f"run.dir={run}"]
    job = submit(cluster, [str(tiny_config), *sizes], "--chain=3", "--", "--hold", tasks=2)
    (run / "submit.yaml").write_text(tiny_config.read_text().replace("global_batch_size: 16", "global_batch_size: 20"))
    cluster.call("scontrol", "release", job)
    cluster.wait(lambda: not cluster.attempt("squeue", "-h", "-j", job), "end of all three")
    log = (run / f"slurm-{job}.log").read_text()
    assert "on 4 ranks: train.global_batch_size is 20" in log  # two nodes of two tasks
    assert "failed with status 2; the newest checkpoint is of step 0" in log and log.count("restart 0: 4 tasks") == 1
    state = status(cluster, run)
    assert (state["state"], state["exit_status"], state["step"]) == ("failed", 2, 0)


def test_a_chain_goes_on_from_job_to_job_until_it_is_cancelled(cluster, tiny_config, tmp_path):
    run = tmp_path / "run"
    job = submit(cluster, [str(tiny_config), f"run.dir={run}", *SIZES], "--chain=3")
    cluster.wait(lambda: last_step(run, 1) >= 2, "second step")
    cluster.attempt("scancel", "--signal=USR1", f"{job}_1")  # ends with 229 for one of an array, and yet delivers
    log = run / f"slurm-{job}.log"
    cluster.wait(lambda: last_step(run, 2) >= 4, "a step of the second job")
    assert f"status 75; the next job of array {job} goes on after step" in log.read_text()
    assert status(cluster, run)["state"] == "running"
    said = cluster.call(sys.executable, "launch/submit.py", "--cancel", str(run))
    assert "was told to save and end, and is not requeued" in said
    cluster.wait(lambda: not cluster.attempt("squeue", "-h", "-j", job), "end of all three")
    assert "as it was told, and not requeued" in log.read_text() and log.read_text().count("restart 0") == 2
    state = status(cluster, run)
    assert (state["state"], state["exit_status"], state["num_restarts"]) == ("stopped", 75, 1)
    assert (state["job"]["state"], state["job"]["exit_code"]) == ("FAILED", 75)  # of the second one
    assert state["step"] == state["saved_step"] == newest(run).manifest["step"]


def test_a_job_that_waits_is_taken_out_of_the_queue(cluster, tiny_config, tmp_path):
    run = tmp_path / "run"
    job = submit(cluster, [str(tiny_config), f"run.dir={run}", *SIZES], "--", "--hold")
    state = status(cluster, run)
    assert (state["state"], state["reason"], state["place"]) == ("queued", "JobHeldUser", [1, 1]), state
    assert "taken out of the queue" in cluster.call(sys.executable, "launch/submit.py", "--cancel", str(run))
    assert cluster.job(job)["JobState"] == "CANCELLED"


def test_a_job_by_hand_that_slurm_does_not_requeue(cluster, tiny_config, tmp_path):
    run = tmp_path / "run"
    job = cluster.call(
        "sbatch", "--parsable", "--no-requeue", "--gpus-per-node=0", "--ntasks-per-node=1", "--cpus-per-task=1",
        f"--output={tmp_path}/%j.log", f"--export=ALL,PYTHON={sys.executable},OMP_NUM_THREADS=1",
        "launch/slurm/pretrain.sbatch", str(tiny_config), f"run.dir={run}", *SIZES,
    )  # fmt: skip
    cluster.wait(lambda: last_step(run, 1) >= 2, "second step")
    state = status(cluster, run)
    assert (state["state"], state["job"]["job_id"], state["job"]["may_requeue"]) == ("running", job, False)
    cluster.call("scancel", "--signal=USR1", job)
    cluster.wait(lambda: cluster.job(job)["JobState"] == "FAILED", "end of the job")
    assert cluster.job(job)["ExitCode"] == "75:0"
    assert "SLURM does not requeue this job. Submit the same command again" in (tmp_path / f"{job}.log").read_text()
    assert status(cluster, run)["state"] == "stopped"


@pytest.mark.parametrize(
    ("options", "error"),
    [
        (["--time=3-0"], "--time is 3-0; expected at most the limit of partition main, 2-00:00:00."),
        (["--partition=gpu"], "--partition is gpu; expected one of main, urgent."),
        (["--partition=urgent", "--time=1:00:00"], "--nodes is 2; expected at most 1, as partition urgent allows a job."),
        (["--nodes=4"], "expected nodes that partition main has (2 with 0 GPUs)"),
        (["--cpus-per-task=3"], "expected at most 2, the CPUs of a node of partition main"),
        (["--", "--mem=64G"], "Memory specification can not be satisfied"),
    ],
    ids=str,
)  # fmt: skip
def test_what_the_cluster_cannot_run_is_refused(cluster, tiny_config, tmp_path, options, error):
    arguments = [str(tiny_config), f"run.dir={tmp_path}/run", "train.micro_batch_size=4", "--nodes=2",
                 "--gpus-per-node=0", "--tasks-per-node=1"]  # fmt: skip
    assert error in cluster.refused(sys.executable, "launch/submit.py", *arguments, *options)
    assert not (tmp_path / "run/submit.json").exists()
