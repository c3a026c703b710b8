"""`launch/submit.py`: what is found before the queue, the script that is written, and how a run is seen to stand."""

from __future__ import annotations

import difflib
import json
import os
import signal
import subprocess
import time
from dataclasses import replace
from pathlib import Path

import pytest

from pretrain.cluster import slurm
from pretrain.cluster.run_state import read_state, render
from pretrain.cluster.slurm import Job, NodeGroup, count_gpus, find_jobs, list_nodes, parse_time, place_in_queue
from pretrain.cluster.slurm_script import ROOT, TEMPLATE, ScriptSettings, covering, enter_container, fill_in
from pretrain.cluster.submit import prepare_submission, send
from pretrain.cluster.submit_checks import (
    Request,
    check_cluster,
    check_extra_options,
    check_files,
    check_time,
    choose_cpus,
)
from pretrain.errors import ConfigError, DataError
from tests.helpers.rank_helpers import run_command

GPUS = Request(nodes=2, gpus_per_node=8, tasks_per_node=8)
ON_CPUS = Request(nodes=2, gpus_per_node=0, tasks_per_node=2, cpus_per_task=1)
GROUP = NodeGroup("gpu", True, 4, 96, 8, 86400.0, None)
SETTINGS = ScriptSettings(
    options={"nodes": "4", "time": "12:00:00", "output": "runs/a b/slurm-%j.log"}, arguments=["mine.yaml", "run.dir=a b"],
    python="/venv/bin/python", command=["python", "launch/submit.py", "mine.yaml"], path=Path("runs/a b/submit.sbatch"),
    folder=Path("/project"),
)  # fmt: skip


# --- SLURM's words


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90", 5400), ("1:30", 90), ("24:00:00", 86400), ("1-0", 86400), ("2-12:30", 217800), ("1-00:00:01", 86401),
     ("UNLIMITED", None), ("infinite", None)],
)  # fmt: skip
def test_times(text: str, seconds: float | None) -> None:
    assert parse_time(text) == seconds


@pytest.mark.parametrize("text", ["", "a day", "1:2:3:4", "-5", "1.5"])
def test_what_is_no_time(text: str) -> None:
    with pytest.raises(ValueError):
        parse_time(text)


@pytest.mark.parametrize(
    ("resources", "number"),
    [("(null)", 0), ("gpu:8", 8), ("gpu:a100:8(S:0-1)", 8), ("nvme:1,gpu:h100:4,gpu:2", 6), ("gpu:a100_3g.20gb:2", 2)],
)
def test_gpus_of_a_node(resources: str, number: int) -> None:
    assert count_gpus(resources) == number


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """What each of SLURM's commands prints; one that is not there fails."""
    outputs: dict[str, str] = {}

    def run(*command: str) -> subprocess.CompletedProcess[str]:
        output = outputs.get(command[0])
        return subprocess.CompletedProcess(command, int(output is None), output or "", "it is down")

    monkeypatch.setattr(slurm, "_run", run)
    return outputs


def test_partitions(said: dict[str, str]) -> None:
    assert list_nodes() == []
    said["sinfo"] = (
        "gpu|gpu*|up|4|96|gpu:a100:8(S:0-1)|1-00:00:00|1-infinite\nold|old|up|2|16+|(null)|infinite|1-4\n"
        "off|off|down|9|8|(null)|n/a|1"
    )
    assert list_nodes() == [GROUP, NodeGroup("old", False, 2, 16, 0, None, 4)]


RECORD = (
    "JobId=7 JobName=a Priority=4 JobState={state} Reason=Resources Requeue=0 Restarts=2 BatchFlag=0 ExitCode=75:0 "
    "RunTime=01:00:00 TimeLimit=1-00:00:00 StartTime=2026-01-01T10:00:00 Partition=gpu NodeList=n[1-2] NumNodes=2-2"
)


