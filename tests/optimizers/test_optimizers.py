"""Every optimizer moves the weights as a plain loop does, at every ZeRO stage, and resumes exactly."""

from __future__ import annotations

import pytest
import torch

from pretrain.checkpoints.checkpoint_files import list_steps
from tests.helpers.plain_torch import train_plainly
from tests.helpers.rank_helpers import losses, metric_lines, newest, run_cases

pytestmark = [pytest.mark.slow, pytest.mark.launches, pytest.mark.timeout(900)]
STAGES = (0, 1, 2, 3)
SHORT = ["train.num_steps=8"]  # Muon goes through all 20 steps of the config
# Three blocks of this width: half of Muon's weights end within a row of one of the matrices of a gate_up.
SHAPE = ["model.num_layers=3", "model.ffn_dim=63"]
OPTIMIZERS = {
    "muon": "{name: muon, lr: 3e-3, clip_norm: 0}",
    "muon-clip": "{name: muon, lr: 3e-3, clip_norm: 0.3}",
    "lion": "{name: lion, lr: 1e-3, clip_norm: 0}",
    "lion-clip": "{name: lion, lr: 1e-3, clip_norm: 0.3}",
    "sgd": "{name: sgd, lr: 0.1, momentum: 0.9, nesterov: true, weight_decay: 0.01, clip_norm: 0}",
    "sgd-clip": "{name: sgd, lr: 0.1, momentum: 0.9, weight_decay: 0.01, clip_norm: 0.3}",
    "groups": "{name: adamw, lr: 3e-3, groups: [{match: 'embedding.*', lr_ratio: 2, weight_decay: 0}, "
    "{match: 'blocks.1.*', lr_ratio: 0}, {match: '*_norm.*', weight_decay: 0.2}]}",
}  # fmt: skip


def options_of(name):
    return [*SHAPE, *([] if name.startswith("muon") else SHORT), f"optim={OPTIMIZERS[name]}"]


def relative_difference(ours, theirs):
    return max(abs(a - b) / abs(b) for a, b in zip(ours, theirs, strict=True))


@pytest.fixture(scope="module")
def reference(tiny_config):
    """Losses and weights of plain PyTorch: no DeepSpeed, one process, the whole batch at once."""
    return {name: train_plainly(tiny_config, options_of(name)) for name in OPTIMIZERS}


RATES, NUM_RACED = (4e-3, 1.2e-2), 80


@pytest.fixture(scope="module")
def single_runs(tiny_config, tmp_path_factory):
    """Cases of several tests in one start of one rank: outcomes by name, and the folder of the runs."""
    folder = tmp_path_factory.mktemp("single")
    cases = {"run": options_of("groups"), "unknown": ["optim.groups=[{match: 'blocks.9.*'}]"]} | {
        f"{name}-{rate}": [f"optim={{name: {name}, lr: {rate}}}", f"train.num_steps={NUM_RACED}"]
        for name in ("adamw", "muon") for rate in RATES
    }  # fmt: skip
    listed = [{"overrides": [f"run.dir={folder}/{name}", *overrides]} for name, overrides in cases.items()]
    return dict(zip(cases, run_cases(tiny_config, listed, 1, folder / "ranks"), strict=True)), folder


def is_cut_within_a_row(reader, name):
    """Whether a fragment of a parameter begins within a row, and so within one of the stacked matrices."""
    return any(start % reader.shapes[name][1] for _, start, _ in reader.manifest["parameters"][name]["fragments"])


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_every_stage_equals_plain_torch(tiny_config, tmp_path, reference, num_ranks):
    names = ["muon", "muon-clip", *(["lion-clip", "sgd"] if num_ranks == 1 else ["lion", "sgd-clip", "groups"])]
    cases = [
        {"overrides": [f"run.dir={tmp_path}/{name}-z{stage}", f"parallel.zero_stage={stage}",
                       "train.micro_batch_size=8", *options_of(name)]}
        for name in names for stage in STAGES
    ]  # fmt: skip
    assert run_cases(tiny_config, cases, num_ranks, tmp_path / "ranks") == ["done"] * len(cases)
    for name in names:
        expected_losses, expected_weights = reference[name]
        assert expected_losses[0] > expected_losses[-1]  # it learns
        for stage in STAGES:
            run = tmp_path / f"{name}-z{stage}"
            assert relative_difference(losses(run), expected_losses) < 1e-5, (name, stage)
            reader = newest(run)
            if num_ranks == 2 and name.startswith("muon") and stage in (1, 2):
                assert is_cut_within_a_row(reader, "blocks.1.ffn.gate_up.weight")
            for parameter, weight in expected_weights.items():
                difference = float((reader.read_whole(parameter) - weight).abs().max())
                assert difference < 1e-4, (name, stage, parameter, difference)


