"""Convert a checkpoint to files that other software loads, verified: `python launch/convert.py RUN OUT --to hf`."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

if sys.path[0] == str(Path(__file__).resolve().parent):  # run as a file: launch/ would shadow the package `pretrain`
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from pretrain.console import ends_at_closed_pipe

EXAMPLES = """examples:
  python launch/convert.py runs/quickstart exports/quickstart --to hf
  python launch/convert.py runs/llama-350m exports/llama-350m --to hf --step 20000 --dtype fp32 --license apache-2.0
  python launch/convert.py runs/llama-350m exports/llama-350m-gguf --to gguf --dtype q8_0
  python launch/convert.py runs/llama-350m exports/llama-350m-torch --to torch --json"""


@ends_at_closed_pipe
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return its exit status."""
    parser = argparse.ArgumentParser(
        prog="convert", description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", metavar="RUN", help="run folder")
    parser.add_argument("out", metavar="OUT", help="folder to make; it must not exist, or be empty")
    parser.add_argument("--step", type=int, help="checkpoint to convert; the newest good one by default")
    parser.add_argument("--to", choices=["hf", "gguf", "torch"], required=True, help="format: hf is Hugging Face's, in "
                        "safetensors; gguf llama.cpp's and Ollama's; torch a plain state dict")  # fmt: skip
    parser.add_argument("--dtype", choices=["bf16", "fp16", "fp32", "q8_0"],
                        help="precision of the weights; the run's by default; q8_0 only for gguf")  # fmt: skip
    parser.add_argument("--max-shard-size", default="5GB", help="size at which hf's weights go on in another file")
    parser.add_argument("--verify", choices=["logits", "tensors"], help="compare logits (as far as memory allows the "
                        "default: once the model in fp32) or only every tensor of the files")  # fmt: skip
    parser.add_argument("--license", help="of the weights, as the Hub names it: apache-2.0, cc-by-4.0, …")
    parser.add_argument("--json", action="store_true", help="print what was verified as one JSON object")
    arguments = parser.parse_args(argv)
    from pretrain.convert import ConvertOptions, convert, parse_size, summary
    from pretrain.errors import EXIT_STOPPED, LonghaulError
    from pretrain.redaction import print_error

    try:
        options = ConvertOptions(arguments.to, arguments.dtype, parse_size(arguments.max_shard_size), arguments.verify,
                                 arguments.license)  # fmt: skip
        report = convert(arguments.run, arguments.out, arguments.step, options)
    except LonghaulError as error:
        print_error(error)
        return error.exit_status
    except KeyboardInterrupt:
        print("stopped; the same command goes on with what is written", file=sys.stderr)
        return EXIT_STOPPED
    print(json.dumps(report) if arguments.json else summary(report, arguments.out))
    return 0


if __name__ == "__main__":
    sys.exit(main())
