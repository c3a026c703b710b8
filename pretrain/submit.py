"""Submitting a run to SLURM: what is commonly wrong is found before the queue; the script is kept in the run folder."""

from __future__ import annotations

import errno
import json
import os
import platform
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pretrain.batch_plan import BatchPlan, num_steps_of
from pretrain.config import Config
from pretrain.config_changes import check_same_run
from pretrain.console import warn
from pretrain.data_plan import open_plan
from pretrain.errors import ConfigError, LonghaulError
from pretrain.redaction import redact, storable
from pretrain.run_state import LIVE, SUBMISSIONS, SUBMITTED_CONFIG, RunState, last_job, read_state
from pretrain.settings import load_config
from pretrain.slurm import NodeGroup, find_jobs, is_installed, list_nodes, parse_time, stop, submit
from pretrain.slurm_script import ROOT, TEMPLATE, ScriptSettings, enter_container, fill_in
from pretrain.stores import is_remote
from pretrain.tokenizer_files import open_tokenizer

SCRIPT = "submit.sbatch"
_CPUS_PER_TASK = 8  # where the cluster cannot be asked


@dataclass(frozen=True)
class Request:
    """What is asked of SLURM; empty texts leave it to the cluster.

    Attributes:
        nodes, tasks_per_node: whose product is the number of ranks.
        gpus_per_node: 0 for ranks on CPUs.
        cpus_per_task: None: this rank's part of a node.
        time: limit of a job.
        partition, account, qos, constraint: as sbatch takes them.
        job_name: None: the run folder's.
        grace_seconds: before the limit, when training saves.
        num_links: jobs of a chain; 1: one job that is requeued.
        container: image; empty for none.
        python: on the nodes; None: this one.
        variables: of the job's environment.
        extra_options: of sbatch.
    """

    nodes: int
    gpus_per_node: int
    tasks_per_node: int
    cpus_per_task: int | None = None
    time: str = "24:00:00"
    partition: str = ""
    account: str = ""
    qos: str = ""
    constraint: str = ""
    job_name: str | None = None
    grace_seconds: int = 600
    num_links: int = 1
    container: str = ""
    python: str | None = None
    variables: dict[str, str] = field(default_factory=dict)
    extra_options: Sequence[str] = ()

    @property
    def num_ranks(self) -> int:
        """Ranks of the run."""
        return self.nodes * self.tasks_per_node


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
    check_time(request)
    check_run(config)
    try:
        check_data(config)
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


def check_time(request: Request) -> None:
    """Check that a job's time and what it keeps of it for saving make sense.

    Raises:
        ConfigError: they do not.
    """
    try:
        limit = parse_time(request.time)
    except ValueError:
        raise ConfigError(
            f"--time is {request.time}; expected minutes, hours:minutes:seconds or days-hours, as sbatch takes it. "
            "Use for example 24:00:00."
        ) from None
    if limit is not None and limit <= request.grace_seconds + 60:  # SLURM may send the signal a minute early
        raise ConfigError(
            f"--time is {request.time}, and --grace {request.grace_seconds}; expected a limit longer than the grace by "
            "more than a minute, or training would be told to stop as it starts. Raise --time or lower --grace."
        )


def check_run(config: Config) -> None:
    """Check that the run folder can be submitted: not of a run that goes on, is done or belongs to another config.

    Raises:
        ConfigError: it cannot.
    """
    run = Path(config.run.dir)
    try:
        state = read_state(run)
    except ConfigError:  # a new one
        return
    if state.state in LIVE:
        who = f"job {state.job.job_id}" if state.job else f"a process on {state.host}"
        raise ConfigError(
            f"run.dir is {run}, whose run is {state.state} ({who}); expected one that nothing trains in. See "
            f"`python launch/submit.py --status {run}`; end it by --cancel, or use another run.dir."
        )
    if state.state == "done" and state.step >= num_steps_of(config):
        raise ConfigError(
            f"run.dir is {run}, whose run is done: {state.reason}; expected steps that are left. Raise "
            "train.num_steps, or use another run.dir."
        )
    saved = run / "config.yaml"
    if saved.exists() and has_checkpoint(run, state) and not config.resume.from_scratch:
        check_same_run(run, load_config(saved), config)


def has_checkpoint(run: Path, state: RunState) -> bool:
    """Whether the run has saved: in its folder, or elsewhere, as status.json says."""
    return state.saved_step is not None or any((run / "checkpoints").glob("step-*"))


def check_data(config: Config) -> None:
    """Check that tokenizer, shards and row tables are there and fit each other, as a start would.

    Shards in stores are left to the job: they would be downloaded.

    Raises:
        LonghaulError: they do not.
    """
    if any(is_remote(source.shards) for source in config.data.sources):
        return
    fingerprint = open_tokenizer(config.tokenizer).fingerprint
    _, corpora = open_plan(config, fingerprint, is_new=not any(Path(config.run.dir, "checkpoints").glob("step-*")))
    for corpus in corpora:
        corpus.close()


