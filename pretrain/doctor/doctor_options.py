"""The command line of `launch/doctor.py`, and what it prints."""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import sys
import textwrap
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, TextIO

from pretrain import __version__
from pretrain.command_line import CommandLine
from pretrain.console import LiveLine
from pretrain.doctor.examination import Check, chosen, run_check
from pretrain.doctor.findings import FAILURE, OK, SKIPPED, WARNING, Line, Request
from pretrain.options.config_arguments import add_config

EXAMPLES = """examples:
  python launch/doctor.py
  python launch/doctor.py --quick
  python launch/doctor.py configs/llama-350m.yaml run.dir=/scratch/try     # and what a start of it would need
  python launch/doctor.py runs/mine --json
  python launch/doctor.py --dir /scratch --store s3://bucket/checkpoints
  python launch/doctor.py --compile                                        # builds DeepSpeed's operators, minutes

Each line is ok, warning, failure or skipped, with the mend below it; docs/doctor.md explains them.
exit status: 0 nothing failed, 1 something did, 2 wrong use, 130 stopped by a signal."""
_COLOURS = {OK: "32", WARNING: "33", FAILURE: "31;1", SKIPPED: "2"}
_NAME_WIDTH, _OUTCOME_WIDTH, _LEAST_WIDTH, _PLAIN_WIDTH = 22, 9, 60, 120


def parse(argv: Sequence[str] | None, description: str | None) -> argparse.Namespace:
    """Read the arguments; ends the process with status 2 and a message where they are wrong."""
    parser = CommandLine(prog="doctor", description=description, epilog=EXAMPLES)
    add_config(parser, "YAML file or run folder to look at", nargs="?", default="")
    parser.add_argument("--quick", action="store_true", help="leave out what takes long")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--dir", metavar="DIR", default="", help="folder whose disk is tried; default: the run folder")
    parser.add_argument("--store", metavar="URL", default="", help="also list an object store")
    parser.add_argument("--compile", action="store_true", help="also build DeepSpeed's operators")
    arguments = parser.parse_intermixed_args(argv)
    if "=" in arguments.config:
        parser.error(f"CONFIG is {arguments.config}; expected a YAML file or run folder before the first key=value")
    return arguments


def run(arguments: argparse.Namespace) -> int:
    """Examine and print; return the exit status."""
    request = Request(
        folder=arguments.dir, config=arguments.config, overrides=arguments.overrides, store=arguments.store,
        is_quick=arguments.quick, compiles=arguments.compile,
    )  # fmt: skip
    begin, groups, live = time.monotonic(), [], LiveLine()
    page = Page(sys.stdout)
    if not arguments.json:
        page.write_head()
    for check in chosen(request):
        live.show(f"{check.group} …", plain=False)
        began = time.monotonic()
        groups.append((check, run_check(check, request), time.monotonic() - began))
        live.show("", plain=False)
        if not arguments.json:
            page.write_group(*groups[-1][:2])
    counts = Counter(line.outcome for _, lines, _ in groups for line in lines)
    seconds = time.monotonic() - begin
    if arguments.json:
        print(json.dumps(as_json(groups, counts, seconds), indent=1))
    else:
        page.write_sum(counts, seconds)
    return 1 if counts[FAILURE] else 0


def as_json(
    groups: Sequence[tuple[Check, Sequence[Line], float]], counts: Counter[str], seconds: float
) -> dict[str, Any]:
    """Return all that was found, in plain values."""
    return {
        "longhaul": __version__, "host": platform.node(), "timestamp": time.time(), "seconds": seconds,
        "status": FAILURE if counts[FAILURE] else WARNING if counts[WARNING] else OK,
        "counts": {outcome: counts[outcome] for outcome in _COLOURS},
        "checks": [{"group": check.group, "seconds": took, "lines": [asdict(line) for line in lines]}
                   for check, lines, took in groups],
    }  # fmt: skip


class Page:
    """What people read: a heading for each check, and its lines below, aligned; coloured on a terminal."""

    def __init__(self, stream: TextIO) -> None:
        """Take where to print."""
        self._stream = stream
        is_terminal = stream.isatty()
        self._is_coloured = is_terminal and not os.environ.get("NO_COLOR")
        self._width = max(shutil.get_terminal_size().columns, _LEAST_WIDTH) if is_terminal else _PLAIN_WIDTH

    def write_head(self) -> None:
        """Say what is looked at."""
        self._print(f"longhaul {__version__} on {platform.node()}, {sys.executable}")

    def write_group(self, check: Check, lines: Sequence[Line]) -> None:
        """Print what a check has found."""
        self._print(f"\n{check.group}")
        for line in lines:
            outcome = f"{line.outcome:<{_OUTCOME_WIDTH}}"
            if self._is_coloured:
                outcome = f"\x1b[{_COLOURS[line.outcome]}m{outcome}\x1b[0m"
            first, *rest = self._wrapped(" ".join(line.text.split()))
            self._print(f"  {outcome}{line.name:<{_NAME_WIDTH}} {first}")
            below = [*rest, *(self._wrapped(f"→ {line.mend}") if line.mend else [])]
            for text in below:
                self._print(f"  {'':<{_OUTCOME_WIDTH + _NAME_WIDTH + 1}}{text}")

    def write_sum(self, counts: Counter[str], seconds: float) -> None:
        """Say how many lines of each kind there are."""
        parts = [f"{counts[outcome]} {outcome}" for outcome in _COLOURS if counts[outcome]]
        self._print(f"\n{', '.join(parts)}, in {seconds:.0f} s")

    def _wrapped(self, text: str) -> list[str]:
        room = self._width - _OUTCOME_WIDTH - _NAME_WIDTH - 4
        return textwrap.wrap(text, room, break_long_words=False, break_on_hyphens=False)

    def _print(self, text: str) -> None:
        print(text, file=self._stream, flush=True)