def test_a_job(said: dict[str, str]) -> None:
    said["scontrol"] = RECORD.format(state="RUNNING") + "\n" + RECORD.format(state="PENDING").replace("=7", "=9")
    running, waiting = find_jobs("7")
    assert running == Job(
        "7", "RUNNING", "Resources", "gpu", 2, "n[1-2]", 2, 75, False, False, "2026-01-01T10:00:00", 82800.0
    )  # fmt: skip
    assert waiting.is_waiting and not running.is_waiting and not waiting.has_ended
    said["squeue"] = "5\n9\n7"
    assert place_in_queue(waiting) == (2, 3)


def test_of_a_chain_that_has_ended_its_last_job_counts(said: dict[str, str]) -> None:
    record = RECORD.format(state="FAILED")
    left = record.replace("FAILED", "CANCELLED").replace("T10:", "T12:")  # those that never began, in one record
    said["scontrol"] = "\n".join([left, record, record.replace("JobId=7", "JobId=8").replace("T10:", "T11:")])
    assert [job.job_id for job in find_jobs("7")] == ["8", "7", "7"]


def test_a_job_that_only_accounting_remembers(said: dict[str, str]) -> None:
    assert find_jobs("7") == []
    said["sacct"] = "7|REQUEUED|0:0\n7|CANCELLED by 1000|75:0"
    assert find_jobs("7") == [Job("7", "CANCELLED", exit_code=75)] and find_jobs("7")[0].has_ended


def test_a_job_that_submits_does_not_pass_its_sizes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sbatch").write_text('#!/bin/sh\necho "$SLURM_CONF $SLURM_MEM_PER_CPU $MINE"\n')
    (tmp_path / "sbatch").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    for name, value in {"SLURM_CONF": "conf", "SLURM_MEM_PER_CPU": "9", "MINE": "mine"}.items():
        monkeypatch.setenv(name, value)
    assert slurm.submit(Path("a.sbatch")) == "conf 9 mine"
    monkeypatch.setenv("SLURM_JOB_ID", "1")
    assert slurm.submit(Path("a.sbatch")) == "conf  mine"
    monkeypatch.setenv("PATH", str(tmp_path / "nowhere"))
    with pytest.raises(ConfigError, match="sbatch is not installed here"):
        slurm.submit(Path("a.sbatch"))


# --- the script


def test_the_script_is_the_template_with_its_settings() -> None:
    template = TEMPLATE.read_text(encoding="utf-8")
    script = fill_in(template, SETTINGS)
    changes = [line for line in difflib.ndiff(template.splitlines(), script.splitlines()) if line[0] in "+-"]
    assert [line[2:] for line in changes if line[0] == "+" and not line.startswith("+ # ")] == [
        "#SBATCH --nodes=4", "#SBATCH --time=12:00:00", '#SBATCH --output="runs/a b/slurm-%j.log"',
        "PYTHON=/venv/bin/python", f"PROGRAM={ROOT}/launch/pretrain.py",
        "[ $# -gt 0 ] || set -- mine.yaml 'run.dir=a b'",
    ]  # fmt: skip
    settings_end = template.index("# Settings end.")
    assert script.endswith(template[settings_end:])  # the logic is the template's, to the letter
    assert subprocess.run(["bash", "-n"], input=script, text=True).returncode == 0
    assert script.splitlines()[3] == "#   python launch/submit.py mine.yaml"


def test_options_are_added_and_the_clusters_own_lines_stay() -> None:
    template = TEMPLATE.read_text(encoding="utf-8").replace("# export NCCL_DEBUG", "export NCCL_DEBUG")
    template = template.replace("container=()", "container=(site-wrapper)").replace(
        "#SBATCH --mem=0", "#SBATCH --licenses=x"
    )
    settings = replace(SETTINGS, options={"gpus-per-node": "4", "array": "1-7%1", "partition": "gpu"},
                       extra_options=["--mem=64G", "--comment=a b"], variables={"MY_VARIABLE": "a'b"})  # fmt: skip
    lines = fill_in(template, settings).splitlines()
    assert "#SBATCH --gpus-per-node=4           # on CPUs: sbatch --gpus-per-node=0" in lines
    for line in ("#SBATCH --licenses=x                     # all memory of each node", "container=(site-wrapper)"):
        assert line in lines
    own = [line for line in lines if line.startswith("#SBATCH")]
    assert own[-4:] == ["#SBATCH --array=1-7%1", "#SBATCH --partition=gpu", "#SBATCH --mem=64G",
                        '#SBATCH --comment="a b"']  # fmt: skip
    assert lines[lines.index("# Settings end.") - 1] == "export MY_VARIABLE='a'\"'\"'b'"
    with pytest.raises(ConfigError, match="lines that begin with 'PROGRAM=' are 0; expected one"):
        fill_in(template.replace("PROGRAM=", "PROG="), settings)


