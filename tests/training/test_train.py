"""What a run does beyond stepping: early stopping, the best checkpoint, retention, a disk that is full, damaged text."""

from __future__ import annotations

import gzip
import json
import re
import shutil
from statistics import median

import pytest
import torch

from pretrain.checkpoints.checkpoint_files import CheckpointReader, folder_name, list_steps
from pretrain.options.settings import load_config
from tests.helpers.data_helpers import damage_last_needed
from tests.helpers.rank_helpers import losses, metric_lines, newest, run_cases

pytestmark = pytest.mark.launches


@pytest.fixture(scope="module")
def runs(tiny_config, tmp_path_factory):
    """Run all cases of this module in one start of one rank; return (outcomes by name, folder)."""
    folder = tmp_path_factory.mktemp("train")
    code = folder / "damaged-code"
    shutil.copytree(tiny_config.parent / "shards" / "code", code)
    held_out = folder / "damaged-held-out"
    shutil.copytree(tiny_config.parent / "shards" / "code", held_out)
    content = bytearray((held_out / "val-000000.tar").read_bytes())
    content[600] ^= 16
    (held_out / "val-000000.tar").write_bytes(content)
    damaged = f"data.sources=[{{name: code, shards: {code}, weight: 3}}, {{name: prose, shards: {tiny_config.parent}/shards/prose}}]"
    whole = damaged.replace(str(code), f"{tiny_config.parent}/shards/code")
    damage_last_needed(load_config(tiny_config, [whole]), "code", code)
    cases = {
        "plain": [],
        "deterministic": ["train.deterministic=true"],
        "recomputed": ["train.activation_checkpointing=full"],
        "recomputed-selectively": ["train.activation_checkpointing=selective"],
        "early": ["optim.lr=0.3", "optim.clip_norm=0", "schedule={name: constant}", "train.num_steps=60",
                  "eval={every_steps: 3, patience: 2, max_rows: 8}"],
        "best": ["eval={every_steps: 4, max_rows: 8}", "checkpoint={every_steps: 5, keep_last: 2}"],
        "best-fails": ["eval={every_steps: 4, max_rows: 8}", "checkpoint={every_steps: 3, keep_last: 2}"],
        "not-best": ["eval={every_steps: 4, max_rows: 8}", "checkpoint={every_steps: 5, keep_last: 2, keep_best: false, keep_every: 10}"],
        "damaged": [damaged, "data.prefetch_steps=1", "data.max_damaged_fraction=0.1"],
        "too-damaged": [damaged, "data.prefetch_steps=1", "data.max_damaged_fraction=0"],
        "held-out-damaged": [damaged.replace(str(code), str(held_out)), "eval={every_steps: 10}"],
        "undamaged": [damaged.replace(str(code), f"{tiny_config.parent}/shards/code")],
        "wsd": ["schedule={name: wsd, warmup_steps: 2, decay_steps: 5, final_lr_ratio: 0}"],
        "gpt2": ["model={family: gpt2, dim: 32, num_layers: 2, num_heads: 4, dropout: 0.1}"],
        "z-loss": ["train.z_loss=0.01"],
        "smoothed": ["train.label_smoothing=0.2", "train.z_loss=0.01", "eval={every_steps: 20, max_rows: 8}"],
        "profiled": ["train.profile_steps=[3, 20]"],
        "out-of-memory": ["checkpoint.every_steps=2"],
        "unreadable": ["checkpoint.every_steps=4"],
        "reads": ["train.precision=bf16"],
        "reads-recomputed": ["train.precision=bf16", "model.attention_dropout=0.1", "model.dropout=0.1",
                             "train.activation_checkpointing=full", "train.z_loss=0.01"],
        "saved-beside": ["checkpoint={every_steps: 5, keep_last: 9}"],
        "saved-at-once": ["checkpoint={every_steps: 5, keep_last: 9, asynchronous: false}"],
        "tensors": ["log.tensorboard=true", "eval={every_steps: 10, max_rows: 4}"],
    }  # fmt: skip
    extra = {"out-of-memory": {"out_of_memory": 4}, "unreadable": {"unreadable": 7}, "best-fails": {"signal_at": 10, "fail_save": [8]},
             "saved-beside": {"slow_save": 0.3}, "reads": {"count_reads": 5}, "reads-recomputed": {"count_reads": 5}}  # fmt: skip
    listed = [
        {"overrides": [f"run.dir={folder}/{name}", *overrides]} | extra.get(name, {})
        for name, overrides in cases.items()
    ]
    outcomes = run_cases(tiny_config, listed, 1, folder / "ranks")
    return dict(zip(cases, outcomes, strict=True)), folder


