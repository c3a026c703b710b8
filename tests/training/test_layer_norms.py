"""Norms by layer: right at every stage, alike at all of them, and free of any effect on the training."""

from __future__ import annotations

import math

import pytest
import torch

from tests.helpers.rank_helpers import losses, metric_lines, run_cases

pytestmark = pytest.mark.launches

EVERY = "log={tensorboard: false, layer_norms_every: 2}"
CASES = {
    "off": ["parallel.zero_stage=1"],
    "stage-0": ["parallel.zero_stage=0", EVERY],
    "stage-1": ["parallel.zero_stage=1", EVERY],
    "stage-2": ["parallel.zero_stage=2", EVERY],
    "stage-3": ["parallel.zero_stage=3", EVERY],
    "offload-2": ["parallel={zero_stage: 2, offload: optimizer}", EVERY],
    "offload-3": ["parallel={zero_stage: 3, offload: optimizer}", EVERY],
    "bf16-1": ["train.precision=bf16", EVERY],
    "bf16-2": ["train.precision=bf16", "parallel.zero_stage=2", EVERY],
    "recomputed": ["train.activation_checkpointing=full", EVERY],
    "shared-rows": ["parallel.sequence_parallel_size=2", EVERY],
}
NAMES = ["0", "1", "embedding", "final_norm", "output"]


@pytest.fixture(scope="module")
def runs(tiny_config, tmp_path_factory):
    """Two ranks and two micro-steps; clipped at every step, so that norms after clipping would be others."""
    folder = tmp_path_factory.mktemp("norms")
    common = ["train={num_steps: 4, global_batch_size: 16, micro_batch_size: 4}", "optim.clip_norm=0.1"]
    small = {"stage3_param_persistence_threshold": 0}  # else nothing this small is divided
    cases = [
        {"overrides": [*common, *own, f"run.dir={folder}/{name}"], "zero": small if "3" in name else {}}
        for name, own in CASES.items()
    ]
    assert run_cases(tiny_config, cases, 2, folder / "ranks") == ["done"] * len(CASES)
    return folder


def norms_of(run):
    return {line["step"]: {key: line[key] for key in line if key.startswith("layer/")}
            for line in metric_lines(run) if "loss" in line}  # fmt: skip


@pytest.mark.parametrize("name", [name for name in CASES if name != "off"])
def test_the_squares_of_all_layers_are_those_of_the_whole(runs, name):
    found = norms_of(runs / name)
    assert [bool(found[step]) for step in (1, 2, 3, 4)] == [False, True, False, True]
    for line in metric_lines(runs / name):
        if line.get("layer/0/grad_norm"):
            total = math.sqrt(sum(line[f"layer/{layer}/grad_norm"] ** 2 for layer in NAMES))
            assert total == pytest.approx(line["grad_norm"], rel=1e-5) and total > 0.2
    assert set(found[2]) == {f"layer/{layer}/grad_norm" for layer in NAMES} | {
        "layer/0/activation_rms", "layer/1/activation_rms"}  # fmt: skip


@pytest.mark.parametrize("name", ["stage-1", "stage-2", "stage-3", "offload-2", "offload-3", "recomputed"])
def test_every_stage_has_the_same_norms(runs, name):
    expected, found = norms_of(runs / "stage-0"), norms_of(runs / name)
    for step in (2, 4):
        assert found[step] == pytest.approx(expected[step], rel=1e-4)


def test_looking_changes_no_bit(runs):
    assert losses(runs / "off") == losses(runs / "stage-1") and not norms_of(runs / "off")[2]


def test_activations_are_what_leaves_each_block():
    from pretrain.options.families import resolve_shape
    from pretrain.options.model_options import ModelSection
    from pretrain.transformer.model import Transformer

    model = Transformer(resolve_shape(ModelSection(dim=32, num_layers=2, num_heads=4), 64, 16), seed=1)
    tokens_BT = torch.arange(32).view(2, 16)
    taken, seen = [], []
    for block in model.blocks:
        block.register_forward_hook(lambda _, __, output: taken.append(output[0] + output[1]))
    model.on_block = lambda index, x_BTD, residual_BTD: seen.append((index, x_BTD + residual_BTD))
    model(tokens_BT, tokens_BT, torch.zeros_like(tokens_BT))
    assert [index for index, _ in seen] == [0, 1]
    assert all(torch.equal(found, expected) for (_, found), expected in zip(seen, taken, strict=True))
    model.eval()
    model(tokens_BT, tokens_BT, torch.zeros_like(tokens_BT))
    assert len(seen) == 2
