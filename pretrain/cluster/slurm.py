"""SLURM's commands: what a cluster has, how a job stands, submitting and ending one.

Read from what `sinfo`, `scontrol`, `squeue` and `sacct` print; nothing here knows of runs.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

from pretrain.errors import ConfigError

_ENDED = (
    "BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED", "REVOKED",
    "TIMEOUT",
)  # fmt: skip
_UNLIMITED = ("UNLIMITED", "INFINITE")
_KEPT = ("SLURM_CONF", "SLURM_CLUSTERS")  # of a job's variables: where its cluster is
_COMMAND_SECONDS = 60.0
# sbatch's words where there is no configuration, no controller, or none that answers.
_UNREACHED = (
    "configuration source|contact slurm controller|connection refused|no answer in|could not resolve|zero bytes"
)


@dataclass(frozen=True)
class NodeGroup:
    """Nodes of a partition that are alike; `gpus` and `cpus` are of each, None is no limit."""

    partition: str
    is_default: bool
    num_nodes: int
    cpus: int
    gpus: int
    limit_seconds: float | None
    max_nodes: int | None


@dataclass(frozen=True)
class Job:
    """How a job stands, one of an array perhaps.

    Attributes:
        job_id: its number, the one of its own if it is of an array.
        state: SLURM's word, in capitals.
        reason: why it waits, or why it ended.
        partition, num_nodes, nodes: where; `nodes` is empty while it waits.
        num_restarts: how often it was requeued.
        exit_code: of its script, once it has ended.
        may_requeue: whether SLURM would requeue it.
        is_batch: it runs a script, and is not the allocation of somebody's shell, which goes on without a run.
        start: when it began or is expected to, as SLURM writes it; empty if unknown.
        seconds_left: of its time limit; None without one.
    """

    job_id: str
    state: str
    reason: str = ""
    partition: str = ""
    num_nodes: int = 0
    nodes: str = ""
    num_restarts: int = 0
    exit_code: int = 0
    may_requeue: bool = True
    is_batch: bool = True
    start: str = ""
    seconds_left: float | None = None

    @property
    def start_seconds(self) -> float:
        """When it began or is expected to, in seconds since 1970; 0 if unknown."""
        return time.mktime(time.strptime(self.start, "%Y-%m-%dT%H:%M:%S")) if self.start else 0.0

    @property
    def has_ended(self) -> bool:
        """Whether it will not run again by itself."""
        return self.state.startswith(_ENDED)

    @property
    def is_waiting(self) -> bool:
        """Whether it is in the queue."""
        return self.state in ("PENDING", "REQUEUED", "REQUEUE_HOLD", "SPECIAL_EXIT")


def is_installed() -> bool:
    """Whether this machine can submit jobs."""
    return shutil.which("sbatch") is not None


def parse_time(text: str) -> float | None:
    """Return the seconds of a time as SLURM writes it: `90` (minutes), `1:30:00`, `2-12`; None for no limit.

    Raises:
        ValueError: it is none.
    """
    if text.upper() in _UNLIMITED:
        return None
    found = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", text)
    if not found:
        raise ValueError(text)
    days, first, second, third = (int(part) if part else 0 for part in found.groups())
    if found[1]:
        hours, minutes, seconds = first, second, third
    elif found[4]:
        hours, minutes, seconds = first, second, third
    else:
        hours, minutes, seconds = 0, first, second
    return 86400.0 * days + 3600 * hours + 60 * minutes + seconds


def count_gpus(resources: str) -> int:
    """Return the number of GPUs in a node's generic resources: 8 of `gpu:a100:8(S:0-1),nvme:1`."""
    return sum(int(number) for number in re.findall(r"(?:^|,)gpu(?::[^:,(]+)?:(\d+)", resources))


def list_nodes() -> list[NodeGroup]:
    """Return what the partitions that are up consist of; nothing where SLURM does not answer."""
    groups = []
    for line in _attempt("sinfo", "-h", "-e", "-o", "%R|%P|%a|%D|%c|%G|%l|%s").splitlines():
        partition, marked, state, num_nodes, cpus, resources, limit, size = line.strip().split("|")
        if state != "up":
            continue
        most = size.rpartition("-")[2]
        groups.append(
            NodeGroup(
                partition, marked.endswith("*"), int(num_nodes), int(cpus.rstrip("+")), count_gpus(resources),
                parse_time(limit) if limit != "n/a" else None, int(most) if most.isdigit() else None,
            )
        )  # fmt: skip
    return groups


def version() -> tuple[str, str]:
    """Return what SLURM's commands call themselves, and what is wrong if they or the controller do not answer."""
    for command in (("sinfo", "--version"), ("scontrol", "ping")):
        done = _run(*command)
        if done.returncode:
            said = (done.stderr.strip() or done.stdout.strip() or f"status {done.returncode}").splitlines()
            return "", f"{' '.join(command)}: {said[-1]}"
    return _attempt("sinfo", "--version"), ""