def test_containers_have_what_the_config_names(tmp_path: Path) -> None:
    (tmp_path / "project/data").mkdir(parents=True)
    (tmp_path / "big").mkdir()
    (tmp_path / "project/data/link").symlink_to(tmp_path / "big")
    folders = [tmp_path / "project", tmp_path / "project/data/link", tmp_path / "project/data", tmp_path / "scratch"]
    wanted = [tmp_path / "big", tmp_path / "project", tmp_path / "scratch"]
    assert covering(folders) == wanted
    mounts = ",".join(map(str, wanted))
    assert enter_container("a.sif", folders, tmp_path, True) == [
        "apptainer", "exec", "--nv", "--pwd", str(tmp_path), "--bind", mounts, "a.sif"]  # fmt: skip
    assert "--nv" not in enter_container("a.sif", folders, tmp_path, False)
    pairs = ",".join(f"{path}:{path}" for path in wanted)
    assert enter_container("nvcr.io#nvidia/pytorch:26.01-py3", folders, tmp_path, True) == [
        "--container-image=nvcr.io#nvidia/pytorch:26.01-py3", f"--container-mounts={pairs}",
        f"--container-workdir={tmp_path}"]  # fmt: skip


# --- what is found before the queue


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"partition": "big"}, "--partition is big; expected one of gpu, cpu. Name one."),
        ({"time": "1-01:00:00"}, "--time is 1-01:00:00; expected at most the limit of partition gpu, 1-00:00:00."),
        ({"time": "UNLIMITED"}, "--time is UNLIMITED; expected at most the limit of partition gpu"),
        ({"nodes": 5}, r"--nodes is 5 and --gpus-per-node 8; expected nodes that partition gpu has \(4 with 8 GPUs\)"),
        ({"nodes": 5}, "Lower --nodes to 4, or use another --partition."),
        ({"gpus_per_node": 16}, "--gpus-per-node 16; expected nodes that partition gpu has"),
        ({"gpus_per_node": 16}, "Lower --gpus-per-node to 8, or use another --partition."),
        ({"nodes": 9, "gpus_per_node": 0, "tasks_per_node": 1}, "Lower --nodes to 4, or use another --partition."),
        (
            {"partition": "cpu"},
            r"partition cpu has \(9 with 0 GPUs\). Use --gpus-per-node=0 and --tasks-per-node for CPUs",
        ),
        (
            {"cpus_per_task": 16},
            "--tasks-per-node x --cpus-per-task is 8 x 16; expected at most 96, the CPUs of a node",
        ),
        (
            {"partition": "cpu", "gpus_per_node": 0, "nodes": 4},
            "--nodes is 4; expected at most 3, as partition cpu allows",
        ),
    ],
    ids=str,
)
def test_what_would_wait_for_ever(changes: dict, error: str) -> None:
    groups = [GROUP, NodeGroup("cpu", False, 9, 64, 0, None, 3)]
    with pytest.raises(ConfigError, match=error):
        check_cluster(replace(GPUS, **changes), groups)


def test_what_fits_somewhere_is_let_through() -> None:
    for request in (GPUS, replace(GPUS, nodes=4, cpus_per_task=12), replace(GPUS, partition="old,gpu")):
        check_cluster(request, [GROUP, NodeGroup("old", False, 2, 16, 0, None, None)])
    check_cluster(replace(GPUS, nodes=5), [GROUP, replace(GROUP, num_nodes=1, cpus=64)])
    check_cluster(GPUS, [])  # a machine that is not of the cluster
    with pytest.raises(ConfigError, match="--partition is not given, and there is no default; expected one of gpu"):
        check_cluster(GPUS, [replace(GROUP, is_default=False)])


