"""Look at what a model does with a text, on one page: `python launch/report.py RUN --inspect TEXT`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

if sys.path[0] == str(Path(__file__).resolve().parent):  # run as a file: launch/ would shadow the package `pretrain`
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from pretrain.console import ends_at_closed_pipe
from pretrain.errors import LonghaulError
from pretrain.interrupts import begin_work, ends_on_signal

EXAMPLES = """examples:
  python launch/report.py runs/quickstart --inspect 'def main():'
  python launch/report.py runs/quickstart --step 400 --inspect-file example.py --out example.html
  python launch/report.py runs/quickstart --inspect-file - < example.py

exit status: 0 done, 1 failed, 2 wrong use, 130 stopped by a signal: the page is whole or as it was."""


@ends_at_closed_pipe
@ends_on_signal()
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return its exit status."""
    import json

    from pretrain.command_line import CommandLine
    from pretrain.console import format_bytes
    from pretrain.reporting.report_options import add_arguments, text_from

    parser = CommandLine("report", __doc__, EXAMPLES)
    add_arguments(parser)
    arguments = parser.parse_args(argv)
    try:
        text = text_from(arguments)
        from pretrain.checkpoints.run_folder import load_run
        from pretrain.ranks.hardware import best_device
        from pretrain.reporting.inspection import inspect
        from pretrain.reporting.inspection_page import facts_of, write_page

        begin_work()
        run = load_run(arguments.run, arguments.step)
        run.model.to(best_device())
        inspection = inspect(run.model, run.tokenizer, text)
        path = write_page(run, inspection, text, arguments.out)
    except LonghaulError as error:
        from pretrain.redaction import print_error

        print_error(error)
        return error.exit_status
    facts, size = facts_of(run, inspection), path.stat().st_size
    if arguments.json:
        loss = float(inspection.loss_T.double().mean())
        print(
            json.dumps(
                {"out": str(path), "bytes": size, "step": run.step, "tokens": len(inspection.ids) - 1, "loss": loss}
            )
        )
    else:
        print(f"{path} ({format_bytes(size)}): {facts['text']}, loss {facts['loss']}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