def evaluations(run):
    return {line["step"]: line["eval/loss"] for line in metric_lines(run) if "eval/loss" in line}


def test_recomputing_activations_or_determinism_change_nothing_on_a_cpu(runs):
    assert losses(runs[1] / "deterministic") == losses(runs[1] / "plain")
    assert losses(runs[1] / "recomputed") == losses(runs[1] / "plain")
    assert losses(runs[1] / "recomputed-selectively") == losses(runs[1] / "plain")


def test_early_stopping_keeps_the_best(runs):
    outcomes, folder = runs
    run = folder / "early"
    status = json.loads((run / "status.json").read_text())
    assert outcomes["early"] == "done" and status["status"] == "done" and status["exit_status"] == 0
    assert status["reason"].startswith(
        f"stopped early at step {status['step']}: the held-out loss has not fallen below"
    )
    judged = evaluations(run)
    best = min(judged, key=judged.get)
    assert status["step"] == best + 6 < 60  # two evaluations later
    assert set(list_steps(run / "checkpoints")) >= {best, status["step"]}
    again = CheckpointReader(run / "checkpoints" / f"step-{status['step']:08d}").training["progress"]
    assert (again["best_step"], again["evals_without_improvement"]) == (best, 2)


def test_retention_keeps_the_newest_and_the_best(runs):
    _, folder = runs
    judged = evaluations(folder / "best")
    assert sorted(judged) == [4, 8, 12, 16, 20]
    best = min(judged, key=judged.get)
    saved = {5, 10, 15, 20} | {step for step in judged if judged[step] == min(judged[s] for s in judged if s <= step)}
    assert list_steps(folder / "best" / "checkpoints") == sorted({best, *sorted(saved)[-2:]})
    assert list_steps(folder / "not-best" / "checkpoints") == [10, 15, 20]  # the last two, and multiples of keep_every


def test_a_best_checkpoint_that_cannot_be_saved_does_not_cost_the_one_before(runs):
    outcomes, folder = runs
    judged = evaluations(folder / "best-fails")
    assert outcomes["best-fails"] == "stopped" and judged[8] < judged[4]
    assert list_steps(folder / "best-fails" / "checkpoints") == [4, 9, 10]


def test_a_damaged_document_is_masked_counted_and_shifts_nothing(runs):
    _, folder = runs
    ours, whole = losses(folder / "damaged"), losses(folder / "undamaged")
    events = [line["step"] for line in metric_lines(folder / "damaged") if line.get("event") == "damaged_documents"]
    assert events and ours[: events[0] - 1] == whole[: events[0] - 1] and ours[events[0] - 1] != whole[events[0] - 1]
    assert re.search(r"damaged-code/train-\d+\.tar document \d+ in row", (folder / "damaged" / "log.txt").read_text())
    assert len(ours) == 20
    lines = [line for line in metric_lines(folder / "damaged") if "loss" in line]
    assert [line["damaged_documents"] for line in lines] == [0] * (events[0] - 1) + [1] * (21 - events[0])
    assert lines[-1]["damaged_tokens"] > 2 and lines[0]["damaged_tokens"] == 0


def test_the_documents_of_the_step_that_ends_a_run_are_recorded_and_in_its_checkpoint(runs):
    outcomes, folder = runs
    assert outcomes["too-damaged"].startswith("TooMuchDamageError")
    run, lines = folder / "too-damaged", metric_lines(folder / "damaged")
    first = next(line["step"] for line in lines if line.get("damaged_documents"))
    (named,) = [line for line in metric_lines(run) if line.get("event") == "damaged_documents"]
    assert named["step"] == first - 1 and len(named["documents"]) == 1
    log = (run / "log.txt").read_text()
    assert log.count(f"WARNING {named['documents'][0]}") == 1, log
    assert list_steps(run / "checkpoints") == [first - 1]
    ((shard, documents),) = newest(run).training["data"]["damaged"]["code"].items()
    assert len(documents) == 1 and f"{shard}.tar document {documents[0][0]} " in named["documents"][0]


def test_rows_that_cannot_be_read_end_a_run_after_saving(runs):
    outcomes, folder = runs
    assert outcomes["unreadable"] == "DataError: shards: cannot be read"
    assert list_steps(folder / "unreadable" / "checkpoints") == [4, 6]


