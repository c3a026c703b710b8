"""The memory of ZeRO's stages as a picture: `python benchmarks/plot.py bench-results/memory.json docs/memory.svg`.

Stacked bars of measured bytes a parameter, by number of ranks, a panel for each precision and stage; a black line on
each bar is what theory has for weights, masters, moments and gradients together.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

COLOURS = {
    "parameters": "#4c78a8", "masters": "#9ecae9", "moments": "#54a24b", "gradients": "#f58518", "buckets": "#bab0ac",
}  # fmt: skip
PANEL_WIDTH, PANEL_HEIGHT, MARGIN, GAP = 170, 180, 46, 18


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
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-weight="{weight}">{text}</text>'


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return its exit status."""
    parser = argparse.ArgumentParser(prog="plot", description=__doc__)
    parser.add_argument("results", type=Path, nargs="+", metavar="FILE", help="JSON files of benchmarks/memory.py")
    parser.add_argument("picture", type=Path, help="SVG file to write")
    arguments = parser.parse_args(argv)
    rows = [row for path in arguments.results for row in json.loads(path.read_text(encoding="utf-8"))["rows"]]
    arguments.picture.write_text(draw(rows), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
