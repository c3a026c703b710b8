"""The commands start in every form that people use, in spite of `launch/` and `pretrain` sharing names with files."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.rank_helpers import ROOT, free_port, losses, run_command

pytestmark = pytest.mark.launches
COMMANDS = sorted(path.stem for path in (ROOT / "launch").glob("*.py") if path.stem not in ("__init__", "cli"))


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_examples(command):
    done = run_command(f"launch/{command}.py", "--help")
    assert done.returncode == 0 and "examples:" in done.stdout and done.stderr == ""


def forms(command: str, folder: Path) -> dict[str, tuple[list[str], Path]]:
    script = ROOT / "launch" / f"{command}.py"
    link = folder / "link.py"
    link.symlink_to(script)
    return {
        "file": ([f"launch/{command}.py"], ROOT),
        "module": (["-m", f"launch.{command}"], ROOT),
        "other folder": ([str(script)], folder),
        "inside launch": ([f"{command}.py"], ROOT / "launch"),
        "symlink": ([str(link)], folder),
    }


@pytest.mark.parametrize("command", ["prepare", "pretrain"])
def test_every_form_finds_the_library(command, tmp_path):
    for name, (arguments, cwd) in forms(command, tmp_path).items():
        done = run_command(*arguments, "absent.yaml", cwd=cwd)
        assert done.returncode == 2 and done.stderr.startswith("error: absent.yaml"), (name, done.stderr)


@pytest.mark.parametrize("launcher", ["torchrun", "deepspeed", "deepspeed --module", "one process"])
def test_every_launcher_trains(tiny_config, tmp_path, launcher):
    port = str(free_port())
    deepspeed = ["-m", "deepspeed.launcher.runner", "--num_gpus", "2", "--master_port", port]
    target = {
        "torchrun": [
            "-m",
            "torch.distributed.run",
            "--nproc-per-node",
            "2",
            "--master-port",
            port,
            "launch/pretrain.py",
        ],
        "deepspeed": [*deepspeed, "launch/pretrain.py"],
        "deepspeed --module": [*deepspeed, "--module", "launch.pretrain"],
        "one process": ["launch/pretrain.py"],
    }[launcher]
    overrides = [f"run.dir={tmp_path}/run", "train.num_steps=4", "train.micro_batch_size=8", "log.tensorboard=true"]
    done = run_command(*target, tiny_config, *overrides, OMP_NUM_THREADS="1", timeout=200)
    assert done.returncode == 0, done.stderr
    run = tmp_path / "run"
    assert len(losses(run)) == 4
    assert json.loads((run / "status.json").read_text())["status"] == "done"
    start = json.loads((run / "environment.json").read_text())["starts"][0]
    assert start["world_size"] == (1 if launcher == "one process" else 2) and start["versions"]["deepspeed"] == "0.19.8"
    assert list((run / "tensorboard").glob("events*")) and (run / "tokenizer.model").exists()
    assert "starting: " in (run / "log.txt").read_text()
    again = run_command("launch/pretrain.py", tiny_config, *overrides)
    assert again.returncode == 0, again.stderr
    assert len(losses(run)) == 4  # it was done, and is not done again


def test_evaluate_prints_one_json_object(tiny_config, tmp_path):
    overrides = [f"run.dir={tmp_path}/run", "train.num_steps=4", "eval.every_steps=4", "log.tensorboard=false"]
    assert run_command("launch/pretrain.py", tiny_config, *overrides).returncode == 0
    done = run_command("launch/evaluate.py", tmp_path / "run", "--json")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    during = next(line for line in lines if "eval/loss" in line)
    assert result["step"] == 4
    assert result["loss"] == pytest.approx(during["eval/loss"], rel=1e-5)
    assert result["bits_per_byte"] == pytest.approx(during["eval/bits_per_byte"], rel=1e-5)
    missing = run_command("launch/evaluate.py", tmp_path / "run", "--step", "3")
    assert missing.returncode == 2 and "--step is 3; expected one of the checkpoints" in missing.stderr


def test_the_console_command(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "launch.cli", "train", str(tmp_path / "absent.yaml")], cwd=ROOT, env=os.environ,
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 2 and "absent.yaml" in done.stderr
