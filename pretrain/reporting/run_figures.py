"""What became of a run in a few numbers, how runs differ, and both as tables for people."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from pretrain.console import format_bytes, format_count, format_duration
from pretrain.options.config import Config
from pretrain.options.config_changes import flatten
from pretrain.options.config_docs import yaml_value
from pretrain.reporting.run_records import RunRecord
from pretrain.reporting.run_series import hours_of, is_finite, shown_columns

LAST_STEPS = 100  # that the final training loss is a mean of
_MAX_VALUE = 400  # characters of an option's value


def figures_of(run: RunRecord) -> dict[str, Any]:
    """Return a run's final figures; None where they are not known.

    `wall_seconds` is from the first start to the last step, waiting between starts included; `rank_hours` are
    those of the steps that count, on all ranks: GPU-hours on GPUs. `tokens_per_second` is all tokens over all seconds
    of steps, `loss` the mean of the last `LAST_STEPS`.
    """
    columns, num_steps = shown_columns(run), run.metrics.num_steps
    found: dict[str, Any] = {
        "run": run.name, "path": str(run.path), "state": run.state.state if run.state else None,
        "reason": run.state.reason if run.state else None, "step": int(columns["step"][-1]) if num_steps else 0,
        "num_steps": run.num_planned or None, "starts": max(len(run.starts), _last(columns, "attempt") or 0) or None,
        "loss": _mean(columns.get("loss", np.empty(0))[-LAST_STEPS:]),
    }  # fmt: skip
    found |= _held_out(run)
    seconds = columns.get("step_seconds", np.empty(0))
    total = float(np.nansum(seconds))
    rates = columns.get("tokens_per_second", np.empty(0))
    is_timed = np.isfinite(rates) & np.isfinite(seconds) if len(rates) == len(seconds) else np.zeros(0, bool)
    found |= {
        "tokens": _last(columns, "tokens"),
        "wall_seconds": float(hours_of(run)[-1]) * 3600 if num_steps and "timestamp" in columns else None,
        "step_seconds": total if len(seconds) else None,
        "rank_hours": _rank_hours(run, columns) if len(seconds) else None,
        "tokens_per_second": float((rates * seconds)[is_timed].sum() / total) if is_timed.any() and total else None,
        "median_step_seconds": float(np.nanmedian(seconds)) if np.isfinite(seconds).any() else None,
        "mfu": _mean(columns.get("mfu", np.empty(0))), "mfu_causal": _mean(columns.get("mfu_causal", np.empty(0))),
        "memory_bytes": _greatest(columns.get("memory_bytes", np.empty(0))),
        "data_wait_share": _share(columns.get("data_wait_seconds", np.empty(0)), total),
    }  # fmt: skip
    for key in ("skipped_steps", "clipped_steps", "damaged_documents", "damaged_tokens"):
        found[key] = _last(columns, key)
    found["phase_seconds"] = {
        key.removeprefix("seconds/"): mean for key, column in columns.items()
        if key.startswith("seconds/") and (mean := _mean(column)) is not None
    }  # fmt: skip
    found["corpus_tokens"] = {key[7:]: _last(columns, key) for key in columns if key.startswith("tokens/")}
    return found


def _held_out(run: RunRecord) -> dict[str, Any]:
    """Return the last and the best held-out figures, of training's own evaluations."""
    lines = [line for line in run.metrics.evaluations if is_finite(line.get("eval/loss"))]
    if not lines:
        return {"held_out": None, "best_held_out": None}
    chosen = {"held_out": lines[-1], "best_held_out": min(lines, key=lambda line: line["eval/loss"])}
    return {
        name: {
            key.removeprefix("eval/"): value
            for key, value in line.items()
            if (key == "step" or key.count("/") == 1) and is_finite(value)
        }
        for name, line in chosen.items()
    }


def _rank_hours(run: RunRecord, columns: Any) -> float:
    """Return the hours of steps, times the ranks of the start that each is of."""
    sizes = [start.get("world_size") for start in run.starts]
    known = [size if isinstance(size, int) else 1 for size in sizes] or [1]
    attempts = np.nan_to_num(columns.get("attempt", np.ones(run.metrics.num_steps)), nan=1.0).astype(np.int64)
    ranks = np.array(known)[np.clip(attempts, 1, len(known)) - 1]
    return float(np.nansum(columns["step_seconds"] * ranks)) / 3600


def _last(columns: Any, key: str) -> int | None:
    known = columns[key][np.isfinite(columns[key])] if key in columns else np.empty(0)
    return int(known[-1]) if len(known) else None


def _mean(values: np.ndarray) -> float | None:
    return float(np.nanmean(values)) if np.isfinite(values).any() else None


def _greatest(values: np.ndarray) -> int | None:
    return int(np.nanmax(values)) if np.isfinite(values).any() else None


def _share(values: np.ndarray, total: float) -> float | None:
    return float(np.nansum(values)) / total if np.isfinite(values).any() and total else None