def test_cpus_are_divided_like_gpus() -> None:
    assert choose_cpus(GPUS, [GROUP]) == 12
    assert (
        choose_cpus(replace(GPUS, gpus_per_node=2, tasks_per_node=2), [GROUP]) == 12
    )  # not those of the other six GPUs
    assert choose_cpus(replace(GPUS, cpus_per_task=3), [GROUP]) == 3
    assert choose_cpus(GPUS, []) == 8


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"time": "a day"}, "--time is a day; expected minutes, hours:minutes:seconds or days-hours"),
        (
            {"time": "10"},
            r"--time is 10 \(10m00s\), and --grace 600 \(10m00s\); expected a limit longer than the grace by more than",
        ),
    ],
)
def test_times_that_make_no_sense(changes: dict, error: str) -> None:
    with pytest.raises(ConfigError, match=error):
        check_time(replace(GPUS, **changes))


@pytest.mark.parametrize(
    ("options", "flag"),
    [(["--time=1:00"], "--time"), (["--exclusive", "-t", "1:00"], "--time"), (["-N4"], "--nodes"),
     (["--signal=USR1@9"], "--grace"), (["--ntasks-per-node=2"], "--tasks-per-node"), (["--array=1-3"], "--chain")],
    ids=str,
)  # fmt: skip
def test_what_would_win_over_what_was_checked_is_not_passed_on(options: list[str], flag: str) -> None:
    with pytest.raises(ConfigError, match=f"expected what this command has no option for. Write {flag} before the --"):
        check_extra_options(replace(GPUS, extra_options=options))
    check_extra_options(
        replace(GPUS, extra_options=["--exclusive", "--mem=64G", "--mail-type=END", "-v", "--time-min=1"])
    )


def test_image_and_python_are_there(tmp_path: Path) -> None:
    (tmp_path / "image.sif").touch()
    image, python = str(tmp_path / "nosuch.sif"), str(tmp_path / "nosuch")
    with pytest.raises(ConfigError, match=f"--container is {image}, which does not exist; expected an image. If only"):
        check_files(replace(GPUS, container=image))
    with pytest.raises(ConfigError, match="--container is nosuch.sqsh, which does not exist"):
        check_files(replace(GPUS, container="nosuch.sqsh"))
    with pytest.raises(
        ConfigError, match=f"--python is {python}, which does not exist; expected a Python. If only the"
    ):
        check_files(replace(GPUS, python=python))
    for container in (str(tmp_path / "image.sif"), "docker://a/b.sif", "nvcr.io#nvidia/pytorch:26.01-py3",
                      str(tmp_path / "nowhere/image.sif")):  # fmt: skip
        check_files(replace(GPUS, container=container, python=python))  # in the image, or on the nodes only
    check_files(replace(GPUS, python="python3"))


def submission_of(config: Path, run: Path, *overrides: str, request: Request = ON_CPUS):
    return prepare_submission(str(config), [f"run.dir={run}", *overrides], request, ["submit"])


