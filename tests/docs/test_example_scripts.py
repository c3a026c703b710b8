"""Every script of `examples/` runs from any folder, makes what it says, and stands in their README."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.rank_helpers import ROOT, free_port, losses

EXAMPLES = ROOT / "examples"
SCRIPTS = sorted(path.name for path in EXAMPLES.iterdir() if path.suffix in (".sh", ".py"))
ALONE = {"train.sh", "continue.sh", "own_tokenizer.sh"}  # the others go on from train.sh


def run_example(name: str, folder: Path, cwd: Path) -> str:
    """Run a script as a user does who stands in `cwd`; return what it printed."""
    command = [sys.executable if name.endswith(".py") else "bash", str(EXAMPLES / name), str(folder)]
    environment = os.environ | {"PYTHON": sys.executable, "PORT": str(free_port())}
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    assert "Traceback" not in done.stderr, done.stderr
    return done.stdout


def test_the_page_lists_every_script() -> None:
    page = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    assert sorted(re.findall(r"^\| \[.*?\]\((.*?)\)", page, re.MULTILINE)) == SCRIPTS
    for path in map(EXAMPLES.joinpath, SCRIPTS):
        if path.suffix == ".sh":
            assert "\nset -euo pipefail\n" in path.read_text() and os.access(path, os.X_OK), path


@pytest.mark.parametrize("name", sorted(set(SCRIPTS) - ALONE))
def test_what_is_not_there_is_said(name: str, tmp_path: Path) -> None:
    command = [sys.executable if name.endswith(".py") else "bash", str(EXAMPLES / name), str(tmp_path / "absent")]
    done = subprocess.run(
        command, cwd=tmp_path, env=os.environ | {"PYTHON": sys.executable}, capture_output=True, text=True
    )
    assert done.returncode in (1, 2) and "run examples/train.sh first" in done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What train.sh makes."""
    folder = tmp_path_factory.mktemp("examples")
    said = run_example("train.sh", folder / "train run", folder)  # a space in a path is no mistake
    made = folder / "train run"
    assert len(losses(made / "run")) == 200
    starts = json.loads((made / "run/environment.json").read_text())["starts"]
    assert [start["world_size"] for start in starts] == [1, 2]
    assert (made / "hf/model.safetensors").exists() and len(list((made / "gguf").glob("*.gguf"))) == 1
    assert "step 200: loss " in said and "\nThe " in said
    return made


@pytest.mark.slow
@pytest.mark.launches
def test_ranks(trained: Path) -> None:
    run_example("ranks.sh", trained, trained)
    starts = json.loads((trained / "zero3/environment.json").read_text())["starts"]
    assert len(losses(trained / "zero3")) == 220 and starts[-1]["world_size"] == 2
    assert "zero_stage: 3" in (trained / "zero3/config.yaml").read_text()


@pytest.mark.slow
@pytest.mark.launches
def test_slurm(trained: Path) -> None:
    said = run_example("slurm.sh", trained, trained.parent)
    assert "done at step 200" in said and "#SBATCH --nodes=2" in (trained / "submit.sbatch").read_text()


@pytest.mark.slow
@pytest.mark.launches
def test_tune(trained: Path) -> None:
    said = run_example("tune.sh", trained, trained.parent)
    answer = re.search(r"again \(7\) is of the kind (\w+)\n", said)
    assert answer and f"peft says: we saw the old carp again (7) is of the kind {answer[1]}" in said
    assert answer[1] in ("tree", "fish", "metal", "music")


@pytest.mark.slow
@pytest.mark.launches
def test_read_from_python(trained: Path) -> None:
    said = run_example("read_from_python.py", trained, trained.parent)
    loss = re.search(r"is ([\d.]+) nats a token", said)
    assert (
        said.startswith("step 200: llama, ") and loss and float(loss[1]) < 6.9
    )  # ln 1024, of a model that knows nothing


@pytest.mark.slow
@pytest.mark.launches
def test_continue(tmp_path: Path) -> None:
    run_example("continue.sh", tmp_path / "made", tmp_path)
    found = losses(tmp_path / "made/continued")
    assert len(found) == 30 and found[-1] < found[0]
    assert json.loads((tmp_path / "made/hf/config.json").read_text())["model_type"] == "olmo2"


@pytest.mark.slow
@pytest.mark.launches
def test_own_tokenizer(tmp_path: Path) -> None:
    run_example("own_tokenizer.sh", tmp_path / "made", tmp_path)
    assert len(losses(tmp_path / "made/run")) == 20 and (tmp_path / "made/run/tokenizer.json").exists()
