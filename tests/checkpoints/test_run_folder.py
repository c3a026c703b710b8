"""Whose a run folder is, and what may change when a run goes on."""

from __future__ import annotations

import errno
import fcntl
import json

import pytest

from pretrain.checkpoints.checkpoint_folder import FolderPlace
from pretrain.checkpoints.run_folder import RunFolder, newest_good
from pretrain.checkpoints.run_status import read_saved_step
from pretrain.errors import CheckpointError, ConfigError
from pretrain.options.config_changes import changed_options, describe_changes, flatten
from pretrain.options.model_options import RopeScalingSection
from pretrain.options.settings import load_config
from tests.conftest import write_tiny_corpus


@pytest.fixture
def config(tmp_path):
    return load_config(write_tiny_corpus(tmp_path / "corpus"), [f"run.dir={tmp_path}/run"])


def test_differences_are_named_in_order(config):
    other = config.model_copy(update={"optim": config.optim.model_copy(update={"lr": 0.5, "eps": 1e-6})})
    assert changed_options(config, other) == [("optim.lr", 3e-3, 0.5), ("optim.eps", 1e-8, 1e-6)]
    scaled = config.model.model_copy(update={"rope_scaling": RopeScalingSection(type="linear", factor=2.0)})
    longer = config.model_copy(update={"model": scaled})
    there, back = changed_options(config, longer), changed_options(longer, config)
    assert ("model.rope_scaling.factor", None, 2.0) in there and ("model.rope_scaling.factor", 2.0, None) in back
    assert flatten({"a": {"b": [1, {"c": 2}]}, "d": None}) == {"a.b": [1, {"c": 2}], "d": None}


def save_one(run):
    (run / "checkpoints" / "step-00000003").mkdir(parents=True)
    (run / "checkpoints" / "step-00000003" / "manifest.json").write_text("{}")


def test_before_the_first_checkpoint_any_config_may_begin(tmp_path, monkeypatch):
    path = write_tiny_corpus(tmp_path / "corpus")
    run = f"run.dir={tmp_path}/run"
    first = RunFolder(load_config(path, [run]))
    assert first.attempt == 1
    first.close()
    with monkeypatch.context() as image:  # a container that has no git
        image.setenv("PATH", str(tmp_path))
        second = RunFolder(load_config(path, [run, "optim.lr=1e-2"]))
    assert second.attempt == 2
    second.close()
    save_one(tmp_path / "run")
    with pytest.raises(ConfigError, match=r"optim.lr: 0.01 in the run folder, 0.003 now"):
        RunFolder(load_config(path, [run]))
    third = RunFolder(load_config(path, [run, "optim.lr=1e-2", "parallel.zero_stage=3", "train.num_steps=99"]))
    assert third.attempt == 3
    third.close()
    allowed = RunFolder(load_config(path, [run, "optim.lr=1e-3", "run.allow_changes=[optim.lr]"]))
    allowed.close()
    # Until the checkpoint is loaded nothing says that the run goes on with the change: the old config still may.
    RunFolder(load_config(path, [run, "optim.lr=1e-2"])).close()
    for option in ("data.seq_len=64", "data.packing=concat", "data.shuffle_window_shards=3", "run.seed=1"):
        name = option.partition("=")[0]
        with pytest.raises(ConfigError, match=rf"run\.dir=…: the rows that are to come cannot be others \({name}\)\."):
            RunFolder(load_config(path, [run, "optim.lr=1e-2", option, f"run.allow_changes=[{name}]"]))
    starts = json.loads((tmp_path / "run" / "environment.json").read_text())["starts"]
    assert starts[1]["git_commit"] is None
    assert len(starts) == 5 and {"command", "versions", "git_commit", "host", "world_size"} <= set(starts[0])


def test_sources_and_phases_may_change_but_not_the_number_of_learned_positions(tmp_path):
    path = write_tiny_corpus(tmp_path / "corpus")
    gpt2 = "model={family: gpt2, dim: 32, num_layers: 2, num_heads: 4}"
    RunFolder(load_config(path, [f"run.dir={tmp_path}/run", gpt2])).close()
    save_one(tmp_path / "run")
    changes = [f"run.dir={tmp_path}/run", gpt2, "data.sources.0.weight=1", "data.phases=[{from_step: 5, seq_len: 16}]"]
    RunFolder(load_config(path, changes)).close()  # what of it is past is for the plan of the rows to judge
    with pytest.raises(
        ConfigError, match=r"data\.phases: rows of up to 32 tokens in the run folder, rows of up to 64 t"
    ):
        RunFolder(load_config(path, [*changes, "data.phases=[{from_step: 5, seq_len: 64}]"]))
    (tmp_path / "run" / "config.yaml").unlink()


def test_other_weights_or_moments_are_not_offered_as_a_change(tmp_path):
    path = write_tiny_corpus(tmp_path / "corpus")
    run = f"run.dir={tmp_path}/run"
    RunFolder(load_config(path, [run])).close()
    save_one(tmp_path / "run")

    def refused(*changes: str) -> str:
        with pytest.raises(ConfigError) as caught:
            RunFolder(load_config(path, [run, *changes]))
        return str(caught.value).splitlines()[-1]

    text = refused("model.dim=64", "optim.lr=1", "run.allow_changes=[model.dim]")
    assert text == "Start a new run with run.dir=…: the checkpoints are of another model (model.dim)."
    text = refused("optim.name=muon", "optim.betas=[0.8, 0.9]", "run.allow_changes=[optim.name]")
    assert text.endswith(f"run.dir=… resume.from={tmp_path}/run resume.optimizer=false: another optimizer has other "
                         "moments (optim.name).")  # fmt: skip
    text = refused("model.dropout=0.1", "optim.clip_norm=0", "run.allow_changes=[optim.lr, model.dropout]")
    assert text.endswith("or go on with the change by 'run.allow_changes=[optim.lr, model.dropout, optim.clip_norm]'.")


