"""Convert a checkpoint to files that other software loads, verified: `python launch/convert.py RUN OUT --to hf`;
or a published model to a run folder, to go on training it: `python launch/convert.py DIR OUT --from hf`."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

if sys.path[0] == str(Path(__file__).resolve().parent):  # run as a file: launch/ would shadow the package `pretrain`
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from pretrain.console import ends_at_closed_pipe
from pretrain.import_options import add_options, import_model

EXAMPLES = """examples:
  python launch/convert.py runs/quickstart exports/quickstart --to hf
  python launch/convert.py runs/llama-350m exports/llama-350m --to hf --step 20000 --dtype fp32 --json
  python launch/convert.py downloads/SmolLM2-135M runs/smollm2 --from hf --add-tokens '<|user|>' '<|assistant|>'"""


@ends_at_closed_pipe
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return its exit status."""
    parser = argparse.ArgumentParser(
        prog="convert", description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", metavar="RUN", help="run folder; with --from the folder of the published model")
    parser.add_argument("out", metavar="OUT", help="folder to make; it must not exist, or be empty")
    parser.add_argument("--step", type=int, help="checkpoint to convert; the newest good one by default")
    way = parser.add_mutually_exclusive_group(required=True)
    way.add_argument("--to", choices=["hf", "peft"], help="format: hf is Hugging Face's, in safetensors; peft the "
                     "adapters of train.lora alone")  # fmt: skip
    add_options(parser, way)
    parser.add_argument(
        "--dtype", choices=["bf16", "fp16", "fp32"], help="precision of the weights; the run's by default"
    )
    parser.add_argument("--json", action="store_true", help="print what was verified as one JSON object")
    arguments = parser.parse_args(argv)
    if (status := import_model(arguments, parser)) is not None:
        return status
    from pretrain.convert import convert, notes, summary
    from pretrain.errors import LonghaulError

    try:
        if arguments.to == "peft":
            from pretrain.adapter_export import export_adapter

            print(json.dumps(export_adapter(arguments.run, arguments.out, arguments.step, arguments.dtype)))
            return 0
        report = convert(arguments.run, arguments.out, arguments.step, arguments.to, arguments.dtype)
    except LonghaulError as error:
        from pretrain.redaction import print_error

        print_error(error)
        return error.exit_status
    if arguments.json:
        print(json.dumps(report))
    else:
        for note in notes(report):
            print(f"note: {note}", file=sys.stderr)
        print(f"{arguments.out}: {summary(report)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
