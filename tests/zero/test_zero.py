"""Where states lie changes no loss: every stage, offload, a disk, hpZ; and checkpoints move between all of them."""

from __future__ import annotations

import json
import os

import pytest

from pretrain.checkpoints.checkpoint_files import list_steps
from tests.helpers.rank_helpers import losses, newest, run_cases
from tests.zero.test_topology import relative_difference, same_tensors

pytestmark = [pytest.mark.slow, pytest.mark.launches, pytest.mark.timeout(900)]
PLACES = [(0, "none"), (1, "none"), (2, "none"), (3, "none"), (1, "optimizer"), (2, "optimizer"), (3, "optimizer"),
          (3, "parameters")]  # fmt: skip
FAMILIES = {
    "gpt2": "{family: gpt2, dim: 32, num_layers: 2, num_heads: 4, tie_embeddings: true}",
    "qwen3": "{family: qwen3, dim: 32, num_layers: 2, num_heads: 4, num_kv_heads: 2, tie_embeddings: true}",
}
# Tensors this small stay whole otherwise, and nothing would be gathered.
GATHERS = {
    "stage3_param_persistence_threshold": 0, "stage3_max_reuse_distance": 0, "stage3_max_live_parameters": 0,
}  # fmt: skip


@pytest.fixture(scope="module")
def plain_losses(tiny_config):
    """Losses of plain PyTorch by family, clipped so often that it matters."""
    from tests.helpers.plain_torch import train_plainly

    return {
        family: train_plainly(tiny_config, [f"model={model}", "optim.clip_norm=0.5"])[0]
        for family, model in FAMILIES.items()
    }


def test_tied_families_are_the_same_at_every_stage_and_place(tiny_config, tmp_path, plain_losses):
    """Two ranks, two micro-steps."""
    cases = {
        f"{family}-{stage}-{offload}": [f"model={model}", "optim.clip_norm=0.5", "train.micro_batch_size=4",
                                        f"parallel={{zero_stage: {stage}, offload: {offload}}}"]
        for family, model in FAMILIES.items() for stage, offload in (PLACES if family == "gpt2" else PLACES[2::2])
    }  # fmt: skip
    outcomes = run_cases(
        tiny_config,
        [{"overrides": [*own, f"run.dir={tmp_path}/{name}"], "zero": GATHERS} for name, own in cases.items()],
        2, tmp_path / "ranks", timeout=800,
    )  # fmt: skip
    assert outcomes == ["done"] * len(cases)
    differences = {}
    for name in cases:
        found, expected = losses(tmp_path / name), plain_losses[name.partition("-")[0]]
        assert len(found) == 20 and expected[0] > expected[-1] + 0.5
        differences[name] = relative_difference(found, expected)
    print("largest relative difference of a loss:", max(differences.values()))
    assert max(differences.values()) < 1e-5, differences
    told = json.loads((tmp_path / "gpt2-3-parameters/deepspeed.json").read_text())
    assert told["zero_optimization"]["offload_param"] == {"device": "cpu"}


# Matrices large enough for files, norms too small for one
LARGER = "{family: llama, dim: 128, num_layers: 4, num_heads: 4, num_kv_heads: 2, ffn_dim: 384}"


def test_states_on_a_disk_are_those_in_memory(tiny_config, tmp_path):
    """A stand-in reads and writes the files. LONGHAUL_NVME=1: DeepSpeed's own operator, which it compiles for minutes."""
    stands_in = os.environ.get("LONGHAUL_NVME") != "1"
    disk = f"parallel={{zero_stage: 3, offload: optimizer, nvme_dir: {tmp_path}/nvme}}"
    memory, other = "parallel={zero_stage: 3, offload: optimizer}", "parallel={zero_stage: 1}"
    parts = {"sub_group_size": 300_000}  # several files, and for Muon the same batches of matrices
    common = [f"model={LARGER}", "train.num_steps=4", "train.micro_batch_size=4"]
    own = {"adamw": [], "muon": ["optim={name: muon, lr: 1e-3}"], "bf16": ["train.precision=bf16"]}

    def case(run: str, parallel: str, **more) -> dict:
        overrides = [f"run.dir={tmp_path}/{run}", *common, *own[run.partition("-")[0]], parallel]
        return {"overrides": overrides, "files": stands_in, "zero": parts, **more}

    cases = [
        case(f"{name}-{place}", parallel, poison=[2])
        for name in own for place, parallel in (("memory", memory), ("disk", disk))
    ] + [
        case("adamw-whole", memory),
        case("adamw-cut", disk, signal_at=3),
        case("adamw-cut", disk),
        case("adamw-moved", memory, signal_at=1),
        case("adamw-moved", disk, signal_at=2),
        case("adamw-moved", other),
        case("adamw-still", other),
    ]  # fmt: skip
    outcomes = run_cases(tiny_config, cases, 2, tmp_path / "ranks", timeout=800)
    assert outcomes == [*["done"] * 7, "stopped", "done", "stopped", "stopped", "done", "done"]
    pairs = [(f"{name}-disk", f"{name}-memory") for name in ("adamw", "muon", "bf16")] + [("adamw-cut", "adamw-whole")]
    for run, like in pairs:
        assert losses(tmp_path / run) == losses(tmp_path / like)
        same_tensors(newest(tmp_path / run), newest(tmp_path / like))
    assert list_steps(tmp_path / "adamw-moved/checkpoints") == [1, 2, 4]
    assert relative_difference(losses(tmp_path / "adamw-moved"), losses(tmp_path / "adamw-still")) < 1e-5
    assert not list((tmp_path / "nvme").iterdir())  # a run that has ended leaves nothing


def test_hpz_changes_nothing_and_forgets_its_copies_of_the_weights_before_a_checkpoint(tiny_config, tmp_path):
    common = ["parallel={zero_stage: 3, hpz_ranks: 2}", "train.micro_batch_size=4", "train.num_steps=8"]
    cases = [
        {"overrides": [f"run.dir={tmp_path}/plain", "parallel.zero_stage=3", *common[1:]]},
        {"overrides": [*common, f"run.dir={tmp_path}/still"]},
        {"overrides": [*common, f"run.dir={tmp_path}/cut"], "signal_at": 4},
        {"overrides": [*common, f"run.dir={tmp_path}/cut"]},
    ]
    outcomes = run_cases(tiny_config, [case | {"zero": GATHERS} for case in cases], 4, tmp_path / "ranks")
    assert outcomes == ["done", "done", "stopped", "done"]
    for run in ("still", "cut"):
        assert losses(tmp_path / run) == losses(tmp_path / "plain")
        same_tensors(newest(tmp_path / run), newest(tmp_path / "plain"))
    told = json.loads((tmp_path / "still/deepspeed.json").read_text())
    assert told["zero_optimization"]["zero_hpz_partition_size"] == 2