def test_what_is_frozen_stays_and_is_said(single_runs):
    outcomes, folder = single_runs
    run = folder / "run"
    assert outcomes["run"] == "done"
    [event] = [line for line in metric_lines(run) if line.get("event") == "frozen"]
    assert "blocks.1.ffn.gate_up.weight" in event["message"] and "blocks.0" not in event["message"]
    assert torch.equal(newest(run).read_whole("blocks.1.attention_norm.weight"), torch.ones(32))
    assert outcomes["unknown"].startswith(
        "ConfigError: optim.groups.0.match is blocks.9.*; expected a pattern that some"
    )
    assert not list_steps(folder / "unknown" / "checkpoints")


def test_muon_is_ahead_of_adamw_at_equal_steps_on_real_text(single_runs):
    def last_loss(name):
        return sum(losses(single_runs[1] / name)[-10:]) / 10

    adamw, muon = (min(last_loss(f"{name}-{rate}") for rate in RATES) for name in ("adamw", "muon"))
    print(f"mean of the last 10 of {NUM_RACED} steps: AdamW {adamw:.3f}, Muon {muon:.3f}")
    assert muon < adamw - 0.1


KINDS = [("fp32", 0), ("fp32", 1), ("fp32", 2), ("fp32", 3), ("bf16", 1), ("bf16", 2), ("bf16", 3)]


def test_muon_resumes_bitwise_and_moves_between_stages(tiny_config, tmp_path):
    cases, chain = [], [0, 1, 2, 3, 1, 0]
    muon = [*options_of("muon-clip"), "train.num_steps=8", "train.micro_batch_size=8"]
    for precision, stage in KINDS:
        common = [f"parallel.zero_stage={stage}", f"train.precision={precision}", *muon]
        name = f"{precision}-{stage}"
        cases += [
            {"overrides": [f"run.dir={tmp_path}/{name}-whole", *common]},
            {"overrides": [f"run.dir={tmp_path}/{name}-cut", *common], "signal_at": 4, "signal_rank": 1},
            {"overrides": [f"run.dir={tmp_path}/{name}-cut", *common]},
        ]
    moves = [
        {"overrides": [f"run.dir={tmp_path}/moving", f"parallel.zero_stage={stage}", *muon]}
        | ({"signal_at": index + 1} if index < len(chain) - 1 else {})
        for index, stage in enumerate(chain)
    ]
    lost = {"overrides": [f"run.dir={tmp_path}/lost", *muon, "train.num_steps=4"], "lose_state": "momentum_buffer"}
    outcomes = run_cases(tiny_config, [*cases, *moves, lost], 2, tmp_path / "ranks")
    assert outcomes[:-1] == ["done", "stopped", "done"] * len(KINDS) + ["stopped"] * 5 + ["done"]
    assert "state is missing: 'blocks.1.ffn.gate_up.weight' has no 'momentum_buffer'" in outcomes[-1]
    assert "stop it, and start it again from the last checkpoint" in outcomes[-1] and "space" not in outcomes[-1]
    assert list((tmp_path / "lost" / "checkpoints").iterdir()) == []
    for precision, stage in KINDS:
        whole, cut = tmp_path / f"{precision}-{stage}-whole", tmp_path / f"{precision}-{stage}-cut"
        assert list_steps(cut / "checkpoints") == [4, 8]
        assert losses(cut) == losses(whole) and len(losses(cut)) == 8
        one, other = newest(cut), newest(whole)
        for name in one.shapes:
            is_hidden = name.startswith("blocks.") and len(one.shapes[name]) == 2
            assert one.states[name] == ["master", *(["momentum_buffer"] if is_hidden else ["exp_avg", "exp_avg_sq"])]
            for state in one.states[name]:
                assert torch.equal(one.read_whole(name, state), other.read_whole(name, state)), (name, state)
        if precision == "bf16":
            assert relative_difference(losses(whole), losses(tmp_path / f"fp32-{stage}-whole")) < 0.02
            assert losses(whole) != losses(tmp_path / f"fp32-{stage}-whole")
    assert relative_difference(losses(tmp_path / "moving"), losses(tmp_path / "fp32-0-whole")) < 1e-5
