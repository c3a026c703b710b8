"""Submitting a run to SLURM, with the script kept in the run folder; and stopping one."""

from __future__ import annotations

import errno
import json
import os
import platform
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pretrain.cluster.run_state import LIVE, SUBMISSIONS, SUBMITTED_CONFIG, last_job, read_entries, read_state
from pretrain.cluster.slurm import find_jobs, is_installed, list_nodes, stop, submit
from pretrain.cluster.slurm_script import ROOT, TEMPLATE, ScriptSettings, enter_container, fill_in
from pretrain.cluster.submit_checks import (
    Request,
    check_cluster,
    check_data,
    check_extra_options,
    check_files,
    check_run,
    check_time,
    choose_cpus,
    refuse_secrets,
)
from pretrain.console import warn
from pretrain.errors import ConfigError, LonghaulError
from pretrain.interrupts import begin_work, signals_held
from pretrain.options.batch_plan import BatchPlan
from pretrain.options.config import Config
from pretrain.options.settings import load_config
from pretrain.redaction import redact, storable
from pretrain.storage.stores import is_remote
from pretrain.zero.deepspeed_settings import check_hpz

SCRIPT = "submit.sbatch"


@dataclass(frozen=True)
class Submission:
    """A script that is ready.

    Attributes:
        run: the run folder.
        script: the text of the batch script, for `run / SCRIPT`.
        config_text: of the config's copy in the run folder; None if the file itself is read.
        command: that wrote it.
        is_chain: several jobs, one after the other.
    """

    run: Path
    script: str
    config_text: str | None
    command: list[str]
    is_chain: bool


def prepare_submission(
    path: str, overrides: Sequence[str], request: Request, command: Sequence[str], is_trial: bool = False
) -> Submission:
    """Check everything that can be known before a job starts, and fill in its script; nothing is written.

    Args:
        path: CONFIG.
        overrides: `key=value`.
        request: what is asked of SLURM.
        command: the command line, for people.
        is_trial: nothing will be submitted: that the data are not here, as on a laptop, is a warning.
    Raises:
        ConfigError: config, batch, run folder or request are wrong, or do not fit the cluster.
        DataError: shards or tokenizer are missing or do not fit.
    """
    config = load_config(path, overrides)
    BatchPlan.of(config, request.num_ranks)
    check_hpz(config.parallel, request.num_ranks)
    check_time(request)
    check_extra_options(request)
    check_run(config)
    for check in (lambda: check_files(request), lambda: check_data(config)):
        try:
            check()
        except LonghaulError as error:
            if not is_trial:
                raise
            warn(str(error))
    groups = list_nodes()
    check_cluster(request, groups)
    refuse_secrets([*overrides, *(f"{name}={value}" for name, value in request.variables.items())])
    run, text = Path(config.run.dir), Path(path).read_text(encoding="utf-8")
    copied = redact(text) == text and Path(path).resolve() != (run / SUBMITTED_CONFIG).resolve()
    arguments = [str(run / SUBMITTED_CONFIG) if copied else path, *overrides]
    if not any(override.startswith("run.dir=") for override in overrides):  # the file's name gives another one
        arguments.append(f"run.dir={config.run.dir}")
    settings = ScriptSettings(
        options=sbatch_options(request, run, choose_cpus(request, groups)), extra_options=request.extra_options,
        arguments=arguments, python=request.python or ("python" if request.container else sys.executable),
        container=container_of(request, config), variables=request.variables, command=storable(list(command)),
        path=run / SCRIPT, folder=Path.cwd(),
    )  # fmt: skip
    return Submission(run, fill_in(TEMPLATE.read_text(encoding="utf-8"), settings), text if copied else None,
                      storable(list(command)), request.num_links > 1)  # fmt: skip


