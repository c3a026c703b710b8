"""torch's optimizers without its compiler: the same bits, and nothing of the compiler is imported."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pretrain.optimizers import torch_optimizers
from tests.helpers.rank_helpers import ROOT, metric_lines

KINDS = {
    "AdamW": {"lr": 1e-2, "weight_decay": 0.1, "fused": True},
    "Adam": {"lr": 1e-2, "weight_decay": 0.1, "fused": True},
    "SGD": {"lr": 1e-2, "momentum": 0.9, "nesterov": True, "foreach": True},
    "RMSprop": {"lr": 1e-2, "momentum": 0.5, "foreach": True},
}


@pytest.mark.parametrize("name", KINDS)
def test_they_compute_what_torchs_own_do(name):
    found = []
    for library in (torch_optimizers, torch.optim):
        torch.manual_seed(1)
        weight = torch.nn.Parameter(torch.randn(40, 30))
        optimizer = getattr(library, name)([weight], **KINDS[name])
        for _ in range(4):
            optimizer.zero_grad()
            (weight.sin() * torch.randn(40, 30)).sum().backward()
            optimizer.step()
        assert weight.requires_grad and weight.grad_fn is None and torch.is_grad_enabled()
        found.append([weight.detach(), *(value for value in optimizer.state[weight].values())])
    assert len(found[0]) == len(found[1]) > 1
    assert all(torch.equal(own, other) for own, other in zip(*found, strict=True))


def test_they_import_no_compiler():
    code = f"""
import sys, torch
from pretrain.optimizers import torch_optimizers
for name, options in {KINDS!r}.items():
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = getattr(torch_optimizers, name)([weight], **options)
    weight.sum().backward()
    optimizer.step()
    optimizer.load_state_dict(optimizer.state_dict())
    optimizer.zero_grad()
print([name for name in ("torch._dynamo", "torch._inductor") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "[]\n"), done.stderr


@pytest.mark.launches
def test_a_start_on_a_cpu_imports_no_compiler(tiny_config: Path, tmp_path: Path):
    command = [sys.executable, "-X", "importtime", "launch/pretrain.py", tiny_config, "train.num_steps=1"]
    done = subprocess.run(
        [*map(str, command), "schedule.warmup_steps=0", f"run.dir={tmp_path}/run"], cwd=ROOT, capture_output=True,
        text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert " torch\n" in done.stderr  # the names of what is imported are there
    assert "torch._dynamo" not in done.stderr and "torch._inductor" not in done.stderr
    event = next(line for line in metric_lines(tmp_path / "run") if line.get("event") == "first_step")
    assert list(event["seconds"]) == list(event["cpu_seconds"]) == [
        "python", "config", "imports", "deepspeed", "process group", "run folder", "pre-flight",
            "tokenizer", "data", "self-test",
        "model", "engine", "checkpoint", "metrics", "first step",
    ]  # fmt: skip
    assert 0.5 < sum(event["cpu_seconds"].values()) < 100
