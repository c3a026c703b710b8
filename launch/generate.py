"""Sample text from a run: `python launch/generate.py RUN --prompt TEXT`."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path

if sys.path[0] == str(Path(__file__).resolve().parent):  # run as a file: launch/ would shadow the package `pretrain`
    sys.path[0] = str(Path(__file__).resolve().parents[1])

EXAMPLES = """examples:
  python launch/generate.py runs/quickstart --prompt 'import '
  python launch/generate.py runs/quickstart --prompt 'def ' --prompt 'class ' --temperature 0 --stop $'\\n\\n' --json"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return its exit status."""
    parser = argparse.ArgumentParser(
        prog="generate", description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", metavar="RUN", help="run folder")
    parser.add_argument("--step", type=int, help="checkpoint to use; the newest good one by default")
    parser.add_argument("--prompt", action="append", required=True, help="text to go on from; may be repeated")
    parser.add_argument("--max-new-tokens", type=int, default=128, help="tokens at most (%(default)s)")
    parser.add_argument("--temperature", type=float, default=1.0, help="0: the most probable token (%(default)s)")
    parser.add_argument("--top-k", type=int, default=0, help="sample from the k most probable; 0: all (%(default)s)")
    parser.add_argument("--top-p", type=float, default=1.0, help="sample from this much probability (%(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="the same seed gives the same text (%(default)s)")
    parser.add_argument("--stop", action="append", default=[], help="string that ends the text; may be repeated")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_args(argv)
    from pretrain.errors import LonghaulError
    from pretrain.generate import GenerateOptions, generate
    from pretrain.hardware import best_device
    from pretrain.run_folder import load_run

    given = {option.name: getattr(arguments, option.name) for option in dataclasses.fields(GenerateOptions)}
    options = GenerateOptions(**given | {"stop": tuple(arguments.stop)})
    try:
        options.check()  # before seconds are spent on loading
        run = load_run(arguments.run, arguments.step)
        completions = generate(run.model.to(best_device()), run.tokenizer, arguments.prompt, options)
    except LonghaulError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_status
    if arguments.json:
        print(json.dumps({"step": run.step, "completions": [dataclasses.asdict(item) for item in completions]}))
        return 0
    for item in completions:
        print(item.prompt + item.text)
        if item.finish == "context":
            note = f"note: stopped at {run.config.data.seq_len} tokens, the length that the model was trained on"
            print(note, file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
