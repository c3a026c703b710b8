"""How a run stands, from outside: `queued`, `running` at which step and for how long yet, `stopped`, `failed` and why.

Read from the files of the run folder, and from SLURM where a job of the run is known; nothing is locked or written.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pretrain.cluster.slurm import Job, find_jobs, place_in_queue
from pretrain.console import counted, format_count, format_duration
from pretrain.errors import ConfigError
from pretrain.options.batch_plan import num_steps_of
from pretrain.options.config import Config
from pretrain.options.settings import load_config

SUBMISSIONS, SUBMITTED_CONFIG = "submit.json", "submit.yaml"
LIVE = ("queued", "starting", "running")
_TAIL_BYTES = 1 << 18  # of metrics.jsonl, whose lines have about a kilobyte
_RECENT_STEPS = 20
_HEARD_SECONDS = 900  # a run on another machine, of which no job is known, is lost after so long


@dataclass
class RunState:
    """How a run stands; what is not known is None or empty.

    Attributes:
        run: its folder.
        state: `queued`, `starting`, `running`, `done`, `stopped` (resumable), `failed`, `lost` (it ended and could not
            say so), or `new` (never started).
        reason: why it waits, stopped or failed.
        exit_status: of training, once it has ended.
        step, num_steps: steps done, and of the whole run.
        loss, tokens_per_second, step_seconds: of the last step; the time is a median of the last 20.
        silent_seconds: since the last step, or the last sign of a start.
        saved_step, next_save_step: the newest checkpoint, and the next one that is due.
        next_save_seconds, seconds_left: until then and until the end, at this pace.
        num_restarts: starts so far but for the first.
        job: of SLURM, as it stands.
        place: its place in the queue, and of how many.
        pid, host: of rank 0.
    """

    run: str
    state: str = "new"
    reason: str = ""
    exit_status: int | None = None
    step: int = 0
    num_steps: int | None = None
    loss: float | None = None
    tokens_per_second: float | None = None
    step_seconds: float | None = None
    silent_seconds: float | None = None
    saved_step: int | None = None
    next_save_step: int | None = None
    next_save_seconds: float | None = None
    seconds_left: float | None = None
    num_restarts: int = 0
    job: Job | None = None
    place: tuple[int, int] | None = None
    pid: int | None = None
    host: str = ""


def read_state(run: Path) -> RunState:
    """Find out how a run stands.

    Raises:
        ConfigError: the folder is not a run's.
    """
    status, starts = read_json(run / "status.json"), read_entries(run / "environment.json", "starts")
    if not status and not starts and not (run / SUBMISSIONS).exists():
        raise ConfigError(
            f"{run}: has no status.json, environment.json or {SUBMISSIONS}; expected the folder of a run that was "
            "started or submitted. Its name is run.dir of the config, or runs/ and the name of the config's file."
        )
    jobs = find_jobs(job_id) if (job_id := last_job(run)) else []
    state = RunState(
        str(run), exit_status=status.get("exit_status"), step=status.get("step") or 0, pid=status.get("pid"),
        saved_step=status.get("saved_step"), host=str(status.get("host", "")), num_restarts=max(len(starts) - 1, 0),
        job=jobs[0] if jobs else None,
    )  # fmt: skip
    _read_progress(state, run, len(starts))
    _judge(state, run, status)
    if state.state == "queued" and state.job:
        state.place = place_in_queue(state.job)
    return state


def last_job(run: Path) -> str:
    """Return the number of the run's newest job, that was submitted or has started; empty if none is known."""
    known = [(entry["timestamp"], entry["job"]) for entry in read_entries(run / SUBMISSIONS, "submissions")]
    for start in read_entries(run / "environment.json", "starts"):
        known.append((start["timestamp"], start.get("slurm_job") or ""))  # without one it was started by other means
    return str(max(known)[1]) if known else ""


def is_alive(run: Path, pid: int | None) -> bool:
    """Whether a process of this machine trains in a run folder: it has the folder's lock open."""
    lock = (run / ".lock").resolve()
    try:
        return any(os.readlink(path) == str(lock) for path in Path(f"/proc/{pid}/fd").iterdir())
    except PermissionError:
        return True  # another user's
    except OSError:
        return False


def _judge(state: RunState, run: Path, status: Mapping[str, Any]) -> None:
    """Say which of its states the run is in."""
    job, has_stepped = state.job, state.silent_seconds is not None
    state.state, state.reason = str(status.get("status", "new")), str(status.get("reason", ""))
    is_going = state.state == "running"
    if job and not job.has_ended:
        if job.is_waiting:
            state.state, state.reason = "queued", job.reason
        elif status.get("timestamp", 0) < job.start_seconds:  # said by an attempt before this one
            state.state, state.reason = "starting", ""
        elif is_going:
            state.state = "running" if has_stepped else "starting"
    elif is_going:
        heard = state.silent_seconds is not None and state.silent_seconds < _HEARD_SECONDS and not job
        if is_alive(run, state.pid) if state.host == platform.node() else heard:
            state.state = "running" if has_stepped else "starting"
        else:
            ended = f"job {job.job_id} is {job.state}" if job else f"its process on {state.host} has ended"
            state.state, state.reason = "lost", f"{ended}, and could not say why. The same command goes on"
    elif state.state == "new" and job:
        state.state, state.reason = "failed", _ended_early(job, run)
    elif state.state == "new":
        state.reason = "nothing has started, and SLURM knows no job of it (any more): see slurm-*.log there"


