"""What a run folder says of its run, read for a report. What is missing, cut short or damaged is left out and named."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from pretrain.cluster.run_state import RunState, read_entries, read_json, read_state
from pretrain.console import counted
from pretrain.errors import ConfigError
from pretrain.options.batch_plan import num_steps_of
from pretrain.options.config import Config
from pretrain.options.settings import load_config

MAX_SAMPLE_PAGES = 60  # of text that the model wrote
MAX_SAMPLE_CHARACTERS = 4000
MAX_LOG_LINES = 200
_LOG_TAIL_BYTES = 1 << 16
_CHUNK_LINES = 5000  # that become columns at once: a million lines as objects would take gigabytes
_PROMPT = re.compile(r"^--- prompt (.+), ended by (\w+) ---\n", re.MULTILINE)  # as generation/samples.py writes it


@dataclass
class Event:
    """Something that happened, at a step."""

    step: int
    kind: str
    message: str
    details: dict[str, Any] = field(default_factory=dict)


@dataclass
class Metrics:
    """A `metrics.jsonl`.

    Attributes:
        columns: of the training lines, by key, in the order of steps; NaN where a line lacks it.
        evaluations: lines with held-out losses or results of tasks.
        events: in the order of the file.
        num_unreadable: lines that are none.
        is_cut: the last one is not whole: it is being written, or a crash cut it.
    """

    columns: dict[str, np.ndarray] = field(default_factory=dict)
    evaluations: list[dict[str, Any]] = field(default_factory=list)
    events: list[Event] = field(default_factory=list)
    num_unreadable: int = 0
    is_cut: bool = False

    @property
    def num_steps(self) -> int:
        """How many steps there are lines of."""
        return len(self.columns.get("step", ()))


@dataclass
class Sample:
    """Text that the model wrote, going on from a prompt; `num_left_out` characters at the end are not here."""

    step: int
    prompt: str
    text: str
    ended_by: str
    num_left_out: int = 0


@dataclass
class RunRecord:
    """A run folder, as far as it can be read.

    Attributes:
        path, name: the folder, and what the run is called beside others.
        state: how it stands; None if neither `status.json` nor `environment.json` is there.
        config, config_text: None and empty if there is none that can be read.
        num_planned: steps of the whole run, by the config; 0 if unknown.
        starts: of `environment.json`, each start's own entry.
        evaluations: entries that `launch/evaluate.py` kept, by step.
        checkpoints: steps of those in the folder.
        notes: what is missing or left out, in sentences.
    """

    path: Path
    name: str
    metrics: Metrics
    state: RunState | None = None
    config: Config | None = None
    config_text: str = ""
    num_planned: int = 0
    starts: list[dict[str, Any]] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)
    evaluations: list[tuple[int, list[dict[str, Any]]]] = field(default_factory=list)
    checkpoints: list[int] = field(default_factory=list)
    log: str = ""
    notes: list[str] = field(default_factory=list)


def read_run(path: Path, name: str) -> RunRecord:
    """Read a run folder.

    Raises:
        ConfigError: it is no run's.
    """
    known = ("metrics.jsonl", "status.json", "environment.json")
    if not any((path / file).exists() for file in known):
        raise ConfigError(
            f"RUN is {path}; expected the folder of a run that was started, with a metrics.jsonl, status.json or "
            "environment.json. Its name is run.dir of the config, or runs/ and the name of the config's file."
        )
    try:
        run = RunRecord(path, name, read_metrics(path / "metrics.jsonl"))
    except OSError as error:
        raise ConfigError(f"{error.filename}: is not readable ({error.strerror}); expected a run's metrics.") from None
    run.starts = read_entries(path / "environment.json", "starts")
    if read_json(path / "status.json") or run.starts:
        try:
            run.state = read_state(path)
        except (KeyError, TypeError, ValueError):
            run.notes.append("How the run stands is not known: status.json or the last metrics are damaged.")
    _read_config(run)
    run.checkpoints = [int(folder.name[5:]) for folder in _named(path / "checkpoints", "step-*")]
    _read_samples(run)
    for file in _named(path / "evaluations", "step-*.json"):
        kept = [one for one in read_entries(file, "entries") if one.keys() >= {"name", "result", "settings"}]
        run.evaluations += [(int(file.stem[5:]), kept)] if kept else []
    run.log = _read_log(path / "log.txt")
    run.notes += _missing(run)
    return run


def read_metrics(path: Path) -> Metrics:
    """Read a `metrics.jsonl`; one that does not exist has no lines.

    Where a step has two lines, since what was past a checkpoint could not be removed, the later one counts.

    Raises:
        OSError: it exists and cannot be read.
    """
    metrics, chunks, rows = Metrics(), [], []
    for line in _lines(path, metrics):
        if "event" in line:
            details = {key: value for key, value in line.items() if key not in ("step", "event", "message")}
            metrics.events.append(Event(line["step"], str(line["event"]), str(line.get("message", "")), details))
        elif "loss" in line:
            rows.append(line)
            if len(rows) == _CHUNK_LINES:
                chunks.append(_columns_of(rows))
                rows = []
        elif any(key.startswith("eval/") for key in line):
            metrics.evaluations.append(line)
    chunks += [_columns_of(rows)] if rows else []
    keys = dict.fromkeys(key for chunk in chunks for key in chunk)
    sizes = [len(chunk["step"]) for chunk in chunks]
    for key in keys:
        parts = (chunk.pop(key, None) for chunk in chunks)  # popped: a long run's columns are not held twice
        metrics.columns[key] = np.concatenate(
            [np.full(size, np.nan) if part is None else part for part, size in zip(parts, sizes, strict=True)]
        )
    if keys and (np.diff(metrics.columns["step"]) <= 0).any():
        steps = metrics.columns["step"][::-1]
        places = len(steps) - 1 - np.unique(steps, return_index=True)[1]
        metrics.columns = {key: column[places] for key, column in metrics.columns.items()}
    latest = {(line["step"], any(key.startswith("eval/task/") for key in line)): line for line in metrics.evaluations}
    metrics.evaluations = sorted(latest.values(), key=lambda line: line["step"])
    return metrics


def _lines(path: Path, metrics: Metrics) -> Iterator[dict[str, Any]]:
    """Yield the objects of a file that have a step; count what is none."""
    if not path.exists():
        return
    with open(path, "rb") as file:
        for line in file:
            try:
                content = json.loads(line)
                if type(content["step"]) is not int:
                    raise TypeError
            except (ValueError, KeyError, TypeError):
                if line.endswith(b"\n"):
                    metrics.num_unreadable += bool(line.strip())
                else:
                    metrics.is_cut = True
                continue
            yield content


def _columns_of(rows: list[dict[str, Any]]) -> dict[str, np.ndarray]:
    found = {}
    for key in dict.fromkeys(key for row in rows for key in row):
        values = [row.get(key) for row in rows]
        try:
            column = np.array(values, dtype=np.float64)  # None becomes NaN
        except (ValueError, TypeError, OverflowError):  # text, lists: nothing to draw
            column = np.array(
                [one if isinstance(one, (int, float)) and abs(one) < 1e300 else np.nan for one in values],
                dtype=np.float64,
            )
        found[key] = np.where(np.isfinite(column), column, np.nan) if column.ndim == 1 else np.full(len(rows), np.nan)
    return found


def _named(folder: Path, pattern: str) -> list[Path]:
    """Return what a folder has of the names `step-NNNNNNNN…`, in order."""
    found = [path for path in folder.glob(pattern) if path.name.removesuffix(path.suffix)[5:].isdecimal()]
    return sorted(found, key=lambda path: int(path.name.removesuffix(path.suffix)[5:]))


def _read_config(run: RunRecord) -> None:
    path = run.path / "config.yaml"
    try:
        run.config_text = path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        run.notes.append("There is no config.yaml that can be read.")
        return
    try:
        run.config = load_config(path)
        run.num_planned = num_steps_of(run.config)
    except ConfigError:
        run.notes.append("config.yaml is of another version of Longhaul: it is shown, and not compared.")


def _read_samples(run: RunRecord) -> None:
    pages = _named(run.path / "samples", "step-*.txt")
    if len(pages) > MAX_SAMPLE_PAGES:
        run.notes.append(f"Of {len(pages)} pages of samples {MAX_SAMPLE_PAGES} are here, evenly spread.")
        pages = [pages[round(place)] for place in np.linspace(0, len(pages) - 1, MAX_SAMPLE_PAGES)]
    for page in pages:
        try:
            run.samples += parse_samples(int(page.stem[5:]), page.read_text(encoding="utf-8", errors="replace"))
        except OSError as error:
            run.notes.append(f"{page.name} of the samples cannot be read ({error.strerror}).")


def parse_samples(step: int, page: str) -> list[Sample]:
    """Take apart a page that training wrote: what the model went on with from each prompt."""
    found = []
    heads = [(match, prompt) for match in _PROMPT.finditer(page) if (prompt := _prompt_of(match, page)) is not None]
    for number, (head, prompt) in enumerate(heads):
        is_last = number + 1 == len(heads)
        body = page[head.end() : len(page) if is_last else heads[number + 1][0].start()]
        text = body.removesuffix("\n" if is_last else "\n\n")[len(prompt) :]
        left_out = max(0, len(text) - MAX_SAMPLE_CHARACTERS)
        found.append(Sample(step, prompt, text[:MAX_SAMPLE_CHARACTERS], head[2], left_out))
    return found


def _prompt_of(match: re.Match[str], page: str) -> str | None:
    """Return the prompt of a head; None if it only looks like one, in what a model wrote."""
    try:
        prompt = ast.literal_eval(match[1])
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return None
    return prompt if isinstance(prompt, str) and page.startswith(prompt, match.end()) else None


def _read_log(path: Path) -> str:
    """Return the last lines of a log."""
    try:
        with open(path, "rb") as file:
            size = file.seek(0, 2)
            file.seek(max(0, size - _LOG_TAIL_BYTES))
            lines = file.read().decode(errors="replace").splitlines()
    except OSError:
        return ""
    return "\n".join(lines[1 if size > _LOG_TAIL_BYTES else 0 :][-MAX_LOG_LINES:])


def _missing(run: RunRecord) -> Iterator[str]:
    metrics = run.metrics
    if not metrics.num_steps:
        yield "No step is recorded yet."
    if metrics.num_unreadable:
        yield f"{counted(metrics.num_unreadable, 'line')} of metrics.jsonl cannot be read, and left out."
    if metrics.is_cut:
        yield "The last line of metrics.jsonl is not whole (it was being written), and is left out."
    if run.state is None:
        yield (
            "There is neither a status.json nor an environment.json that can be read: how the run stands, and where it "
            "ran, is not known."
        )
    elif not run.starts:
        yield "There is no environment.json that can be read: where the run ran is not known."
    mfu = metrics.columns.get("mfu", np.empty(0))
    if num_above := int((mfu > 1).sum()):
        yield (
            f"MFU above 100% in {counted(num_above, 'step')} is left out: the peak of a CPU is measured at the start, "
            "and was when others used it."
        )
