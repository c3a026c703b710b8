"""Master weights in the host's memory and a model on a GPU: the same losses, for every optimizer."""

from __future__ import annotations

import pytest
import torch

from tests.helpers.rank_helpers import losses, newest, run_cases

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.launches,
    pytest.mark.timeout(600),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: torch.cuda is not available"),
]
OPTIMIZERS = ("adamw", "rmsprop", "muon", "lion", "sgd")


def test_offloading_changes_no_loss_and_checkpoints_move(tiny_config, tmp_path):
    cases, places = [], [(1, "none"), (1, "optimizer"), (2, "optimizer"), (3, "optimizer"), (3, "parameters")]
    for name in OPTIMIZERS:
        common = [f"optim={{name: {name}, lr: 1e-3, clip_norm: 1.0}}", "train.precision=bf16"]
        for stage, offload in places:
            topology = f"parallel={{zero_stage: {stage}, offload: {offload}}}"
            cases.append({"overrides": [f"run.dir={tmp_path}/{name}-{stage}-{offload}", topology, *common]})
        for number, (stage, offload) in enumerate(places):
            topology = f"parallel={{zero_stage: {stage}, offload: {offload}}}"
            case = {"overrides": [f"run.dir={tmp_path}/{name}-moving", topology, *common]}
            cases.append(case | ({"signal_at": 4 * number + 3} if number < len(places) - 1 else {}))
    expected = (["done"] * len(places) + ["stopped"] * (len(places) - 1) + ["done"]) * len(OPTIMIZERS)
    assert run_cases(tiny_config, cases, 1, tmp_path / "ranks") == expected
    for name in OPTIMIZERS:
        reference = losses(tmp_path / f"{name}-1-none")
        for other in (*(f"{stage}-{offload}" for stage, offload in places), "moving"):
            run = tmp_path / f"{name}-{other}"
            assert losses(run) == pytest.approx(reference, rel=5e-3), (name, other)
            assert newest(run).manifest["step"] == 20