def test_a_run_whose_checkpoints_are_gone_does_not_begin_anew(tmp_path):
    path = write_tiny_corpus(tmp_path / "corpus")
    config = load_config(path, [f"run.dir={tmp_path}/run"])
    folder = RunFolder(config)
    folder.write_status("running", None, 3, saved_step=3)
    folder.close()
    with pytest.raises(
        ConfigError, match=r"tells of a checkpoint of step 3, and .*/run/checkpoints holds none; expected"
    ):
        RunFolder(config)
    anew = load_config(path, [f"run.dir={tmp_path}/run", "resume.from_scratch=true"])
    RunFolder(anew).close()
    assert read_saved_step(tmp_path / "run") is None
    RunFolder(anew).close()
    save_one(tmp_path / "run")
    again = RunFolder(anew)
    again.close()
    assert [event for event, _ in again.events] == ["not_from_scratch"]
    changed = RunFolder(new := load_config(path, [f"run.dir={tmp_path}/run", "parallel.zero_stage=0"]))
    changed.close()
    assert changed.events == [] and describe_changes(changed.former, new, 4) == "parallel.zero_stage: 1, now 0"


@pytest.mark.parametrize(
    ("override", "step", "rate"),
    [
        ("train.num_steps=40", 10, "1.77e-03, now 2.70e-03"),  # up again
        ("train.num_steps=12", 10, "1.77e-03, now 3.81e-04"),
        ("train.num_steps=40", 20, "3.00e-04, now 1.71e-03"),  # after the end
        ("train.num_steps=40", 2, ""),  # the warm-up is as it was
        ("train.num_steps=12", 12, ""),  # nothing is left to do
        ("optim.lr=0.002", 0, "1.00e-03, now 6.67e-04"),
    ],
)
def test_what_a_change_does_to_the_rate_is_said(tmp_path, override, step, rate):
    path = write_tiny_corpus(tmp_path / "corpus")
    text = describe_changes(load_config(path), load_config(path, [override]), step)
    name = override.partition("=")[0]
    assert text.startswith(f"{name}: ") and text.partition("; ")[2] == (
        f"learning rate of step {step + 1}: {rate}" if rate else ""
    )


def test_a_folder_without_its_config_is_refused(config):
    from pathlib import Path

    run = Path(config.run.dir)
    save_one(run)
    with pytest.raises(ConfigError, match="has checkpoints and no config.yaml; expected both"):
        RunFolder(config)


def test_one_job_a_folder(config):
    first = RunFolder(config)
    with pytest.raises(ConfigError, match="no other job is training in"):
        RunFolder(config)
    first.close()
    RunFolder(config).close()


def test_a_file_system_without_locks_is_said(config, monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(
        ConfigError, match=r"run\.dir is .*, whose file system has no locks \(Function not implemented\);"
    ):
        RunFolder(config)


def test_status_is_whole_json(config):
    folder = RunFolder(config)
    folder.write_status("stopped", 75, 12, "a signal")
    folder.close()
    status = json.loads((folder.path / "status.json").read_text())
    assert status["saved_step"] is None
    folder.write_status("running", None, 12, saved_step=10)
    folder.write_status("stopped", 75, 12, "a signal")
    status = json.loads((folder.path / "status.json").read_text())
    assert status["saved_step"] == 10
    assert (status["status"], status["exit_status"], status["step"], status["reason"]) == (
        "stopped",
        75,
        12,
        "a signal",
    )


def test_an_export_is_told_from_a_run_that_has_not_saved(tmp_path):
    place = FolderPlace(tmp_path / "checkpoints")
    rule = f"{tmp_path}: holds no checkpoint; expected a run folder in which training has saved."
    with pytest.raises(ConfigError) as refused:
        newest_good(tmp_path, place, None)
    assert str(refused.value) == f"{rule} Train first."
    (tmp_path / "mine.yaml").touch()
    with pytest.raises(
        ConfigError, match="This is a file: name the run folder, which is run.dir of the config or runs/"
    ):
        newest_good(tmp_path / "mine.yaml", FolderPlace(tmp_path / "mine.yaml/checkpoints"), None)
    (tmp_path / "verification.json").write_text("{}")
    with pytest.raises(ConfigError) as refused:
        newest_good(tmp_path, place, None)
    assert str(refused.value) == f"{rule} This is an export: name the run that it was made from."


def test_the_checkpoint_that_is_taken_for_a_damaged_one_is_named(tmp_path, capsys):
    class Reader:
        def __init__(self, step):
            self.step = step

        def verify(self):
            if self.step == 9:
                raise CheckpointError("step-00000009: is damaged. Use another checkpoint (--step).")

    class Place:
        def list_steps(self):
            return [3, 6, 9]

        def open(self, step):
            return Reader(step)

    assert newest_good(tmp_path, Place(), None).step == 6
    assert capsys.readouterr().err == (
        "warning: step-00000009: is damaged. Use another checkpoint (--step). Taken instead: step 6.\n"
    )
    with pytest.raises(CheckpointError, match=r"^step-00000009: is damaged\. Use another checkpoint \(--step\)\.$"):
        newest_good(tmp_path, Place(), 9)
    assert capsys.readouterr().err == ""