def list_states() -> list[tuple[str, str, str, int]]:
    """Return (partition, `up` or why it takes no jobs, state of its nodes, how many of them); nothing if unknown."""
    rows = [line.strip().split("|") for line in _attempt("sinfo", "-h", "-o", "%R|%a|%T|%D").splitlines()]
    return [(partition, is_up, state.rstrip("*~#!%$@^-"), int(number)) for partition, is_up, state, number in rows]


def find_jobs(job_id: str) -> list[Job]:
    """Return the job of this number, or the jobs of an array: the one that runs, those that wait, the last to end.

    What SLURM has forgotten, after five minutes or so, is asked of its accounting, where that is on.
    """
    records = _attempt("scontrol", "-o", "show", "job", job_id).splitlines()
    jobs = [_read_job(dict(re.findall(r"(\S+?)=(\S*)", record))) for record in records if "JobId=" in record]
    if not jobs and (line := _attempt("sacct", "-X", "-n", "-P", "-j", job_id, "-o", "JobID,State,ExitCode")):
        number, state, code = line.splitlines()[-1].split("|")
        jobs = [Job(number, state.partition(" ")[0], exit_code=int(code.partition(":")[0]))]
    return sorted(jobs, key=lambda job: (job.has_ended, job.is_waiting, "CANCELLED" in job.state, -job.start_seconds))


def _read_job(record: dict[str, str]) -> Job:
    def known(name: str) -> str:
        value = record.get(name, "")
        return "" if value in ("(null)", "None", "Unknown", "N/A") else value

    limit = parse_time(record["TimeLimit"]) if known("TimeLimit") not in ("", "Partition_Limit") else None
    num_nodes = re.match(r"\d+", known("NumNodes"))
    return Job(
        job_id=record["JobId"], state=record["JobState"], reason=known("Reason"), partition=known("Partition"),
        num_nodes=int(num_nodes.group()) if num_nodes else 0, nodes=known("NodeList"),
        num_restarts=int(known("Restarts") or 0), exit_code=int((known("ExitCode") or "0").partition(":")[0]),
        may_requeue=known("Requeue") != "0", is_batch=known("BatchFlag") != "0", start=known("StartTime"),
        seconds_left=None if limit is None else max(0.0, limit - (parse_time(known("RunTime") or "0") or 0)),
    )  # fmt: skip


def place_in_queue(job: Job) -> tuple[int, int] | None:
    """Return a waiting job's place by priority among those of its partition that this user sees, and their number."""
    waiting = _attempt("squeue", "-h", "-r", "-t", "PENDING", "-p", job.partition, "--sort=-p,i", "-o", "%A")
    numbers = waiting.split()
    return (numbers.index(job.job_id) + 1, len(numbers)) if job.job_id in numbers else None


def submit(script: Path) -> str:
    """Submit a batch script; return the job's number.

    Raises:
        ConfigError: SLURM refuses it.
    """
    done = _run("sbatch", "--parsable", str(script))
    if done.returncode and re.search(_UNREACHED, done.stderr, re.IGNORECASE):
        raise ConfigError(
            f"sbatch {script}: {done.stderr.strip()}; expected SLURM, which is not reached from here. Submit from a "
            "login node of the cluster; there `scontrol ping` says whether its controller is up."
        )
    if done.returncode:
        raise ConfigError(
            f"sbatch {script}: {done.stderr.strip() or f'status {done.returncode}'}; expected a job that this cluster "
            'takes. `sinfo -o "%P %D %G %c %m %l"` shows what its partitions have; docs/slurm.md explains the rest.'
        )
    return done.stdout.strip().partition(";")[0]


def stop(job_id: str, is_running: bool) -> None:
    """Take a job, or those of an array that wait, out of the queue; have the one that runs save and end for good.

    Raises:
        ConfigError: SLURM does not let this user.
    """
    # Those that wait first, or one of them would begin; the signal reaches the batch script too, which then does not
    # requeue the job.
    signals = [["--state=RUNNING", "--full", "--signal=USR1"]] if is_running else []
    for options in (["--state=PENDING"], *signals):
        done = _run("scancel", *options, job_id)
        if done.returncode:
            raise ConfigError(
                f"scancel {' '.join(options)} {job_id}: {done.stderr.strip()}; expected a job of your own that SLURM "
                "knows. `squeue --me` lists them."
            )


def _run(*command: str) -> subprocess.CompletedProcess[str]:
    # Who submits from within a job would pass its sizes on, some of which win over those of the script.
    inherited = {name: value for name, value in os.environ.items() if name in _KEPT or not name.startswith("SLURM_")}
    environment = inherited if "SLURM_JOB_ID" in os.environ else dict(os.environ)
    try:
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=_COMMAND_SECONDS)
    except FileNotFoundError:
        return subprocess.CompletedProcess(command, 127, "", f"{command[0]} is not installed here")
    except subprocess.TimeoutExpired:
        return subprocess.CompletedProcess(command, 124, "", f"no answer in {_COMMAND_SECONDS:.0f} s")


def _attempt(*command: str) -> str:
    done = _run(*command)
    return done.stdout.strip() if done.returncode == 0 else ""