def test_too_much_damage_of_held_out_documents_ends_the_run_after_saving(runs):
    outcomes, folder = runs
    assert outcomes["held-out-damaged"].startswith("TooMuchDamageError: data.sources[code]: ")
    assert (
        "of its held-out tokens cannot be read; expected at most data.max_damaged_fraction (0.01). The worst are "
        in (outcomes["held-out-damaged"])
    )
    assert list_steps(folder / "held-out-damaged" / "checkpoints") == [10]
    (event,) = (
        line for line in metric_lines(folder / "held-out-damaged") if line.get("event") == "damaged_held_out_documents"
    )
    assert event["step"] == 10 and "val-000000.tar document 0 in row" in event["documents"][0]


def test_the_rate_of_every_step_is_the_schedules(runs):
    rates = [line["lr"] for line in metric_lines(runs[1] / "wsd") if "loss" in line]
    assert rates[:2] == pytest.approx([1.5e-3, 3e-3]) and rates[2:15] == pytest.approx([3e-3] * 13)
    assert rates[15:] == pytest.approx([2.4e-3, 1.8e-3, 1.2e-3, 0.6e-3, 0.0], abs=1e-9)


def test_gpt2_learns_with_dropout(runs):
    assert losses(runs[1] / "gpt2")[-1] < losses(runs[1] / "gpt2")[0] - 0.3


def test_z_loss_and_smoothing_are_minimised_and_the_reported_loss_is_without_them(runs, tiny_config):
    from tests.helpers.plain_torch import train_plainly

    plain = [line for line in metric_lines(runs[1] / "plain") if "loss" in line]
    assert all("objective" not in line for line in plain)
    for name, overrides in (("z-loss", []), ("smoothed", ["train.label_smoothing=0.2"])):
        lines = [line for line in metric_lines(runs[1] / name) if "loss" in line]
        expected, _ = train_plainly(tiny_config, ["train.z_loss=0.01", *overrides])
        assert [line["loss"] for line in lines] == pytest.approx(expected, rel=1e-5)
        assert lines[0]["loss"] == plain[0]["loss"]  # the same weights, before any update
        assert lines[-1]["loss"] != pytest.approx(plain[-1]["loss"], rel=1e-5)
        assert all(line["objective"] > line["loss"] for line in lines)
    # At the start logits are near 0, so lse is near ln(512): z-loss adds 0.01 ln(512)^2 = 0.389 nats.
    first = next(line for line in metric_lines(runs[1] / "z-loss") if "loss" in line)
    assert first["objective"] - first["loss"] == pytest.approx(0.389, abs=0.02)
    held_out = evaluations(runs[1] / "smoothed")[20]
    assert abs(held_out - lines[-1]["loss"]) < 0.5  # cross-entropy, not the smoothed objective
    assert held_out < lines[-1]["objective"] - 0.3


def test_steps_are_traced_as_asked(runs):
    outcomes, folder = runs
    assert losses(folder / "profiled") == losses(folder / "plain")
    paths = sorted((folder / "profiled/profile").iterdir())
    assert [path.name for path in paths] == [f"step-{n:08d}.rank-0.pt.trace.json.gz" for n in (3, 20)]
    with gzip.open(paths[0], "rt") as file:
        names = {event.get("name") for event in json.load(file)["traceEvents"]}
    assert {"aten::mm", "aten::embedding"} <= names
    events = [line for line in metric_lines(folder / "profiled") if line.get("event") == "profile"]
    assert [event["message"] for event in events] == [str(path) for path in paths]


def test_phases_add_up_to_the_step(runs):
    lines = [line for line in metric_lines(runs[1] / "plain") if "loss" in line]
    phases = ("data", "forward", "backward", "optimizer", "communication", "others")
    for line in lines:
        seconds = [line[f"seconds/{phase}"] for phase in phases]
        assert min(seconds) >= 0
        assert sum(seconds) == pytest.approx(line["step_seconds"], abs=2e-3)
    backward, optimizer = (median(line[f"seconds/{phase}"] for line in lines) for phase in ("backward", "optimizer"))
    assert backward > optimizer / 2  # steps of some milliseconds: a phase that is not timed would have none


