"""Starts ranks in a second instead of ten: a process that has imported everything forks them.

`ForkServer` starts that process (this file, run as a script) and talks to it by lines of JSON: it forks the ranks of a
run and tells how they ended. A rank runs `launch/pretrain.py`, or another command, as `__main__`, to its own end, with a launcher's
variables; only the imports are shared. Nothing else may exist in the process that forks: no second thread, no process
group, no random numbers drawn. It checks the threads before every fork, and `test_fork_server.py` compares weights.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import runpy
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parents[2]
POLL_SECONDS = 0.005
PR_SET_CHILD_SUBREAPER = 36


class ForkedRanks:
    """The ranks of one run, in a process group of their own; `pids` in rank order."""

    def __init__(self, server: ForkServer, pids: list[int], log: Path) -> None:
        self._server, self.pids, self._log = server, pids, log

    def statuses(self) -> list[int | None]:
        """How each rank ended: its exit status, minus the signal that killed it, or None while it runs."""
        return self._server.ask({"statuses": self.pids})

    def is_running(self) -> bool:
        """Whether any rank runs."""
        return None in self.statuses()

    def wait(self, timeout: float = 60) -> list[int]:
        """Wait for all ranks, kill them if that takes longer than `timeout` seconds, and return how they ended."""
        give_up = time.monotonic() + timeout
        while None in (statuses := self.statuses()):
            if time.monotonic() > give_up:
                log = self.log()
                self.kill()
                raise AssertionError(f"ranks ended as {statuses} within {timeout} s; expected an end of all\n{log}")
            time.sleep(POLL_SECONDS)
        return statuses  # type: ignore[return-value]

    def send(self, number: int, rank: int | None = None) -> None:
        """Send a signal to a rank, or to all at once; to those that have ended, nothing."""
        with suppress(ProcessLookupError):
            if rank is None:
                os.killpg(self.pids[0], number)
            elif self.statuses()[rank] is None:
                os.kill(self.pids[rank], number)

    def kill(self) -> list[int]:
        """Kill all ranks at once and return how they ended."""
        self.send(signal.SIGKILL)
        return self.wait()

    def log(self, rank: int | None = None) -> str:
        """What a rank, or all, wrote to stdout and stderr."""
        ranks = range(len(self.pids)) if rank is None else [rank]
        return "".join(self._log.with_name(f"{self._log.name}-{n}").read_text(errors="replace") for n in ranks)


class ForkServer:
    """A process that forks ranks; also the parent of what ranks leave behind."""

    def __init__(self) -> None:
        """Start it, which takes seconds."""
        environment = os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
        # A session of its own: Ctrl-C and signals to the tests' group are not its ranks'.
        self._process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT,
            env=environment, start_new_session=True,
        )  # fmt: skip
        assert self._read() == "ready"

    def start(
        self,
        arguments: Sequence[str | Path],
        num_ranks: int,
        log: Path,
        hooks: Sequence[tuple[str, dict[str, Any]]] = (),
        command: str = "pretrain",
        **environment: str,
    ) -> ForkedRanks:
        """Start a command with these arguments.

        Args:
            arguments: config, overrides, options.
            num_ranks: how many processes.
            log: what rank N writes is appended to the file of this name with `-N` behind it.
            hooks: functions called in every rank before the command, as `module:function` and keyword arguments; each
                is also given `rank`.
            command: name of its file in `launch`.
            environment: variables besides a launcher's.
        """
        from tests.helpers.rank_helpers import free_port  # not where ranks are forked from

        common = {"WORLD_SIZE": num_ranks, "LOCAL_WORLD_SIZE": num_ranks, "MASTER_ADDR": "127.0.0.1",
                  "MASTER_PORT": free_port()} | environment  # fmt: skip
        request = {
            "arguments": [str(argument) for argument in arguments], "num_ranks": num_ranks, "log": str(log),
            "hooks": list(hooks), "environment": {name: str(value) for name, value in common.items()},
            "command": command,
        }  # fmt: skip
        return ForkedRanks(self, self.ask(request), log)

    def ask(self, request: dict[str, Any]) -> Any:
        """Send a request and return the answer."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return self._read()

    def _read(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, "the fork server has ended; what it wrote is above"
        return json.loads(line)

    def descendants(self) -> list[psutil.Process]:
        """Processes that live: ranks, what they started, and what killed ranks left behind."""
        self.ask({"statuses": []})  # reaps
        return psutil.Process(self._process.pid).children(recursive=True)

    def close(self) -> None:
        """End it, and whatever it started."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait(30)
        self._process.stdout.close()


def import_everything() -> None:
    """Import what a run imports, its late imports too."""
    sys.path[0] = str(ROOT)
    import deepspeed  # noqa: F401
    import sentencepiece  # noqa: F401
    import torch

    engine = importlib.import_module("pretrain.zero.engine")
    importlib.import_module("pretrain.training.train")
    engine._import_muon_without_compiler()
    for late in ("deepspeed.module_inject.auto_ep_config", "deepspeed.runtime.bf16_optimizer",
                 "deepspeed.runtime.zero.stage3", "setuptools", "torch._dynamo", "torch.distributed.fsdp",
                 "torch.utils.tensorboard"):  # fmt: skip
        importlib.import_module(late)
    assert not torch.distributed.is_initialized() and not torch.cuda.is_initialized()


def serve() -> tuple[dict[str, Any], int] | None:
    """Answer requests to the end of stdin; return a request and a rank where this is the process of one."""
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)  # what a killed rank started becomes a child of this
    ended: dict[int, int] = {}
    print(json.dumps("ready"), flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        if "statuses" in request:
            with suppress(ChildProcessError):
                while (found := os.waitpid(-1, os.WNOHANG))[0]:
                    ended[found[0]] = os.waitstatus_to_exitcode(found[1])
            print(json.dumps([ended.get(pid) for pid in request["statuses"]]), flush=True)
            continue
        threads = os.listdir("/proc/self/task")
        assert len(threads) == 1, f"{len(threads)} threads; expected one: locks of others would stay locked for ever"
        pids: list[int] = []
        for rank in range(request["num_ranks"]):
            pid = os.fork()
            if pid == 0:
                os.setpgid(0, pids[0] if pids else 0)
                return request, rank
            pids.append(pid)
            os.setpgid(pid, pids[0])  # whoever is first: nobody signals a group that is not there yet
        print(json.dumps(pids), flush=True)
    for child in psutil.Process().children(recursive=True):
        child.kill()
    return None


def become_rank(request: dict[str, Any], rank: int) -> None:
    """Run the command in this process, which ends with it."""
    with open(f"{request['log']}-{rank}", "ab") as log, open(os.devnull) as nothing:
        for stream, file in ((sys.stdin, nothing), (sys.stdout, log), (sys.stderr, log)):
            os.dup2(file.fileno(), stream.fileno())
    os.environ.update(request["environment"] | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
    for name, keywords in request["hooks"]:
        module, _, function = name.partition(":")
        getattr(importlib.import_module(module), function)(rank=rank, **keywords)
    command = ROOT / "launch" / f"{request['command']}.py"
    sys.argv = [str(command), *request["arguments"]]
    sys.path[0] = str(command.parent)  # as Python does for a script
    try:
        runpy.run_path(str(command), run_name="__main__")
    except SystemExit as ended:  # training ends so too; to take down all that was imported takes seconds
        sys.stdout.flush()
        os._exit(int(ended.code or 0))


if __name__ == "__main__":
    import_everything()
    if as_rank := serve():
        become_rank(*as_rank)
