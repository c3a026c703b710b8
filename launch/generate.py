"""Sample text from a run: `python launch/generate.py RUN --prompt TEXT`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

if sys.path[0] == str(Path(__file__).resolve().parent):  # run as a file: launch/ would shadow the package `pretrain`
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from pretrain.console import TextPrinter, ends_at_closed_pipe
from pretrain.errors import LonghaulError
from pretrain.interrupts import begin_work, ends_on_signal


@ends_at_closed_pipe
@ends_on_signal()
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return its exit status."""
    import dataclasses
    import json

    from pretrain.generation.generate_options import make_parser, options_from, prompts_from

    arguments = make_parser(__doc__).parse_args(argv)
    try:
        options, prompts = options_from(arguments), prompts_from(arguments)  # before seconds are spent on loading
        from pretrain.checkpoints.run_folder import load_run
        from pretrain.generation.conversation import Conversation
        from pretrain.generation.generate import generate, place
        from pretrain.generation.talk import take_template, talk

        begin_work()
        run = load_run(arguments.run, arguments.step)
        model = place(run.model, run.config.train.precision, arguments.dtype)
        take_template(run.tokenizer, arguments.chat_template)
        if arguments.chat:
            talk(Conversation(model, run.tokenizer, options, arguments.system))
            return 0
        is_live = sys.stdout.isatty() if arguments.stream is None else arguments.stream
        beginnings = [prompt if isinstance(prompt, str) else "" for prompt in prompts]
        printer = None if arguments.json else TextPrinter(beginnings, is_live)
        completions = generate(model, run.tokenizer, prompts, options, printer.add if printer else None)
    except LonghaulError as error:
        from pretrain.redaction import print_error

        print_error(error)
        return error.exit_status
    if arguments.json:
        print(json.dumps({"step": run.step, "completions": [dataclasses.asdict(item) for item in completions]}))
    num_full = sum(item.finish == "context" for item in completions)
    if num_full and not arguments.json:
        which, most = "" if len(completions) == 1 else f"{num_full} texts ", run.config.data.max_seq_len
        print(f"note: {which}stopped at {most} tokens, the length that the model was trained on", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