def check_cluster(request: Request, groups: Sequence[NodeGroup]) -> None:
    """Check that some partition can run this: SLURM itself would let such a job wait for ever.

    Args:
        request: what is asked.
        groups: what there is; nothing is checked if that is not known.
    Raises:
        ConfigError: none can.
    """
    if not groups:
        return
    names = request.partition.split(",") if request.partition else [one.partition for one in groups if one.is_default]
    known = list(dict.fromkeys(group.partition for group in groups))
    if not names or not set(names) & set(known):
        raise ConfigError(
            f"--partition is {request.partition or 'not given, and there is no default'}; expected one of "
            f"{', '.join(known)}. Name one."
        )
    problems = [_misfit(request, name, [one for one in groups if one.partition == name]) for name in names]
    if all(problems):
        raise ConfigError("\n".join(dict.fromkeys(filter(None, problems))))


def _misfit(request: Request, name: str, groups: Sequence[NodeGroup]) -> str:
    """Say why a partition cannot run this; empty if it can."""
    if not groups:
        return f"--partition is {name}; expected one of this cluster's."
    limits = [group.limit_seconds for group in groups]
    seconds = parse_time(request.time)
    longest = max((limit for limit in limits if limit is not None), default=None)
    if None not in limits and (seconds is None or longest is None or seconds > longest):
        return (
            f"--time is {request.time}; expected at most the limit of partition {name}, "
            f"{_sbatch_time(longest or 0)}. Lower it: a job that has not finished by then is requeued and goes on."
        )
    most = groups[0].max_nodes
    if most is not None and request.nodes > most:
        return f"--nodes is {request.nodes}; expected at most {most}, as partition {name} allows a job. Lower it."
    enough = [group for group in groups if group.gpus >= request.gpus_per_node]
    if sum(group.num_nodes for group in enough) < request.nodes:
        has = ", ".join(f"{group.num_nodes} with {group.gpus} GPUs" for group in groups)
        flaw = "--gpus-per-node=0 and --tasks-per-node for CPUs, or " if not any(group.gpus for group in groups) else ""
        return (
            f"--nodes is {request.nodes} and --gpus-per-node {request.gpus_per_node}; expected nodes that partition "
            f"{name} has ({has}). Use {flaw}fewer of them, or another --partition."
        )
    cpus = request.tasks_per_node * (request.cpus_per_task or 1)
    if sum(group.num_nodes for group in enough if group.cpus >= cpus) < request.nodes:
        return (
            f"--tasks-per-node x --cpus-per-task is {request.tasks_per_node} x {request.cpus_per_task or 1}; expected "
            f"at most {max(group.cpus for group in enough)}, the CPUs of a node of partition {name}. Lower one of them."
        )
    return ""


def _sbatch_time(seconds: float) -> str:
    """Write a time as sbatch takes it."""
    days, rest = divmod(int(seconds), 86400)
    clock = f"{rest // 3600:02d}:{rest % 3600 // 60:02d}:{rest % 60:02d}"
    return f"{days}-{clock}" if days else clock


def choose_cpus(request: Request, groups: Sequence[NodeGroup]) -> int:
    """Return the CPUs of a task: those asked for, or of the smallest node that fits, in proportion to its GPUs."""
    if request.cpus_per_task:
        return request.cpus_per_task
    names = request.partition.split(",") if request.partition else [one.partition for one in groups if one.is_default]
    fitting = [group for group in groups if group.partition in names and group.gpus >= request.gpus_per_node]
    shares = [group.cpus * (request.gpus_per_node / group.gpus if request.gpus_per_node else 1) for group in fitting]
    return max(1, int(min(shares) / request.tasks_per_node)) if shares else _CPUS_PER_TASK


def refuse_secrets(texts: Sequence[str]) -> None:
    """Refuse what should not be in a file that others can read.

    Raises:
        ConfigError: a text holds a password, a token or a key.
    """
    for text in texts:
        if redact(text) != text:
            raise ConfigError(
                f"command line: {redact(text)} holds something secret; expected none, because the script is a file "
                "that others may read. Export it as a variable before submitting: sbatch passes the environment on."
            )


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
    jobs = find_jobs(job_id)
    if jobs and not jobs[0].may_requeue and not submission.is_chain:
        return job_id, (
            f"SLURM does not let job {job_id} be requeued (Requeue=0): it ends at its time limit or when it is "
            "preempted, and the same command goes on. --chain K submits K jobs at once, one after the other."
        )
    return job_id, ""


def _record(run: Path, entry: dict[str, Any]) -> None:
    path = run / SUBMISSIONS
    try:
        entries = json.loads(path.read_bytes())["submissions"] if path.exists() else []
    except (ValueError, KeyError, TypeError):  # nothing that training needs
        entries = []
    path.write_text(json.dumps({"submissions": [*entries, entry]}, indent=1), encoding="utf-8")


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