@pytest.mark.parametrize("name", ["reads", "reads-recomputed"])
def test_the_host_waits_for_the_device_in_deepspeeds_step_only(runs, name):
    """It looks at the gradients there, which must be finite before the weights move."""
    callers = json.loads((runs[1] / name / "reads.json").read_text())
    on_cpus = ("kernels/pieces.py", "kernels/visibility.py")  # attention's paths that a GPU does not take
    callers = [caller for caller in callers if not any(path in caller for path in on_cpus)]
    assert callers, "the check of the gradients was not seen: nothing was measured"
    assert [caller for caller in callers if not caller.startswith(("deepspeed/runtime/", "runtime/zero/"))] == []
    assert len(callers) <= 2


def test_checkpoints_written_beside_training_are_those_of_a_run_that_waits(runs):
    """The slow copy would hold later weights, and the slow file later moments, if the update did not wait for it."""
    beside, at_once = (runs[1] / name / "checkpoints" for name in ("saved-beside", "saved-at-once"))
    assert list_steps(beside) == list_steps(at_once) == [5, 10, 15, 20]
    for step in list_steps(beside):
        one, other = (CheckpointReader(folder / folder_name(step)) for folder in (beside, at_once))
        assert one.training == other.training and one.states == other.states
        for name, states in one.states.items():
            assert all(torch.equal(one.read_whole(name, state), other.read_whole(name, state)) for state in states)
        assert sorted(path.name for path in one.folder.iterdir()) == ["manifest.json", "rank-00000.safetensors"]
    assert losses(runs[1] / "saved-beside") == losses(runs[1] / "saved-at-once") == losses(runs[1] / "plain")
    times = {line["step"]: line["timestamp"] for line in metric_lines(runs[1] / "saved-beside") if "loss" in line}
    assert times[7] < (beside / folder_name(5) / "manifest.json").stat().st_mtime < times[11]  # one after the other
    steps = {line["step"]: line["step_seconds"] for line in metric_lines(runs[1] / "saved-beside") if "loss" in line}
    assert steps[6] > 0.25 > max(steps[7], steps[8])  # the update waits for the copy, and for nothing else


def test_a_run_that_is_out_of_memory_says_what_to_change(runs):
    outcomes, folder = runs
    assert outcomes["out-of-memory"].startswith("TrainingError: step 4: rank 0 ran out of memory (")
    assert (
        "Halve train.micro_batch_size (train.global_batch_size stays, and so does the loss)"
        in outcomes["out-of-memory"]
    )
    assert list_steps(folder / "out-of-memory/checkpoints") == [2]
    assert json.loads((folder / "out-of-memory/status.json").read_text())["status"] == "failed"


def test_tensorboard_has_the_metrics(runs):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(runs[1] / "tensors" / "tensorboard")).Reload()
    values = [event.value for event in events.Scalars("train/loss")]
    assert values == pytest.approx(losses(runs[1] / "tensors"), rel=1e-6)
    assert [event.step for event in events.Scalars("eval/bits_per_byte")] == [10, 20]


def test_every_line_has_the_promised_keys(runs):
    line = next(line for line in metric_lines(runs[1] / "plain") if "loss" in line)
    assert set(line) >= {
        "step", "tokens", "loss", "grad_norm", "lr", "tokens_per_second", "tokens_per_second_per_gpu", "step_seconds",
        "mfu", "mfu_causal", "memory_bytes", "data_wait_seconds", "skipped_steps", "timestamp", "attempt",
        "epoch/code", "epoch/prose",
    }  # fmt: skip


def test_a_full_disk_loses_no_run(tiny_config, tmp_path):
    """Saves fail on a file system without space; the run goes on, and what was saved before stays."""
    from tests.helpers.small_disk import small_disk

    with small_disk(tmp_path / "disk", 900) as disk:
        cases = [
            {"overrides": [f"run.dir={disk}/run", "checkpoint={every_steps: 2, keep_last: 10}", "log.every_steps=50"]}
        ]
        outcome = run_cases(tiny_config, cases, 2, tmp_path / "ranks", overrides=["train.micro_batch_size=8"])[0]
        run = disk / "run"
        assert outcome.startswith("CheckpointError:") and "could not be written: " in outcome
        failed = [line["step"] for line in metric_lines(run) if line.get("event") == "save_failed"]
        saved = list_steps(run / "checkpoints")
        assert saved and failed and saved[-1] < failed[0]
        assert len(losses(run)) == 20  # it went on to the end
        for step in saved:
            CheckpointReader(run / "checkpoints" / f"step-{step:08d}").verify()
        assert not list((run / "checkpoints").glob(".tmp-*"))
