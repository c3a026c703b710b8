"""Curves of a run, short enough for a page: buckets of steps with their mean, least and greatest values.

Nothing that stands out is lost by it: a spike of one step among a million is its bucket's greatest value.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from pretrain.reporting.run_records import RunRecord

MAX_BUCKETS = 2000  # of one run
MAX_BUCKETS_IN_ALL = 12_000
# Counts since the run began, and what steps on smoothly: the last value of a bucket tells all.
_LAST = ("tokens", "lr", "skipped_steps", "clipped_steps", "damaged_documents", "damaged_tokens", "attempt")
_UNSHOWN = ("step", "timestamp")
SLOW_TIMES = 3.0  # a step is slow that takes so many times the median of its attempt
MAX_SLOW = 100


def num_buckets(num_runs: int) -> int:
    """Return how many buckets each of so many runs may have on one page."""
    return min(MAX_BUCKETS, MAX_BUCKETS_IN_ALL // max(num_runs, 1))


def curves(run: RunRecord, max_buckets: int) -> dict[str, Any]:
    """Return a run's curves as JSON can hold them; numbers of six digits, None where there is none.

    Returns:
        `width`: steps of a bucket; `step`, `tokens`, `hours`: of the last step in each bucket, hours since the first
        start; `steps`: how many there are in each; `series`: by key [means] where a bucket is one step or the
        key is a count, else [means, least, greatest]; `mixture`: by corpus its tokens in each bucket;
        `phases`: by phase the mean seconds of a step.
    """
    columns = shown_columns(run)
    steps = columns.get("step", np.empty(0))
    if not len(steps):
        lists, mappings = ("step", "tokens", "hours", "steps"), ("series", "mixture", "phases")
        return {"width": 1} | {name: [] for name in lists} | {name: {} for name in mappings}
    width = -(-int(steps[-1] - steps[0] + 1) // max_buckets)
    begins = np.flatnonzero(np.diff((steps - 1) // width, prepend=-1))
    ends = np.append(begins[1:], len(steps)) - 1
    series, phases = {}, {}
    for key, column in columns.items():
        if key in _UNSHOWN or key.startswith("tokens/") or np.isnan(column).all():
            continue
        is_count = key in _LAST or key.startswith("epoch/")
        mean = column[ends] if is_count else _means(column, begins)
        if key.startswith("seconds/"):
            phases[key.removeprefix("seconds/")] = plain(mean)
        elif width == 1 or is_count or key.startswith("layer/"):  # of many layers, bounds would be too much
            series[key] = [plain(mean)]
        else:
            least, greatest = (bound.reduceat(column, begins) for bound in (np.fmin, np.fmax))
            series[key] = [plain(mean), plain(least), plain(greatest)]
    return {
        "width": width, "step": [int(step) for step in steps[ends]],
        "tokens": whole(columns["tokens"][ends]) if "tokens" in columns else [],
        "hours": [round(hours, 5) for hours in hours_of(run)[ends].tolist()], "steps": whole(ends - begins + 1),
        "series": series, "mixture": _mixture(columns, ends), "phases": phases,
    }  # fmt: skip


def shown_columns(run: RunRecord) -> Mapping[str, np.ndarray]:
    """Return the columns of a run, without MFU above 100%."""
    columns = dict(run.metrics.columns)
    if "mfu" in columns:
        is_above = columns["mfu"] > 1
        columns |= {key: np.where(is_above, np.nan, columns[key]) for key in ("mfu", "mfu_causal") if key in columns}
    return columns


def hours_of(run: RunRecord) -> np.ndarray:
    """Return when each step ended, in hours since the first start; 0 where that is not known."""
    columns = run.metrics.columns
    if "timestamp" not in columns:
        return np.zeros(run.metrics.num_steps)
    stamps = columns["timestamp"]
    known = np.flatnonzero(np.isfinite(stamps))
    if not len(known):
        return np.zeros(len(stamps))
    stamps = np.interp(np.arange(len(stamps)), known, stamps[known])
    first = float(stamps[0] - np.nan_to_num(columns.get("step_seconds", np.zeros(1))[0]))
    begin = min([first, *(start["timestamp"] for start in run.starts[:1] if is_finite(start.get("timestamp")))])
    return np.maximum(stamps - begin, 0.0) / 3600


def slow_steps(run: RunRecord) -> list[tuple[int, str]]:
    """Return the slowest of the steps that took `SLOW_TIMES` the median of their attempt, and a sentence on each.

    The first step of a start is not among them: `first_step` tells of it.
    """
    columns = run.metrics.columns
    if "step_seconds" not in columns:
        return []
    seconds, steps = columns["step_seconds"], columns["step"]
    attempts = np.nan_to_num(columns.get("attempt", np.ones(len(seconds))))
    found = []
    for attempt in np.unique(attempts):
        own = np.flatnonzero(attempts == attempt)[1:]
        if not np.isfinite(seconds[own]).any():
            continue
        median = float(np.nanmedian(seconds[own]))
        found += [
            (float(seconds[place]), int(steps[place]), median)
            for place in own[seconds[own] > SLOW_TIMES * median]
        ]  # fmt: skip
    slowest = sorted(found, reverse=True)[:MAX_SLOW]
    return sorted(
        (step, f"{took:.3g} s, {took / max(median, 1e-9):.1f} times the median of this start ({median:.3g} s)")
        for took, step, median in slowest
    )  # fmt: skip


def _means(column: np.ndarray, begins: np.ndarray) -> np.ndarray:
    is_known = np.isfinite(column)
    sums = np.add.reduceat(np.where(is_known, column, 0.0), begins)
    counts = np.add.reduceat(is_known.astype(np.int64), begins)
    return np.where(counts > 0, sums / np.maximum(counts, 1), np.nan)


def _mixture(columns: Mapping[str, np.ndarray], ends: np.ndarray) -> dict[str, list[int | None]]:
    """Return the tokens of each corpus in each bucket, of which a page makes shares."""
    found = {}
    for key, column in columns.items():
        if key.startswith("tokens/"):  # a corpus that a phase brings begins at nothing
            taken = np.diff(np.nan_to_num(column)[ends], prepend=0.0)
            if columns["step"][0] > 1:  # what was before the first line is not this bucket's
                taken[0] = 0.0
            found[key.removeprefix("tokens/")] = whole(np.maximum(taken, 0.0))
    return found


def is_finite(value: object) -> bool:
    """Whether it is a number that can be drawn."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def plain(values: np.ndarray) -> list[float | None]:
    """Return numbers of six digits, None for NaN."""
    return [None if value != value else float(f"{value:.6g}") for value in values.tolist()]


def whole(values: np.ndarray) -> list[int | None]:
    """Return whole numbers, None for NaN."""
    return [None if value != value else int(value) for value in values.tolist()]
