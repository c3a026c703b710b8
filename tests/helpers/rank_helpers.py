"""Starting several ranks on this machine, and reading what their runs left."""

from __future__ import annotations

import hashlib
import json
import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from pretrain.checkpoints.checkpoint_files import CheckpointReader, folder_name, list_steps

ROOT = Path(__file__).resolve().parents[2]


def run_command(
    *arguments: str | Path, timeout: float = 120, cwd: Path = ROOT, **environment: str
) -> subprocess.CompletedProcess:
    """Run one of the commands as a user does: `run_command("launch/prepare.py", config)`."""
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(
        command, cwd=cwd, env=os.environ | environment, capture_output=True, text=True, timeout=timeout
    )


def prepare(config: Path, *overrides: str) -> None:
    """Run `launch/prepare.py`, which must succeed."""
    done = run_command("launch/prepare.py", config, *overrides, timeout=300)
    assert done.returncode == 0, done.stderr


def skip_for(reason: str | None, variable: str) -> None:
    """Skip the test if there is a reason; fail it where an environment variable says that there must be none."""
    if reason:
        (pytest.fail if os.environ.get(variable) else pytest.skip)(reason)


def free_port() -> int:
    """A port of this machine that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start_ranks(script: str, arguments: list[str], num_ranks: int, log: Path) -> list[subprocess.Popen]:
    """Start `num_ranks` processes of a script as a launcher would."""
    port = free_port()
    processes = []
    for rank in range(num_ranks):
        variables = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": num_ranks, "LOCAL_WORLD_SIZE": num_ranks,
                     "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": 1}  # fmt: skip
        environment = os.environ | {name: str(value) for name, value in variables.items()}
        with open(log.with_name(f"{log.name}-{rank}"), "w") as output:
            processes.append(subprocess.Popen([sys.executable, script, *arguments], cwd=ROOT, env=environment,
                                              stdout=output, stderr=subprocess.STDOUT))  # fmt: skip
    return processes


def run_cases(
    config: Path,
    cases: list[dict],
    num_ranks: int,
    folder: Path,
    timeout: float = 400,
    overrides: Sequence[str] = (),
) -> list[str]:
    """Run cases on `num_ranks` ranks in one start, `overrides` before their own; return their outcomes."""
    cases = [case | {"overrides": [*overrides, *case["overrides"]]} for case in cases]
    folder.mkdir(parents=True, exist_ok=True)
    cases_path = folder / "cases.json"
    cases_path.write_text(json.dumps(cases))
    processes = start_ranks("tests/ranks/cases.py", [str(config), str(cases_path)], num_ranks, folder / "output")
    try:
        statuses = [process.wait(timeout) for process in processes]
    finally:
        for process in processes:
            process.kill()
    logs = "".join((folder / f"output-{rank}").read_text()[-3000:] for rank in range(num_ranks))
    assert statuses == [0] * num_ranks, logs
    return json.loads(cases_path.with_suffix(".outcomes").read_text())


def metric_lines(run: Path) -> list[dict]:
    """All lines of a run's `metrics.jsonl`."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def losses(run: Path) -> list[float]:
    """Training losses of a run, step by step."""
    return [line["loss"] for line in metric_lines(run) if "loss" in line]


def state_hash(reader: CheckpointReader) -> str:
    """The sha256 of all weights and moments of a checkpoint, however they are divided into files."""
    digest = hashlib.sha256()
    for name in sorted(reader.shapes):
        for state in sorted(reader.states[name]):
            digest.update(f"{name}/{state}".encode() + reader.read_whole(name, state).numpy().tobytes())
    return digest.hexdigest()


def good_steps(run: Path) -> list[int]:
    """Steps of a run's complete checkpoints, each of which must verify."""
    steps = list_steps(run / "checkpoints")
    for step in steps:
        CheckpointReader(run / "checkpoints" / folder_name(step)).verify()
    return steps


def newest(run: Path) -> CheckpointReader:
    """The newest checkpoint of a run."""
    return CheckpointReader(run / "checkpoints" / folder_name(list_steps(run / "checkpoints")[-1]))
