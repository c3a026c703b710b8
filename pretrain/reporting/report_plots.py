"""A report's main curves as PNG files, for papers and messages. The only file on matplotlib, which is optional."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pretrain.errors import ConfigError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# As on the page: told apart by all kinds of colour vision, and by dashes where there are more.
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#b8569b", "#8a6d00", "#3fa0dd", "#5b4bb5", "#555555")
_DASHES = ("-", "--", ":", "-.")
_SERIES = (  # file, key, label, scale, whether it is smoothed
    ("loss", "loss", "training loss (nats per token)", 1.0, True),
    ("grad-norm", "grad_norm", "gradient norm", 1.0, True),
    ("lr", "lr", "learning rate", 1.0, False),
    ("tokens-per-second", "tokens_per_second", "tokens per second", 1.0, True),
    ("mfu", "mfu", "model FLOPs utilisation", 1.0, True),
    ("memory", "memory_bytes", "peak memory of rank 0 (GiB)", 2.0**-30, False),
    ("step-seconds", "step_seconds", "seconds of a step", 1.0, True),
)


def write_plots(data: Mapping[str, Any], folder: Path) -> list[Path]:
    """Draw what the runs have; return the files.

    Faint is every step, or where they are too many the range of each bucket; strong the exponential mean.

    Args:
        data: from `report_page.page_data`.
        folder: for the files, made where it does not exist.

    Raises:
        ConfigError: it cannot be written.
    """
    runs = data["runs"]
    longest = max((run["curves"]["step"][-1] for run in runs if run["curves"]["step"]), default=0)
    half_life = min(longest / 100, 30 + longest / 1000)  # as the page begins with
    written = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, key, label, scale, is_smooth in _SERIES:
            if any(key in run["curves"]["series"] for run in runs):
                life = half_life if is_smooth else 0.0
                written.append(
                    _draw(folder / f"{name}.png", label, lambda axes, *of: _lines(axes, runs, *of), key, scale, life)
                )
        if any("loss" in run["evals"]["values"] for run in runs):
            written.append(_draw(folder / "held-out-loss.png", "held-out loss (nats per token)", _held_out, runs))
        for run in runs:
            if run["curves"]["phases"]:
                end = "" if len(runs) == 1 else f"-{run['name'].replace('/', '-')}"
                label = "seconds of a step, by phase"
                written.append(_draw(folder / f"step-phases{end}.png", label, _phases, run["curves"], half_life))
    except OSError as error:
        raise ConfigError(
            f"--png is {folder}; expected a folder that can be written ({error}). Name another."
        ) from None
    return written


def _draw(path: Path, label: str, fill: Callable[..., None], *arguments: Any) -> Path:
    from matplotlib.figure import Figure  # optional; no window is opened by it

    figure = Figure(figsize=(8, 4.5), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    fill(axes, *arguments)
    axes.set(xlabel="step", ylabel=label)
    axes.grid(color="#e7eaee")
    axes.spines[["top", "right"]].set_visible(False)
    lines, names = axes.get_legend_handles_labels()
    if len(names) > 1:
        axes.legend(lines, [_literal(name) for name in names], frameon=False, fontsize=8)
    temporary = path.with_name(f".{path.stem}.tmp-{os.getpid()}.png")
    try:
        figure.savefig(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def _literal(text: str) -> str:
    return text.replace("$", r"\$")  # else matplotlib takes it for a formula


def _style(number: int) -> dict[str, Any]:
    return {
        "color": _COLOURS[number % len(_COLOURS)],
        "linestyle": _DASHES[number // len(_COLOURS) % len(_DASHES)],
    }


def _lines(axes: Axes, runs: Sequence[Mapping[str, Any]], key: str, scale: float, half_life: float) -> None:
    for number, run in enumerate(runs):
        series, steps = run["curves"]["series"].get(key), run["curves"]["step"]
        if series is None:
            continue
        mean, *bounds = ([None if value is None else value * scale for value in part] for part in series)
        style = _style(number)
        if bounds:
            (places, low), (_, high) = (_known(steps, bound) for bound in bounds)
            axes.fill_between(places, low, high, color=style["color"], alpha=0.25, linewidth=0)
        elif half_life:
            axes.plot(*_known(steps, mean), color=style["color"], alpha=0.35, linewidth=0.8)
        shown = smoothed(steps, mean, run["curves"]["steps"], half_life)
        axes.plot(*_known(steps, shown), label=run["name"], linewidth=1.6, **style)


def _held_out(axes: Axes, runs: Sequence[Mapping[str, Any]]) -> None:
    for number, run in enumerate(runs):
        values = run["evals"]["values"]
        places = _known(run["evals"]["step"], values.get("loss", []))
        axes.plot(
            *places, marker="o", markersize=3, label=run["name"] if len(runs) > 1 else "together", **_style(number)
        )
        sources = [key for key in values if key.endswith("/loss") and not key.startswith("task/")]
        for index, key in enumerate(sources if len(runs) == 1 else [], 1):
            axes.plot(
                *_known(run["evals"]["step"], values[key]),
                label=key.removesuffix("/loss"),
                linewidth=1,
                **_style(index),
            )


def _phases(axes: Axes, curves: Mapping[str, Any], half_life: float) -> None:
    parts = [
        [value or 0.0 for value in smoothed(curves["step"], part, curves["steps"], half_life)]
        for part in curves["phases"].values()
    ]
    axes.stackplot(curves["step"], parts, labels=list(curves["phases"]), colors=_COLOURS, alpha=0.7)


def _known(places: Sequence[float], values: Sequence[float | None]) -> tuple[list[float], list[float]]:
    pairs = [(place, value) for place, value in zip(places, values, strict=False) if value is not None]
    return [place for place, _ in pairs], [value for _, value in pairs]


def smoothed(
    steps: Sequence[int], values: Sequence[float | None], counts: Sequence[int], half_life: float
) -> list[float | None]:
    """Return an exponential mean whose weights halve every `half_life` steps, as the page's script computes it.

    Dividing by the sum of the weights keeps the first values from being pulled towards 0.

    Args:
        steps, values: of the curve.
        counts: steps that each value stands for.
        half_life: in steps; 0 leaves the values as they are.
    """
    if not half_life:
        return list(values)
    found: list[float | None] = []
    total = weight = 0.0
    last = 0
    for step, value, count in zip(steps, values, counts, strict=True):
        if value is not None:
            decay = 0.5 ** ((step - last) / half_life)
            total, weight, last = total * decay + value * count, weight * decay + count, step
        found.append(None if value is None else total / weight)
    return found
