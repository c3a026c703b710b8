"""The loss depends on the config alone: not on ranks, ZeRO stage or accumulation; and resuming is exact."""

from __future__ import annotations

import json
import math

import pytest
import torch

from pretrain.checkpoints.checkpoint_files import CheckpointReader, folder_name, list_steps
from tests.helpers.rank_helpers import losses, metric_lines, newest, run_cases

pytestmark = [pytest.mark.slow, pytest.mark.launches, pytest.mark.timeout(900)]
STAGES = (0, 1, 2, 3)
OFFLOADED = ((1, "optimizer"), (2, "optimizer"), (3, "optimizer"), (3, "parameters"))
OPTIMIZERS = {
    "adamw": ["optim.name=adamw", "optim.clip_norm=0.5"],
    "adam": ["optim.name=adam", "optim.weight_decay=0.01"],
    "rmsprop": ["optim={name: rmsprop, lr: 1e-3, weight_decay: 0.01, clip_norm: 1.0, momentum: 0.5}"],
}


def topology_cases(num_ranks, folder):
    return [
        {"overrides": [f"run.dir={folder}/r{num_ranks}-z{stage}-a{accumulation}", f"parallel.zero_stage={stage}",
                       f"train.micro_batch_size={16 // (num_ranks * accumulation)}"]}
        for stage in STAGES for accumulation in (1, 2, 4)
    ] + [
        {"overrides": [f"run.dir={folder}/r{num_ranks}-z{stage}-overlap", f"parallel.zero_stage={stage}",
                       f"train.micro_batch_size={8 // num_ranks}", "parallel.overlap_comm=true"]}
        for stage in (1, 2, 3)
    ]  # fmt: skip


@pytest.fixture(scope="module")
def reference(tiny_config, tmp_path_factory):
    """Losses and weights of plain PyTorch: no DeepSpeed, one process, the whole batch at once."""
    from tests.helpers.plain_torch import train_plainly

    return {name: train_plainly(tiny_config, overrides) for name, overrides in OPTIMIZERS.items()} | {
        "default": train_plainly(tiny_config, [])
    }


