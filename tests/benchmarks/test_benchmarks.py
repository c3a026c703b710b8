"""The benchmarks at tiny sizes on a CPU: that they run, what they write, and that what they compare is the same."""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from xml.etree import ElementTree

import numpy as np
import pytest
import torch

from benchmarks import (
    attention_cpu,
    data,
    data_peers,
    filters,
    norms,
    optimizers,
    plot,
    prepare,
    startup,
    step,
    table,
    tars,
    updates,
)
from benchmarks.baseline import Baseline
from benchmarks.record import Record
from kernels.attention import attention
from kernels.visibility import visibility
from pretrain.options.families import num_parameters
from tests.helpers.rank_helpers import run_command

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = [f"configs/{name}.yaml" for name in ("gpt2-124m", "llama-350m", "llama-1.3b", "qwen3-0.6b", "stablelm-1.6b")]
RECORD_KEYS = {"benchmark", "date", "commit", "device", "versions", "settings", "rows", "failures"}
STEP_KEYS = {
    "variant", "num_parameters", "seq_len", "micro_batch_size", "num_micro_steps", "num_timed_steps", "step_seconds",
    "step_seconds_range", "tokens_per_second", "mfu", "mfu_causal", "peak_flops", "peak_memory_bytes",
    "common_micro_batch_size", "common_memory_bytes", "loss",
}  # fmt: skip
NORM_KEYS = {
    "operation", "direction", "implementation", "num_rows", "width", "dtype", "microseconds", "gigabytes_per_second",
    "percent_of_copy", "relative_error",
}  # fmt: skip


def step_arguments(config: str, **changes) -> argparse.Namespace:
    base = {
        "config": str(ROOT / config),
        "shrink": True,
        "micro_batch": 2,
        "micro_steps": 2,
        "steps": 3,
        "seq_len": None,
    }
    return argparse.Namespace(**(base | changes))


@pytest.mark.parametrize("config", CONFIGS)
def test_the_baseline_computes_what_ours_computes(config: str) -> None:
    _, shape = step.open_config(str(ROOT / config), shrink=True, micro_batch=2, num_micro_steps=1)
    torch.manual_seed(1)
    ours = updates.make_ours(shape, torch.device("cpu"), torch.float32)
    baseline = Baseline(shape)
    missing, unexpected = baseline.load_state_dict(ours.state_dict(), strict=False)
    assert unexpected == [] and set(missing) <= {"output.weight"}  # tied
    assert sum(parameter.numel() for parameter in baseline.parameters()) == num_parameters(shape)
    rows = updates.draw_rows(shape, 2, torch.device("cpu"))
    one_document = torch.zeros_like(rows.doc_start_BT)
    expected = ours(rows.tokens_BT, rows.targets_BT, one_document)[0] / rows.targets_BT.numel()
    expected.backward()
    actual = baseline(rows.tokens_BT, rows.targets_BT)
    actual.backward()
    torch.testing.assert_close(actual, expected)
    grads = {name: parameter.grad for name, parameter in ours.named_parameters()}
    for name, parameter in baseline.named_parameters():
        torch.testing.assert_close(parameter.grad, grads[name], msg=name)


def test_the_baseline_refuses_what_it_does_not_compute() -> None:
    _, shape = step.open_config(str(ROOT / "configs/starcoder2-3b.yaml"), shrink=True, micro_batch=1, num_micro_steps=1)
    with pytest.raises(ValueError, match="model.sliding_window is 20; expected null for the baseline. Remove it."):
        Baseline(shape)
    full = dataclasses.replace(shape, sliding_window=None)
    assert sum(p.numel() for p in Baseline(full).parameters()) == num_parameters(full)


def test_rows_are_packed_documents() -> None:
    _, shape = step.open_config(str(ROOT / CONFIGS[0]), shrink=True, micro_batch=2, num_micro_steps=1)
    rows = updates.draw_rows(shape, 8, torch.device("cpu"))
    slot_T = torch.arange(shape.seq_len)
    assert torch.equal(rows.tokens_BT[:, 1:], rows.targets_BT[:, :-1])
    assert (rows.doc_start_BT <= slot_T).all() and (rows.doc_start_BT.diff() >= 0).all()
    assert 8 < len(torch.unique(rows.doc_start_BT)) < 64
    begins = rows.doc_start_BT.gather(1, rows.doc_start_BT.long())
    assert torch.equal(begins, rows.doc_start_BT)  # a document begins where it says


