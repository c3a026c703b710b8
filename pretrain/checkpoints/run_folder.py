"""The run folder: whose it is, what it may go on with, how the run stands, and reading a model back from it."""

from __future__ import annotations

import fcntl
import json
import logging
import os
import platform
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from pretrain import __version__
from pretrain.checkpoints.adapters import merged
from pretrain.checkpoints.checkpoint_files import CheckpointReader
from pretrain.checkpoints.checkpoint_folder import FolderPlace
from pretrain.checkpoints.checkpoint_places import Place, open_place
from pretrain.checkpoints.run_status import read_saved_step, write_status
from pretrain.checkpoints.saved_run import LoadedRun, SavedRun, saved_run
from pretrain.console import counted, warn
from pretrain.errors import CheckpointError, ConfigError
from pretrain.options.config import Config
from pretrain.options.config_changes import check_same_run
from pretrain.options.settings import load_config, parse_config, resolved_yaml
from pretrain.ranks.distributed import Ranks
from pretrain.redaction import RedactingFormatter, storable
from pretrain.storage.patient_file import PatientFile
from pretrain.storage.whole_file import write_text

CONFIG_FILE = "config.yaml"
EXPORT_REPORT = "verification.json"  # in every folder that `launch/convert.py` makes
_PACKAGES = (
    "torch",
    "deepspeed",
    "triton",
    "webdataset",
    "sentencepiece",
    "tokenizers",
    "numpy",
    "safetensors",
    "pydantic",
)


