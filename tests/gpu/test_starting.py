"""A task that is shown its own GPU only, as by `srun --gpus-per-task=1`, which is GPU 0 whatever the task's number."""

from __future__ import annotations

import json
import os

import pytest
import torch

from tests.helpers.rank_helpers import run_command

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: torch.cuda is not available"),
    pytest.mark.launches,
    pytest.mark.timeout(300),
]


def test_a_task_with_a_gpu_of_its_own(tiny_config, tmp_path):
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0").partition(",")[0]
    variables = {"RANK": "0", "LOCAL_RANK": "1", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1", "SLURM_LOCALID": "1",
                 "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29631", "CUDA_VISIBLE_DEVICES": visible}  # fmt: skip
    done = run_command("launch/pretrain.py", tiny_config, f"run.dir={tmp_path}/run", "train.num_steps=4",
                       timeout=250, **variables)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "run/status.json").read_text())["status"] == "done"
