"""The report of one run or several as one HTML page. The only file on plotly, whose plotly.js draws the curves."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from pretrain import __version__
from pretrain.redaction import redact
from pretrain.reporting.page import fill_page
from pretrain.reporting.run_figures import config_differences, figure_rows
from pretrain.reporting.run_records import RunRecord
from pretrain.reporting.run_series import curves, hours_of, is_finite, num_buckets, plain, slow_steps

MAX_EVENTS_OF_A_KIND = 200
MAX_MESSAGE = 2000  # characters
MAX_DOCUMENTS = 20  # that an event names
_SCRIPTS = ("report_elements", "report_charts", "report_sections")


def page_data(runs: Sequence[RunRecord], figures: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return what the page's script reads.

    Args:
        runs: as read.
        figures: of each, by `figures_of`.
    """
    return {
        "written": time.time(), "version": __version__, "figures": figure_rows(figures),
        "differences": config_differences([run.config for run in runs]) if len(runs) > 1 else [],
        "runs": [_run_data(run, own, num_buckets(len(runs))) for run, own in zip(runs, figures, strict=True)],
    }  # fmt: skip


def _run_data(run: RunRecord, figures: dict[str, Any], max_buckets: int) -> dict[str, Any]:
    events, left_out = events_of(run)
    parts = [(event.step, *(event.details.get(key) for key in ("seconds", "cpu_seconds")))
             for event in run.metrics.events if event.kind == "first_step"]  # fmt: skip
    starts = [(step, own, cpu if isinstance(cpu, dict) else {}) for step, own, cpu in parts if isinstance(own, dict)]
    return {
        "name": run.name, "path": str(run.path), "state": figures["state"], "reason": figures["reason"],
        "planned": run.num_planned, "notes": run.notes, "curves": curves(run, max_buckets),
        "evals": _evaluations(run), "events": events, "left_out": left_out,
        "phase_seconds": _finite(figures["phase_seconds"]), "step_seconds": figures["step_seconds"],
        "num_steps": run.metrics.num_steps, "start_parts": _finite(starts),
        "starts": [_finite(start) for start in run.starts], "kept": _kept(run),
        "samples": [[one.step, one.prompt, one.text, one.ended_by, one.num_left_out] for one in run.samples],
        "config": run.config_text, "log": redact(run.log),
    }  # fmt: skip


def events_of(run: RunRecord) -> tuple[list[tuple[int, str, str]], dict[str, int]]:
    """Return a run's events as (step, kind, message), in order of steps; and by kind how many are left out.

    Beside those that training recorded: checkpoints that are in the folder, steps that were slow, and how a run ended
    that could not say so itself.
    """
    found = []
    for event in run.metrics.events:
        documents = event.details.get("documents") or []
        names = "; ".join(map(str, documents[:MAX_DOCUMENTS])) if isinstance(documents, list) else ""
        more = f"; and {len(documents) - MAX_DOCUMENTS} more" if len(documents) > MAX_DOCUMENTS else ""
        found.append((event.step, event.kind, event.message + (f" ({names}{more})" if names else "")))
    found += [(step, "checkpoint", "is in checkpoints/, complete") for step in run.checkpoints]
    found += [(step, "slow_step", sentence) for step, sentence in slow_steps(run)]
    if run.state and run.state.state in ("failed", "lost") and not any(one[1] == run.state.state for one in found):
        found.append((run.state.step, run.state.state, run.state.reason))
    by_kind: dict[str, list[tuple[int, str, str]]] = {}
    for step, kind, message in sorted(found, key=lambda one: one[0]):
        text = message if len(message) <= MAX_MESSAGE else message[: MAX_MESSAGE - 1] + "…"
        by_kind.setdefault(kind, []).append((step, kind, text))
    half = MAX_EVENTS_OF_A_KIND // 2
    left_out = {kind: len(own) - 2 * half for kind, own in by_kind.items() if len(own) > 2 * half}
    kept = [one for own in by_kind.values() for one in (own if len(own) <= 2 * half else own[:half] + own[-half:])]
    return sorted(kept, key=lambda one: one[0]), left_out


def _evaluations(run: RunRecord) -> dict[str, Any]:
    """Return held-out losses and results of tasks during training, by key."""
    lines = run.metrics.evaluations
    columns = run.metrics.columns
    steps = [line["step"] for line in lines]
    keys = dict.fromkeys(key for line in lines for key in line if key.startswith("eval/"))
    hours = np.interp(steps, columns["step"], hours_of(run)) if run.metrics.num_steps else np.zeros(len(steps))
    values = {}
    for key in keys:
        numbers = [one if is_finite(one := line.get(key)) else None for line in lines]
        values[key.removeprefix("eval/")] = plain(np.array(numbers, dtype=np.float64))
    tokens = [one if isinstance(one := line.get("tokens"), int) else None for line in lines]
    return {"step": steps, "tokens": tokens, "hours": plain(hours), "values": values}


def _kept(run: RunRecord) -> list[dict[str, Any]]:
    """Return the results that `launch/evaluate.py` kept: step, of what, and its numbers by name."""
    rows = []
    for step, entries in run.evaluations:
        for entry in entries:
            numbers: dict[str, Any] = {}
            _collect(entry["result"], "", numbers)
            rows.append({"step": step, "name": str(entry["name"]), "numbers": _finite(numbers)})
    return rows


def _collect(tree: Any, prefix: str, numbers: dict[str, Any]) -> None:
    """Gather the numbers of a result by dotted name, without the values of single samples."""
    if isinstance(tree, dict):
        for key, value in tree.items():
            if not isinstance(value, list):
                _collect(value, f"{prefix}{key}.", numbers)
    elif isinstance(tree, (int, float)) and not isinstance(tree, bool):
        numbers[prefix[:-1]] = tree


def _finite(tree: Any) -> Any:
    """Return a tree as strict JSON can hold it."""
    if isinstance(tree, dict):
        return {str(key): _finite(value) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return [_finite(value) for value in tree]
    return None if isinstance(tree, float) and not np.isfinite(tree) else tree


def render(names: Sequence[str], data: dict[str, Any]) -> str:
    """Put the page together.

    Args:
        names: of the runs, for the title.
        data: from `page_data`.
    """
    from plotly.offline import get_plotlyjs  # optional

    title = ", ".join(names[:3]) + (f" and {len(names) - 3} more runs" if len(names) > 3 else "")
    return fill_page("report", title, data, scripts=_SCRIPTS, library=get_plotlyjs())