def figure_rows(figures: Sequence[dict[str, Any]]) -> list[tuple[str, list[str]]]:
    """Return the figures of runs for people: what each is, and its text for each run; none that no run has."""

    def text(key: str, write: Callable[[Any], str]) -> list[str]:
        return ["–" if one.get(key) is None else write(one[key]) for one in figures]

    def best(key: str, digits: int) -> Callable[[dict[str, Any]], str]:
        return lambda found: f"{found[key]:.{digits}f} at step {found['step']:,}" if key in found else "–"

    def count(value: int) -> str:
        return f"{value:,}"

    rows = [
        ("state", text("state", str)),
        ("steps", [f"{one['step']:,}" + (f" of {one['num_steps']:,}" if one["num_steps"] else "") for one in figures]),
        ("tokens", text("tokens", lambda value: format_count(value) if value >= 1e4 else count(value))),
        ("best held-out loss", text("best_held_out", best("loss", 4))),
        ("last held-out loss", text("held_out", best("loss", 4))),
        ("last bits per byte", text("held_out", best("bits_per_byte", 4))),
        ("last perplexity", text("held_out", best("perplexity", 2))),
        (f"training loss, mean of the last {LAST_STEPS} steps", text("loss", lambda value: f"{value:.4f}")),
        ("time from the first start to the last step", text("wall_seconds", format_duration)),
        ("time in steps", text("step_seconds", format_duration)),
        ("rank-hours in steps (GPU-hours on GPUs)", text("rank_hours", lambda value: f"{value:,.4g}")),
        ("tokens per second", text("tokens_per_second", lambda value: f"{value:,.0f}")),
        ("median time of a step", text("median_step_seconds", lambda value: f"{value:.3g} s")),
        ("MFU, mean", text("mfu", lambda value: f"{value:.1%}")),
        ("MFU with causal attention counted once", text("mfu_causal", lambda value: f"{value:.1%}")),
        ("waiting for data", text("data_wait_share", lambda value: f"{value:.1%} of the time")),
        ("peak memory of rank 0", text("memory_bytes", format_bytes)),
        ("starts", text("starts", count)),
        ("skipped steps", text("skipped_steps", count)),
        ("clipped steps", text("clipped_steps", count)),
        ("damaged documents", text("damaged_documents", count)),
    ]
    return [(name, texts) for name, texts in rows if any(one != "–" for one in texts)]


def config_differences(configs: Sequence[Config | None]) -> list[tuple[str, list[str]]]:
    """Return the options that differ between runs, and the value of each run; `–` where a run has no such option.

    Sources, phases and the like are compared by their names; one that only some runs have is one row. `run.dir` always
    differs, and is not among them.
    """
    trees = [_by_name(config.model_dump(mode="json", by_alias=True)) if config else {} for config in configs]
    given = [_by_name(config.model_dump(mode="json", by_alias=True, exclude_defaults=True)) if config else {}
             for config in configs]  # fmt: skip
    there = [tree for tree in trees if tree]
    flat = [flatten(_alike(tree, there, own)) for tree, own in zip(trees, given, strict=True)]
    known = [one for one, tree in zip(flat, trees, strict=True) if tree]
    names = dict.fromkeys(name for one in known for name in one if name != "run.dir")
    return [
        (name, [_short(one[name]) if name in one else "–" for one in flat])
        for name in names if len({yaml_value(one[name]) if name in one else None for one in known}) > 1
    ]  # fmt: skip


class _Named(dict[str, Any]):
    """A list of things that have names."""


class _Whole(str):
    """One of them, in short."""


def _by_name(tree: Any) -> Any:
    """Return a tree with lists of named things as mappings."""
    if isinstance(tree, dict):
        return {key: _by_name(value) for key, value in tree.items()}
    if isinstance(tree, list) and tree and all(isinstance(item, dict) and "name" in item for item in tree):
        own = {str(item["name"]): {key: value for key, value in item.items() if key != "name"} for item in tree}
        return _Named((name, _by_name(item)) for name, item in own.items())
    return tree


def _alike(tree: Any, others: Sequence[Any], given: Any) -> Any:
    """Return a tree whose named things are leaves, of what is `given` of them, where not all others have them."""
    if not isinstance(tree, dict):
        return tree
    found = {}
    for key, value in tree.items():
        there = [one[key] for one in others if isinstance(one, dict) and key in one]
        own = given.get(key, {}) if isinstance(given, dict) else {}
        if isinstance(tree, _Named) and len(there) < len(others):
            found[key] = _Whole(yaml_value(own))
        else:
            found[key] = _alike(value, there if len(there) == len(others) else [], own)
    return found


def _short(value: Any) -> str:
    text = str(value) if isinstance(value, _Whole) else yaml_value(value)
    return text if len(text) <= _MAX_VALUE else text[: _MAX_VALUE - 1] + "…"
