"""What a run says at its twentieth step of what was foreseen."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pretrain.options.settings import load_config
from pretrain.planning.plan import choose_machine, make_plan
from pretrain.training.plan_check import STEPS, compare, compare_with_plan
from tests.helpers.rank_helpers import metric_lines, run_cases

CONFIG = load_config(Path(__file__).resolve().parents[2] / "configs/llama-1.3b.yaml")
PLAN = make_plan(CONFIG, choose_machine(CONFIG, "H100", 8))


def test_both_are_said_and_what_differs_is_named() -> None:
    memory, seconds = PLAN.memory.allocated, PLAN.time.total
    text, off = compare(PLAN, memory, seconds)
    assert off == [] and text.startswith(f"memory {memory / 2**30:.1f} GiB foreseen, ") and "(+0%); step " in text
    assert compare(PLAN, int(1.09 * memory), 1.09 * seconds)[1] == []
    text, off = compare(PLAN, int(0.85 * memory), 1.2 * seconds)
    assert off == ["memory", "step", "tokens/s"] and "(-15%)" in text and "(+20%)" in text and "(-17%)" in text


def fake_run(step: int, kind: str = "cuda", log: bool = True) -> Any:
    events: list[tuple] = []
    return SimpleNamespace(
        log=SimpleNamespace(median_step_seconds=lambda: 2 * PLAN.time.total) if log else None, config=CONFIG,
        progress=SimpleNamespace(step=step), ranks=SimpleNamespace(device=torch.device(kind), world_size=8),
        event=lambda *args, **details: events.append((*args, details)), events=events,
    )  # fmt: skip


@pytest.fixture
def on_h100(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA H100 80GB HBM3")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda _: PLAN.memory.allocated)


def test_a_gpu_is_compared_once(on_h100: None) -> None:
    for step in (1, STEPS - 1, STEPS + 1):
        compare_with_plan(run := fake_run(step), first_step=1)
        assert run.events == []
    compare_with_plan(run := fake_run(STEPS, log=False), first_step=1)  # another rank than the first
    assert run.events == []
    compare_with_plan(run := fake_run(100 + STEPS - 1), first_step=100)  # of this start
    (first, text, details), (second, warning, _) = run.events
    assert (first, second) == ("plan", "plan_differs") and details["measured"][0] == PLAN.memory.allocated
    assert "memory" in text and "more than 10% from what was foreseen: step, tokens/s. docs/planning.md" in warning


def test_what_is_not_known_is_said(on_h100: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Unknown 9000")
    compare_with_plan(run := fake_run(STEPS), first_step=1)
    assert run.events == [("plan", "nothing is foreseen for Unknown 9000, which is not in pretrain/ranks/gpus.py", {})]
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Tesla V100-SXM2-32GB")
    compare_with_plan(run := fake_run(STEPS), first_step=1)
    assert len(run.events) == 1 and "nothing is foreseen: --gpu: train.precision is bf16" in run.events[0][1]


@pytest.mark.slow
@pytest.mark.launches
def test_a_run_on_cpus_says_what_it_holds(tiny_config: Path, tmp_path: Path) -> None:
    changes = [f"run.dir={tmp_path}/run", "train.num_steps=22", "train.micro_batch_size=8", "parallel.zero_stage=2"]
    assert run_cases(tiny_config, [{"overrides": changes}], 2, tmp_path / "ranks") == ["done"]
    [event] = [line for line in metric_lines(tmp_path / "run") if line.get("event") == "plan"]
    assert event["step"] == STEPS
    assert event["message"].startswith("foreseen of each rank: parameters ")
    assert event["message"].endswith("neither time nor activations are foreseen on a CPU")