# torch.compile looks at the gradient of a block's input, and torch warns itself
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("variant", ["baseline-eager", "baseline-compiled"])
def test_a_variant_is_measured(variant: str) -> None:
    row = step.measure(step_arguments(CONFIGS[1]), variant)
    assert set(row) == STEP_KEYS
    assert row["tokens_per_second"] == pytest.approx(2 * 2 * 64 / row["step_seconds"])
    assert 0 < row["mfu_causal"] < row["mfu"]
    assert row["num_timed_steps"] == 3 and 5.5 < row["loss"] < 7.0  # ln(512) is 6.24


@pytest.mark.launches
def test_a_step_by_deepspeed_is_the_step_by_torch(tmp_path: Path) -> None:
    out = tmp_path / "step.json"
    command = [sys.executable, "benchmarks/step.py", CONFIGS[0], "--shrink", "--steps", "3", "--micro-steps", "2"]
    command += ["--variants", "ours-deepspeed,ours-compiled,ours-torch", "--out", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    content = json.loads(out.read_text(encoding="utf-8"))
    assert set(content) == RECORD_KEYS and content["failures"] == []
    by_engine, compiled, by_torch = content["rows"]
    assert set(by_engine) == STEP_KEYS
    assert by_engine["loss"] == pytest.approx(by_torch["loss"], rel=1e-3)  # after six updates
    assert compiled["loss"] == pytest.approx(by_torch["loss"], rel=1e-3)
    assert "ours-deepspeed" in done.stdout and "SHRUNK" in done.stdout


def test_a_variant_that_fails_does_not_stop_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    row = dict.fromkeys(STEP_KEYS, 1.0) | {"variant": "ours-torch"}

    def measure_apart(arguments: argparse.Namespace, variant: str, seconds: float) -> dict:
        assert 0 < seconds <= 100
        if variant == "baseline-eager":
            raise RuntimeError("took longer than 3 s")
        return row

    monkeypatch.setattr(step, "measure_apart", measure_apart)
    out = tmp_path / "results/step.json"
    arguments = [CONFIGS[0], "--variants", "baseline-eager,ours-torch", "--seconds", "100", "--out", str(out)]
    assert step.main(arguments) == 0
    content = json.loads(out.read_text(encoding="utf-8"))
    assert content["rows"] == [row]
    assert content["failures"] == [{"part": "baseline-eager", "error": "took longer than 3 s"}]
    assert "no number: baseline-eager: took longer than 3 s" in capsys.readouterr().out


def test_the_error_of_a_variant_is_recorded(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"ConfigError: .*absent.yaml"):
        step.measure_apart(step_arguments("configs/absent.yaml"), "baseline-eager", 60)


@pytest.mark.parametrize(("capacity", "fits"), [(100, 1), (480, 8), (1e9, 64)])
def test_the_largest_micro_batch_is_predicted(monkeypatch: pytest.MonkeyPatch, capacity: float, fits: int) -> None:
    tried = []

    def peak(update: object, shape: object, size: int) -> int:
        tried.append(size)
        return 50 + 40 * size

    monkeypatch.setattr(step, "_peak_of_one", peak)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=capacity))
    update = updates.Update(lambda batches: 0.0, torch.device("cpu"))
    assert step.largest_micro_batch(update, None, 64) == max(fits, 2)  # the first two are what predicts
    assert tried[-1] == max(fits, 2)


def test_norms_are_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "norms.json"
    assert norms.main(["--shrink", "--widths", "256", "--out", str(out)]) == 0
    content = json.loads(out.read_text(encoding="utf-8"))
    assert set(content) == RECORD_KEYS | {"copy_gigabytes_per_second"}
    assert [failure["part"] for failure in content["failures"]] == ["liger"]
    rows = content["rows"]
    assert all(set(row) == NORM_KEYS for row in rows)
    measured = {(row["operation"], row["direction"], row["implementation"]) for row in rows}
    names = ("ours", "eager", "compiled")
    assert measured == {(o, d, n) for o in norms.OPERATIONS for d in ("forward", "backward") for n in names}
    assert all(row["relative_error"] < 1e-2 and row["microseconds"] > 0 for row in rows)
    assert "add_rmsnorm D=256 backward" in capsys.readouterr().out


