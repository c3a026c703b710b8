"""Look at what a model does with a text, on one page: `python launch/report.py RUN --inspect TEXT`."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

if sys.path[0] == str(Path(__file__).resolve().parent):  # run as a file: launch/ would shadow the package `pretrain`
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from pretrain.console import ends_at_closed_pipe, format_bytes
from pretrain.errors import ConfigError, LonghaulError
from pretrain.generate_options import read_text

EXAMPLES = """examples:
  python launch/report.py runs/quickstart --inspect 'def main():'
  python launch/report.py runs/quickstart --step 400 --inspect-file example.py --out example.html
  python launch/report.py runs/quickstart --inspect-file - < example.py"""


@ends_at_closed_pipe
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return its exit status."""
    parser = argparse.ArgumentParser(
        prog="report", description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", metavar="RUN", help="run folder")
    which = parser.add_mutually_exclusive_group()
    which.add_argument(
        "--inspect", metavar="TEXT", help="loss of each token, what each layer would predict, attention maps"
    )
    which.add_argument(
        "--inspect-file", metavar="FILE", help="likewise, of the text in a file; - is the standard input"
    )
    parser.add_argument("--step", type=int, help="checkpoint to use; the newest good one by default")
    parser.add_argument("--out", metavar="FILE", type=Path, help="page to write; by default in RUN/inspect")
    parser.add_argument("--json", action="store_true", help="print one JSON object on stdout and nothing else there")
    arguments = parser.parse_args(argv)
    try:
        text = arguments.inspect
        if arguments.inspect_file is not None:
            text = read_text("--inspect-file", arguments.inspect_file)
        if text is None:
            raise ConfigError(
                "--inspect is missing; expected a text to look at. Add --inspect TEXT or --inspect-file FILE; a run's "
                "curves are in its tensorboard/ and metrics.jsonl."
            )
        from pretrain.hardware import best_device
        from pretrain.inspection import inspect
        from pretrain.inspection_page import facts_of, write_page
        from pretrain.run_folder import load_run

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
