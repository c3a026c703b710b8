"""What `longhaul doctor` says of a real cluster, from outside a job and within one."""

from __future__ import annotations

import json
import subprocess

import pytest

from pretrain.doctor.findings import python_command
from tests.slurm.cluster import Cluster

pytestmark = [pytest.mark.slow, pytest.mark.slurm, pytest.mark.launches, pytest.mark.timeout(600)]
CHECK = python_command("pretrain.doctor.child", "slurm_check", "{}", "/dev/stdout")


def lines(cluster: Cluster, *prefix: str) -> dict[str, list[str]]:
    done = subprocess.run([*prefix, *CHECK], env=cluster.environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return {line["name"]: [line["outcome"], line["text"]] for line in map(json.loads, done.stdout.splitlines())}


def test_partitions_and_the_job_that_it_runs_in(cluster: Cluster):
    found = lines(cluster)
    assert found["SLURM"][0] == "ok" and found["SLURM"][1].endswith("; its controller answers")
    assert found["partition main"][1].startswith("up (default): 2 nodes with 0 GPUs and 2 CPUs; ")
    (job,) = [text for name, text in lines(cluster, "srun", "-n1", "--time=30").items() if name.startswith("job ")]
    assert job[0] == "ok" and job[1].startswith("1 node (127.")
    assert "of main, CPUs of this one: 1, GPUs: 0, " in job[1] and job[1].endswith(" left")


def test_a_partition_that_is_down(cluster: Cluster):
    change = ["scontrol", "update", "partition=urgent"]
    subprocess.run([*change, "state=down"], env=cluster.environment, check=True)
    try:
        outcome, text = lines(cluster)["partition urgent"]
    finally:
        subprocess.run([*change, "state=up"], env=cluster.environment, check=True)
    assert outcome == "warning" and text.startswith("down: no nodes that are up; ")
