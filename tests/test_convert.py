"""The convert command: complete and verified, or nothing."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from launch.convert import main
from pretrain import convert as convert_module
from pretrain import hf_export, hf_tokenizer
from pretrain.convert import comparison_rows, convert
from pretrain.errors import CheckpointError, ConfigError, DataError, ExportError
from pretrain.settings import resolved_yaml
from tests.test_hf_export import config_of, make_run, swap_names, tokenizer  # noqa: F401

ROOT = Path(__file__).resolve().parents[1]


class NoData:
    """Held-out rows of a run whose corpora are gone."""

    def __init__(self, *args: object) -> None:
        raise DataError("no manifest")


@pytest.fixture
def a_run(tokenizer, monkeypatch):  # noqa: F811
    """Let every run folder hold a small llama model, without its data."""
    asked = []

    def load(run, step=None):
        asked.append((run, step))
        return make_run("llama", tokenizer)

    monkeypatch.setattr(convert_module, "load_run", load)
    monkeypatch.setattr(convert_module, "ValRows", NoData)
    monkeypatch.setattr(hf_export, "NUM_TEXTS", 200)
    return asked


def test_the_command_writes_a_verified_export(a_run, tmp_path, capsys):
    out = tmp_path / "exports" / "small"
    assert main(["runs/a", str(out), "--to", "hf", "--step", "30", "--json"]) == 0
    assert a_run == [("runs/a", 30)]
    report = json.loads(capsys.readouterr().out)
    assert report == json.loads((out / "verification.json").read_text())
    assert report["dtype"] == "bf16", "the run's precision"
    assert report["logits"]["rows"] == {"held-out": 0, "random": 6}
    assert {path.name for path in out.iterdir()} == {
        "config.json", "generation_config.json", "model.safetensors", "README.md", "tokenizer.json", "tokenizer.model",
        "tokenizer_config.json", "verification.json",
    }  # fmt: skip
    assert [path.name for path in out.parent.iterdir()] == ["small"], "no temporary folder is left"


def test_the_summary_says_what_was_compared(a_run, tmp_path, capsys):
    assert main(["runs/a", str(tmp_path / "out"), "--to", "hf", "--dtype", "fp32"]) == 0
    assert "LlamaForCausalLM of step 30 in fp32. In transformers, logits of 264 tokens" in capsys.readouterr().out


def test_an_export_that_computes_something_else_leaves_nothing(a_run, tmp_path, capsys, monkeypatch):
    swap_names(monkeypatch, "llama", "model.layers.{i}.mlp.gate_proj.weight", "model.layers.{i}.mlp.up_proj.weight")
    assert main(["runs/a", str(tmp_path / "out"), "--to", "hf"]) == 1
    captured = capsys.readouterr()
    assert captured.out == "" and "error: export: random row 0, position 0: the logit of token" in captured.err
    assert list(tmp_path.iterdir()) == []


def test_an_export_with_another_tokenizer_leaves_nothing(a_run, tmp_path, monkeypatch):
    right = hf_tokenizer._merges
    monkeypatch.setattr(hf_tokenizer, "_merges", lambda normal: right(normal)[::-1])
    with pytest.raises(ExportError, match="tokenizer: ids of"):
        convert("runs/a", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_an_interrupt_leaves_nothing(a_run, tmp_path, monkeypatch):
    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(hf_export, "verify_model", interrupt)
    with pytest.raises(KeyboardInterrupt):
        convert("runs/a", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_an_error_that_leaves_nothing(a_run, tmp_path, monkeypatch):
    def fill(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(hf_export, "write_tensors", fill)
    with pytest.raises(
        ExportError, match=r"out: cannot be written \(.*No space left on device\); expected a folder on"
    ):
        convert("runs/a", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_taken_name_is_refused_before_anything_is_read(a_run, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("keep")
    assert main(["runs/a", str(tmp_path / "out"), "--to", "hf"]) == 2
    assert "out: exists already; expected no such folder, or an empty one. Delete it or name" in capsys.readouterr().err
    assert a_run == [] and (tmp_path / "out" / "mine.txt").read_text() == "keep"
    (tmp_path / "file").write_text("keep")
    with pytest.raises(ConfigError, match="file: exists already"):
        convert("runs/a", tmp_path / "file")


def test_an_empty_folder_is_filled(a_run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out").mkdir()
    convert("runs/a", "out")
    assert (tmp_path / "out" / "model.safetensors").exists()


def test_a_custom_model_is_refused_before_its_checkpoint_is_read(a_run, tmp_path, capsys):
    run = tmp_path / "run"
    run.mkdir()
    config = config_of("llama")
    custom = config.model.model_copy(update={"family": "custom", "attention_softcap": 30.0})
    (run / "config.yaml").write_text(resolved_yaml(config.model_copy(update={"model": custom})))
    assert main([str(run), str(tmp_path / "out"), "--to", "hf"]) == 1
    assert capsys.readouterr().err == (
        f"error: {run}: model.family is custom; expected one that is exported. The nearest is llama. It differs in: "
        "model.attention_softcap is 30 (llama: null). Train without that under model.family llama.\n"
    )
    assert a_run == []
    custom = config.model.model_copy(update={"family": "custom"})
    (run / "config.yaml").write_text(resolved_yaml(config.model_copy(update={"model": custom})))
    with pytest.raises(ExportError, match=r"every option: go on with model.family=llama and 'run.allow_changes=\[mod"):
        convert(run, tmp_path / "out")


def test_an_unknown_format_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="--to is 'onnx'; expected one of hf"):
        convert("runs/a", tmp_path / "out", to="onnx")


@pytest.mark.parametrize(("error", "status"), [(ConfigError("no such run"), 2), (CheckpointError("damaged"), 1)])
def test_errors_of_the_run_end_the_command(error, status, tmp_path, capsys, monkeypatch):
    def fail(run, step):
        raise error

    monkeypatch.setattr(convert_module, "load_run", fail)
    assert main(["runs/a", str(tmp_path / "out"), "--to", "hf"]) == status
    assert capsys.readouterr().err == f"error: {error}\n"


def test_held_out_rows_are_compared_where_the_data_is(tokenizer, monkeypatch):  # noqa: F811
    class Rows:
        closed = 0

        def __init__(self, config, fingerprint, max_rows):
            assert fingerprint == tokenizer.fingerprint
            self.num_rows = min(max_rows, 3)

        def batch(self, numbers):
            assert list(numbers) == [0, 1, 2]
            return type("Batch", (), {"tokens_BT": torch.arange(3 * 64).view(3, 64)})

        def close(self):
            Rows.closed += 1

    monkeypatch.setattr(convert_module, "ValRows", Rows)
    rows = comparison_rows(make_run("llama", tokenizer))
    assert [row.tolist() for row in rows["held-out"]] == torch.arange(3 * 64).view(3, 64).tolist()
    assert [len(row) for row in rows["random"]] == [64, 7, 1] and Rows.closed == 1
    assert max(int(row.max()) for row in rows["random"]) < tokenizer.vocab_size


@pytest.mark.parametrize("form", ["file", "symlink", "module"])
def test_help_works_from_anywhere(form, tmp_path):
    (tmp_path / "link.py").symlink_to(ROOT / "launch" / "convert.py")
    command = {
        "file": [str(ROOT / "launch" / "convert.py")],
        "symlink": ["link.py"],
        "module": ["-m", "launch.convert"],
    }
    cwd = ROOT if form == "module" else tmp_path
    done = subprocess.run(
        [sys.executable, *command[form], "--help"], cwd=cwd, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0 and "python launch/convert.py runs/quickstart" in done.stdout, done.stderr
    done = subprocess.run(
        [sys.executable, *command[form], "no-such-run", str(tmp_path / "out"), "--to", "hf"],
        cwd=cwd, capture_output=True, text=True, timeout=60, env=os.environ | {"PYTHONPATH": ""},
    )  # fmt: skip
    assert done.returncode == 2 and done.stderr.startswith("error: no-such-run: holds no checkpoint"), done.stderr


@pytest.mark.launches
def test_a_trained_run_is_exported_and_compared_on_its_held_out_rows(tiny_config, tmp_path, capsys):
    command = ["launch/pretrain.py", str(tiny_config), "train.num_steps=4", f"run.dir={tmp_path / 'run'}"]
    done = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert main([str(tmp_path / "run"), str(tmp_path / "out"), "--to", "hf", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["source"]["run"] == "run" and report["source"]["step"] == 4 and report["dtype"] == "fp32"
    assert report["logits"]["rows"] == {"held-out": 4, "random": 2} and report["tokenizer"]["mismatches"] == 0


def test_other_formats_are_not_offered(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["runs/a", "out", "--to", "gguf"])
    assert stop.value.code == 2 and "invalid choice: 'gguf'" in capsys.readouterr().err
