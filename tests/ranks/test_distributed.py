"""Rank variables under every launcher, and which GPU a rank takes."""

from __future__ import annotations

import resource

import pytest
import torch

from pretrain.errors import ConfigError
from pretrain.ranks.distributed import allow_open_files, choose_device, first_host, read_rank_variables

SRUN = {"SLURM_PROCID": "5", "SLURM_LOCALID": "1", "SLURM_NTASKS": "8", "SLURM_STEP_NUM_TASKS": "8",
        "SLURM_JOB_ID": "12345", "SLURM_STEP_ID": "2", "SLURM_STEP_NODELIST": "node7"}  # fmt: skip


def test_one_process_without_a_launcher():
    variables = read_rank_variables({})
    assert (variables["RANK"], variables["WORLD_SIZE"], variables["MASTER_ADDR"]) == ("0", "1", "127.0.0.1")
    assert 0 < int(variables["MASTER_PORT"]) < 65536


def test_torchrun_and_deepspeed_variables_are_taken():
    given = {"RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4", "MASTER_ADDR": "node0", "MASTER_PORT": "29500"}
    assert read_rank_variables(given | {"SLURM_NTASKS": "4", "SLURM_PROCID": "0"}) == given


def test_half_a_launcher_is_an_error():
    with pytest.raises(ConfigError, match=r"RANK is set and LOCAL_RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT not"):
        read_rank_variables({"RANK": "0"})


def test_srun():
    variables = read_rank_variables(SRUN)
    assert (variables["RANK"], variables["LOCAL_RANK"], variables["WORLD_SIZE"]) == ("5", "1", "8")
    assert variables["MASTER_ADDR"] == "node7"
    assert read_rank_variables(SRUN | {"MASTER_ADDR": "ib7", "MASTER_PORT": "1"})["MASTER_ADDR"] == "ib7"


def test_a_step_of_fewer_tasks_than_its_job():
    assert read_rank_variables(SRUN | {"SLURM_STEP_NUM_TASKS": "6"})["WORLD_SIZE"] == "6"
    older = {name: value for name, value in SRUN.items() if name != "SLURM_STEP_NUM_TASKS"}
    assert read_rank_variables(older)["WORLD_SIZE"] == "8"


def test_all_ranks_of_a_step_have_one_port_and_no_other_step_or_job_nearby_has_it():
    def port(**given: str) -> int:
        return int(read_rank_variables(SRUN | given)["MASTER_PORT"])

    assert port() == port(SLURM_PROCID="0", SLURM_LOCALID="0")
    ports = [port(SLURM_JOB_ID=str(job), SLURM_STEP_ID=str(step)) for job in range(5000, 6000) for step in range(16)]
    assert len(set(ports)) == len(ports)
    assert 10000 <= min(ports) and max(ports) < 30000  # neither reserved nor given to outgoing connections


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("node7", "node7"),
        ("node[01-04,07]", "node01"),
        ("node[9,11-12],gpu3", "node9"),
        ("login1,node[2-3]", "login1"),
        ("rack[1-2]n[03-04]-ib,x", "rack1n03-ib"),
        ("node[007-010]", "node007"),
        ("ip-10-0-[1-2]", "ip-10-0-1"),
        ("a.b[3,5].org", "a.b3.org"),
    ],
)
def test_first_host_of_a_compressed_list(monkeypatch, nodes, first):
    monkeypatch.setenv("PATH", "/nonexistent")  # as in a container without scontrol
    assert first_host(nodes) == first
    job = {name: value for name, value in SRUN.items() if name != "SLURM_STEP_NODELIST"} | {"SLURM_JOB_NODELIST": nodes}
    assert read_rank_variables(job)["MASTER_ADDR"] == first


def test_one_task_under_slurm_is_one_process():
    assert read_rank_variables({"SLURM_NTASKS": "1", "SLURM_PROCID": "0"})["WORLD_SIZE"] == "1"
    assert read_rank_variables({"SLURM_NTASKS": "8"})["WORLD_SIZE"] == "1"  # the shell of salloc


def test_python_in_a_batch_script_without_srun():
    batch = {"SLURM_NTASKS": "8", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_JOB_ID": "1"}
    with pytest.raises(ConfigError, match=r"SLURM_NTASKS is 8 and this process was not started by srun; expected srun"):
        read_rank_variables(batch)


def test_a_rank_takes_its_gpu(monkeypatch):
    assert choose_device(3, {}) == torch.device("cpu") or torch.cuda.is_available()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    assert choose_device(3, {}) == torch.device("cuda", 3)
    with pytest.raises(
        ConfigError, match="local rank is 8; expected less than 8, the number of this node's GPUs. Start one process a"
    ):
        choose_device(8, {"SLURM_LOCALID": "8"})
    # `srun --gpus-per-task=1`: each task sees one GPU, its own
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert choose_device(3, {"SLURM_LOCALID": "3"}) == torch.device("cuda", 0)
    with pytest.raises(ConfigError, match="local rank is 3; expected less than 1, the number of this node's GPUs"):
        choose_device(3, {"SLURM_LOCALID": "0"})  # torchrun inside a job


def test_more_files_may_be_open_than_a_system_begins_with():
    soft, hard = before = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(256, soft), hard))
        allow_open_files(300)
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (min(300, hard), hard)
        allow_open_files(280)  # it is never lowered
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (min(300, hard), hard)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