def test_config_batch_data_and_secrets_are_checked(tiny_config: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    for overrides, kind, error in (
        (["optim.lr=-1"], ConfigError, "command line: optim.lr is -1"),
        (["train.global_batch_size=6", "train.micro_batch_size=1"], ConfigError,
         r"on 4 ranks: train.global_batch_size is 6; expected a multiple"),
        (["parallel={zero_stage: 3, hpz_ranks: 3}"], ConfigError,
         r"on 4 ranks: parallel.hpz_ranks is 3; expected a divisor of 4. Use the number of GPUs of a node, or 1."),
        (["tokenizer.model=gone.model"], DataError, "gone.model: the tokenizer is not readable"),
        (["data.sources.0.shards=gone"], DataError, "shards is gone, which does not exist"),
    ):  # fmt: skip
        with pytest.raises(kind, match=error):
            submission_of(tiny_config, run, "train.micro_batch_size=4", *overrides)
    request = replace(ON_CPUS, variables={"WANDB_API_KEY": "0123456789abcdef"})
    with pytest.raises(ConfigError, match="command line: WANDB_API_KEY=… holds something secret; expected none"):
        submission_of(tiny_config, run, "train.micro_batch_size=4", request=request)
    assert not run.exists()


def test_the_config_is_copied_so_that_a_job_that_waits_trains_what_was_submitted(tiny_config, tmp_path) -> None:
    named = submission_of(tiny_config, tmp_path / "run", "train.micro_batch_size=4")
    assert named.config_text == tiny_config.read_text()
    assert f"set -- {tmp_path}/run/submit.yaml run.dir={tmp_path}/run train.micro_batch_size=4" in named.script
    secret = tmp_path / "mine.yaml"
    secret.write_text(tiny_config.read_text() + "# password=abcdefgh12345\n")
    kept = prepare_submission(str(secret), ["train.micro_batch_size=4"], ON_CPUS, ["submit"])
    assert kept.config_text is None and f"set -- {secret} train.micro_batch_size=4 run.dir=" in kept.script


def test_what_is_left_in_the_run_folder(tiny_config, tmp_path, said, monkeypatch) -> None:
    run, asks = tmp_path / "run", slurm._run
    ready = submission_of(tiny_config, run, "train.micro_batch_size=4")
    monkeypatch.setattr("shutil.which", lambda name: None)
    with pytest.raises(
        ConfigError, match="sbatch is not installed here; expected SLURM's commands. Submit from a login"
    ):
        send(ready)
    assert not run.exists()
    monkeypatch.setattr("shutil.which", lambda name: f"/usr/bin/{name}")
    with pytest.raises(
        ConfigError, match=f"sbatch {run}/submit.sbatch: it is down; expected a job that this cluster takes"
    ):
        send(ready)
    with pytest.raises(
        ConfigError, match="source; expected SLURM, which is not reached from here. Submit from a login"
    ):
        monkeypatch.setattr(slurm, "_run", lambda *command: subprocess.CompletedProcess(
            command, 1, "", "sbatch: error: Could not establish a configuration source"))  # fmt: skip
        send(ready)
    monkeypatch.setattr(slurm, "_run", asks)
    said["sbatch"], said["scontrol"] = "7;cluster\n", RECORD.format(state="PENDING")
    job, warning = send(ready)
    assert job == "7" and "SLURM does not let job 7 be requeued (Requeue=0)" in warning and "--chain K" in warning
    assert send(replace(ready, is_chain=True)) == ("7", "")  # nothing else was asked for
    said["scontrol"] = said["scontrol"].replace("Requeue=0", "Requeue=1")
    assert send(ready) == ("7", "")
    assert (run / "submit.sbatch").read_text() == ready.script and (
        run / "submit.yaml"
    ).read_text() == ready.config_text
    submissions = json.loads((run / "submit.json").read_text())["submissions"]
    assert [(entry["job"], entry["command"]) for entry in submissions] == [("7", ["submit"])] * 3
    with pytest.raises(ConfigError, match=r"whose run is queued \(job 7\); expected one that nothing trains in"):
        submission_of(tiny_config, run, "train.micro_batch_size=4")


# --- how a run stands


def write_run(run: Path, status: dict | None, steps: int = 0, attempt: int = 1, **start: object) -> Path:
    """Write what a run of 20 steps that saves every 8 would leave."""
    run.mkdir(parents=True, exist_ok=True)
    if status:
        status = {"exit_status": None, "step": 0, "saved_step": None, "reason": "", "pid": 1 << 30,
                  "host": os.uname().nodename, "timestamp": time.time()} | status  # fmt: skip
        (run / "status.json").write_text(json.dumps(status))
    starts = [{"timestamp": 1.0 * number} | start for number in range(1, attempt + 1)]
    (run / "environment.json").write_text(json.dumps({"starts": starts}))
    lines = [{"step": step, "loss": 5.0 - step / 10, "tokens_per_second": 3210.0, "step_seconds": 2.0 if step > 1 else 60.0,
              "timestamp": time.time() - 3, "attempt": attempt} for step in range(1, steps + 1)]  # fmt: skip
    events = [{"step": 0, "event": "start", "message": "loss"}]
    text = "".join(json.dumps(line) + "\n" for line in [*events, *lines, {"step": steps, "event": "saved"}])
    (run / "metrics.jsonl").write_text(text + '{"step": 99, "lo')  # being written
    return run


@pytest.fixture
def config_of(tiny_config: Path):
    def write(run: Path) -> None:
        (run / "config.yaml").write_text(tiny_config.read_text() + "checkpoint: {every_steps: 8}\n")

    return write


def test_a_run_on_this_machine(tmp_path: Path, config_of, said) -> None:
    with pytest.raises(ConfigError, match="has no status.json, environment.json or submit.json; expected the folder"):
        read_state(tmp_path)
    run = write_run(tmp_path / "a", {"status": "running", "saved_step": 8}, steps=10, attempt=3)
    config_of(run)
    lost = read_state(run)
    assert (lost.state, lost.step, lost.saved_step, lost.num_restarts) == ("lost", 10, 8, 2)
    assert "lost at step 10 of 20: its process on" in render(lost) and "2 restarts so far" in render(lost)
    with open(run / ".lock", "a"):  # as training has it
        write_run(run, {"status": "running", "saved_step": 8, "pid": os.getpid()}, steps=10, attempt=3)
        state = read_state(run)
        write_run(run, {"status": "running", "pid": os.getpid()}, steps=10, attempt=3)
        (run / "environment.json").write_text(json.dumps({"starts": [{"timestamp": 1}] * 4}))
        assert read_state(run).state == "starting"  # the steps are an earlier attempt's
    assert (state.state, state.next_save_step, state.next_save_seconds, state.seconds_left) == (
        "running",
        16,
        12.0,
        20.0,
    )
    assert render(state).splitlines()[:4] == [
        f"{run}: running at step 10 of 20",
        "  loss 4.0000, 3.21k tokens/s, 2 s a step; the last one 3s ago",
        "  newest checkpoint: step 8; next one at step 16, in 12s",
        "  ends in 20s",
    ]
    for status, code, reason in (("stopped", 75, "a signal"), ("failed", 1, "loss is nan"), ("done", 0, "trained")):
        write_run(run, {"status": status, "exit_status": code, "reason": reason, "step": 10}, steps=10)
        assert read_state(run).exit_status == code
        assert render(read_state(run)).startswith(f"{run}: {status} at step 10 of 20: {reason}\n")


def test_a_run_on_another_machine_is_lost_when_it_is_not_heard_of(tmp_path: Path, said) -> None:
    run = write_run(tmp_path / "a", {"status": "running", "host": "elsewhere"}, steps=3)
    assert read_state(run).state == "running"
    text = (run / "metrics.jsonl").read_text()
    (run / "metrics.jsonl").write_text(text.replace('"timestamp": ', '"timestamp": 1') + "\n")
    assert read_state(run).state == "running"  # its clock is ahead
    (run / "metrics.jsonl").write_text(text.replace('"timestamp": 1', '"timestamp": ') + "\n")
    assert read_state(run).state == "lost"


def test_a_run_of_slurm(tmp_path: Path, config_of, said) -> None:
    run = tmp_path / "a"
    run.mkdir()
    (run / "submit.json").write_text(json.dumps({"submissions": [{"job": "7", "timestamp": 5.0}]}))
    said["scontrol"], said["squeue"] = RECORD.format(state="PENDING"), "9\n7\n"
    assert render(read_state(run)) == (
        f"{run}: queued (Resources)\n  no checkpoint yet\n  job 7: PENDING, 2 of 2 that wait in gpu, expected to start "
        "2026-01-01T10:00:00, requeued 2 times"
    )
    said["scontrol"] = RECORD.format(state="RUNNING")
    assert read_state(run).state == "starting"
    write_run(run, {"status": "stopped", "exit_status": 75, "timestamp": 9.0}, steps=4, slurm_job="7")
    assert read_state(run).state == "starting"  # status.json is of the attempt before
    write_run(run, {"status": "running"}, steps=4, slurm_job="7")
    state = read_state(run)
    assert state.state == "running" and "job 7: RUNNING on n[1-2], 23h00m of its time left" in render(state)
    said["scontrol"] = RECORD.format(state="NODE_FAIL")
    assert "lost at step 4: job 7 is NODE_FAIL, and could not say why" in render(read_state(run))
    (run / "status.json").unlink()
    assert f"failed at step 4: job 7 ended before training began: see {run}/slurm-7.log" in render(read_state(run))
    said.clear()
    (run / "metrics.jsonl").unlink()
    assert render(read_state(run)) == (
        f"{run}: new: nothing has started, and SLURM knows no job of it (any more): see slurm-*.log there\n"
        "  no checkpoint yet"
    )


def test_what_goes_on_or_is_done_is_not_submitted(tiny_config, tmp_path, said) -> None:
    run = tmp_path / "run"
    few = ["train.micro_batch_size=4"]
    with open((write_run(run, {"status": "running", "pid": os.getpid()}, steps=3) / ".lock"), "a"):
        with pytest.raises(ConfigError, match=r"whose run is running \(a process on .*\); expected one that nothing"):
            submission_of(tiny_config, run, *few)
    write_run(run, {"status": "done", "step": 20, "reason": "trained 20 steps"})
    with pytest.raises(ConfigError, match="whose run is done: trained 20 steps; expected steps that are left"):
        submission_of(tiny_config, run, *few)
    assert submission_of(tiny_config, run, *few, "train.num_steps=30").run == run
    (run / "config.yaml").write_text(tiny_config.read_text())
    (run / "checkpoints/step-00000008").mkdir(parents=True)
    with pytest.raises(
        ConfigError, match="belongs to another config; expected the same one:\n  optim.lr: 0.003 in the"
    ):
        submission_of(tiny_config, run, *few, "train.num_steps=30", "optim.lr=0.1")
    (tmp_path / "owner.json").write_text(json.dumps({"run": "another", "run_dir": "/runs/b", "host": "login1"}))
    with pytest.raises(ConfigError, match="its owner.json names the run in /runs/b on login1. Use another"):
        submission_of(tiny_config, run, *few, "train.num_steps=30", f"checkpoint.dir={tmp_path}")


def test_a_job_that_has_not_ended_keeps_its_run(tiny_config, tmp_path, said) -> None:
    run = write_run(tmp_path / "run", {"status": "stopped", "exit_status": 75, "step": 3}, steps=3, slurm_job="7")
    said["scontrol"] = RECORD.format(state="COMPLETING").replace("BatchFlag=0", "BatchFlag=1")
    with pytest.raises(ConfigError, match=r"whose run is stopped \(job 7\); expected one that nothing trains in"):
        submission_of(tiny_config, run, "train.micro_batch_size=4")
    said["scontrol"] = RECORD.format(state="RUNNING")  # somebody's shell
    assert submission_of(tiny_config, run, "train.micro_batch_size=4").run == run


@pytest.mark.slow
@pytest.mark.launches
def test_a_local_run_is_seen_and_stopped(fork_server, tiny_config, tmp_path) -> None:
    run = tmp_path / "run"
    ranks = fork_server.start(
        [tiny_config, f"run.dir={run}", "train.num_steps=4000", "train.micro_batch_size=8"], 2, tmp_path / "log"
    )
    try:
        deadline = time.monotonic() + 60
        while not (run / "metrics.jsonl").exists() or read_state(run).state != "running":
            assert time.monotonic() < deadline and ranks.is_running(), ranks.log()
            time.sleep(0.05)
        shown = run_command("launch/submit.py", "--status", run)
        assert shown.returncode == 0 and f"{run}: running at step " in shown.stdout and " of 4000" in shown.stdout
        stopped = run_command("launch/submit.py", "--cancel", run)
        assert stopped.returncode == 0 and f"process {ranks.pids[0]} was told to save and end" in stopped.stdout
        assert ranks.wait() == [75, 75]
    finally:
        ranks.send(signal.SIGKILL)
    assert read_state(run).state == "stopped"
    again = run_command("launch/submit.py", "--cancel", run)
    assert again.returncode == 2 and "its run is stopped; expected one that is queued or running" in again.stderr


# --- the command line


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ([], "CONFIG is missing"),
        (["a.yaml"], "--nodes and --gpus-per-node are missing; on CPUs: --gpus-per-node 0 --tasks-per-node N"),
        (
            ["a.yaml", "--nodes=2", "--gpus-per-node=0"],
            "--tasks-per-node is missing: with --gpus-per-node 0, how many ranks each node has on its CPUs",
        ),
        (["a.yaml", "--nodes=2"], "error: --gpus-per-node is missing; on CPUs: --gpus-per-node 0 --tasks-per-node N"),
        (["a.yaml", "--gpus-per-node=8"], "error: --nodes is missing\n"),
        (["a.yaml", "--nodes=2", "--gpus-per-node=8", "--tasks-per-node=8"], "--tasks-per-node goes with"),
        (["a.yaml", "--nodes=0", "--gpus-per-node=8"], "it is 0; expected a whole number from 1"),
        (["a.yaml", "--nodes=2", "--gpus-per-node=8", "--env=A"], "it is A; expected NAME=VALUE"),
        (["--status", "runs/a", "a.yaml"], "--status and --cancel take the run folder alone"),
    ],
    ids=str,
)
def test_wrong_use(arguments: list[str], error: str, capsys: pytest.CaptureFixture[str]) -> None:
    from pretrain.cluster.submit_options import parse

    with pytest.raises(SystemExit) as ended:
        parse(arguments, "")
    assert ended.value.code == 2 and error in capsys.readouterr().err


