"""The report of one run or several: read, drawn, written."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pretrain.console import counted, format_bytes
from pretrain.errors import ConfigError
from pretrain.reporting.page import OUTSIDE, save_page
from pretrain.reporting.report_page import page_data, render
from pretrain.reporting.report_plots import write_plots
from pretrain.reporting.run_figures import figures_of
from pretrain.reporting.run_records import RunRecord, read_run


def report(runs: Sequence[str], out: Path | None, png: Path | None) -> tuple[dict[str, Any], str]:
    """Write the page of runs, complete or not at all.

    Args:
        runs: their folders.
        out: the file; None: `report.html` in the run folder, or `comparison.html` in the first of several.
        png: folder for the main curves as pictures, too.

    Returns:
        Where it is and each run's figures, as JSON can hold them; and a sentence for people.

    Raises:
        ConfigError: a folder is no run's, a library is missing, or something cannot be written.
    """
    check_library("plotly", "launch/report.py")
    if png is not None:
        check_library("matplotlib", "--png")
    records = read_runs(runs)
    figures = [figures_of(record) for record in records]
    data = page_data(records, figures)
    own = records[0].path / ("report.html" if len(records) == 1 else "comparison.html")
    page = render([record.name for record in records], data)
    save_page(out or own, page, "Name another." if out else OUTSIDE)
    size, pictures = (out or own).stat().st_size, write_plots(data, png) if png is not None else []
    content = {"out": str(out or own), "bytes": size, "png": [str(path) for path in pictures], "runs": figures}
    steps = ", ".join(f"{one['run']} {counted(one['step'], 'step')}" for one in figures)
    beside = f", and {counted(len(pictures), 'picture')} in {png}" if png is not None else ""
    return content, f"{out or own} ({format_bytes(size)}): {steps}{beside}"


def check_library(library: str, where: str) -> None:
    """Check that a library that not everybody needs is there, before anything is read.

    Args:
        library: its name.
        where: what needs it.

    Raises:
        ConfigError: it is not installed.
    """
    if importlib.util.find_spec(library) is None:
        raise ConfigError(
            f"{where}: the library {library} is missing; expected what reports are drawn by. Install it by "
            "pip install 'longhaul[report]' (in a checkout: pip install '.[report]')."
        )


def read_runs(paths: Sequence[str]) -> list[RunRecord]:
    """Read run folders.

    Raises:
        ConfigError: one is no run's, or is given twice.
    """
    folders = [Path(path) for path in paths]
    real = [folder.resolve() for folder in folders]
    for number, folder in enumerate(real):
        if folder in real[:number]:
            raise ConfigError(f"RUN is {folders[number]} twice; expected each run once. Leave one out.")
    return [read_run(folder, name) for folder, name in zip(folders, names_of(real), strict=True)]


def names_of(folders: Sequence[Path]) -> list[str]:
    """Return the folders' names, with as many of those above as tell them apart."""
    for depth in range(1, max(len(folder.parts) for folder in folders) + 1):
        names = ["/".join(folder.parts[-depth:]) for folder in folders]
        if len(set(names)) == len(names):
            break
    return names