def relative_difference(ours, theirs):
    return max(abs(a - b) / abs(b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("num_ranks", [1, 2, 4])
def test_loss_is_the_same_for_every_topology(tiny_config, tmp_path, reference, num_ranks):
    cases = topology_cases(num_ranks, tmp_path)
    assert run_cases(tiny_config, cases, num_ranks, tmp_path / "ranks") == ["done"] * len(cases)
    expected, _ = reference["default"]
    assert expected[0] > expected[-1] + 0.5  # it learns
    differences = {
        case["overrides"][0]: relative_difference(losses(tmp_path / case["overrides"][0].rsplit("/", 1)[1]), expected)
        for case in cases
    }
    print("largest relative difference of a loss:", max(differences.values()))
    assert max(differences.values()) < 1e-5, differences


def test_optimizers_equal_plain_torch_at_every_stage(tiny_config, tmp_path, reference):
    cases = [
        {"overrides": [f"run.dir={tmp_path}/{name}-z{stage}", f"parallel.zero_stage={stage}",
                       "train.micro_batch_size=4", *overrides]}
        for name, overrides in OPTIMIZERS.items() for stage in STAGES
    ]  # fmt: skip
    assert run_cases(tiny_config, cases, 2, tmp_path / "ranks") == ["done"] * len(cases)
    for name in OPTIMIZERS:
        expected_losses, expected_weights = reference[name]
        for stage in STAGES:
            run = tmp_path / f"{name}-z{stage}"
            assert relative_difference(losses(run), expected_losses) < 1e-5, (name, stage)
            reader = newest(run)
            for parameter, weight in expected_weights.items():
                difference = (reader.read_whole(parameter) - weight).abs().max()
                assert difference < 1e-4, (name, stage, parameter, float(difference))


KINDS = [("fp32", 0), ("fp32", 1), ("fp32", 2), ("fp32", 3), ("bf16", 0), ("bf16", 1), ("bf16", 2), ("bf16", 3)]


def same_tensors(one, other):
    for name in one.shapes:
        for state in one.states[name]:
            assert torch.equal(one.read_whole(name, state), other.read_whole(name, state)), (name, state)


def test_resuming_after_a_signal_is_bitwise(tiny_config, tmp_path):
    cases = []
    for precision, stage in KINDS:
        common = [f"parallel.zero_stage={stage}", f"train.precision={precision}", "train.micro_batch_size=4",
                  "model.dropout=0.1", "model.attention_dropout=0.1"]  # fmt: skip
        name = f"{precision}-{stage}"
        cases += [
            {"overrides": [f"run.dir={tmp_path}/{name}-whole", *common]},
            {"overrides": [f"run.dir={tmp_path}/{name}-cut", *common], "signal_at": 9, "signal_rank": 1},
            {"overrides": [f"run.dir={tmp_path}/{name}-cut", *common]},
        ]
    assert run_cases(tiny_config, cases, 2, tmp_path / "ranks") == ["done", "stopped", "done"] * len(KINDS)
    for precision, stage in KINDS:
        whole, cut = tmp_path / f"{precision}-{stage}-whole", tmp_path / f"{precision}-{stage}-cut"
        assert list_steps(cut / "checkpoints") == [9, 20]
        assert losses(cut) == losses(whole) and len(losses(cut)) == 20
        norms = [[line["grad_norm"] for line in metric_lines(run) if "loss" in line] for run in (cut, whole)]
        assert norms[0] == norms[1] and all(norm > 0 for norm in norms[0])
        same_tensors(newest(cut), newest(whole))
        assert json.loads((cut / "status.json").read_text())["status"] == "done"
    fp32, bf16 = (losses(tmp_path / f"{precision}-1-whole") for precision in ("fp32", "bf16"))
    assert fp32 != bf16 and relative_difference(bf16, fp32) < 0.02


def test_bf16_depends_on_neither_ranks_nor_stage(tiny_config, tmp_path):
    """Gradients are summed in fp32 over micro-steps and ranks. Sent in bf16, norms differed by 1.5 percent."""
    for num_ranks in (1, 2):
        cases = [
            {"overrides": [f"run.dir={tmp_path}/{num_ranks}-{stage}", f"parallel.zero_stage={stage}",
                           "train.precision=bf16", "train.micro_batch_size=1"]}
            for stage in (1, 2, 3)
        ]  # fmt: skip
        assert run_cases(tiny_config, cases, num_ranks, tmp_path / f"ranks-{num_ranks}") == ["done"] * 3
    lines = {
        (num_ranks, stage): [line for line in metric_lines(tmp_path / f"{num_ranks}-{stage}") if "loss" in line]
        for num_ranks in (1, 2) for stage in (1, 2, 3)
    }  # fmt: skip
    for key, bound in (("loss", 2e-6), ("grad_norm", 1e-5)):
        expected = [line[key] for line in lines[1, 1]]
        for case, found in lines.items():
            assert relative_difference([line[key] for line in found], expected) < bound, (case, key)


def test_gradients_summed_in_bf16_train_and_resume(tiny_config, tmp_path):
    cases = []
    for stage in (1, 2, 3):
        common = [f"parallel.zero_stage={stage}", "train.precision=bf16", "train.micro_batch_size=2"]
        short = [f"run.dir={tmp_path}/{stage}-bf16", *common, "train.grad_accum_dtype=bf16"]
        cases += [{"overrides": [f"run.dir={tmp_path}/{stage}-fp32", *common]}]
        cases += [{"overrides": short, "signal_at": 9}, {"overrides": short}]
    assert run_cases(tiny_config, cases, 2, tmp_path / "ranks") == ["done", "stopped", "done"] * 3
    for stage in (1, 2, 3):
        short, exact = losses(tmp_path / f"{stage}-bf16"), losses(tmp_path / f"{stage}-fp32")
        assert len(short) == 20 and short != exact
        assert relative_difference(short, exact) < 0.01


ELASTIC = {  # a run each
    "adamw": ["optim={name: adamw, lr: 1e-3, weight_decay: 0.1, clip_norm: 1.0}"],
    "rmsprop": ["optim={name: rmsprop, lr: 3e-4, clip_norm: 1.0, momentum: 0.5}"],
    "muon": ["optim={name: muon, lr: 1e-3, weight_decay: 0.1, clip_norm: 1.0}"],
    "bf16": ["train.precision=bf16"],
}
# ranks, stage, offload, micro-batch: 12 rows a step by one or two micro-steps
HOPS = [(1, 0, "none", 6), (2, 1, "optimizer", 3), (4, 2, "none", 3), (3, 3, "parameters", 2), (1, 1, "optimizer", 12)]
HOP_STEPS = 3


def lines_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_run_moves_to_other_ranks_stages_and_offload(tiny_config, tmp_path):
    """1, 2, 4, 3 and 1 ranks: what is loaded is what was saved, and 20 steps and more are those of a run left alone."""
    common = [
        "train.global_batch_size=12",
        "checkpoint.keep_last=9",
        f"train.num_steps={HOP_STEPS * (len(HOPS) - 1) + 20}",
    ]
    for index, (num_ranks, stage, offload, micro) in enumerate(HOPS):
        topology = [f"parallel={{zero_stage: {stage}, offload: {offload}}}", f"train.micro_batch_size={micro}"]
        cases = [{"overrides": [f"run.dir={tmp_path}/{name}", *common, *topology, *own], "watch_loading": True}
                 for name, own in ELASTIC.items()]  # fmt: skip
        if index < len(HOPS) - 1:
            cases = [case | {"signal_at": HOP_STEPS * (index + 1), "signal_rank": num_ranks - 1} for case in cases]
            expected = ["stopped"] * len(cases)
        else:
            expected = ["done"] * len(cases)
        if index == 0:
            cases += [{"overrides": [f"run.dir={tmp_path}/{name}-still", *common, *topology, *own],
                       "watch_loading": True} for name, own in ELASTIC.items()]  # fmt: skip
            expected += ["done"] * len(ELASTIC)
        assert run_cases(tiny_config, cases, num_ranks, tmp_path / f"ranks-{index}") == expected
    for name in ELASTIC:
        moved, still = tmp_path / name, tmp_path / f"{name}-still"
        loads = lines_of(moved / "loads.jsonl")
        assert [(step, stage, len(counts)) for step, stage, counts in loads] == [
            (HOP_STEPS * (index + 1), stage, num_ranks) for index, (num_ranks, stage, *_) in enumerate(HOPS[1:])
        ]
        for step, _, counts in loads:
            loaded = CheckpointReader(moved / "checkpoints" / folder_name(step))
            same_tensors(loaded, CheckpointReader(moved / f"reloaded-{len(counts)}" / folder_name(step)))
            total = sum(math.prod(loaded.shapes[key]) * len(loaded.states[key]) for key in loaded.shapes)
            assert sum(counts) == total and max(counts) < 1.1 * total / len(counts), (name, counts)  # each its share
        assert lines_of(moved / "batches.jsonl") == lines_of(still / "batches.jsonl")
        assert len(lines_of(still / "batches.jsonl")) == len(losses(still))
        difference = relative_difference(losses(moved), losses(still))
        print(f"{name}: largest relative difference of a loss {difference:.2g}")
        assert difference < (1e-3 if name == "bf16" else 1e-5), name


def test_steps_that_are_not_finite_are_skipped_or_end_the_run(tiny_config, tmp_path):
    cases = []
    for stage in STAGES:
        common = [f"parallel.zero_stage={stage}", "train.micro_batch_size=4", "guard.max_skipped_steps=2"]
        cases += [
            {"overrides": [f"run.dir={tmp_path}/z{stage}", *common], "poison": [5, 6]},
            {"overrides": [f"run.dir={tmp_path}/z{stage}-bad", *common], "poison": [5, 6, 7, 8]},
        ]
    for stage, offload in OFFLOADED:
        cases.append({"overrides": [f"run.dir={tmp_path}/z{stage}-{offload}", f"parallel.offload={offload}",
                                    f"parallel.zero_stage={stage}", "train.micro_batch_size=4"],
                      "poison": [5, 6]})  # fmt: skip
    outcomes = run_cases(tiny_config, cases, 2, tmp_path / "ranks")
    assert outcomes[2 * len(STAGES) :] == ["done"] * len(OFFLOADED)
    for stage, offload in OFFLOADED:
        assert losses(tmp_path / f"z{stage}-{offload}") == losses(tmp_path / f"z{stage}")
        same_tensors(newest(tmp_path / f"z{stage}-{offload}"), newest(tmp_path / f"z{stage}"))
    for index, stage in enumerate(STAGES):
        assert outcomes[2 * index] == "done"
        lines = metric_lines(tmp_path / f"z{stage}")
        assert [line["step"] for line in lines if line.get("event") == "skipped_step"] == [5, 6]
        assert [line["loss"] is None for line in lines if "loss" in line] == [step in (5, 6) for step in range(1, 21)]
        reader = newest(tmp_path / f"z{stage}")
        assert reader.training["progress"]["num_skipped"] == 2
        assert reader.training["optimizer_step"] == 18
        assert all(
            bool(torch.isfinite(reader.read_whole(name, s)).all())
            for name in reader.shapes
            for s in reader.states[name]
        )
        bad = outcomes[2 * index + 1]
        assert bad.startswith("TrainingError: step 7: gradients are not finite for 3 steps in a row"), bad
        status = json.loads((tmp_path / f"z{stage}-bad" / "status.json").read_text())
        assert (status["status"], status["exit_status"], status["step"]) == ("failed", 1, 7)
    skipped = [losses(tmp_path / f"z{stage}") for stage in STAGES]
    assert all(math.isclose(skipped[0][-1], other[-1], rel_tol=1e-5) for other in skipped)


def test_damaged_checkpoints_are_passed_over_and_never_begin_anew(tiny_config, tmp_path):
    common = [
        f"run.dir={tmp_path}/run",
        "train.micro_batch_size=8",
        "checkpoint={every_steps: 4, keep_last: 2}",
        "schedule={name: constant}",
    ]
    rank_file, cases = "rank-00001.safetensors", [{"overrides": common, "signal_at": 13}]
    cases += [
        {"overrides": common, "damage": rank_file},
        {"overrides": [*common, "train.num_steps=24"], "damage": "manifest.json"},
        {"overrides": [f"run.dir={tmp_path}/still", *common[1:]]},
    ]
    assert run_cases(tiny_config, cases, 2, tmp_path / "ranks") == ["stopped", "done", "done", "done"]
    run = tmp_path / "run"
    events = [(line["step"], line["event"]) for line in metric_lines(run) if "event" in line]
    assert (12, "checkpoint_damaged") in events and (16, "checkpoint_damaged") in events
    assert losses(run)[:20] == losses(tmp_path / "still")  # the damaged 13 and 20 were not used, and nothing was lost
    assert {p.name for p in (run / "checkpoints").glob("*.damaged")} >= {
        "step-00000013.damaged",
        "step-00000020.damaged",
    }
    for manifest in (run / "checkpoints").glob("step-*/manifest.json"):
        manifest.write_text("{}")
    outcome = run_cases(tiny_config, [{"overrides": [*common, "train.num_steps=24"]}], 2, tmp_path / "again")
    assert "none of its 2 checkpoints is intact" in outcome[0]


def test_the_self_test_notices_another_optimizer_at_every_stage(tiny_config, tmp_path):
    cases = [
        {"overrides": [f"run.dir={tmp_path}/{name}-{stage}", f"optim={{name: {name}, lr: 1e-3}}",
                       f"parallel.zero_stage={stage}", "train.micro_batch_size=8"], "sabotage": True}
        for name in ("adamw", "rmsprop", "muon", "lion") for stage in STAGES
    ]  # fmt: skip
    outcomes = run_cases(tiny_config, cases, 2, tmp_path / "ranks")
    for case, outcome in zip(cases, outcomes, strict=True):
        assert outcome.startswith("TrainingError: self-test: after 3 steps of"), (case, outcome)
