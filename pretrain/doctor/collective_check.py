"""Ranks on this machine that meet, sum and measure: by NCCL on its GPUs, by gloo on two processes without one."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from pretrain.console import counted
from pretrain.doctor.findings import Line, Request, failure, last_line, ok, python_command

_ON_CPU = 2  # ranks
_SECONDS = 150.0
_MEND = {
    "nccl": "Look at what NCCL says with NCCL_DEBUG=INFO, and at /dev/shm (in a container --ipc=host or --shm-size).",
    "gloo": "Look whether a firewall closes local ports, and whether GLOO_SOCKET_IFNAME is right.",
}


def check(request: Request) -> Iterator[Line]:
    """Start the ranks, and say what they found."""
    num_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    backend = "nccl" if num_gpus else "gloo"
    begin = time.monotonic()
    found, said = run_ranks(num_gpus or _ON_CPU)
    yield judge(backend, found, said, time.monotonic() - begin)


def run_ranks(num_ranks: int, seconds: float = _SECONDS) -> tuple[dict[str, Any] | None, str]:
    """Start ranks of `pretrain.doctor.ring`; return what they found, None if they failed, and what the first said."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    inherited = {
        name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "TORCHELASTIC_", "OMPI_"))
    }
    with tempfile.TemporaryDirectory(prefix="longhaul-doctor-") as folder:
        file, processes = Path(folder, "found"), []
        for rank in range(num_ranks):
            variables = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": num_ranks, "LOCAL_WORLD_SIZE": num_ranks,
                         "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}  # fmt: skip
            environment = inherited | {name: str(value) for name, value in variables.items()}
            with open(Path(folder, str(rank)), "wb") as output:
                processes.append(subprocess.Popen(python_command("pretrain.doctor.ring", str(file)), env=environment,
                                                  stdout=output, stderr=output))  # fmt: skip
        give_up = time.monotonic() + seconds
        try:
            statuses: list[int | None] = []
            for process in processes:
                try:
                    statuses.append(process.wait(max(give_up - time.monotonic(), 0.1)))
                except subprocess.TimeoutExpired:
                    statuses.append(None)
        finally:
            for process in processes:
                process.kill()
                process.wait()
        bad = [rank for rank, status in enumerate(statuses) if status != 0]
        if not bad and file.exists():
            return json.loads(file.read_text(encoding="utf-8")), ""
        for rank in sorted(bad, key=lambda rank: statuses[rank] is None):  # who failed says more than who waited
            text = last_line(Path(folder, str(rank)).read_text(encoding="utf-8", errors="replace"))
            ended = f"no answer in {seconds:.0f} s" if statuses[rank] is None else f"status {statuses[rank]}"
            return None, f"rank {rank} of {num_ranks} ended with {ended}: {text or 'it said nothing'}"
        return None, "the ranks ended and left no result"


def judge(backend: str, found: dict[str, Any] | None, said: str, seconds: float) -> Line:
    """Say whether the ranks could meet and sum, and how fast."""
    if found is None:
        return failure("all-reduce", f"by {backend}: {said}", _MEND[backend])
    what = f"{found['backend']}{' ' + found['version'] if 'version' in found else ''}"
    if not found["is_right"]:
        return failure("all-reduce", f"{what} sums {counted(found['num_ranks'], 'rank')} wrongly", _MEND[backend])
    speeds = found["speeds"] or "one GPU: nothing to measure between ranks"
    return ok("all-reduce", f"{counted(found['num_ranks'], 'rank')}, {what}: {speeds} ({seconds:.0f} s with the start)")
