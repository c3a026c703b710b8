"""Beginning with what another run has learned, or from scratch."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

from pretrain.checkpoints.checkpoint_files import CheckpointReader, folder_name, list_steps
from tests.helpers.rank_helpers import losses, metric_lines, newest, run_cases

pytestmark = pytest.mark.launches


@pytest.fixture(scope="module")
def runs(tiny_config, tmp_path_factory):
    """Run all cases of this module in one start of two ranks; return (outcomes by name, folder)."""
    folder = tmp_path_factory.mktemp("resume")
    base = folder / "base"
    at_10 = f"{base}/checkpoints/step-00000010"
    cases = {
        "base": ["checkpoint={every_steps: 5, keep_last: 9}"],
        "other optimizer": ["optim={name: sgd, lr: 0.01, momentum: 0.9}"],
        "branch": [f"resume={{from: {at_10}}}", "parallel.zero_stage=3"],
        "branch, again": [f"resume={{from: {at_10}}}", "parallel.zero_stage=3", "train.num_steps=22"],
        "newest": [f"resume={{from: {base}}}", "train.num_steps=21"],
        "weights": [f"resume={{from: {at_10}, optimizer: false, schedule: false, data: false}}"],
        "no data": [f"resume={{from: {at_10}, data: false}}"],
        "no schedule": [f"resume={{from: {at_10}, schedule: false}}"],
        "optimizer of another": [f"resume={{from: {folder}/other optimizer}}"],
        "weights of another": [f"resume={{from: {folder}/other optimizer, optimizer: false}}", "train.num_steps=21"],
        "another model": [f"resume={{from: {base}}}", "model.num_layers=1"],
        "another plan": [f"resume={{from: {base}}}", "run.seed=8"],
        "past its end": [f"resume={{from: {base}}}", "train.num_steps=15"],
        "itself": [f"resume={{from: {folder}/itself}}"],
        "nothing there": [f"resume={{from: {folder}}}"],
        "scratch": ["checkpoint.every_steps=5", "train.num_steps=10"],
        "scratch, again": ["checkpoint.every_steps=5", "train.num_steps=12", "resume.from_scratch=true"],
        "scratch, third time": ["checkpoint.every_steps=5", "train.num_steps=14", "resume.from_scratch=true"],
    }
    listed = [{"overrides": [f"run.dir={folder}/{name.split(',')[0]}", "train.micro_batch_size=8", *rest]}
              for name, rest in cases.items()]  # fmt: skip
    outcomes = run_cases(tiny_config, listed, 2, folder / "ranks")
    return dict(zip(cases, outcomes, strict=True)), folder


def first_step(run):
    return next(line for line in metric_lines(run) if "loss" in line)


def test_a_branch_goes_on_as_the_run_itself(runs):
    outcomes, folder = runs
    assert (outcomes["branch"], outcomes["branch, again"]) == ("done", "done")
    assert first_step(folder / "branch")["step"] == 11
    assert losses(folder / "branch")[:10] == pytest.approx(losses(folder / "base")[10:], abs=1e-5)  # another stage
    [event] = [line for line in metric_lines(folder / "branch") if line.get("event") == "resumed_from"]
    assert event["message"].endswith("base/checkpoints/step-00000010: weights, optimizer, schedule, data")
    # the second start goes on from the branch's own checkpoint of step 20, not from the other run's again
    assert [line["step"] for line in metric_lines(folder / "branch") if "loss" in line] == list(range(11, 23))
    assert newest(folder / "branch").training["progress"]["best_step"] is None
    assert list_steps(folder / "base" / "checkpoints") == [5, 10, 15, 20]


def test_a_run_folder_means_its_newest_checkpoint(runs):
    _, folder = runs
    assert [line["step"] for line in metric_lines(folder / "newest") if "loss" in line] == [21]


def test_weights_alone(runs):
    _, folder = runs
    run = folder / "weights"
    lines = [line for line in metric_lines(run) if "loss" in line]
    assert [line["step"] for line in lines] == list(range(1, 21)) and lines[0]["lr"] < lines[2]["lr"]
    assert losses(run)[0] < losses(folder / "base")[0] - 0.5  # the same rows, by weights that have learned
    assert newest(run).training["data"]["cursor"] == 20 * 16
    assert newest(run).training["optimizer_step"] == 20


def test_the_parts_can_be_had_apart(runs):
    _, folder = runs
    no_data, no_schedule = newest(folder / "no data").training, newest(folder / "no schedule").training
    assert (no_data["progress"]["step"], no_data["data"]["cursor"], no_data["optimizer_step"]) == (20, 10 * 16, 20)
    assert (no_schedule["progress"]["step"], no_schedule["data"]["cursor"]) == (20, 30 * 16)
    assert no_schedule["optimizer_step"] == 30
    base, first = losses(folder / "base"), first_step(folder / "no schedule")
    assert first["loss"] == pytest.approx(base[10], abs=1e-5) and first["step"] == 1  # the rows of step 11


def test_what_does_not_fit_says_what_to_do(runs):
    outcomes, folder = runs
    assert "has no 'exp_avg' of" in outcomes["optimizer of another"]
    assert outcomes["optimizer of another"].endswith("by resume.from and resume.optimizer=false.")
    assert outcomes["weights of another"] == "done"
    assert outcomes["another model"].startswith(
        f"ConfigError: resume.from is {folder}/base, whose model is another one; expected the same:\n"
        "  model.num_layers: 2 there, 1 here\n"
    )
    assert outcomes["another plan"].startswith("DataError: data: the order of rows differs from the checkpoint's")
    assert "the run folder itself" in outcomes["itself"]
    assert outcomes["nothing there"] == (
        f"ConfigError: resume.from is {folder}; expected a run folder with checkpoints, a folder with a manifest.json, "
        "or the URL of one. Name one, such as runs/other, runs/other/checkpoints/step-00001000 or "
        "s3://bucket/other/step-00001000."
    )


def test_from_scratch_is_done_once_and_loses_nothing(runs):
    outcomes, folder = runs
    run = folder / "scratch"
    assert [outcomes[f"scratch{rest}"] for rest in ("", ", again", ", third time")] == ["done"] * 3
    assert list_steps(run / "checkpoints.abandoned-1") == [5, 10]
    assert not (run / "checkpoints.abandoned-2").exists()
    assert list_steps(run / "checkpoints") == [10, 12, 14]
    assert [line["attempt"] for line in metric_lines(run) if "loss" in line] == [2] * 12 + [3] * 2
    assert losses(run)[:10] == pytest.approx(losses(folder / "base")[:10], rel=0.05)


def test_a_damaged_checkpoint_of_the_other_run_is_left_as_it_is(runs, tiny_config, tmp_path):
    _, folder = runs
    other = tmp_path / "other"
    shutil.copytree(folder / "base", other)
    path = next((other / "checkpoints" / folder_name(20)).glob("rank-*.safetensors"))
    content = bytearray(path.read_bytes())
    content[-5] ^= 4
    path.write_bytes(content)
    shutil.copytree(other, tmp_path / "wrong tokenizer")
    wrong = tmp_path / "wrong tokenizer" / "checkpoints" / folder_name(15) / "manifest.json"
    from pretrain.checkpoints.checkpoint_files import manifest_digest

    manifest = json.loads(wrong.read_text())
    manifest["about"]["tokenizer"] = "0" * 64
    del manifest["sha256"]
    wrong.write_text(json.dumps(manifest | {"sha256": manifest_digest(manifest)}))
    outcomes = run_cases(tiny_config, [
        {"overrides": [f"run.dir={tmp_path}/run", f"resume={{from: {other}}}", "train.num_steps=16"]},
        {"overrides": [f"run.dir={tmp_path}/run2", f"resume={{from: {wrong.parents[2]}}}"]},
    ], 1, tmp_path / "ranks")  # fmt: skip
    assert outcomes[0] == "done" and "whose tokenizer is another one" in outcomes[1]
    assert [line["step"] for line in metric_lines(tmp_path / "run") if "loss" in line] == [16]
    events = [line["event"] for line in metric_lines(tmp_path / "run") if "event" in line]
    assert events.index("checkpoint_damaged") < events.index("resumed_from")
    assert list_steps(other / "checkpoints") == [5, 10, 15, 20]
    one, two = CheckpointReader(other / "checkpoints" / folder_name(15)), newest(folder / "base")
    assert not torch.equal(one.read_whole("embedding.weight"), two.read_whole("embedding.weight"))


def test_a_run_that_would_do_nothing_is_refused(runs):
    text = runs[0]["past its end"]
    assert text.startswith("ConfigError: train.num_steps is 15; expected more than the 20 steps of resume.from"), text


def test_other_rows_name_the_way_on(runs):
    assert runs[0]["another plan"].endswith("Put back what changed, or train on other rows by resume.data=false.")


def test_what_from_scratch_did_is_recorded(runs):
    run = runs[1] / "scratch"
    events = {line["event"]: line["message"] for line in metric_lines(run) if "event" in line}
    assert events["from_scratch"].endswith("checkpoints.abandoned-1, and stay there")
    assert events["not_from_scratch"].startswith(
        "resume.from_scratch was done by an earlier start, and this one goes on."
    )
