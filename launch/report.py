"""What runs did, or what a model makes of a text, as one page: `python launch/report.py RUN [RUN …]`."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

if sys.path[0] == str(Path(__file__).resolve().parent):  # run as a file: launch/ would shadow the package `pretrain`
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from pretrain.command_line import CommandLine
from pretrain.console import ends_at_closed_pipe, format_bytes
from pretrain.errors import LonghaulError
from pretrain.reporting.report_options import add_arguments, text_from

EXAMPLES = """examples:
  python launch/report.py runs/quickstart
  python launch/report.py runs/a runs/b runs/c --out comparison.html --png plots
  python launch/report.py runs/quickstart --inspect 'def main():'
  python launch/report.py runs/quickstart --step 400 --inspect-file example.py --out example.html
  python launch/report.py runs/quickstart --inspect-file - < example.py"""


@ends_at_closed_pipe
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return its exit status."""
    parser = CommandLine(prog="report", description=__doc__, epilog=EXAMPLES)
    add_arguments(parser)
    arguments = parser.parse_args(argv)
    try:
        text = text_from(arguments)
        content, sentence = _report(arguments) if text is None else _inspect(arguments, text)
    except LonghaulError as error:
        from pretrain.redaction import print_error

        print_error(error)
        return error.exit_status
    print(json.dumps(content) if arguments.json else sentence)
    return 0


def _report(arguments: argparse.Namespace) -> tuple[dict[str, Any], str]:
    from pretrain.reporting.report import report

    return report(arguments.run, arguments.out, arguments.png)


def _inspect(arguments: argparse.Namespace, text: str) -> tuple[dict[str, Any], str]:
    from pretrain.checkpoints.run_folder import load_run
    from pretrain.ranks.hardware import best_device
    from pretrain.reporting.inspection import inspect
    from pretrain.reporting.inspection_page import facts_of, write_page

    run = load_run(arguments.run[0], arguments.step)
    run.model.to(best_device())
    found = inspect(run.model, run.tokenizer, text)
    path = write_page(run, found, text, arguments.out)
    facts, size, loss = facts_of(run, found), path.stat().st_size, float(found.loss_T.double().mean())
    content = {"out": str(path), "bytes": size, "step": run.step, "tokens": len(found.ids) - 1, "loss": loss}
    return content, f"{path} ({format_bytes(size)}): {facts['text']}, loss {facts['loss']}"


if __name__ == "__main__":
    sys.exit(main())
