"""Results as pictures: `python benchmarks/plot.py bench-results/overhead.json overhead.svg`.

Of `benchmarks/memory.py`: stacked bars of measured bytes a parameter, by number of ranks, a panel for each precision
and stage; a black line on each bar is what theory has for weights, masters, moments and gradients together. Of all
others: our time divided by each peer's, a bar from 1 to the left where ours is quicker, to the right where slower.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

if sys.path[0] == str(Path(__file__).resolve().parent):  # run as a file
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks.comparisons import Comparison, comparisons

COLOURS = {
    "parameters": "#4c78a8", "masters": "#9ecae9", "moments": "#54a24b", "gradients": "#f58518", "buckets": "#bab0ac",
}  # fmt: skip
PANEL_WIDTH, PANEL_HEIGHT, MARGIN, GAP = 170, 180, 46, 18
QUICKER, SLOWER = "#54a24b", "#f58518"
LABEL_WIDTH, BARS_WIDTH, LINE_HEIGHT = 400, 320, 20


def draw(rows: Sequence[dict[str, Any]]) -> str:
    """Write the picture of rows of `benchmarks/memory.py` as SVG."""
    precisions = sorted({row["precision"] for row in rows})
    stages = sorted({row["stage"] for row in rows})
    top = max(sum(_heights(row).values()) for row in rows)
    width = MARGIN + len(stages) * (PANEL_WIDTH + GAP)
    height = len(precisions) * (PANEL_HEIGHT + MARGIN) + MARGIN
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" '
        f'font-size="11"><rect width="{width}" height="{height}" fill="white"/>'
    ]
    for line, precision in enumerate(precisions):
        for column, stage in enumerate(stages):
            panel = [row for row in rows if (row["precision"], row["stage"]) == (precision, stage)]
            left = MARGIN + column * (PANEL_WIDTH + GAP)
            bottom = line * (PANEL_HEIGHT + MARGIN) + MARGIN + PANEL_HEIGHT - 18
            parts += _panel(panel, f"{precision}, ZeRO {stage}", left, bottom, top, with_axis=column == 0)
    parts += _legend(height - 14)
    return "\n".join([*parts, "</svg>\n"])


def draw_ratios(title: str, found: Sequence[Comparison]) -> str:
    """Write a picture of our time divided by each peer's as SVG; every doubling is as wide as the others."""
    doublings = max(1, *(math.ceil(abs(math.log2(one.ratio))) for one in found))
    unit = BARS_WIDTH / 2 / doublings
    middle, top = LABEL_WIDTH + BARS_WIDTH / 2, 44
    width, height = LABEL_WIDTH + BARS_WIDTH + 50, top + LINE_HEIGHT * len(found) + 30
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" '
        f'font-size="11"><rect width="{width}" height="{height}" fill="white"/>',
        _text(10, 20, title, weight="bold"),
    ]
    for power in range(-doublings, doublings + 1):
        x = middle + power * unit
        colour = "black" if power == 0 else "#ddd"
        parts.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{top - 8}" y2="{height - 28}" stroke="{colour}"/>')
        if abs(power) % (1 + doublings // 5) == 0:
            parts.append(_text(x, top - 12, f"{2**power}" if power >= 0 else f"1/{2**-power}", "middle"))
    for line, one in enumerate(found):
        y, length = top + LINE_HEIGHT * line, unit * math.log2(one.ratio)
        left, colour = (middle, SLOWER) if length > 0 else (middle + length, QUICKER)
        parts.append(_text(LABEL_WIDTH - 10, y + 11, f"{one.what} / {one.peer}", "end"))
        parts.append(f'<rect x="{left:.1f}" y="{y}" width="{abs(length):.1f}" height="14" fill="{colour}"/>')
        parts.append(_text(width - 8, y + 11, f"{one.ratio:.2f}" if one.ratio > 0.1 else f"{one.ratio:.1g}", "end"))
    note = "our time / the peer's for the same work: to the left of 1 ours is quicker"
    return "\n".join([*parts, _text(width - 8, height - 10, note, "end"), "</svg>\n"])


def picture(record: dict[str, Any]) -> str | None:
    """Draw a result; None where there is nothing to draw."""
    if record["benchmark"] == "memory":
        return draw(record["rows"])
    found = comparisons(record)
    threads = record["settings"].get("num_threads", record["device"]["num_processors"])
    what = f", threads: {threads}" if record["device"]["kind"] == "cpu" else ""
    title = f"{record['benchmark'].replace('_cpu', ' on a CPU')}: {record['device']['name']}{what}"
    return draw_ratios(title, found) if found else None


def _heights(row: dict[str, Any]) -> dict[str, float]:
    """Bytes a parameter by kind at the end of the backward pass, and the buckets, which may be freed by then."""
    found = {**row["memory"]["backward"], "buckets": row["memory"]["forward"]["buckets"]}
    return {kind: found[kind] / row["num_parameters"] for kind in COLOURS}


def _panel(rows: list[dict[str, Any]], title: str, left: int, bottom: int, top: float, with_axis: bool) -> list[str]:
    scale = (PANEL_HEIGHT - 36) / top
    parts = [_text(left + PANEL_WIDTH / 2, bottom - PANEL_HEIGHT + 26, title, "middle", "bold")]
    for mark in range(0, int(top) + 1, 4):
        y = bottom - mark * scale
        parts.append(f'<line x1="{left}" x2="{left + PANEL_WIDTH}" y1="{y:.1f}" y2="{y:.1f}" stroke="#ddd"/>')
        if with_axis:
            parts.append(_text(left - 6, y + 4, str(mark), "end"))
    if with_axis:
        parts.append(f'<text transform="translate({left - 30},{bottom - 40}) rotate(-90)">bytes a parameter</text>')
    step = PANEL_WIDTH / max(len(rows), 1)
    for number, row in enumerate(sorted(rows, key=lambda row: row["ranks"])):
        x, top_of_bar = left + (number + 0.15) * step, float(bottom)
        for kind, value in _heights(row).items():
            top_of_bar -= value * scale
            parts.append(f'<rect x="{x:.1f}" y="{top_of_bar:.1f}" width="{0.7 * step:.1f}" '
                         f'height="{value * scale:.2f}" fill="{COLOURS[kind]}"/>')  # fmt: skip
        theory = bottom - sum(row["theory"].values()) / row["num_parameters"] * scale
        parts.append(f'<line x1="{x - 3:.1f}" x2="{x + 0.7 * step + 3:.1f}" y1="{theory:.1f}" y2="{theory:.1f}" '
                     'stroke="black" stroke-width="2"/>')  # fmt: skip
        parts.append(_text(x + 0.35 * step, bottom + 14, str(row["ranks"]), "middle"))
    parts.append(_text(left + PANEL_WIDTH / 2, bottom + 27, "ranks", "middle"))
    return parts


def _legend(y: int) -> list[str]:
    parts: list[str] = []
    x = MARGIN
    for kind, colour in COLOURS.items():
        parts.append(f'<rect x="{x}" y="{y - 9}" width="10" height="10" fill="{colour}"/>' + _text(x + 14, y, kind))
        x += 104
    line = f'<line x1="{x}" x2="{x + 16}" y1="{y - 4}" y2="{y - 4}" stroke="black" stroke-width="2"/>'
    return [*parts, line, _text(x + 20, y, "theory, without buckets")]


def _text(x: float, y: float, text: str, anchor: str = "start", weight: str = "normal") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-weight="{weight}">{escape(text)}</text>'


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return its exit status."""
    parser = argparse.ArgumentParser(prog="plot", description=__doc__)
    parser.add_argument("result", type=Path, metavar="FILE", help="JSON file of a benchmark")
    parser.add_argument("picture", type=Path, help="SVG file to write")
    arguments = parser.parse_args(argv)
    drawn = picture(json.loads(arguments.result.read_text(encoding="utf-8")))
    if drawn is None:
        parser.error(f"{arguments.result} compares ours with nothing: there is nothing to draw")
    arguments.picture.write_text(drawn, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
