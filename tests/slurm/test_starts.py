"""The other ways to start on SLURM's nodes, as docs/clusters.md has them: `srun`, torchrun inside, and deepspeed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.fork_server import ForkServer
from tests.helpers.rank_helpers import ROOT, free_port, losses
from tests.slurm.cluster import NODES, Cluster

pytestmark = [pytest.mark.slow, pytest.mark.slurm, pytest.mark.launches, pytest.mark.timeout(600)]
BIN = Path(sys.executable).parent
SIZES = ["train.micro_batch_size=4", "train.num_steps=3", "checkpoint.every_steps=0"]
TORCHRUN = ["--nnodes=2", "--nproc-per-node=1", "--rdzv-backend=c10d"]


@pytest.fixture(scope="module")
def expected(fork_server: ForkServer, tiny_config: Path, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """The losses of the same run on two ranks without SLURM."""
    folder = tmp_path_factory.mktemp("starts")
    ranks = fork_server.start([tiny_config, f"run.dir={folder}/run", *SIZES], 2, folder / "log")
    assert ranks.wait(120) == [0, 0], ranks.log()
    return losses(folder / "run")


@pytest.mark.parametrize("form", ["srun", "torchrun", "deepspeed"])
def test_a_run_over_both_nodes(cluster: Cluster, tiny_config: Path, tmp_path: Path, expected: list[float], form: str):
    hostfile = tmp_path / "hosts.txt"
    hostfile.write_text("".join(f"{node} slots=1\n" for node in NODES))
    srun = ["srun", "--nodes=2", "--ntasks-per-node=1"]
    command: list[str | Path] = {
        "srun": [*srun, sys.executable],
        "torchrun": [*srun, BIN / "torchrun", *TORCHRUN, f"--rdzv-endpoint={NODES[0]}:{free_port()}"],
        "deepspeed": [BIN / "deepspeed", f"--hostfile={hostfile}", "--launcher=slurm", "--no_ssh_check",
                      f"--master_addr={NODES[0]}", "--launcher_args=--nodes=2 --ntasks-per-node=1"],
    }[form]  # fmt: skip
    command += ["launch/pretrain.py", str(tiny_config), f"run.dir={tmp_path}/run", *SIZES]
    done = subprocess.run(command, cwd=ROOT, env=cluster.environment | {"OMP_NUM_THREADS": "1"}, capture_output=True,
                          text=True, timeout=300)  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr + cluster.logs()
    assert losses(tmp_path / "run") == expected
    (start,) = json.loads((tmp_path / "run/environment.json").read_text())["starts"]
    assert start["world_size"] == 2
