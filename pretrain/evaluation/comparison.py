"""Results of evaluations beside each other: differences, their standard errors, and tables for people."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Score:
    """One number of an evaluation.

    Attributes:
        value: mean over samples or, where there are weights, sum over sum of weights; or any other number of them.
        stderr: its standard error; None if unknown.
        samples: of each sample its value, or its sum where there are weights; empty if unknown.
        weights: of each sample, such as its tokens.
        samples_are: what they are of; only scores of the same samples are compared sample by sample.
    """

    value: float
    stderr: float | None = None
    samples: Sequence[float] = ()
    weights: Sequence[float] = ()
    samples_are: str = ""


@dataclass(frozen=True)
class Row:
    """A checkpoint of a run, with its scores by name."""

    label: str
    scores: dict[str, Score] = field(default_factory=dict)


@dataclass(frozen=True)
class Difference:
    """How much a score is above another; `is_paired` says whether `stderr` is that of the samples' differences."""

    value: float
    stderr: float | None
    is_paired: bool


def ratio_stderr(sums: Sequence[float], weights: Sequence[float]) -> float | None:
    """Return the standard error of sum(sums) / sum(weights) over samples that are drawn with both.

    Source: Cochran 1977, "Sampling Techniques", equation 6.13, without the correction for a finite population.
    """
    total, count = math.fsum(weights), len(sums)
    if count < 2 or total <= 0:
        return None
    ratio = math.fsum(sums) / total
    squares = math.fsum((one - ratio * weight) ** 2 for one, weight in zip(sums, weights, strict=True))
    return math.sqrt(squares * count / (count - 1)) / total


def difference(score: Score, base: Score) -> Difference:
    """Subtract a score, sample by sample where both are of the same ones."""
    value = score.value - base.value
    if _is_same_sample(score, base):
        weights = score.weights or [1.0] * len(score.samples)
        changes = [one - other for one, other in zip(score.samples, base.samples, strict=True)]
        return Difference(value, ratio_stderr(changes, weights), True)
    if score.stderr is None or base.stderr is None:
        return Difference(value, None, False)
    return Difference(value, math.hypot(score.stderr, base.stderr), False)


def _is_asked_otherwise(score: Score, base: Score) -> bool:
    return bool(score.samples_are and base.samples_are and score.samples_are != base.samples_are)


def _is_same_sample(score: Score, base: Score) -> bool:
    """Whether the samples' differences tell of the scores' difference."""
    if not score.samples_are or score.samples_are != base.samples_are:
        return False
    if len(score.samples) != len(base.samples) or list(score.weights) != list(base.weights):
        return False
    # Some metrics are not a mean of what their samples have.
    return all(math.isclose(_mean(one), one.value, rel_tol=1e-6, abs_tol=1e-9) for one in (score, base))


def _mean(score: Score) -> float:
    total = math.fsum(score.weights) if score.weights else float(len(score.samples))
    return math.fsum(score.samples) / total if total else math.nan


def differences(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Compare all rows with the first, for JSON."""
    first, found = rows[0], []
    for row in rows[1:]:
        for name, score in row.scores.items():
            if name in first.scores:
                change = difference(score, first.scores[name])
                found.append({"name": name, "of": row.label, "from": first.label, "value": change.value,
                              "stderr": change.stderr, "is_paired": change.is_paired})  # fmt: skip
    return found


def table(rows: Sequence[Row]) -> str:
    """Write scores, one row a checkpoint, and how the others differ from the first."""
    names = list(dict.fromkeys(name for row in rows for name in row.scores))
    lines = [["", *names]]
    for row in rows:
        cells = [_with_error(row.scores[name], "") if name in row.scores else "-" for name in names]
        lines.append([row.label, *cells])
    text = aligned(lines)
    if len(rows) > 1:
        changes: list[list[str]] = [[f"minus {rows[0].label}", *names]]
        marked = others = False
        for row in rows[1:]:
            cells = []
            for name in names:
                if name not in row.scores or name not in rows[0].scores:
                    cells.append("-")
                    continue
                change = difference(row.scores[name], rows[0].scores[name])
                is_clear = change.stderr is not None and abs(change.value) > 1.96 * change.stderr
                marked |= is_clear
                is_other = _is_asked_otherwise(row.scores[name], rows[0].scores[name])
                others |= is_other
                marks = (" *" if is_clear else "") + (" ~" if is_other else "")
                cells.append(_with_error(Score(change.value, change.stderr), "+") + marks)
            changes.append([row.label, *cells])
        text += "\n\n" + aligned(changes)
        text += "\n* more than 1.96 standard errors from 0" if marked else ""
        text += (
            "\n~ not of the same rows or samples: what was asked differs too, not the models alone" if others else ""
        )
    return text


def _with_error(score: Score, sign: str) -> str:
    error = "" if score.stderr is None else f" ±{_short(score.stderr)}"
    return f"{_short(score.value, sign)}{error}"


def _short(value: float, sign: str = "") -> str:
    return f"{value:{sign}.4f}" if abs(value) < 1e4 else f"{value:{sign}.4g}"


def aligned(lines: Sequence[Sequence[str]]) -> str:
    """Write lines of cells in columns, the first on the left and the others on the right."""
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if column else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def task_table(results: Mapping[str, Mapping[str, Any]]) -> str:
    """Write the results of tasks, a line for each metric, as of `harness.run_tasks`."""
    lines = [["task", "shots", "samples", "metric", "value", "stderr"]]
    for task, result in results.items():
        for metric, number in result["metrics"].items():
            error = "-" if number["stderr"] is None else _short(number["stderr"])
            shots = result["num_fewshot"]
            lines.append([task, "-" if shots is None else str(shots), str(result["samples"] or "-"), metric,
                          _short(number["value"]), error])  # fmt: skip
    return aligned(lines)
