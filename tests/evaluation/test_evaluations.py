"""`launch/evaluate.py`: what it shows, what the run folder keeps of it, and comparing checkpoints."""

from __future__ import annotations

import json
import re

import pytest

from launch.evaluate import main
from pretrain.evaluation import evaluations
from tests.evaluation.task_files import documents, write_tasks

pytestmark = [pytest.mark.launches, pytest.mark.filterwarnings("default")]  # of lm-eval's libraries


@pytest.fixture(scope="module")
def folder(tiny_config, fork_server, tmp_path_factory):
    """A folder with two runs of two checkpoints each, which differ in seed, and tasks."""
    folder = tmp_path_factory.mktemp("evaluations")
    for seed in (1, 2):
        arguments = [tiny_config, f"run.dir={folder}/run{seed}", f"run.seed={seed}", "train.num_steps=4", "checkpoint.every_steps=2"]  # fmt: skip
        assert fork_server.start(arguments, 1, folder / f"log{seed}").wait() == [0]
    write_tasks(folder / "tasks", documents(8), ["choices", "rolling"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setenv("HF_DATASETS_CACHE", str(folder / "cache"))
        yield folder


@pytest.fixture
def command(folder, monkeypatch, capsys):
    """Run the command; return (stdout, labels of what was computed)."""
    computed: list[str] = []
    held_out, tasks = evaluations.Judge._held_out, evaluations.Judge._do_tasks

    def count_held_out(self, checkpoint, loaded):
        computed.append(f"{checkpoint.step} held-out")
        return held_out(self, checkpoint, loaded)

    def count_tasks(self, checkpoint, loaded, names):
        computed.extend(f"{checkpoint.step} {name}" for name in names)
        return tasks(self, checkpoint, loaded, names)

    monkeypatch.setattr(evaluations.Judge, "_held_out", count_held_out)
    monkeypatch.setattr(evaluations.Judge, "_do_tasks", count_tasks)

    def run(*arguments):
        computed.clear()
        status = main([str(argument) for argument in arguments])
        shown = capsys.readouterr()
        assert status == 0, shown.err
        assert ("as evaluated before; --again" in shown.err) == (not computed)
        return shown.out, list(computed)

    return run


def test_held_out_documents_in_all_and_by_source(folder, command):
    text, computed = command(folder / "run1", "--max-rows", 300)
    assert computed == ["4 held-out"]
    loss, tokens = re.match(r"step 4: loss ([\d.]+) nats per token, .* over (\d+) tokens", text).groups()
    lines = [line.split() for line in text.splitlines()[3:]]
    assert [line[0] for line in lines] == ["code", "prose"] and sum(int(line[-1]) for line in lines) == int(tokens)
    mean = sum(float(line[1]) * int(line[-1]) for line in lines) / int(tokens)
    assert mean == pytest.approx(float(loss), abs=2e-4)
    found = json.loads(command(folder / "run1", "--max-rows", 300, "--json")[0])
    assert found["tokens"] == int(tokens) and found["sources"].keys() == {"code", "prose"} and found["step"] == 4
    assert 0 < found["loss_stderr"] < 0.1


def test_what_was_computed_is_read_until_something_changes(folder, command, monkeypatch):
    common = [
        folder / "run1",
        "--step",
        2,
        "--tasks",
        "choices,rolling",
        "--include-path",
        folder / "tasks",
        "--max-rows",
        40,
        "--json",
    ]
    first, computed = command(*common)
    assert computed == ["2 held-out", "2 choices", "2 rolling"]
    again, computed = command(*common)
    assert again == first and computed == []
    assert command(*common, "--limit", 3)[1] == ["2 choices", "2 rolling"]
    assert command(*common, "--no-held-out", "--no-bos")[1] == ["2 choices", "2 rolling"]
    assert command(*common, "--again")[1] == ["2 held-out", "2 choices", "2 rolling"]
    assert command(*common, "--max-rows", 5)[1] == ["2 held-out"]
    assert command(*common)[1] == []  # the others were kept beside
    monkeypatch.setattr(evaluations, "__version__", "99")
    assert command(*common)[1] == ["2 held-out", "2 choices", "2 rolling"]
    assert command(*common)[1] == []
    data = folder / "tasks/data.jsonl"
    data.write_text(data.read_text() + data.read_text())
    assert command(*common)[1] == ["2 choices", "2 rolling"]
    kept = folder / "run1/evaluations/step-00000002.json"
    entries = json.loads(kept.read_text())["entries"]
    assert sorted(entry["name"] for entry in entries) == sorted(["held-out"] * 2 + ["choices", "rolling"] * 3)
    kept.write_text(kept.read_text()[:-30])
    assert command(*common)[1] == ["2 held-out", "2 choices", "2 rolling"]


def test_checkpoints_of_several_runs_beside_each_other(folder, command):
    arguments = [folder / "run1", folder / "run2", "--steps", "all", "--tasks", "choices",
                 "--include-path", folder / "tasks", "--max-rows", 300]  # fmt: skip
    text, _ = command(*arguments)
    above, below = text.split("\n\n")
    labels = [f"{folder}/run{run}@{step}" for run in (1, 2) for step in (2, 4)]
    assert [line.split()[0] for line in above.splitlines()[1:]] == labels
    names = ["loss", "bits_per_byte", "code/loss", "prose/loss", "choices/acc", "choices/acc_norm"]
    assert above.splitlines()[0].split() == names and below.splitlines()[0].split() == ["minus", labels[0], *names]
    found = json.loads(command(*arguments, "--json")[0])
    assert [one["run"] + "@" + str(one["step"]) for one in found["evaluations"]] == labels
    changes = {(one["of"], one["name"]): one for one in found["differences"]}
    assert len(changes) == 3 * len(names)
    learned = changes[labels[1], "loss"]
    first, second = found["evaluations"][:2]
    assert learned["value"] == pytest.approx(second["loss"] - first["loss"]) and learned["is_paired"]
    assert learned["value"] < -3 * learned["stderr"]
    assert changes[labels[2], "choices/acc"]["is_paired"]


def test_a_folder_that_cannot_be_written_is_no_reason_to_stop(folder, command):
    kept = folder / "run2/evaluations"
    if kept.exists():
        kept.rename(folder / "aside")
    kept.write_text("not a folder")
    assert "step 2: loss" in command(folder / "run2", "--step", 2, "--max-rows", 4)[0]
    kept.unlink()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tasks", " ,"], "--tasks is empty; expected names with commas between. Write --tasks hellaswag,arc_easy."),
        (["--limit", "3"], "--limit is for tasks; expected --tasks too. Add --tasks NAMES."),
        (["--include-path", "x"], "--include-path is for tasks; expected --tasks too."),
        (["--no-held-out"], "--no-held-out leaves nothing to do; expected --tasks too."),
        (["--max-rows", "-1"], "--max-rows is -1; expected 0 or more. Leave it out for all."),
        (["--steps", "2,last"], "--steps is 2,last; expected numbers with commas between, or all. Write --steps 100,200."),
        (["--steps", "2,3"], "--steps has 3; expected checkpoints of RUN, which has 2, 4."),
        (["--step", "2", "--steps", "4"], "--step and --steps are both given; expected one of them. Drop --step."),
        (["--step", "3"], "--step is 3; expected one of the checkpoints in RUN: 2, 4."),
        (["--tasks", "a", "--include-path", "/nowhere", "--no-held-out"], "--tasks: /nowhere holds no .yaml file"),
    ],
)  # fmt: skip
def test_mistakes_on_the_command_line(folder, capsys, arguments, message):
    assert main([str(folder / "run1"), *arguments]) == 2
    shown = capsys.readouterr()
    assert message.replace("RUN", str(folder / "run1")) in shown.err and shown.out == ""
