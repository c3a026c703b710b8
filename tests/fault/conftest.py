"""What the tests of faults share: starting runs, the undisturbed run to compare with, and a look at what is left."""

from __future__ import annotations

import os
import random
import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.helpers.fork_server import ForkedRanks, ForkServer
from tests.helpers.rank_helpers import losses, newest, state_hash

COMPILERS = re.compile(r"cc\w{6}\.\w+")  # gcc's own, of one that was killed at work: libraries call it at a start
LEFT_SECONDS = 10.0  # within which everything is gone
NUM_STEPS, EVERY = 12, 3
SUMMARY = pytest.StashKey[list[str]]()


class Starter:
    """Starts runs that save every third of twelve steps."""

    def __init__(self, server: ForkServer, config: Path, folder: Path) -> None:
        self._server, self._config, self._folder = server, config, folder
        self._temporary = folder / "temporary-files"
        self._temporary.mkdir(exist_ok=True)

    def __call__(
        self, run: Path, *overrides: str, num_ranks: int = 2, hooks: Sequence[tuple[str, dict[str, Any]]] = (),
        log: Path | None = None, **environment: str,
    ) -> ForkedRanks:  # fmt: skip
        """Start a run, or let it go on; what it writes is added to `log`."""
        common = [f"run.dir={run}", f"train.micro_batch_size={8 // num_ranks}", f"train.num_steps={NUM_STEPS}",
                  f"checkpoint={{every_steps: {EVERY}, keep_last: 9}}"]  # fmt: skip
        log = log or self._folder / f"{run.name}.log"
        arguments = [self._config, *common, *overrides]
        return self._server.start(arguments, num_ranks, log, hooks, TMPDIR=str(self._temporary), **environment)

    def processes(self) -> list[psutil.Process]:
        """Ranks that run, and whatever ranks have left."""
        return self._server.descendants()

    def finish(self, run: Path, *overrides: str, num_ranks: int = 2) -> None:
        """Take a run to its end."""
        ranks = self(run, *overrides, num_ranks=num_ranks)
        assert ranks.wait() == [0] * num_ranks, ranks.log()


@pytest.fixture
def start(fork_server: ForkServer, tiny_config: Path, tmp_path: Path) -> Starter:
    """Start ranks: `start(run, "key=value", hooks=[...])`."""
    return Starter(fork_server, tiny_config, tmp_path)


@pytest.fixture(scope="session")
def undisturbed(
    fork_server: ForkServer, tiny_config: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., tuple[str, list[float]]]:
    """What a run without faults, with the same overrides, ends with: hash of weights and moments, and its losses."""
    folder = tmp_path_factory.mktemp("undisturbed")
    starter, known = Starter(fork_server, tiny_config, folder), {}

    def result(*overrides: str) -> tuple[str, list[float]]:
        if overrides not in known:
            run = folder / f"run-{len(known)}"
            starter.finish(run, *overrides)
            known[overrides] = state_hash(newest(run)), losses(run)
        return known[overrides]

    return result


class Repetitions:
    """How often a test repeats its fault, and at which random moments; one printed line each, and a summary last."""

    def __init__(self, name: str, summary: list[str]) -> None:
        self._name, self._summary = name, summary
        self._begin = time.monotonic()
        seed = int(os.environ.get("KILL_SEED", time.time_ns() % 10**6))
        self._say(f"KILL_SEED={seed}")  # shown if the test fails
        self.random = random.Random(seed)
        self._num_done = 0

    def __call__(self, few: int, many: int) -> range:
        """Return the repetitions: `few` in `make test`, `many` where LONGHAUL_SOAK=1, as many as it says otherwise."""
        soak = int(os.environ.get("LONGHAUL_SOAK") or 0)
        return range(few if soak == 0 else many if soak == 1 else soak)

    def done(self, what: str) -> None:
        """Say how a repetition went."""
        self._num_done += 1
        self._say(f"{self._num_done}: {what}")

    def _say(self, text: str) -> None:
        print(f"{self._name}  {text}", flush=True)

    def close(self) -> None:
        """Leave a line for the summary."""
        self._summary.append(f"{self._name}: {self._num_done} times, {time.monotonic() - self._begin:.0f} s")


@pytest.fixture
def repeat(request: pytest.FixtureRequest) -> Iterator[Repetitions]:
    """Repeat a fault: `for number in repeat(5, 30)`."""
    repetitions = Repetitions(request.node.name, request.config.stash.setdefault(SUMMARY, []))
    yield repetitions
    repetitions.close()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """What `make soak` ends with."""
    for line in terminalreporter.config.stash.get(SUMMARY, []) if "LONGHAUL_SOAK" in os.environ else []:
        terminalreporter.write_line(f"soak: {line}")


def not_held_by_others(names: set[str]) -> set[str]:
    """Those of the names in /dev/shm that no process of other tests, which may run beside, has open or mapped."""
    own = {os.getpid(), *(process.pid for process in psutil.Process().children(recursive=True))}
    for process in psutil.process_iter() if names else ():
        if process.pid not in own:
            with suppress(psutil.Error, OSError):  # it has ended, or is another user's
                for file in [*process.open_files(), *process.memory_maps()]:
                    names.discard(Path(file.path).name)
    return names


@pytest.fixture(autouse=True)
def nothing_is_left(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[None]:
    """After every test of a fault there is no process, no shared memory, no mount and no temporary file more."""
    server = request.getfixturevalue("fork_server") if "fork_server" in request.fixturenames else None
    own, shared = {process.pid for process in psutil.Process().children(recursive=True)}, set(os.listdir("/dev/shm"))

    def left() -> list[str]:
        if server:
            server.ask({"statuses": []})  # takes notice of ends
        mounts = [line.split()[1] for line in Path("/proc/mounts").read_text().splitlines()]
        return [
            *(f"process {p.pid}" for p in psutil.Process().children(recursive=True) if p.pid not in own),
            *(f"/dev/shm/{name}" for name in not_held_by_others(set(os.listdir("/dev/shm")) - shared)),
            *(f"mount {path}" for path in mounts if path.startswith(str(tmp_path))),
            *(str(path) for path in tmp_path.rglob("*") if ".tmp" in path.name),
            *(str(path) for path in (tmp_path / "temporary-files").glob("*") if not COMPILERS.fullmatch(path.name)),
        ]

    yield
    give_up = time.monotonic() + LEFT_SECONDS
    while (found := left()) and time.monotonic() < give_up:
        time.sleep(0.1)
    for process in server.descendants() if server else []:
        process.kill()
    assert found == []
