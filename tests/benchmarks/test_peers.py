"""Steps beside transformers' Trainer: that it does the same work as ours, and what is said where it cannot run."""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import importlib.util
import json
import os
import subprocess
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

import pytest
import torch

from benchmarks import generation, overhead, step, table, updates
from benchmarks.peers import TrainerLoop, copy_weights, make_model, use_liger
from benchmarks.record import Record
from pretrain.options.config import Config
from pretrain.options.families import ModelShape, num_parameters
from tests.benchmarks.test_benchmarks import ROOT, STEP_KEYS, step_arguments

CPU = torch.device("cpu")
LR = 1e-3


def open_fp32(name: str) -> tuple[Config, ModelShape]:
    config, shape = step.open_config(str(ROOT / f"configs/{name}.yaml"), shrink=True, micro_batch=2, num_micro_steps=2)
    return config.model_copy(update={"train": config.train.model_copy(update={"precision": "fp32"})}), shape


def rows_of_one_document(shape: ModelShape, num_batches: int) -> list[updates.Rows]:
    rows = [updates.draw_rows(shape, 2, CPU, seed) for seed in range(num_batches)]
    return [dataclasses.replace(batch, doc_start_BT=torch.zeros_like(batch.doc_start_BT)) for batch in rows]


@pytest.mark.parametrize(("name", "tolerance"), [("llama-350m", 1e-5), ("gpt2-124m", 1e-4), ("qwen3-0.6b", 1e-5)])
def test_the_trainer_does_the_steps_that_ours_does(name: str, tolerance: float) -> None:
    config, shape = open_fp32(name)
    ours = updates.make_ours(shape, CPU, torch.float32)
    theirs = make_model(shape, CPU)
    assert sum(parameter.numel() for parameter in theirs.parameters()) == num_parameters(shape)
    copy_weights(ours, theirs, shape)
    loop, bare = TrainerLoop(theirs, config), updates.by_torch(ours, config, CPU)
    batches = rows_of_one_document(shape, 2)
    losses = []
    for count in (2, 2, 1, 2):  # another number of micro-batches starts the Trainer's loop anew
        num_targets = sum(rows.targets_BT.numel() for rows in batches[:count])
        losses.append(loop.step(batches[:count], LR))
        # not the same to the last digit with gpt2: the Trainer decays learned positions
        assert losses[-1] == pytest.approx(bare(batches[:count], LR, num_targets, 0), abs=tolerance)
    loop.close()
    assert 6.0 < losses[0] < 6.5 and losses[-1] < losses[0] - 0.2  # ln(512) is 6.24


def test_what_the_trainer_raises_arrives_and_the_next_step_goes_on() -> None:
    config, shape = open_fp32("llama-350m")
    loop = TrainerLoop(make_model(shape, CPU), config)
    batches = rows_of_one_document(shape, 1)
    first = loop.step(batches, LR)
    broken = [dataclasses.replace(batches[0], tokens_BT=batches[0].tokens_BT + shape.padded_vocab_size)]
    with pytest.raises(IndexError):
        loop.step(broken, LR)
    assert loop.step(batches, LR) < first
    loop.close()


def test_the_transformers_variant_is_measured() -> None:
    row = step.measure(step_arguments("configs/llama-350m.yaml"), "transformers")
    assert set(row) == STEP_KEYS
    assert row["num_timed_steps"] == 3 and 5.5 < row["loss"] < 7.0


def test_models_that_transformers_does_not_have(monkeypatch: pytest.MonkeyPatch) -> None:
    config, shape = open_fp32("llama-350m")
    with pytest.raises(ValueError, match="LlamaForCausalLM has 139584 parameters; expected 1, as ours has"):
        monkeypatch.setattr("benchmarks.peers.num_parameters", lambda shape: 1)
        make_model(shape, CPU)
    muon = config.model_copy(update={"optim": config.optim.model_copy(update={"name": "muon"})})
    with pytest.raises(ValueError, match="optim.name is muon, train.precision fp32; expected adamw and bf16 or fp32"):
        TrainerLoop(torch.nn.Linear(1, 1), muon)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ValueError, match="2 GPUs are visible, and the Trainer would use all. Set CUDA_VISIBLE_DEVICES"):
        TrainerLoop(torch.nn.Linear(1, 1), config)


