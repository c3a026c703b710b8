"""Starting a command as several ranks on this machine, as a launcher would."""

from __future__ import annotations

import os
import resource
import socket
import subprocess
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.record import ROOT


@dataclass(frozen=True)
class RanksRun:
    """How a command went: seconds from its start to the end of the last rank, and those of all their processors."""

    seconds: float
    cpu_seconds: float


def run_ranks(command: Sequence[str], num_ranks: int, timeout: float = 3600) -> RanksRun:
    """Run a command as ranks 0 to `num_ranks` - 1 and wait for all; each has its share of the processors.

    Raises:
        RuntimeError: a rank failed; with the end of what it wrote to stderr.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    num_threads = max(1, len(os.sched_getaffinity(0)) // num_ranks)
    variables = {"WORLD_SIZE": num_ranks, "LOCAL_WORLD_SIZE": num_ranks, "MASTER_ADDR": "127.0.0.1",
                 "MASTER_PORT": port, "OMP_NUM_THREADS": num_threads, "PYTHONPATH": ""}  # fmt: skip
    begin, before = time.monotonic(), resource.getrusage(resource.RUSAGE_CHILDREN)
    processes, logs = [], []
    try:
        for rank in range(num_ranks):
            values = variables | {"RANK": rank, "LOCAL_RANK": rank}
            logs.append(tempfile.TemporaryFile("w+"))
            processes.append(subprocess.Popen(
                command, cwd=ROOT, env=os.environ | {name: str(value) for name, value in values.items()},
                stdout=subprocess.DEVNULL, stderr=logs[-1],
            ))  # fmt: skip
        statuses = [process.wait(timeout) for process in processes]
        seconds, after = time.monotonic() - begin, resource.getrusage(resource.RUSAGE_CHILDREN)
        for rank, (status, log) in enumerate(zip(statuses, logs, strict=True)):
            if status:
                log.seek(0)
                raise RuntimeError(f"{' '.join(command)}: rank {rank} ended with {status}: {log.read().strip()[-800:]}")
    finally:
        for process in processes:
            process.kill()
        for log in logs:
            log.close()
    cpu_seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return RanksRun(seconds, cpu_seconds)