class RunFolder:
    """Rank 0's hold on a run folder; one process may hold it at a time.

    Attributes:
        path: the folder.
        attempt: number of this start.
        run_id: what tells the run from others, wherever its folder is moved to.
        events: what taking it up amounted to, as (event, message).
        former: the config that its checkpoints were made with; None if there are none.
    """

    def __init__(self, config: Config) -> None:
        """Create the folder, or take up the run in it.

        Raises:
            ConfigError: another job holds it, or it belongs to another config.
            StoreAccessError: the store of its checkpoints cannot be reached.
        """
        self.path = Path(config.run.dir)
        self.events: list[tuple[str, str]] = []
        self.former: Config | None = None
        self._status_problem = ""
        with writable(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = open(self.path / ".lock", "a+", encoding="utf-8")
        try:
            self._take_lock()
            with writable(self.path):
                self.attempt = self._take_up(config)
        except BaseException:
            self.close()
            raise

    def _take_lock(self) -> None:
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(
                f"run.dir is {self.path}; expected a folder that no other job is training in (see its status.json). "
                "Wait for that job, or use another run.dir."
            ) from None
        except OSError as error:
            raise ConfigError(
                f"run.dir is {self.path}, whose file system has no locks ({error.strerror}); expected one that has, so "
                "that no two jobs train in one folder. Have it mounted with them (Lustre: -o flock), or use another "
                "run.dir; checkpoint.dir may stay there."
            ) from None

    def _take_up(self, config: Config) -> int:
        for leftover in self.path.glob(".*.tmp-*"):  # of a file that was being written when a start was killed
            leftover.unlink(missing_ok=True)
        saved = self.path / CONFIG_FILE
        old = load_config(saved) if saved.exists() else None
        place = open_place(config.checkpoint, self.path, config.data)
        begins_anew = config.resume.from_scratch and old is not None and not old.resume.from_scratch
        if begins_anew:
            self._abandon_checkpoints(place, bool(config.checkpoint.dir))
        if place.has_any():  # before the first checkpoint there is nothing to go on with
            if old is None and config.checkpoint.dir:
                old = _config_in(place)  # the run folder was lost, and its checkpoints were not
            if old is None:
                raise ConfigError(
                    f"{self.path}: has checkpoints and no {CONFIG_FILE}; expected both. Restore it, or use another "
                    "run.dir."
                )
            check_same_run(self.path, old, config)  # what else does not fit is found when the checkpoint is loaded
            if config.resume.from_scratch:
                text = "was done by an earlier start, and this one goes on. To begin anew once more, leave it out once."
                self.events.append(("not_from_scratch", f"resume.from_scratch {text}"))
            self.former = old
        else:
            if old is not None and old.checkpoint.dir != config.checkpoint.dir and not begins_anew:
                self._check_moved(open_place(old.checkpoint, self.path, old.data), place)
            if saved_step := read_saved_step(self.path):
                raise ConfigError(
                    f"{self.path}: its status.json tells of a checkpoint of step {saved_step}, and {place} holds none; "
                    "expected that one. Restore the checkpoints, or mount what they are on; or begin anew with "
                    "resume.from_scratch=true or another run.dir."
                )
            self.accept(config)
        return self._write_environment()

    def _check_moved(self, before: Place, now: Place) -> None:
        """Refuse to begin anew because the checkpoints are elsewhere."""
        if steps := before.list_steps():
            raise ConfigError(
                f"checkpoint.dir is {now}, which holds no checkpoint; expected the run's "
                f"{counted(len(steps), 'checkpoint')}. Copy {before} there, or set checkpoint.dir back, or start a new "
                "run with run.dir=…"
            )

    def _abandon_checkpoints(self, place: Place, is_elsewhere: bool) -> None:
        """Set the checkpoints aside, as `resume.from_scratch` says."""
        folders = [self.path / "checkpoints"]
        if is_elsewhere and place.has_any():
            if not isinstance(place, FolderPlace):
                raise ConfigError(
                    f"resume.from_scratch is true, and checkpoint.dir is {place}, which holds checkpoints; expected "
                    "none: a store renames nothing, so that all of them would be copied to be set aside. Use another "
                    "checkpoint.dir, or move them away."
                )
            if place.is_of(self._read_run_id()):  # another run's stay: that run is named when the place is claimed
                folders.append(place.folder)
        write_status(self.path, "running", None, 0, "", saved_step=0)  # first: who is killed now does this again
        for folder in filter(Path.exists, folders):
            number = 1
            while (aside := folder.with_name(f"{folder.name}.abandoned-{number}")).exists():
                number += 1
            try:
                folder.rename(aside)
            except OSError as error:  # a mounted disk, or a folder above that is not ours
                raise ConfigError(
                    f"resume.from_scratch is true, and {folder} cannot be renamed to {aside.name} ({error}); expected "
                    "a folder in one that can be written. Move the checkpoints away, or use another checkpoint.dir."
                ) from None
            self.events.append(("from_scratch", f"the checkpoints of before are in {aside}, and stay there"))

    def _read_run_id(self) -> str:
        try:
            return str(json.loads((self.path / "environment.json").read_bytes())["run_id"])
        except (OSError, ValueError, KeyError, TypeError):
            return ""

    def accept(self, config: Config) -> None:
        """Write the config that the run goes on with: once it does, for a refused one must not lock out the old one.

        Raises:
            ConfigError: it cannot be written.
        """
        with writable(self.path):
            stored = Config.model_validate_json(json.dumps(storable(config.model_dump(mode="json"))))
            write_text(self.path / CONFIG_FILE, resolved_yaml(stored))

    def _write_environment(self) -> int:
        path = self.path / "environment.json"
        try:
            content = dict(json.loads(path.read_bytes())) if path.exists() else {"starts": []}
            starts = list(content["starts"])
        except (ValueError, KeyError, TypeError) as error:  # nothing that training needs
            aside = path.with_suffix(".damaged.json")
            warn(f"{path}: is not readable ({error!r}); kept as {aside.name}. Starts are counted from 1 again.")
            path.replace(aside)
            content, starts = {}, []
        self.run_id = str(content.get("run_id") or uuid.uuid4().hex)
        starts.append(environment())
        write_text(path, json.dumps({"run_id": self.run_id, "starts": starts}, indent=1))
        return len(starts)

    def add_to_environment(self, details: Mapping[str, Any]) -> None:
        """Add to what `environment.json` says of this start.

        Raises:
            ConfigError: it cannot be written.
        """
        path = self.path / "environment.json"
        with writable(self.path):
            content = json.loads(path.read_bytes())
            content["starts"][-1] |= details
            write_text(path, json.dumps(content, indent=1))

    def write_status(
        self, status: str, exit_status: int | None, step: int, reason: str = "", saved_step: int | None = None
    ) -> None:
        """Write `status.json`: `running`, `done`, `stopped` (resumable) or `failed`; a disk that fails is a warning."""
        problem = write_status(self.path, status, exit_status, step, reason, saved_step)
        if problem and problem != self._status_problem:
            warn(problem)
        self._status_problem = problem

    def close(self) -> None:
        """Let another job have the folder."""
        self._lock.close()


@contextmanager
def writable(folder: Path) -> Iterator[None]:
    """Enclose what is written to a run folder before the first step.

    Raises:
        ConfigError: it cannot be written.
    """
    try:
        yield
    except OSError as error:
        raise ConfigError(
            f"run.dir is {folder}; expected a folder that can be written ({error}). Free space there, or use another "
            "run.dir."
        ) from None


def environment() -> dict[str, Any]:
    """Describe this start: command, versions, commit, machine."""
    versions = {"longhaul": __version__, "python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine()
    return {
        "command": storable(sys.argv), "versions": versions, "git_commit": _git_commit(),
        "host": platform.node(), "slurm_job": os.environ.get("SLURM_ARRAY_JOB_ID") or os.environ.get("SLURM_JOB_ID"),
        "device": device, "cpu_cores": os.cpu_count(), "world_size": int(os.environ.get("WORLD_SIZE", "1")),
        "timestamp": time.time(),
    }  # fmt: skip


def _git_commit() -> str | None:
    root = Path(__file__).resolve().parents[2]
    command = ["git", "-C", str(root), "describe", "--always", "--dirty"]
    with suppress(OSError):  # many a container image has no git
        return subprocess.run(command, capture_output=True, text=True).stdout.strip() or None
    return None


def log_path(folder: Path, ranks: Ranks) -> Path:
    """The file of this rank's log."""
    return folder / ("log.txt" if ranks.is_first else f"log-rank{ranks.rank:05d}.txt")


class _LogFile(logging.Handler):
    """A log that a full disk delays."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self._file = PatientFile(path)

    def emit(self, record: logging.LogRecord) -> None:
        self._file.append(f"{self.format(record)}\n".encode(errors="backslashreplace"))

    def close(self) -> None:
        self._file.close()
        super().close()


def open_log(folder: Path, ranks: Ranks) -> None:
    """Send this rank's log to `log.txt`, other ranks' to files beside it."""
    handler = _LogFile(log_path(folder, ranks))
    handler.setFormatter(RedactingFormatter("%(asctime)s %(levelname)s %(message)s"))
    log = logging.getLogger("longhaul")
    log.setLevel(logging.INFO)
    log.propagate = False
    log.addHandler(handler)


def place_of_run(run: Path) -> Place:
    """Return where the checkpoints of a run folder lie, as its config says.

    Raises:
        ConfigError: its config cannot be read.
    """
    saved = run / CONFIG_FILE
    if not saved.exists():
        return FolderPlace(run / "checkpoints")
    config = load_config(saved)
    return open_place(config.checkpoint, run, config.data)


def _config_in(place: Place) -> Config | None:
    """Return the config in the newest checkpoint that can be read."""
    for step in reversed(place.list_steps()):
        with suppress(CheckpointError):
            return parse_config(place.open(step).manifest["about"]["config"])
    return None


def load_run(run: str | Path, step: int | None = None, allow_pipe: bool = False) -> LoadedRun:
    """Read the model of a run's newest checkpoint that verifies, or of update number `step`.

    Raises:
        LonghaulError: as `open_run`.
    """
    with open_run(run, step, allow_pipe) as saved:
        return saved.load()


@contextmanager
def open_run(run: str | Path, step: int | None = None, allow_pipe: bool = False) -> Iterator[SavedRun]:
    """Open a run's newest checkpoint that verifies, or that of update number `step`, until the end of the block.

    A checkpoint that others made must not run commands: its config's `data.allow_pipe` is replaced.

    Raises:
        ConfigError: no such folder, run or step.
        CheckpointError: the checkpoint is damaged, or its model or tokenizer is another than its config says.
        StoreAccessError: the store that it lies in cannot be read.
    """
    path = Path(run)
    own = newest_good(path, place_of_run(path), step)
    data = parse_config(own.manifest["about"]["config"]).data.model_copy(update={"allow_pipe": allow_pipe})
    saved = path / CONFIG_FILE
    also = load_config(saved).resume.from_ if saved.exists() else ""
    reader = merged(own, path, data, also)  # what is evaluated, exported and talked to is one model
    try:
        yield saved_run(reader, path, allow_pipe)
    finally:
        reader.close()


def newest_good(run: Path, place: Place, step: int | None) -> CheckpointReader:
    """Open a run's newest checkpoint that verifies, or that of update number `step`.

    Raises:
        ConfigError: there is no such step, or none.
        CheckpointError: it is damaged.
    """
    steps = place.list_steps()
    if not steps:
        raise ConfigError(
            f"{run}: holds no checkpoint; expected a run folder in which training has saved. {_advice(run)}"
        )
    if step is not None and step not in steps:
        raise ConfigError(f"--step is {step}; expected one of the checkpoints in {run}: {', '.join(map(str, steps))}.")
    return _open_good(place, [step] if step is not None else list(reversed(steps)))


def _advice(run: Path) -> str:
    """What to do where there is no checkpoint."""
    if (run / EXPORT_REPORT).exists():
        return "This is an export: name the run that it was made from."
    if (run / "config.json").exists():
        return "This is a model in Hugging Face's format: import it by launch/convert.py --from hf."
    if run.is_file():
        return "This is a file: name the run folder, which is run.dir of the config or runs/ and the name of its file."
    return "Train first." if run.is_dir() else "There is no such folder: correct the path."


def _open_good(place: Place, steps: list[int]) -> CheckpointReader:
    problems = []
    for step in steps:
        try:
            reader = place.open(step)
            reader.verify()
        except CheckpointError as error:
            problems.append(str(error))
            continue
        for problem in problems:
            print(f"warning: {problem} Taken instead: step {step}.", file=sys.stderr)
        return reader
    raise CheckpointError(problems[0])