def test_liger_is_used_where_it_can_be(monkeypatch: pytest.MonkeyPatch) -> None:
    (_, llama), (_, gpt2) = open_fp32("llama-350m"), open_fp32("gpt2-124m")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="Liger's operators are Triton kernels and need a GPU"):
        use_liger(llama)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "liger_kernel" else find_spec(name))
    with pytest.raises(ImportError, match="liger_kernel is not installed. Install it: pip install liger-kernel"):
        use_liger(llama)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: ModuleSpec(name, None))
    applied = []
    package, operators = ModuleType("liger_kernel"), ModuleType("liger_kernel.transformers")
    operators.apply_liger_kernel_to_llama = lambda: applied.append("llama")
    package.transformers = operators
    monkeypatch.setitem(sys.modules, "liger_kernel", package)
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers", operators)
    use_liger(llama)
    assert applied == ["llama"]
    with pytest.raises(ValueError, match="Liger has no operators for gpt2"):
        use_liger(gpt2)


def test_without_accelerate_the_reason_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.delitem(sys.modules, "benchmarks.peers")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "accelerate" else find_spec(name))
    with pytest.raises(ImportError, match="Trainer needs accelerate. Install it: pip install 'accelerate>=1.1,<2'$"):
        importlib.import_module("benchmarks.peers")


