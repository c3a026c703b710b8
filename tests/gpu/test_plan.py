"""What the planner foresees of one GPU, beside what it takes: memory within 5%; time is said, and within a factor of 2."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from pretrain.options.settings import load_config
from pretrain.planning.plan import choose_machine, make_plan
from tests.helpers.rank_helpers import start_ranks

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.launches,
    pytest.mark.timeout(600),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: torch.cuda is not available"),
]
ROOT = Path(__file__).resolve().parents[2]
SMALL = ["train.global_batch_size=8", "train.micro_batch_size=4", "model.num_layers=6"]
CASES = [
    [*SMALL, f"train.activation_checkpointing={mode}", f"parallel.zero_stage={stage}", *more]
    for mode in ("none", "selective", "full")
    for stage, more in ((1, []), (2, []), (3, []), (2, ["train.micro_batch_size=8"]), (1, ["optim.name=muon"]))
]


def test_memory_and_time_are_about_what_is_foreseen(tmp_path: Path) -> None:
    path, out = ROOT / "configs/llama-350m.yaml", tmp_path / "out.json"
    (tmp_path / "cases.json").write_text(json.dumps([{"overrides": case} for case in CASES]))
    arguments = [str(path), str(tmp_path / "cases.json"), str(out)]
    [process] = start_ranks("tests/ranks/planned.py", arguments, 1, tmp_path / "log")
    assert process.wait(580) == 0, (tmp_path / "log-0").read_text()[-3000:]
    problems = []
    for case, found in zip(CASES, json.loads(out.read_text()), strict=True):
        config = load_config(path, case)
        plan = make_plan(config, choose_machine(config, torch.cuda.get_device_name(), 1))
        memory, time = plan.memory.allocated / found["peak"], plan.time.total / found["step_seconds"]
        print(f"{' '.join(case)}: memory {memory:.3f} and time {time:.2f} of what was measured")
        if abs(memory - 1) > 0.05 or not 0.5 < time < 2:
            problems.append(f"{case}: memory {memory:.3f}, time {time:.2f}; most {plan.memory.when}")
    assert problems == []
