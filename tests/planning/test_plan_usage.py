"""What the planner foresees, beside what engines on CPU ranks hold and send."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from pretrain.options.config import Config
from pretrain.options.settings import load_config
from pretrain.planning import plan_communication
from pretrain.planning.plan_communication import communication
from pretrain.planning.plan_memory import resident
from tests.helpers.rank_helpers import start_ranks

CONFIG = """
tokenizer: {model: none, vocab_size: 1000}
data: {sources: [{name: none, shards: none}], seq_len: 32}
model: {family: llama, dim: 256, num_layers: 2, num_heads: 4, num_kv_heads: 2, ffn_dim: 512}
optim: {lr: 1e-3}
train: {num_steps: 3, global_batch_size: 8, micro_batch_size: 2, precision: bf16}
"""
FP32 = ["train.precision=fp32"]
ADAPTERS = ["resume={from: base, optimizer: false}", "train.lora.rank=16"]
CASES: dict[str, dict[str, Any]] = {
    "fp32 stage 0": {"overrides": [*FP32, "parallel.zero_stage=0"]},
    "fp32 stage 1": {"overrides": [*FP32, "parallel.zero_stage=1"]},
    "fp32 stage 2": {"overrides": [*FP32, "parallel.zero_stage=2", "train.micro_batch_size=4"]},
    "fp32 stage 3": {"overrides": [*FP32, "parallel.zero_stage=3", "optim.name=lion"]},
    "bf16 stage 1": {"overrides": ["parallel.zero_stage=1"]},
    "bf16 stage 1, no micro-steps": {"overrides": ["parallel.zero_stage=1", "train.micro_batch_size=4"]},
    "bf16 stage 2": {"overrides": ["parallel.zero_stage=2"]},
    "bf16 stage 3": {"overrides": ["parallel.zero_stage=3"]},
    "bf16 sums, stage 1": {"overrides": ["parallel.zero_stage=1", "train.grad_accum_dtype=bf16"]},
    "bf16 sums, stage 2": {"overrides": ["parallel.zero_stage=2", "train.grad_accum_dtype=bf16"]},
    "bf16 sums, stage 3": {"overrides": ["parallel.zero_stage=3", "train.grad_accum_dtype=bf16"]},
    "muon, stage 3": {"overrides": ["parallel.zero_stage=3", "optim.name=muon"]},
    "muon, stage 0": {"overrides": [*FP32, "parallel.zero_stage=0", "optim.name=muon"]},
    "rmsprop, gpt2": {"overrides": ["optim.name=rmsprop", "model.family=gpt2", "model.num_kv_heads=null",
                                    "parallel.zero_stage=2"]},
    "starcoder2": {"overrides": ["model.family=starcoder2", "parallel.zero_stage=3"]},
    "qwen3, recomputed": {"overrides": ["model.family=qwen3", "parallel.zero_stage=3",
                                        "train.activation_checkpointing=full"]},
    "shared rows": {"overrides": ["parallel.sequence_parallel_size=2", "train.activation_checkpointing=full"]},
    "shared rows, few key heads": {"overrides": ["parallel.sequence_parallel_size=2", "model.num_kv_heads=1",
                                                 "parallel.zero_stage=3", "train.ffn_chunk_tokens=16"]},
    "adapters, fp32 stage 0": {"overrides": [*FP32, "parallel.zero_stage=0", *ADAPTERS]},
    "adapters, bf16 stage 1": {"overrides": ["parallel.zero_stage=1", *ADAPTERS]},
    "adapters, bf16 stage 2": {"overrides": ["parallel.zero_stage=2", *ADAPTERS]},
    "adapters, bf16 sums, stage 2": {"overrides": ["parallel.zero_stage=2", "train.grad_accum_dtype=bf16", *ADAPTERS]},
    "adapters, bf16 stage 3": {"overrides": ["parallel.zero_stage=3", *ADAPTERS]},
    "adapters of some layers, nothing is kept": {"overrides": ["parallel.zero_stage=3", *ADAPTERS,
                                                 "train.lora.targets=[ffn_down]"], "reuse": 0},
    "nothing is kept": {"overrides": ["parallel.zero_stage=3"], "reuse": 0},
}  # fmt: skip


PADDED = ("fp32 stage 0", "bf16 stage 1", "bf16 stage 2", "bf16 stage 3", "muon, stage 3")  # by three ranks


def run(config: Path, names: Sequence[str], num_ranks: int, folder: Path) -> list[dict[str, Any]]:
    cases, out = folder / "cases.json", folder / "out.json"
    cases.write_text(json.dumps([CASES[name] for name in names]))
    processes = start_ranks("tests/ranks/planned.py", [str(config), str(cases), str(out)], num_ranks, folder / "log")
    try:
        statuses = [process.wait(1500) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert statuses == [0] * num_ranks, (folder / "log-0").read_text()[-3000:]
    return json.loads(out.read_text())


def foreseen(case: dict[str, Any], config: Config, num_ranks: int, monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    with monkeypatch.context() as patch:
        if "reuse" in case:
            patch.setattr(plan_communication, "kept_elements", lambda recomputes: case["reuse"] // 2)
        sent = communication(config, num_ranks, on_cpu=True)
    sent["all_reduce"] -= (
        plan_communication.METRICS_BYTES + plan_communication.ROWS_BYTES
    )  # the loop's, not the engine's
    return sent


@pytest.mark.slow
@pytest.mark.launches
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(("num_ranks", "names"), [(2, tuple(CASES)), (3, PADDED)], ids=["2", "3"])
def test_engines_hold_and_send_what_is_foreseen(
    num_ranks: int, names: Sequence[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "planned.yaml"
    path.write_text(CONFIG.replace("global_batch_size: 8", f"global_batch_size: {4 * num_ranks}"))
    problems = []
    for name, found in zip(names, run(path, names, num_ranks, tmp_path), strict=True):
        case = CASES[name]
        config = load_config(path, case["overrides"])
        expected, sent = foreseen(case, config, num_ranks, monkeypatch), found["sent"]
        if {kind for kind, size in sent.items() if size} != {kind for kind, size in expected.items() if size}:
            problems.append(f"{name}: sent {sent}, foreseen {expected}")
            continue
        for kind, size in sent.items():
            if abs(expected[kind] - size) > 0.01 * size:
                problems.append(f"{name}: {kind} of {size} bytes, foreseen {expected[kind]}")
        held, states = found["resident"], resident(config, num_ranks)
        for kind, size in held.items():
            if abs(states[kind] - size) > 0.05 * size + 4096:
                problems.append(f"{name}: {kind} of {size} bytes, foreseen {states[kind]}")
    assert problems == []