def sbatch_options(request: Request, run: Path, cpus_per_task: int) -> dict[str, str]:
    """Return the `#SBATCH` lines, by name."""
    log = str(run / ("slurm-%A.log" if request.num_links > 1 else "slurm-%j.log"))
    optional = {"partition": request.partition, "account": request.account, "qos": request.qos,
                "constraint": request.constraint,
                "array": f"1-{request.num_links}%1" if request.num_links > 1 else ""}  # fmt: skip
    return {
        "job-name": request.job_name or run.name, "nodes": str(request.nodes),
        "gpus-per-node": str(request.gpus_per_node), "ntasks-per-node": str(request.tasks_per_node),
        "cpus-per-task": str(cpus_per_task), "time": request.time, "signal": f"USR1@{request.grace_seconds}",
        "output": log, "chdir": str(Path.cwd()), **{name: value for name, value in optional.items() if value},
    }  # fmt: skip


def container_of(request: Request, config: Config) -> list[str]:
    """Return what enters the container, with every folder mounted that the config names; nothing without one."""
    if not request.container:
        return []
    data, run = config.data, Path(config.run.dir)
    places = [source.shards for source in data.sources] + [config.checkpoint.dir, config.resume.from_]
    folders = [Path(place) for place in places if place and not is_remote(place)]
    folders += [Path.cwd(), ROOT, run, Path(config.tokenizer.model).parent]
    folders += [Path(data.cache_dir)] if data.cache_dir else []
    return enter_container(request.container, folders, Path.cwd(), request.gpus_per_node > 0)


def send(submission: Submission) -> tuple[str, str]:
    """Write the script and the config's copy into the run folder, and submit; return the job's number and a warning.

    Raises:
        ConfigError: the folder cannot be written, or SLURM refuses the job.
    """
    if not is_installed():
        raise ConfigError(
            "sbatch is not installed here; expected SLURM's commands. Submit from a login node of the cluster, or look "
            "at the script with --dry-run."
        )
    run, script = submission.run, submission.run / SCRIPT
    with signals_held():  # a job that SLURM has taken is recorded, and the user hears of it
        try:
            run.mkdir(parents=True, exist_ok=True)
            if submission.config_text is not None:
                (run / SUBMITTED_CONFIG).write_text(submission.config_text, encoding="utf-8")
            script.write_text(submission.script, encoding="utf-8")
        except OSError as error:
            raise ConfigError(
                f"run.dir is {run}; expected a folder that can be written ({error}). Free space there, or use another "
                "run.dir."
            ) from None
        job_id = submit(script)
        _record(run, {"job": job_id, "timestamp": time.time(), "command": submission.command})
        begin_work(f"stopped; job {job_id} was submitted before: submit.py --cancel {run} takes it back")
    jobs = find_jobs(job_id)
    if jobs and not jobs[0].may_requeue and not submission.is_chain:
        return job_id, (
            f"SLURM does not let job {job_id} be requeued (Requeue=0): it ends at its time limit or when it is "
            "preempted, and the same command goes on. --chain K submits K jobs at once, one after the other."
        )
    return job_id, ""


def _record(run: Path, entry: dict[str, Any]) -> None:
    entries = read_entries(run / SUBMISSIONS, "submissions")
    (run / SUBMISSIONS).write_text(json.dumps({"submissions": [*entries, entry]}, indent=1), encoding="utf-8")


def cancel(run: Path) -> str:
    """Have a run save and stop for good, wherever it is; return what was done, in words.

    Raises:
        ConfigError: there is nothing to stop.
    """
    state = read_state(run)
    if state.job and not state.job.has_ended:
        stop(last_job(run), is_running=not state.job.is_waiting)
        if state.job.is_waiting:
            return f"job {state.job.job_id} was taken out of the queue. The same command goes on after its checkpoint"
        return f"job {state.job.job_id} was told to save and end, and is not requeued. See --status {run}"
    if state.state not in LIVE or state.pid is None:
        raise ConfigError(f"{run}: its run is {state.state}; expected one that is queued or running. Nothing was done.")
    try:
        if state.host != platform.node():
            raise PermissionError(errno.EPERM, "another machine")
        os.kill(state.pid, signal.SIGTERM)
    except OSError as error:
        raise ConfigError(
            f"{run}: process {state.pid} on {state.host} cannot be told ({error.strerror}); expected one of yours on "
            "this machine. Send it SIGTERM there: training saves and leaves with status 75."
        ) from None
    return f"process {state.pid} was told to save and end. See --status {run}"
