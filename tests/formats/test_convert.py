"""The convert command: complete and verified, or nothing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from launch.convert import main
from pretrain.checkpoints.checkpoint_files import manifest_digest
from pretrain.errors import CheckpointError, ConfigError, DataError, ExportError
from pretrain.formats import convert as convert_module
from pretrain.formats import hf_export, hf_files, torch_export
from pretrain.formats.convert import ConvertOptions, comparison_rows, convert, parse_size
from pretrain.options.settings import resolved_yaml
from pretrain.tokenizers import hf_tokenizer
from pretrain.tokenizers.sentencepiece_tokenizer import choose_sample, fit
from tests.formats.export_helpers import write_run
from tests.formats.test_hf_export import config_of, make_model, make_run, swap_names, tokenizer  # noqa: F401
from tests.helpers.data_helpers import file_size_limit
from tests.helpers.small_disk import small_disk

ROOT = Path(__file__).resolve().parents[2]


class NoData:
    """Held-out rows of a run whose corpora are gone."""

    def __init__(self, *args: object) -> None:
        raise DataError("no manifest")


@pytest.fixture
def a_run(tokenizer, monkeypatch):  # noqa: F811
    """Let every run folder hold a small llama model, without its data."""
    asked = []

    @contextmanager
    def open_run(run, step=None):
        asked.append((run, step))
        yield make_run("llama", tokenizer)

    monkeypatch.setattr(convert_module, "open_run", open_run)
    monkeypatch.setattr(convert_module, "ValRows", NoData)
    monkeypatch.setattr(hf_export, "NUM_TEXTS", 200)
    return asked


@pytest.fixture
def written_run(tokenizer, tmp_path, monkeypatch):  # noqa: F811
    """A run folder with a real checkpoint of three ranks."""
    monkeypatch.setattr(hf_export, "NUM_TEXTS", 200)
    return write_run(tmp_path / "run", config_of("llama"), tokenizer, make_model("llama"))


def test_the_command_writes_a_verified_export(a_run, tmp_path, capsys):
    out = tmp_path / "exports" / "small"
    assert main(["runs/a", str(out), "--to", "hf", "--step", "30", "--json"]) == 0
    assert a_run == [("runs/a", 30)]
    report = json.loads(capsys.readouterr().out)
    assert report == json.loads((out / "verification.json").read_text())
    assert report["dtype"] == "bf16", "the run's precision"
    assert report["logits"]["rows"] == {"held-out": 0, "random": 6}
    assert {path.name for path in out.iterdir()} == {
        "chat_template.jinja", "config.json", "generation_config.json", "model.safetensors", "README.md", "tokenizer.json",
        "tokenizer.model",
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


def test_an_interrupt_is_gone_on_from_by_the_same_command(written_run, tmp_path, monkeypatch, capsys):
    def interrupt(*args):
        raise KeyboardInterrupt

    command = [str(written_run), str(tmp_path / "out"), "--to", "hf", "--max-shard-size", "20kB"]
    with monkeypatch.context() as patched:
        patched.setattr(hf_export, "compute_reference", interrupt)
        assert main(command) == 75
    assert "stopped; the same command goes on with what is written" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == [".out.partial", "run"]
    times = {path.name: path.stat().st_mtime_ns for path in (tmp_path / ".out.partial").glob("*.safetensors")}
    assert main(command) == 0
    assert capsys.readouterr().err.count("of an earlier start are whole and kept") == len(times) > 2
    assert times == {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*.safetensors")}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "run"]


@pytest.mark.parametrize("to", ["hf", "gguf"])
def test_a_full_disk_is_an_error_and_the_same_command_goes_on(written_run, to, tmp_path, capsys):
    command = [str(written_run), str(tmp_path / "out"), "--to", to, "--verify", "tensors"]
    with file_size_limit(60_000):  # bytes, of the 90,000 of each format
        assert main(command) == 1
    message = capsys.readouterr().err
    assert (
        "out: cannot be written ([Errno 27] File too large); expected a folder on a disk with room. Free sp" in message
    )
    assert "run the same again, which goes on with" in message and not (tmp_path / "out").exists()
    assert main(command) == 0
    assert ": 5" in (said := capsys.readouterr().err) and "of an earlier start are whole and kept" in said
    assert (
        convert(written_run, tmp_path / "again", options=ConvertOptions(to, verify="tensors"))["files"]
        == json.loads((tmp_path / "out/verification.json").read_text())["files"]
    )


def test_a_disk_that_is_full_at_the_tokenizer_is_no_other_error(written_run, tmp_path, capsys):
    with small_disk(tmp_path / "disk", 112) as disk:  # the weights take 89, the tokenizer's files 40
        assert main([str(written_run), str(disk / "out"), "--to", "hf", "--verify", "tensors"]) == 1
        message = capsys.readouterr().err
        assert "No space left on device); expected a folder on a disk with room. Free space and run the same" in message
        assert [path.name for path in disk.iterdir()] == [".out.partial"]
        assert (disk / ".out.partial/model.safetensors").exists()


def test_a_state_dict_goes_on_too(written_run, tmp_path, monkeypatch, capsys):
    right, options = torch_export.cast_weight, ConvertOptions("torch")

    def stop(name, *rest):
        if name == "final_norm.weight":
            raise KeyboardInterrupt
        return right(name, *rest)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(torch_export, "cast_weight", stop)
        convert(written_run, tmp_path / "out", options=options)
    report = convert(written_run, tmp_path / "out", options=options)
    assert "model.pt: " in (said := capsys.readouterr().err) and "are whole and kept" in said
    assert report["files"] == convert(written_run, tmp_path / "again", options=options)["files"]
    assert report["tensors"]["compared"] == len(torch.load(tmp_path / "out/model.pt", weights_only=True))
    shape = json.loads((tmp_path / "out/shape.json").read_text())
    assert shape["dim"] == 32 and shape["rope_scaling"] is None and (tmp_path / "out/tokenizer.model").exists()


def test_a_small_disk_is_refused_before_it_is_filled(written_run, tmp_path):
    with small_disk(tmp_path / "disk", 64) as disk:
        with pytest.raises(
            ExportError, match=r"written \(\[Errno 28\] it takes 90,\d+ bytes, and 61,440 are free\); expec"
        ):
            convert(written_run, disk / "out")
        assert list(disk.iterdir()) == []


@pytest.mark.parametrize("num_ranks", [1, 4])
def test_the_export_does_not_depend_on_how_the_checkpoint_is_divided(written_run, num_ranks, tokenizer, tmp_path):  # noqa: F811
    other = write_run(tmp_path / "other/run", config_of("llama"), tokenizer, make_model("llama"), num_ranks)
    reports = [
        convert(run, tmp_path / f"out-{to}-{run.parent.name}", options=ConvertOptions(to, "fp32", verify="tensors"))
        for to in ("torch", "gguf") for run in (written_run, other)
    ]  # fmt: skip
    written = torch.load(tmp_path / "out-torch-other/model.pt", weights_only=True)
    assert all(torch.equal(written[name], one) for name, one in make_model("llama").named_parameters())
    assert reports[0]["files"] == reports[1]["files"]


@pytest.mark.parametrize("damage", ["missing", "flipped", "version", "parameters"])
def test_a_damaged_checkpoint_is_one_error(written_run, damage, tokenizer, tmp_path, capsys):  # noqa: F811
    checkpoint = written_run / "checkpoints/step-00000030"
    if damage == "missing":
        (checkpoint / "rank-00001.safetensors").unlink()
    elif damage == "flipped":
        content = bytearray((checkpoint / "rank-00001.safetensors").read_bytes())
        content[-5] ^= 1
        (checkpoint / "rank-00001.safetensors").write_bytes(content)
    else:
        manifest = json.loads((checkpoint / "manifest.json").read_text())
        manifest.pop("sha256")
        if damage == "version":
            manifest["format_version"] = 99
        else:
            del manifest["parameters"]["final_norm.weight"]
        (checkpoint / "manifest.json").write_text(json.dumps(manifest | {"sha256": manifest_digest(manifest)}))
    assert main([str(written_run), str(tmp_path / "out"), "--to", "torch"]) == (2 if damage == "version" else 1)
    message = capsys.readouterr().err
    assert {
        "missing": "rank-00001.safetensors is missing. Use another checkpoint (--step)",
        "flipped": "rank-00001.safetensors has another sha256 than when it was written",
        "version": "format version is 99; expected at most 2. Use the Longhaul that wrote it",
        "parameters": "its parameters are not those of the model that its config describes; expected the same",
    }[damage] in message and message.count("error:") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_another_tokenizer_in_the_run_folder_is_found(written_run, tmp_path, capsys):
    sample = choose_sample(["another text " * 500, Path(os.__file__).read_text()], 100_000, seed=1)
    (written_run / "tokenizer.model").write_bytes(fit(sample, config_of("llama").tokenizer))
    assert main([str(written_run), str(tmp_path / "out"), "--to", "hf"]) == 1
    assert "its tokenizer has the fingerprint" in (message := capsys.readouterr().err)
    assert "with which step-00000030 was trained. Restore the tokenizer's files in the run folder." in message
    section = config_of("llama").tokenizer
    other = section.model_copy(update={"vocab_size": section.vocab_size + 8})
    (written_run / "tokenizer.model").write_bytes(fit(sample, other))
    assert main([str(written_run), str(tmp_path / "out"), "--to", "hf"]) == 2
    assert (
        f"tokenizer.model: holds {other.vocab_size} ids; expected the {section.vocab_size} of the tokenizer with "
        in (message := capsys.readouterr().err)
    )
    assert "which the run was trained. Restore the tokenizer's files there." in message and "vocab_size" not in message


def test_provenance_and_training_are_told(written_run, tmp_path):
    convert(written_run, tmp_path / "out", options=ConvertOptions("hf", licence="apache-2.0"))
    card = (tmp_path / "out/README.md").read_text()
    assert card.startswith('---\nlibrary_name: transformers\npipeline_tag: text-generation\nlicense: "apache-2.0"\n')
    assert "Licence: not chosen" not in card and "| code | 12,345 | 0.50 | – | – |" in card
    assert "Longhaul 0.1, commit abc1234" in card
    assert "| 30 | 3,000 | 5.1000 |" in card, "the mean of steps 28 to 30, and none later"
    assert "Loss, held-out, in nats per token:" in card and "| 20 | 2,000 | 6.5000 |" in card
    with safe_open(tmp_path / "out/model.safetensors", "pt") as file:
        metadata = file.metadata()
    assert metadata["step"] == "30" and metadata["git_commit"] == "abc1234" and metadata["trained_by_longhaul"] == "0.1"


def test_tensors_alone_are_compared_by_choice_and_where_memory_is_short(written_run, tmp_path, monkeypatch, capsys):
    assert main([str(written_run), str(tmp_path / "a"), "--to", "hf", "--verify", "tensors"]) == 0
    assert "LlamaForCausalLM of step 30 in bf16. 21 tensors were read back" in capsys.readouterr().out
    monkeypatch.setattr(convert_module, "_available_bytes", lambda: 100_000)
    report = convert(written_run, tmp_path / "b")
    assert report["verified"] == "tensors" and "logits" not in report
    assert "note: logits are not compared: that takes 249.1 kB, and 100.0 kB are free" in capsys.readouterr().err
    assert "every weight came back bit for bit" in (tmp_path / "b/README.md").read_text()
    right = hf_files.export_tensors

    def alter(shape, parameters):
        for name, tensor in right(shape, parameters):
            yield name, tensor if tensor.is_meta or name != "lm_head.weight" else tensor * 2

    monkeypatch.setattr(hf_files, "export_tensors", alter)
    with pytest.raises(ExportError, match="lm_head.weight: comes back altered; expected the same bits"):
        convert(written_run, tmp_path / "c")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "run"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--to", "hf", "--dtype", "q8_0"], "--dtype is q8_0; expected one of bf16, fp16, fp32 for --to hf."),
        (["--to", "hf", "--max-shard-size", "five"], "--max-shard-size is 'five'; expected a size such as 5GB, 500MB"),
        (["--to", "hf", "--max-shard-size", "0"], "--max-shard-size is 0; expected a size such as 5GB."),
    ],
)
def test_options_that_mean_nothing_are_refused(a_run, arguments, message, tmp_path, capsys):
    assert main(["runs/a", str(tmp_path / "out"), *arguments]) == 2
    assert message in capsys.readouterr().err and a_run == []
    assert [parse_size(text) for text in ("5GB", "1.5 MiB", "20kb", "7")] == [5 * 10**9, 3 * 2**19, 20_000, 7]


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
    with pytest.raises(ConfigError, match="--to is 'onnx'; expected one of hf, gguf, torch"):
        convert("runs/a", tmp_path / "out", options=ConvertOptions("onnx"))


@pytest.mark.parametrize(("error", "status"), [(ConfigError("no such run"), 2), (CheckpointError("damaged"), 1)])
def test_errors_of_the_run_end_the_command(error, status, tmp_path, capsys, monkeypatch):
    def fail(run, step):
        raise error

    monkeypatch.setattr(convert_module, "open_run", fail)
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
    assert done.stderr.endswith("There is no such folder: correct the path.\n")


@pytest.mark.launches
def test_a_trained_run_is_exported_and_compared_on_its_held_out_rows(tiny_config, tmp_path, capsys):
    command = ["launch/pretrain.py", str(tiny_config), "train.num_steps=4", f"run.dir={tmp_path / 'run'}"]
    done = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert main([str(tmp_path / "run"), str(tmp_path / "out"), "--to", "hf", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["source"]["run"] == "run" and report["source"]["step"] == 4 and report["dtype"] == "fp32"
    assert report["logits"]["rows"] == {"held-out": 4, "random": 2} and report["tokenizer"]["mismatches"] == 0