def test_a_row_outlives_its_memory_measurement(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(command: list[str], timeout: float, stdout: object) -> None:
        assert command[command.index("--seq-len") + 1] == "128"
        arguments = argparse.Namespace(
            config="a", variants=["ours-torch"], row=Path(command[command.index("--row") + 1])
        )

        def measure(_: argparse.Namespace, variant: str, keep) -> dict:
            keep({"variant": variant})
            raise subprocess.TimeoutExpired(command, timeout)  # as if killed here, but for the report

        monkeypatch.setattr(step, "measure", measure)
        monkeypatch.setattr(step, "first_line", lambda error: sys.exit(1))
        try:
            step._measure_as_child(arguments)
        except SystemExit:
            raise subprocess.TimeoutExpired(command, timeout) from None

    monkeypatch.setattr(subprocess, "run", run)
    assert step.measure_apart(step_arguments("a", seq_len=128), "ours-torch", 5) == {"variant": "ours-torch"}


def test_memory_at_the_common_size(monkeypatch: pytest.MonkeyPatch) -> None:
    update = updates.Update(lambda batches: 0.0, CPU)
    monkeypatch.setattr(step, "_peak_of_one", lambda update, shape, size: 100 * size)
    assert step.memory_at(update, None, 8) == 800

    def fail(update: object, shape: object, size: int) -> int:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(step, "_peak_of_one", fail)
    assert step.memory_at(update, None, 8) is None


def step_row(variant: str, tokens_per_second: float, gigabytes: float, mfu: float) -> dict:
    return dict.fromkeys(STEP_KEYS, 1.0) | {
        "variant": variant, "num_micro_steps": 1, "micro_batch_size": 16, "seq_len": 2048, "mfu": mfu,
        "tokens_per_second": tokens_per_second, "common_micro_batch_size": 8, "common_memory_bytes": gigabytes * 2**30,
        "peak_memory_bytes": 64 * 2**30,
    }  # fmt: skip


def test_the_table_says_which_targets_of_a_step_are_met() -> None:
    record = Record("step", None, {"config": "configs/llama-350m.yaml"})
    record.content["device"]["name"] = "NVIDIA H100 80GB HBM3"
    record.add(**step_row("ours-deepspeed", 1000.0, 20, 0.53))
    record.add(**step_row("transformers", 500.0, 40, 0.26))
    record.add(**step_row("transformers-liger", 800.0, 15, 0.42))
    lines = table.render([record.content]).splitlines()
    assert lines[2].split()[-3:] == ["GiB", "of", "8"]
    assert lines[4].split() == ["transformers", "1x16x2048", "1000.0", "500", "0.50", "26.0%", "100.0%", "64.0", "40.0"]
    assert lines[6:] == [
        "  target met: MFU of at least 52% (53.0%)",
        "  target met: faster than each of 2 peers (1.25 times transformers-liger)",
        "  target MISSED: the lowest peak memory at 8 rows (1.33 of transformers-liger's)",
    ]
    record.content["rows"][0] |= {"mfu": 0.5, "seq_len": 2048}
    assert "  target MISSED: MFU of at least 52% (50.0%)" in table.render([record.content])
    record.content["device"]["name"] = "another"
    assert "target" not in table.render([record.content])


def test_the_loops_are_summarised() -> None:
    times = {"ours": [(1.0, 2.0), (1.1, 2.0)], "bare": [(1.0, 1.0), (1.0, 1.0)], "trainer": [(2.0, 4.0), (2.2, 4.0)]}
    losses = {"ours": [3.0, 2.0], "bare": [3.0, 2.5, 9.0], "trainer": [3.1, 2.1]}  # ours may be a step behind
    row = overhead.summary(times, losses)
    assert row["ratio"] == pytest.approx(1.05) and row["cpu_ratio"] == 2.0
    assert row["trainer_ratio"] == row["trainer_cpu_ratio"] == 0.5 and row["trainer_seconds"] == 2.1
    assert row["largest_loss_difference"] == 0.5 and row["last_losses"] == {"ours": 2.0, "bare": 9.0, "trainer": 2.1}
    record = Record("overhead", None, {})
    record.content["device"]["kind"] = "cuda"
    record.add(case="ZeRO 1, fp32", **row)
    del times["trainer"]
    record.add(case="alone", **overhead.summary(times, losses | {"trainer": []}))
    lines = table.render([record.content]).splitlines()
    assert lines[-3:] == [
        "  target MISSED: ZeRO 1, fp32: at least 0.97 of bare torch's tokens/s (0.952)",
        "  target met: ZeRO 1, fp32: faster than the Trainer (2.00 times)",
        "  target MISSED: alone: at least 0.97 of bare torch's tokens/s (0.952)",
    ]
    for key in [key for key in record.content["rows"][0] if key.startswith(("trainer", "plain"))]:
        del record.content["rows"][0][key]  # as in older files
    assert "0.952" in table.render([record.content])
    record.content["device"]["kind"] = "cpu"  # where the worse of time and processor time counts
    assert "bare torch's tokens/s (0.500)" in table.render([record.content])


def test_wheels_of_the_peers_are_installed_where_they_are_missing(tmp_path: Path) -> None:
    python = tmp_path / "python"
    # everything is installed but accelerate; there is no GPU, and what is measured fails
    python.write_text(
        '#!/bin/sh\necho "called: $*"\ncase "$*" in *find_spec*accelerate*) exit 1;; *find_spec*) exit 0;; esac\nexit 3\n',
        encoding="utf-8",
    )
    python.chmod(0o755)
    environment = os.environ | {"PYTHON": str(python), "OUT": str(tmp_path / "out"), "WHEELS": str(tmp_path)}
    environment |= {"PARTS": "peers", "CONFIGS": "llama-350m"}
    for provided in (False, True):
        if provided:
            (tmp_path / "accelerate-1.15.0-py3-none-any.whl").touch()
        command = ["bash", str(ROOT / "benchmarks/gpu.sh")]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
        assert done.returncode == 1 and done.stderr == ""
        log = (tmp_path / "out/log.txt").read_text(encoding="utf-8")
        assert ("called: -m pip install" in log) == provided
        variants = "ours-deepspeed,baseline-compiled,transformers,transformers-liger"
        assert f"--variants {variants} --seconds" in log and "norms" not in log


def test_generation_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(generation, "SHAPES", {"tiny": (32, 2, 4, 2, 128)})
    monkeypatch.setattr(generation, "CASES", ((3, 9),))
    out = tmp_path / "generation.json"
    assert generation.main(["--models", "tiny", "--new-tokens", "5", "--repeats", "1", "--out", str(out)]) == 0
    [row] = json.loads(out.read_text(encoding="utf-8"))["rows"]
    assert (row["num_rows"], row["num_prompt"]) == (3, 9) and row["ours_tokens_per_second"] > 0
    assert "generation on a CPU: 5 new tokens a row" in capsys.readouterr().out
    with pytest.raises(ValueError, match="other: its tokens are not ours"):
        generation.measure({"ours": lambda: [[1]], "other": lambda: [[2]]}, 1)
