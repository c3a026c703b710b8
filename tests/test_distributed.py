"""Rank variables under every launcher."""

from __future__ import annotations

import pytest

from pretrain.distributed import read_rank_variables
from pretrain.errors import ConfigError


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
    slurm = {"SLURM_PROCID": "5", "SLURM_LOCALID": "1", "SLURM_NTASKS": "8", "SLURM_JOB_ID": "12345",
             "SLURM_STEP_ID": "2", "SLURM_STEP_NODELIST": "node7"}  # fmt: skip
    variables = read_rank_variables(slurm)
    assert (variables["RANK"], variables["LOCAL_RANK"], variables["WORLD_SIZE"]) == ("5", "1", "8")
    assert variables["MASTER_ADDR"] == "node7"
    assert variables["MASTER_PORT"] == read_rank_variables(slurm | {"SLURM_PROCID": "0"})["MASTER_PORT"]
    assert variables["MASTER_PORT"] != read_rank_variables(slurm | {"SLURM_STEP_ID": "3"})["MASTER_PORT"]


def test_srun_without_scontrol_says_what_to_set(monkeypatch):
    monkeypatch.setenv("PATH", "/nonexistent")
    slurm = {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NTASKS": "2", "SLURM_JOB_ID": "1", "SLURM_STEP_ID": "0",
             "SLURM_STEP_NODELIST": "node[1-2]"}  # fmt: skip
    with pytest.raises(ConfigError, match="Set MASTER_ADDR in the batch script"):
        read_rank_variables(slurm)
    assert read_rank_variables(slurm | {"MASTER_ADDR": "node1"})["MASTER_ADDR"] == "node1"


def test_one_task_under_slurm_is_one_process():
    assert read_rank_variables({"SLURM_NTASKS": "1", "SLURM_PROCID": "0"})["WORLD_SIZE"] == "1"
