"""The command line of `launch/convert.py`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from pretrain.command_line import CommandLine, whole
from pretrain.formats.import_options import add_options

EXAMPLES = """examples:
  python launch/convert.py runs/quickstart exports/quickstart --to hf
  python launch/convert.py runs/llama-350m exports/llama-350m --to hf --step 20000 --dtype fp32 --license apache-2.0
  python launch/convert.py runs/llama-350m exports/llama-350m-gguf --to gguf --dtype q8_0
  python launch/convert.py runs/llama-350m exports/llama-350m-torch --to torch --json
  python launch/convert.py downloads/SmolLM2-135M runs/smollm2 --from hf --add-tokens '<|user|>' '<|assistant|>'
  python launch/convert.py runs/tuned exports/tuned-adapters --to peft

exit status: 0 done, 1 failed (not verified: nothing is there), 2 wrong use, 75 stopped by a signal: the same command
goes on with what is written (130 with --from hf and --to peft, which begin anew)."""

# Options that not every format has a meaning for, and the formats that have.
_FORMATS_OF = {"max_shard_size": ("hf",), "verify": ("hf", "gguf"), "license": ("hf", "gguf")}


def make_parser(description: str | None) -> argparse.ArgumentParser:
    """Return what reads the arguments."""
    parser = CommandLine("convert", description, EXAMPLES)
    parser.add_argument("run", metavar="RUN", help="run folder; with --from the folder of the published model")
    parser.add_argument("out", metavar="OUT", help="folder to make; it must not exist, or be empty")
    parser.add_argument("--step", type=whole, metavar="N", help="checkpoint to convert; the newest good one by default")
    way = parser.add_mutually_exclusive_group(required=True)
    way.add_argument("--to", choices=["hf", "gguf", "torch", "peft"], help="format: hf is Hugging Face's, in "
                     "safetensors; gguf llama.cpp's and Ollama's; torch a plain state dict; peft the adapters of "
                     "train.lora alone")  # fmt: skip
    add_options(parser, way)
    parser.add_argument("--dtype", choices=["bf16", "fp16", "fp32", "q8_0"],
                        help="precision of the weights; the run's by default; q8_0 only for gguf")  # fmt: skip
    parser.add_argument("--max-shard-size", metavar="SIZE",
                        help="size at which hf's weights go on in another file: 500MB, 2GiB (5GB)")  # fmt: skip
    parser.add_argument("--verify", choices=["logits", "tensors"], help="of hf and gguf: compare logits (as far as "
                        "memory allows the default: once the model in fp32) or only every tensor of the "
                        "files")  # fmt: skip
    parser.add_argument("--license", metavar="NAME", help="of the weights, as the Hub names it, for the card of hf and "
                        "the head of gguf: apache-2.0, cc-by-4.0, …")  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print what was verified as one JSON object")
    return parser


def parse(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the arguments, and refuse options that would do nothing."""
    arguments = parser.parse_args(argv)
    for name, formats in _FORMATS_OF.items():
        if getattr(arguments, name) is not None and arguments.to not in formats:
            parser.error(f"--{name.replace('_', '-')} goes with --to {' and --to '.join(formats)}")
    return arguments
