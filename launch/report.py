"""What runs did, or what a model makes of a text, as one page: `python launch/report.py RUN [RUN …]`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

if sys.path[0] == str(Path(__file__).resolve().parent):  # run as a file: launch/ would shadow the package `pretrain`
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from pretrain.console import ends_at_closed_pipe
from pretrain.errors import LonghaulError
from pretrain.interrupts import begin_work, ends_on_signal


@ends_at_closed_pipe
@ends_on_signal()
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return its exit status."""
    from pretrain.reporting.report_options import make_parser, text_from

    arguments = make_parser(__doc__).parse_args(argv)
    try:
        text = text_from(arguments)
        content, sentence = _report(arguments) if text is None else _inspect(arguments, text)
    except LonghaulError as error:
        from pretrain.redaction import print_error

        print_error(error)
        return error.exit_status
    import json

    print(json.dumps(content) if arguments.json else sentence)
    return 0


def _report(arguments: argparse.Namespace) -> tuple[dict[str, Any], str]:
    from pretrain.reporting.report import report

    begin_work()
    return report(arguments.run, arguments.out, arguments.png)


def _inspect(arguments: argparse.Namespace, text: str) -> tuple[dict[str, Any], str]:
    from pretrain.checkpoints.run_folder import load_run
    from pretrain.console import format_bytes
    from pretrain.ranks.hardware import best_device
    from pretrain.reporting.inspection import inspect
    from pretrain.reporting.inspection_page import facts_of, write_page

    begin_work()
    run = load_run(arguments.run[0], arguments.step)
    run.model.to(best_device())
    found = inspect(run.model, run.tokenizer, text)
    path = write_page(run, found, text, arguments.out)
    facts, size, loss = facts_of(run, found), path.stat().st_size, float(found.loss_T.double().mean())
    content = {"out": str(path), "bytes": size, "step": run.step, "tokens": len(found.ids) - 1, "loss": loss}
    return content, f"{path} ({format_bytes(size)}): {facts['text']}, loss {facts['loss']}"


if __name__ == "__main__":
    sys.exit(main())