def test_norms_go_on_when_one_fails(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def broken(*_: torch.Tensor) -> tuple[torch.Tensor, ...]:
        raise ValueError("no such kernel\nand more")

    monkeypatch.setitem(norms.OURS, "rmsnorm", broken)
    assert norms.main(["--shrink", "--widths", "64"]) == 0
    shown = capsys.readouterr().out
    assert "no number: rmsnorm ours D=64: ValueError: no such kernel\n" in shown
    assert norms.main(["--shrink", "--widths", "64", "--seconds", "0"]) == 1
    assert "no number: layernorm eager D=64: left out: no time left" in capsys.readouterr().out


@pytest.mark.slow
def test_the_data_side_is_measured_beside_other_readers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "data.json"
    num_threads = torch.get_num_threads()
    try:
        sizes = [
            "--tokens",
            "300000",
            "--seq-lens",
            "64,512",
            "--seconds",
            "0.1",
            "--row-tokens",
            "512",
            "--rounds",
            "1",
        ]
        assert data.main([*sizes, "--plan-shards", "100", "--out", str(out)]) == 0
    finally:
        torch.set_num_threads(num_threads)
    record = json.loads(out.read_text(encoding="utf-8"))
    rows = record["rows"]
    assert [(row["part"], row["seq_len"]) for row in rows if row["part"] in ("packing", "reading")] == [
        ("packing", 64), ("reading", 64), ("packing", 512), ("reading", 512),
    ]  # fmt: skip
    # Far below what a quiet core does (70 million at T=2048), and far above what a slip in the loop would leave.
    assert all(row["tokens_per_second"] > 200_000 for row in rows if "tokens_per_second" in row)
    assert all(0.99 < row["fill"] <= 1.0 for row in rows if row["part"] == "packing")
    readers = [row["reader"] for row in rows if row["part"] == "whole rows"]
    assert readers == ["ours", "nanoGPT's get_batch", "one open memmap", "wds.WebDataset"]
    assert [failure["part"] for failure in record["failures"]] == ["whole rows, MosaicML streaming"]
    assert [row["first_row"] for row in rows if row["part"] == "plan"] == [0, 100 * data.PLAN_ROWS_PER_SHARD // 2]
    assert [row["part"] for row in rows].count("memory") == 1
    assert "reading T=512" in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # webdataset leaves its file open
@pytest.mark.parametrize("name", ["nanoGPT's get_batch", "one open memmap", "wds.WebDataset"])
def test_other_readers_give_the_rows_that_were_written(name: str, tmp_path: Path) -> None:
    documents = np.random.default_rng(0).integers(0, 60_000, (30, 17)).astype(np.uint16)
    data_peers.WRITERS[name](tmp_path, documents)
    batches = data_peers.READERS[name](tmp_path, 16, 4)
    for tokens, targets in itertools.islice(batches, 5):
        assert tokens.shape == targets.shape == (4, 16) and tokens.dtype == targets.dtype == torch.int64
        assert torch.equal(tokens[:, 1:], targets[:, :-1])
        if name == "wds.WebDataset":
            rows = {document.tobytes() for document in documents[:, :-1].astype(np.int64)}
            assert {row.numpy().tobytes() for row in tokens} <= rows


@pytest.mark.launches
def test_the_loop_is_compared_with_a_bare_one_that_computes_the_same(tiny_config: Path, tmp_path: Path) -> None:
    out = tmp_path / "overhead.json"
    arguments = [tiny_config, "--steps", "6", "--warmup", "2", "train.micro_batch_size=8", "--out", out]
    done = run_command("benchmarks/overhead.py", *arguments)
    assert done.returncode == 0, done.stderr
    rows = json.loads(out.read_text(encoding="utf-8"))["rows"]
    assert [row["case"] for row in rows] == ["ZeRO 0, fp32", "ZeRO 1, fp32"]
    for row in rows:
        assert row["largest_loss_difference"] < 1e-4 and row["num_steps"] == 6
        assert row["ours_seconds"] > 0 and row["bare_seconds"] > 0 and row["ratio"] > 0.5
        assert row["trainer_seconds"] > 0 and row["trainer_ratio"] > 0
        assert row["plain_seconds"] > 0 and row["plain_cpu_ratio"] > 0
        assert row["last_losses"]["plain"] == pytest.approx(row["last_losses"]["trainer"], rel=1e-4)
        assert row["last_losses"]["trainer"] == pytest.approx(row["last_losses"]["bare"], rel=0.05)
    assert "training loop beside others" in done.stdout


@pytest.mark.launches
def test_a_start_is_measured_by_part(tiny_config: Path, tmp_path: Path) -> None:
    out = tmp_path / "startup.json"
    arguments = ("train.micro_batch_size=8", "--ranks", "2", "--runs", "1", "--out", out)
    done = run_command("benchmarks/startup.py", tiny_config, *arguments, timeout=300)
    assert done.returncode == 0, done.stderr
    rows = json.loads(out.read_text(encoding="utf-8"))["rows"]
    parts = [row["part"] for row in rows]
    assert parts == [
        "python", "config", "imports", "deepspeed", "process group", "run folder", "pre-flight",
            "tokenizer", "data", "self-test",
        "model", "engine", "checkpoint", "metrics", "first step", "to the end of the first step",
        "last checkpoint and exit", "in all",
    ]  # fmt: skip
    assert all(0 <= row["seconds"] < 100 for row in rows) and rows[2]["seconds"] > 0.5
    of_rank_0, of_all = rows[-3]["cpu_seconds"], rows[-1]["cpu_seconds"]
    assert 0.5 < of_rank_0 == pytest.approx(sum(row["cpu_seconds"] for row in rows[:-3])) and of_all > 1.5 * of_rank_0
    with pytest.raises(RuntimeError, match="rank 0 ended with 2: error: .*model.dmi is unknown"):
        startup.start_once(str(tiny_config), ["model.dmi=3"], tmp_path / "run")


@pytest.mark.launches
def test_memory_is_measured_by_kind_and_drawn(tiny_config: Path, tmp_path: Path) -> None:
    out, picture = tmp_path / "memory.json", tmp_path / "memory.svg"
    arguments = ("--ranks", "2", "--stages", "1,3", "--precisions", "fp32", "--out", out)
    done = run_command("benchmarks/memory.py", tiny_config, *arguments, timeout=300)
    assert done.returncode == 0, done.stderr
    rows = json.loads(out.read_text(encoding="utf-8"))["rows"]
    assert [(row["stage"], row["ranks"]) for row in rows] == [(1, 2), (3, 2)]
    for row in rows:
        assert row["memory"]["backward"]["moments"] == pytest.approx(row["theory"]["moments"], rel=0.02)
        assert row["traffic"]["step"] and min(row["peaks"].values()) > sum(row["theory"].values())
    assert "ZeRO 3, fp32" in done.stdout and "sent in a step" in done.stdout
    assert plot.main([str(out), str(picture)]) == 0
    elements = [element.tag.rpartition("}")[2] for element in ElementTree.parse(picture).iter()]
    num_bars, num_kinds = 2, len(plot.COLOURS)
    assert elements.count("rect") == 1 + num_bars * num_kinds + num_kinds  # ground, bars, legend


def test_the_table_shows_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = Record("step", tmp_path / "a.json", {"config": "configs/llama-350m.yaml"})
    row = dict.fromkeys(STEP_KEYS, 1.0) | {
        "variant": "ours-torch", "num_micro_steps": 1, "micro_batch_size": 16, "seq_len": 2048, "step_seconds": 0.25,
        "tokens_per_second": 131072.0, "mfu": 0.456, "mfu_causal": None, "peak_memory_bytes": 3 * 2**30,
        "num_parameters": 345e6,
    }  # fmt: skip
    first.add(**row)
    second = Record("norms", tmp_path / "b.json", {"rows": 64})
    second.content["date"] = first.content["date"]
    second.fail("rmsnorm", "OutOfMemoryError: CUDA out of memory")
    assert table.main([str(tmp_path / "a.json"), str(tmp_path / "b.json")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert f"torch {torch.__version__}" in lines[0] and lines[1] == (
        "training step: llama-350m, 345 million parameters"
    )
    assert lines[3].split() == ["ours-torch", "1x16x2048", "250.0", "131072", "-", "45.6%", "-", "3.0", "0.0"]
    assert lines[-1] == "  no number: rmsnorm: OutOfMemoryError: CUDA out of memory"
    assert sum("torch" in line and "python" in line for line in lines) == 1  # one machine, named once


def test_a_recorded_error_that_is_nan_is_shown(tmp_path: Path) -> None:
    record = Record("norms", None, {"rows": 64})
    for error in (1e-3, float("nan"), 2e-3):
        record.add(**(dict.fromkeys(NORM_KEYS, 1) | {"operation": "a", "implementation": "b", "relative_error": error}))
    assert "largest relative error nan" in table.render([record.content])


def test_the_script_goes_on_when_everything_fails(tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\necho "called: $*"\nexit 3\n', encoding="utf-8")
    python.chmod(0o755)
    environment = os.environ | {"PYTHON": str(python), "OUT": str(tmp_path / "out"), "WHEELS": str(tmp_path)}
    command = ["bash", str(ROOT / "benchmarks/gpu.sh")]
    on_cpu = ["prepare of the quickstart", "attention on a CPU", "operators on a CPU", "generation", "convert", "data"]
    of_gpu = ["attention", "norms", "operators", "step gpt2-124m", "step llama-350m", "step llama-1.3b"]
    for asked, parts in (("", on_cpu), ("attention norms operators step tune", of_gpu)):
        variables = environment | {"PARTS": asked}
        done = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=60)
        assert done.returncode == 1 and done.stderr == ""
        assert re.findall("^(.+): FAILED with status 3 after", done.stdout, re.MULTILINE) == parts
        assert "deepspeed is not installed, nor in" in done.stdout and "no GPU: what is measured there" in done.stdout
        assert ("tune: left out: needs a GPU" in done.stdout) == bool(asked)
        log = (tmp_path / "out/log.txt").read_text(encoding="utf-8")
        assert ("called: benchmarks/norms.py --out" in log) == bool(asked)
        assert ("called: benchmarks/operators_cpu.py --out" in log) == (not asked)


def test_no_part_takes_longer_than_what_is_left(tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\ncase "$*" in *_cpu.py*) sleep 60;; esac\n', encoding="utf-8")
    python.chmod(0o755)
    environment = os.environ | {"PYTHON": str(python), "OUT": str(tmp_path / "out"), "SECONDS_IN_ALL": "7"}
    # has no GPU: `torch.cuda.is_available()` is asked by a program that ends with status 1
    python.write_text(python.read_text() + 'case "$*" in *torch.cuda*) exit 1;; esac\n', encoding="utf-8")
    command = ["bash", str(ROOT / "benchmarks/gpu.sh")]
    variables = environment | {"PARTS": "cpu"}
    done = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert re.search("attention on a CPU: stopped after [5-7] s", done.stdout), done.stdout
    assert "generation: left out: no time left" in done.stdout and "convert: left out: no time left" in done.stdout


@pytest.mark.launches
def test_prepare_is_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "prepare.json"
    arguments = ["--megabytes", "1", "--vocab-size", "1000", "--processes", "1", "2", "--scale", "0.5", "2"]
    assert prepare.main([*arguments, "--out", str(out)]) == 0
    content = json.loads(out.read_text(encoding="utf-8"))
    assert set(content) == RECORD_KEYS
    assert [(row["part"], row["num_processes"]) for row in content["rows"]] == [
        ("processes", 1), ("processes", 2), ("scale", 2), ("scale", 2),
    ]  # fmt: skip
    assert len({row["sha256"] for row in content["rows"]}) == 3
    assert [row["num_bytes"] // 500_000 for row in content["rows"][2:]] == [1, 4]
    for row in content["rows"]:
        assert row["num_bytes"] > 5e5 and row["peak_bytes"] >= row["peak_main_bytes"] > 1e7
        assert min(value for key, value in row.items() if key.endswith("_second") or key.endswith("seconds")) > 0
    shown = capsys.readouterr().out
    assert "all bytes are equal" in shown and "prepare: 1 MB of text; sentencepiece and our tokenizer alone" in shown
    assert "MB of text  processes  seconds" in shown


@pytest.mark.launches
def test_filters_are_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "filters.json"
    arguments = ["--megabytes", "0.5", "--vocab-size", "600", "--filters", "secrets", "--out", str(out)]
    assert filters.main(arguments) == 0
    content = json.loads(out.read_text(encoding="utf-8"))
    assert set(content) == RECORD_KEYS
    assert [row["filter"] for row in content["rows"]] == ["none", "secrets", "--verify"]
    assert content["rows"][0]["ratio"] == 1.0 and content["rows"][1]["kept_bytes"] > 0.99
    shown = capsys.readouterr().out
    assert "--verify reads" in shown and "prepare of 0.5 MB by 1 processes" in shown


def test_tars_are_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "tars.json"
    arguments = ["--megabytes", "0.3", "--vocab-size", "500", "--seq-len", "256", "--repeats", "1", "--out", str(out)]
    assert tars.main(arguments) == 0
    content = json.loads(out.read_text(encoding="utf-8"))
    assert set(content) == RECORD_KEYS
    assert [(row["documents"], row["kind"]) for row in content["rows"]] == [
        ("files", "txt"), ("files", "json"), ("long", "txt"),
    ]  # fmt: skip
    for row in content["rows"]:
        assert row["ratio"] == row["rows_tokens_per_second"] / row["bare_tokens_per_second"] > 0
        assert row["num_documents"] > 0 and 0 < row["index_bytes"] < row["text_bytes"]
    assert "million tokens a CPU second, T=256" in capsys.readouterr().out


def test_bytes_that_differ_fail_the_benchmark(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    row = {"seconds": 1.0, "cpu_seconds": 1.0, "peak_bytes": 1, "peak_main_bytes": 1}
    monkeypatch.setattr(
        prepare, "run_prepare", lambda folder, number: row | {"num_processes": number, "sha256": str(number)}
    )
    assert prepare.main(["--megabytes", "0.3", "--vocab-size", "400", "--processes", "1", "2"]) == 1
    assert "THE BYTES DIFFER" in capsys.readouterr().out


def test_optimizers_are_timed(capsys: pytest.CaptureFixture[str]) -> None:
    model = ["model.dim=32", "model.num_layers=1", "model.num_heads=2", "model.num_kv_heads=2"]
    assert optimizers.main([str(ROOT / "configs/quickstart.yaml"), *model, "--repeats", "2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[1:]] == list(optimizers.NAMES)
    assert all(float(line.split()[1]) > 0 and line.endswith(" ms") for line in lines[1:])


def test_attention_on_a_cpu_is_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "attention-cpu.json"
    arguments = ["--heads", "2", "--kv-heads", "1", "--seq-lens", "40", "520", "--seconds", "0", "--out", str(out)]
    assert attention_cpu.main([*arguments, "--dtypes", "float32"]) == 0
    content = json.loads(out.read_text(encoding="utf-8"))
    assert set(content) == RECORD_KEYS
    cases = {(row["case"], row["seq_len"]) for row in content["rows"]}
    assert cases == {(case, n) for case in attention_cpu.CASES for n in (40, 520)} - {("window 512", 40)}
    for row in content["rows"]:
        assert 0 < row["best_sdpa_seconds"] <= row["masked_seconds"] and row["ours_seconds"] > 0
        assert row["ratio"] > 0 and row["cpu_ratio"] > 0 and row["num_rounds"] == 2 and row["num_pieces"] >= 1
    assert "attention on a CPU: 2 query heads, 1 key heads of 64" in capsys.readouterr().out


def test_calls_a_document_are_what_ours_is_measured_against() -> None:
    lengths = [10, 1, 29, 25, 15]
    starts_BT = torch.tensor([attention_cpu.starts_of(lengths[:3]), attention_cpu.starts_of(lengths[3:])])
    tensors = [torch.randn(2, 40, heads, 8) for heads in (4, 2, 2)]
    ours = attention(*tensors, visibility(starts_BT, 40, torch.float32))
    torch.testing.assert_close(attention_cpu.by_document(lengths)(*tensors), ours)


@pytest.mark.slow
@pytest.mark.launches
def test_checkpoints_are_measured_beside_their_peers(tmp_path):
    arguments = [
        "configs/gpt2-124m.yaml",
        "--shrink",
        "--rounds",
        "1",
        "--ranks",
        "2",
        "--out",
        str(tmp_path / "c.json"),
    ]
    done = run_command("benchmarks/checkpoint.py", *arguments, "--folder", tmp_path)
    assert done.returncode == 0, done.stderr
    content = json.loads((tmp_path / "c.json").read_text())
    rows = {row["what"]: row for row in content["rows"]}
    names = [f"{name} {what}" for name in ("longhaul", "deepspeed", "torch dcp", "disk") for what in ("save", "load")]
    assert set(rows) == {*names, "longhaul blocked", "longhaul asynchronous", "memory of loading"}
    assert content["settings"]["bytes"] % 12 == 0
    assert 0 < rows["longhaul blocked"]["seconds"] < rows["longhaul asynchronous"]["seconds"]
    assert rows["memory of loading"]["share_bytes"] >= content["settings"]["bytes"] // 2
    assert "of the disk" in done.stdout and "holds up the step" in done.stdout
    assert not [path for path in tmp_path.iterdir() if path.is_dir()]  # nothing is left behind
