"""Held-out loss, perplexity and bits per byte of a run: `python launch/evaluate.py RUN`."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

if sys.path[0] == str(Path(__file__).resolve().parent):  # run as a file: launch/ would shadow the package `pretrain`
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from pretrain.console import ends_at_closed_pipe

EXAMPLES = """examples:
  python launch/evaluate.py runs/quickstart
  python launch/evaluate.py runs/quickstart --step 400 --json"""


@ends_at_closed_pipe
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return its exit status."""
    parser = argparse.ArgumentParser(
        prog="evaluate", description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", metavar="RUN", help="run folder")
    parser.add_argument("--step", type=int, help="checkpoint to judge; the newest by default")
    parser.add_argument("--max-rows", type=int, default=0, help="held-out rows to use; all by default")
    parser.add_argument("--json", action="store_true", help="print one JSON object on stdout and nothing else there")
    parser.add_argument("--allow-pipe", action="store_true", help="run the commands of sources that are pipe:")
    arguments = parser.parse_args(argv)
    from pretrain.errors import LonghaulError
    from pretrain.evaluate import evaluate
    from pretrain.hardware import best_device
    from pretrain.redaction import print_error
    from pretrain.run_folder import load_run
    from pretrain.stream import ValRows

    try:
        loaded, device = load_run(arguments.run, arguments.step, arguments.allow_pipe), best_device()
        rows = ValRows(loaded.config, loaded.tokenizer.fingerprint, arguments.max_rows)
        model = loaded.model.to(device)
        result = evaluate(
            model, rows, loaded.tokenizer.token_bytes(), loaded.config.train.micro_batch_size, device=device
        )
    except LonghaulError as error:
        print_error(error)
        return error.exit_status
    for damage in rows.damage.add(rows.take_damaged()):
        print(f"warning: held-out {damage}; it is not scored", file=sys.stderr)
    if arguments.json:
        print(json.dumps({"step": loaded.step, **asdict(result)}))
    else:
        print(
            f"step {loaded.step}: loss {result.loss:.4f} nats per token, perplexity {result.perplexity:.2f}, "
            f"{result.bits_per_byte:.4f} bits per byte, over {result.tokens} tokens ({result.bytes} bytes)"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
