"""SLURM: whether it is here, what its partitions have and how their nodes are, and what this job was given."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

from pretrain.cluster.slurm import Job, NodeGroup, find_jobs, is_installed, list_nodes, list_states, version
from pretrain.console import counted, format_duration
from pretrain.doctor.findings import Line, Request, failure, ok, skipped, warning

_SHORT_SECONDS = 900.0
_BAD = ("down", "drained", "draining", "fail", "failing", "unknown", "inval", "maint", "reboot", "reserved")


def check(request: Request) -> Iterator[Line]:
    """Ask the cluster, if there is one."""
    if not is_installed():
        yield skipped("SLURM", "sbatch is not on PATH: no cluster, or not its login node")
        return
    name, problem = version()
    if problem:
        yield judge_unreached(problem, os.environ)
        return
    yield ok("SLURM", f"{name}; its controller answers")
    yield from judge_partitions(list_nodes(), list_states())
    if job_id := os.environ.get("SLURM_JOB_ID"):
        yield judge_job(find_jobs(job_id), job_id, os.environ)


def judge_unreached(problem: str, environment: Mapping[str, str]) -> Line:
    """Say what it means that SLURM is installed and does not answer: in a job that is a fault."""
    if "SLURM_JOB_ID" in environment:
        return failure("SLURM", problem, "Tell the cluster's administrators: this job cannot be requeued.")
    return warning("SLURM", problem, "Submit from a login node, or have slurmctld started, if this is to be one.")


def judge_partitions(groups: Sequence[NodeGroup], states: Sequence[tuple[str, str, str, int]]) -> Iterator[Line]:
    """Yield a line for each partition: its nodes, and how they are.

    Args:
        groups: nodes that are alike, of partitions that are up.
        states: (partition, whether it is up, state of its nodes, how many).
    """
    if not states:
        yield warning("partitions", "sinfo lists none", "Ask for access to one, or look at sinfo -a.")
    for partition in dict.fromkeys(row[0] for row in states):
        rows = [row for row in states if row[0] == partition]
        own = [group for group in groups if group.partition == partition]
        counts = Counter[str]()
        for _, _, state, number in rows:
            counts[state] += number
        has = (
            ", ".join(
                f"{counted(one.num_nodes, 'node')} with {counted(one.gpus, 'GPU')} and {counted(one.cpus, 'CPU')}"
                for one in own
            )
            or "no nodes that are up"
        )
        default = " (default)" if any(one.is_default for one in own) else ""
        how = ", ".join(f"{number} {state}" for state, number in counts.items())
        name, text = f"partition {partition}", f"{rows[0][1]}{default}: {has}; {how}"
        if rows[0][1] != "up" or all(state in _BAD for state in counts):
            yield warning(name, text, "Use another partition: in this one jobs wait (sinfo -R says why).")
        else:
            yield ok(name, text)


def judge_job(jobs: Sequence[Job], job_id: str, environment: Mapping[str, str]) -> Line:
    """Say what this job was given and how long it has."""
    name = f"job {job_id}"
    if not jobs:
        return warning(name, "is not known to SLURM", "Unset SLURM_JOB_ID, if this shell is in no job.")
    job = jobs[0]
    left = "no time limit" if job.seconds_left is None else f"{format_duration(job.seconds_left)} left"
    gpus = environment.get("SLURM_GPUS_ON_NODE") or "0"
    cpus = environment.get("SLURM_CPUS_ON_NODE") or "?"
    nodes = f"{counted(job.num_nodes, 'node')} ({job.nodes}) of {job.partition}"
    text = f"{nodes}, CPUs of this one: {cpus}, GPUs: {gpus}, {left}"
    if job.seconds_left is not None and job.seconds_left < _SHORT_SECONDS:
        return warning(name, text, "Ask for a new allocation: a start takes minutes of it.")
    return ok(name, text)
