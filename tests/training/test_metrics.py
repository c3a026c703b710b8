"""metrics.jsonl and TensorBoard: one value a step, whatever was interrupted."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest

from pretrain.options.run_options import LogSection
from pretrain.training.metrics import MetricLog, StepMetrics, drop_lines_after

REQUIRED = {
    "step", "tokens", "loss", "grad_norm", "lr", "tokens_per_second", "tokens_per_second_per_gpu", "step_seconds", "mfu",
    "mfu_causal", "memory_bytes", "data_wait_seconds", "skipped_steps", "clipped_steps", "damaged_documents",
    "damaged_tokens", "timestamp", "attempt",
}  # fmt: skip


def make_log(folder, first_step=0, attempt=1, tensorboard=True, hyper_parameters=None):
    folder.mkdir(exist_ok=True)
    return MetricLog(
        folder, LogSection(every_steps=2, tensorboard=tensorboard), num_steps=10, tokens_per_step=1000, world_size=2,
        flops_per_token={32: (60.0, 50.0)}, peak_flops=1e6, first_step=first_step, attempt=attempt,
        hyper_parameters=hyper_parameters,
    )  # fmt: skip


def step_metrics(step, loss=2.0):
    return StepMetrics(step=step, tokens=1000 * step, loss=loss, objective=None, grad_norm=1.5, lr=1e-3, step_seconds=0.5,
                       memory_bytes=123, skipped_steps=0, clipped_steps=0, damaged_documents=2, damaged_tokens=90, seq_len=32, corpus_tokens={"code": 64}, epochs={"code": 0.25},
                       phase_seconds={"data": 0.01, "forward": 0.2, "backward": 0.3})  # fmt: skip


def read(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_training_line_has_the_promised_keys_and_figures(tmp_path, capsys):
    log = make_log(tmp_path, tensorboard=False)
    log.step(step_metrics(1))
    log.step(step_metrics(2))
    log.close()
    line = read(tmp_path)[0]
    assert set(line) >= REQUIRED
    assert (line["tokens_per_second"], line["tokens_per_second_per_gpu"]) == (2000.0, 1000.0)
    assert (line["mfu"], line["mfu_causal"]) == (pytest.approx(0.06), pytest.approx(0.05))
    assert (line["epoch/code"], line["tokens/code"]) == (0.25, 64)
    assert (line["seconds/forward"], line["seconds/backward"]) == (0.2, 0.3)
    shown = capsys.readouterr().err
    assert shown.count("\n") == 1 and shown.startswith("step 2/10  loss 2.0000  2k tokens/s  MFU 6.0%")


def test_a_utilisation_that_cannot_be_is_left_out_and_said_once(tmp_path, capsys):
    log = make_log(tmp_path, tensorboard=False)
    for step, seconds in ((1, 0.01), (2, 0.01), (3, 0.5), (4, 0.5)):
        log.step(replace(step_metrics(step), step_seconds=seconds))
    log.close()
    doubt, second, fourth = capsys.readouterr().err.splitlines()
    assert doubt.startswith("step 1  MFU is left out where above 100%: the peak of a rank, 1e+06 FLOP/s, is too low")
    assert "tokens/s  lr " in second and "MFU 6.0%" in fourth
    assert read(tmp_path)[0]["mfu"] == pytest.approx(3.0)


def test_a_loss_that_is_not_a_number_is_null(tmp_path):
    log = make_log(tmp_path, tensorboard=False)
    log.step(step_metrics(1, loss=math.nan))
    log.close()
    assert read(tmp_path)[0]["loss"] is None


def test_lines_past_the_checkpoint_and_torn_ones_go(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"ste')
    drop_lines_after(path, 2)
    assert read(tmp_path) == [{"step": 1}, {"step": 2}]
    path.write_text('{"step": 1}\n{"step": 2}')
    drop_lines_after(path, 2)
    assert read(tmp_path) == [{"step": 1}]


def test_tensorboard_shows_one_value_a_step_after_a_restart(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = make_log(tmp_path)
    for step in (1, 2, 3):
        log.step(step_metrics(step, loss=9.0))
    log.close()
    log = make_log(tmp_path, first_step=1, attempt=2)
    for step in (2, 3, 4):
        log.step(step_metrics(step, loss=5.0))
    log.evaluation(4, 4000, 2.0, 7.4, 1.1)
    log.event(4, "note", "hello")
    log.close()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(e.step, e.value) for e in events.Scalars("train/loss")] == [(1, 9.0), (2, 5.0), (3, 5.0), (4, 5.0)]
    assert {"eval/loss", "eval/perplexity", "eval/bits_per_byte", "train/lr", "data/epoch/code"} <= set(
        events.Tags()["scalars"]
    )
    assert [line["step"] for line in read(tmp_path)] == [1, 2, 3, 4, 4, 4]


def test_curves_are_grouped_and_named_alike_everywhere(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = make_log(tmp_path)
    log.step(replace(step_metrics(1), objective=2.5, layer_norms={"layer/0/grad_norm": 0.5}))
    log.evaluation(1, 1000, 2.0, 7.4, 1.1, {"code": {"loss": 1.5}})
    log.tasks(1, 1000, {"copa/acc": 0.5}, "")
    log.event(1, "note", "hello")
    log.close()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    found = {tag: [(one.step, one.value) for one in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    expected = {
        "train/loss": 2.0, "train/objective": 2.5, "train/grad_norm": 1.5, "train/lr": 1e-3, "train/tokens": 1000.0,
        "train/skipped_steps": 0.0, "train/clipped_steps": 0.0, "perf/tokens_per_second": 2000.0,
        "perf/tokens_per_second_per_gpu": 1000.0, "perf/mfu": 0.06, "perf/mfu_causal": 0.05, "perf/memory_bytes": 123.0,
        "perf/step_seconds": 0.5, "perf/data_wait_seconds": 0.01, "perf/seconds/data": 0.01, "perf/seconds/forward": 0.2,
        "perf/seconds/backward": 0.3, "data/epoch/code": 0.25, "data/tokens/code": 64.0, "data/damaged_documents": 2.0,
        "data/damaged_tokens": 90.0, "layer/0/grad_norm": 0.5, "eval/loss": 2.0, "eval/perplexity": 7.4,
        "eval/bits_per_byte": 1.1, "eval/code/loss": 1.5, "eval/task/copa/acc": 0.5,
    }  # fmt: skip
    assert found == {tag: [(1, pytest.approx(value, rel=1e-6))] for tag, value in expected.items()}
    assert events.Tags()["tensors"] == ["event/note/text_summary"]