@pytest.mark.parametrize(
    ("sizes", "answer"),
    [
        ("--nodes=2 --gpus-per-node=0 --tasks-per-node=1 --time=15", "job 7: 2 nodes with 1 rank each, at most 15m00s"),
        ("--nodes=1 --gpus-per-node=4 --time=UNLIMITED", "job 7: 1 node with 4 GPUs, no time limit;"),
        (
            "--nodes=2 --gpus-per-node=1 --chain=3",
            "jobs 7_1 to 7_3, one after the other: 2 nodes with 1 GPU each, at most",
        ),
    ],
)
def test_what_was_submitted_is_said(tiny_config, tmp_path, monkeypatch, sizes: str, answer: str) -> None:
    from pretrain.cluster import submit_options

    monkeypatch.setattr("pretrain.cluster.submit.send", lambda _: ("7", ""))
    given = [str(tiny_config), f"run.dir={tmp_path}/run", "train.micro_batch_size=1", *sizes.split()]
    text = submit_options.run(submit_options.parse(given, ""))
    assert text.startswith(answer) and f"script {tmp_path}/run/submit.sbatch, log {tmp_path}/run/slurm-7.log\n" in text


@pytest.mark.launches
def test_a_dry_run_touches_nothing(tiny_config, tmp_path) -> None:
    run = tmp_path / "run"
    arguments = [tiny_config, f"run.dir={run}", "train.micro_batch_size=4", "--nodes=2", "--gpus-per-node=0",
                 "--tasks-per-node=2", "--dry-run"]  # fmt: skip
    environment = {"PATH": "/bin"}  # without SLURM
    done = run_command("launch/submit.py", *arguments, "--", "--exclusive", **environment)
    assert done.returncode == 0, done.stderr
    assert "SLURM's commands are not here" in done.stderr or os.path.exists("/bin/sbatch")
    assert done.stdout.startswith("#!/bin/bash\n# Written from launch/slurm/pretrain.sbatch by\n")
    assert "#SBATCH --ntasks-per-node=2" in done.stdout and "#SBATCH --exclusive" in done.stdout
    assert done.stdout.endswith(f"\n# sbatch --parsable {run}/submit.sbatch\n")
    as_json = json.loads(run_command("launch/submit.py", *arguments, "--json", **environment).stdout)
    assert as_json["command"] == ["sbatch", "--parsable", f"{run}/submit.sbatch"]
    assert as_json["script"].startswith("#!/bin/bash\n") and list(tmp_path.iterdir()) == []
    absent = run_command(
        "launch/submit.py", *[tiny_config, *arguments[1:]], "data.sources.0.shards=gone", **environment
    )
    assert absent.returncode == 0 and "warning: data.sources[code].shards is gone" in absent.stderr
