"""Writes the results into `benchmarks/README.md`, and their pictures beside it: `python benchmarks/summary.py`.

Every file of `benchmarks/results` is shown in the section of its benchmark, between the lines `<!-- results: NAME -->`
and `<!-- end -->`; `<!-- devices -->` has what was measured where, `<!-- losses -->` where a peer is quicker.
`--check` writes nothing and fails where the page is not current.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

if sys.path[0] == str(Path(__file__).resolve().parent):  # run as a file
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks.comparisons import BOUNDS, Comparison, comparisons
from benchmarks.plot import picture
from benchmarks.record import ROOT
from benchmarks.table import TABLES, render_one

FOLDER = ROOT / "benchmarks"
BLOCK = re.compile(r"<!-- (devices|losses|results: (\w+)) -->\n.*?<!-- end -->\n", re.DOTALL)
SHOWN = ("torch", "triton", "deepspeed", "transformers", "accelerate", "liger-kernel", "webdataset")  # of the versions
LOST = 1.03  # of the peer's time: less is within what two runs differ by
Results = dict[str, dict[str, Any]]  # by the name of the file, without .json


def read_results(folder: Path) -> Results:
    """Read all results.

    Raises:
        ValueError: one was made with `--shrink`, or of a benchmark that has no table.
    """
    results = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))}
    for name, record in results.items():
        if record["settings"].get("shrink"):
            raise ValueError(f"{name}.json was made with --shrink: it shows that a benchmark runs, not how fast")
        if record["benchmark"] not in TABLES:
            raise ValueError(f"{name}.json is of {record['benchmark']}; expected one of {', '.join(TABLES)}")
    return results


def pictures(results: Results) -> dict[str, str]:
    """Draw what can be drawn, by the path of the SVG file from this folder."""
    drawn = {_picture_path(name, record): picture(record) for name, record in results.items()}
    return {path: text for path, text in drawn.items() if text is not None}


def _picture_path(name: str, record: dict[str, Any]) -> str:
    """Where a picture is: that of memory among the pages of docs, which show it too."""
    return "../docs/memory.svg" if record["benchmark"] == "memory" else f"plots/{name}.svg"


def page(text: str, results: Results) -> str:
    """Return the page with its marked parts written anew.

    Raises:
        ValueError: a benchmark that has results has no section.
    """
    named = {match[2] for match in BLOCK.finditer(text)}
    if missing := sorted({record["benchmark"] for record in results.values()} - named):
        raise ValueError(f"README.md has no part `<!-- results: {missing[0]} -->`, and there are results of it")

    def write(match: re.Match[str]) -> str:
        if match[2]:
            inside = _section(match[2], results)
        else:
            inside = _devices(results) if match[1] == "devices" else _losses(results)
        return f"<!-- {match[1]} -->\n{inside}\n<!-- end -->\n"

    return BLOCK.sub(write, text)


def _section(benchmark: str, results: Results) -> str:
    parts = [_result(name, record) for name, record in results.items() if record["benchmark"] == benchmark]
    return "\n\n".join(parts) or "No result yet, on any machine."


def _result(name: str, record: dict[str, Any]) -> str:
    versions = ", ".join(f"{key} {record['versions'][key]}" for key in SHOWN if record["versions"].get(key))
    device = record["device"]
    head = f"{_device(record)}, {device['memory_bytes'] / 2**30:.0f} GiB"
    if "load_average" in device:  # older files lack it
        head += f", load average {device['load_average']}, cores: {device['num_cores']}"
    file = f"[{name}.json](results/{name}.json), commit {record['commit'] or 'unknown'}"
    head = f"**{head}, {record['date'][:10]}** ({file}; {versions})"
    drawn = f"\n\n![{record['benchmark']}]({_picture_path(name, record)})" if picture(record) is not None else ""
    return f"{head}\n\n```\n{render_one(record)}\n```{drawn}"


def _device(record: dict[str, Any]) -> str:
    device = record["device"]
    threads = f", threads: {device['num_processors']}" if device["kind"] == "cpu" else ""
    return f"{device['name']}{threads}"


def _devices(results: Results) -> str:
    kinds = {record["device"]["name"]: record["device"]["kind"] for record in results.values()}
    columns = sorted(kinds, key=lambda name: (kinds[name] != "cpu", name))
    rows = []
    for benchmark in TABLES:
        dates = {name: "" for name in columns}
        for record in results.values():
            if record["benchmark"] == benchmark:
                dates[record["device"]["name"]] = max(dates[record["device"]["name"]], record["date"][:10])
        rows.append([f"`{benchmark}`", *(date or "-" for date in dates.values())])
    lines = _markdown([["", *columns], *rows])
    return lines if "cuda" in kinds.values() else f"{lines}\n\nNo GPU has run any of them so far."


def _losses(results: Results) -> str:
    found = [(record, one) for record in results.values() for one in comparisons(record)]
    found.sort(key=lambda pair: -pair[1].ratio)
    peers = [pair for pair in found if pair[1].peer not in BOUNDS]
    lost = [pair for pair in peers if pair[1].ratio > LOST]
    bounds = [pair for pair in found if pair[1].peer in BOUNDS]
    head = f"A peer takes less time than ours, by more than {LOST - 1:.0%}, in {len(lost)} of {len(peers)} comparisons:"
    rest = "Beside what is no peer but the least that the work takes:"
    return "\n\n".join([head, _ratios(lost), rest, _ratios(bounds)])


def _ratios(found: list[tuple[dict[str, Any], Comparison]]) -> str:
    rows = [[record["benchmark"], _device(record), one.what, one.peer, f"{one.ratio:.2f}"] for record, one in found]
    return _markdown([["benchmark", "device", "what", "beside", "our time / its time"], *rows])


def _markdown(rows: Iterable[list[str]]) -> str:
    head, *others = rows
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *others))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return its exit status."""
    parser = argparse.ArgumentParser(
        prog="summary", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="write nothing; fail where a file is not current")
    arguments = parser.parse_args(argv)
    results = read_results(FOLDER / "results")
    wanted = {(FOLDER / path).resolve(): text for path, text in pictures(results).items()}
    wanted[FOLDER / "README.md"] = page((FOLDER / "README.md").read_text(encoding="utf-8"), results)
    old = [path for path in (FOLDER / "plots").glob("*.svg") if path not in wanted]  # of results that are gone
    if arguments.check:
        stale = [path for path, text in wanted.items() if not path.exists() or path.read_text(encoding="utf-8") != text]
        if names := [path.name for path in (*stale, *old)]:
            print(f"not current: {', '.join(names)}. Run: python benchmarks/summary.py", file=sys.stderr)
        return 1 if names else 0
    (FOLDER / "plots").mkdir(exist_ok=True)
    for path in old:
        path.unlink()
    for path, text in wanted.items():
        path.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