def _ended_early(job: Job, run: Path) -> str:
    return f"job {job.job_id} ended before training began: see {run}/slurm-{last_job(run)}.log"


def _read_progress(state: RunState, run: Path, attempt: int) -> None:
    """Take what the metrics and the config say."""
    config = _read_config(run)
    if config:
        state.num_steps = num_steps_of(config)
    lines = [line for line in _tail(run / "metrics.jsonl") if "loss" in line and "attempt" in line]
    if lines:
        last = lines[-1]
        state.step = max(state.step, last["step"])
        state.loss, state.tokens_per_second = last["loss"], last["tokens_per_second"]
        own = [line["step_seconds"] for line in lines if line["attempt"] == last["attempt"]][-_RECENT_STEPS:]
        state.step_seconds = statistics.median(own[1:] or own)  # the first one of a start takes longer
        if last["attempt"] == attempt:
            state.silent_seconds = max(0.0, time.time() - last["timestamp"])
    if config is None or state.step_seconds is None:
        return
    assert state.num_steps is not None
    every = config.checkpoint.every_steps
    state.next_save_step = min(state.num_steps, state.step + every - state.step % every) if every else state.num_steps
    state.next_save_seconds = (state.next_save_step - state.step) * state.step_seconds
    state.seconds_left = (state.num_steps - state.step) * state.step_seconds


def _read_config(run: Path) -> Config | None:
    for name in ("config.yaml", SUBMITTED_CONFIG):
        try:
            if (run / name).exists():
                return load_config(run / name)
        except ConfigError:  # of another version: the steps are known all the same
            continue
    return None


def _tail(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the last whole lines of a file of JSON lines."""
    try:
        with open(path, "rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - _TAIL_BYTES))
            lines = file.read().split(b"\n")
    except OSError:
        return
    for line in lines[1 if size > _TAIL_BYTES else 0 : -1]:
        try:
            yield json.loads(line)
        except ValueError:
            continue


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a file; an empty one if it cannot be read."""
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def read_entries(path: Path, name: str) -> list[dict[str, Any]]:
    """Return the objects in a list of a file's object; none if there is no such list."""
    entries = read_json(path).get(name)
    return [entry for entry in entries if isinstance(entry, dict)] if isinstance(entries, list) else []


def render(state: RunState) -> str:
    """Write it for people."""
    of = f" of {state.num_steps}" if state.num_steps else ""
    head, lines = f"{state.run}: {state.state}", []
    if state.state in LIVE and state.step:
        head += f" at step {state.step}{of}" if state.state == "running" else f", after step {state.step}{of}"
    elif state.state not in ("new", *LIVE):
        head += f" at step {state.step}{of}"
    if state.reason:
        head += f" ({state.reason})" if state.state == "queued" else f": {state.reason}"
    if state.loss is not None and state.state == "running":
        pace = f"{format_count(state.tokens_per_second or 0)} tokens/s, {state.step_seconds or 0:.3g} s a step"
        since = "" if state.silent_seconds is None else f"; the last one {format_duration(state.silent_seconds)} ago"
        lines.append(f"loss {state.loss:.4f}, {pace}{since}")
    saved = "no checkpoint yet" if state.saved_step is None else f"newest checkpoint: step {state.saved_step}"
    if state.state == "running" and state.next_save_seconds is not None:
        saved += f"; next one at step {state.next_save_step}, in {format_duration(state.next_save_seconds)}"
        lines += [saved, f"ends in {format_duration(state.seconds_left or 0)}"]
    else:
        lines.append(saved)
    if state.num_restarts:
        lines.append(f"{counted(state.num_restarts, 'restart')} so far")
    if state.job:
        lines.append(_describe(state.job, state.place))
    return "\n  ".join([head, *lines])


def _describe(job: Job, place: tuple[int, int] | None) -> str:
    text = f"job {job.job_id}: {job.state}"
    if job.is_waiting:
        text += f", {place[0]} of {place[1]} that wait in {job.partition}" if place else ""
        text += f", expected to start {job.start}" if job.start else ""
    elif not job.has_ended:
        text += f" on {job.nodes}" if job.nodes else ""
        text += f", {format_duration(job.seconds_left)} of its time left" if job.seconds_left is not None else ""
    elif job.exit_code:
        text += f" with status {job.exit_code}"
    return text + (f", requeued {job.num_restarts} times" if job.num_restarts > 1 else "")
