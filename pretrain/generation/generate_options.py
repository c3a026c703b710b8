"""How text is sampled and what it goes on from: options, command line, prompts. Without torch: `--help` is quick."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pretrain.command_line import CommandLine, real, whole, written
from pretrain.errors import ConfigError

EXAMPLES = """examples:
  python launch/generate.py runs/quickstart --prompt 'import '
  python launch/generate.py runs/quickstart --prompt 'def ' --num-samples 3 --temperature 0.8 --min-p 0.05
  python launch/generate.py runs/quickstart --prompt 'def ' --temperature 0 --repetition-penalty 1.2 --stop $'\\n\\n'
  python launch/generate.py runs/quickstart --prompt-file prompts.txt --batch-size 64 --top-p 0.9 --json > texts.json
  python launch/generate.py runs/tuned --chat --system 'Answer in one sentence.'
  grep '^def ' example.py | python launch/generate.py runs/quickstart --prompt-file - --max-new-tokens 32

exit status: 0 done, 1 failed, 2 wrong use, 130 stopped by a signal."""


def _option(default: Any, meaning: str, accepts: Callable[[Any], bool], rule: str, fix: str) -> Any:
    """Declare an option: `rule` and `fix` are for the message when `accepts` says no to a value."""
    return dataclasses.field(default=default, metadata={"help": meaning, "accepts": accepts, "rule": rule, "fix": fix})


@dataclass(frozen=True)
class GenerateOptions:
    """How text is sampled; `--help` of `launch/generate.py` says what each option does.

    The filters work in the order of transformers: repetition penalty, temperature, top-k, top-p, min-p.
    """

    max_new_tokens: int = _option(
        128, "at most this many tokens after the prompt", lambda n: n >= 1, "at least 1", "1 or more"
    )
    temperature: float = _option(
        1.0, "divides the logits; 0 takes the most probable token", lambda t: 0 <= t < float("inf"),
        "0 or more", "0 for greedy text",
    )  # fmt: skip
    top_k: int = _option(
        0, "sample from the k most probable tokens; 0: from all", lambda k: k >= 0, "0 or more", "0 for all tokens"
    )
    top_p: float = _option(
        1.0, "sample from the fewest tokens that hold this probability; 1: from all", lambda p: 0 < p <= 1,
        "more than 0 and at most 1", "1 for all tokens",
    )  # fmt: skip
    min_p: float = _option(
        0.0, "drop tokens less probable than this share of the most probable one; 0: none", lambda p: 0 <= p <= 1,
        "0 to 1", "0 for all tokens",
    )  # fmt: skip
    repetition_penalty: float = _option(
        1.0, "above 1: tokens of the prompt and the text so far become less probable",
        lambda penalty: 0 < penalty < float("inf"), "more than 0", "1 for none",
    )  # fmt: skip
    seed: int = _option(
        1, "the same seed gives the same text, whatever else is in the batch", lambda seed: 0 <= seed < 2**63,
        "0 to 2^63 - 1", "such a number",
    )  # fmt: skip
    stop: tuple[str, ...] = _option(
        (), "string that ends the text, which is cut before it; may be repeated", lambda texts: "" not in texts,
        "text", "strings of at least one character",
    )  # fmt: skip
    batch_size: int = _option(
        16, "prompts that are computed at once", lambda size: size >= 1, "at least 1", "1 or more"
    )

    def check(self) -> None:
        """Refuse values that mean nothing.

        Raises:
            ConfigError: one line for each of them.
        """
        problems = []
        for option in dataclasses.fields(self):
            value, about = getattr(self, option.name), option.metadata
            if not about["accepts"](value):
                shown = repr("") if option.name == "stop" else value
                problems.append(f"{_flag(option.name)} is {shown}; expected {about['rule']}. Use {about['fix']}.")
        if problems:
            raise ConfigError("\n".join(problems))


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def make_parser(description: str | None) -> CommandLine:
    """Return what reads the arguments: what writes text, how it is sampled, what it goes on from, how it is shown."""
    parser = CommandLine("generate", description, EXAMPLES)
    parser.add_argument("run", metavar="RUN", help="run folder")
    parser.add_argument("--step", type=whole, metavar="N", help="checkpoint to use; the newest good one by default")
    parser.add_argument(
        "--prompt",
        type=written,
        action="append",
        default=[],
        metavar="TEXT",
        help="text to go on from; may be repeated",
    )
    parser.add_argument(
        "--prompt-file", metavar="FILE",
        help="a prompt a line, blank lines left out; of a .jsonl file the field `prompt`, or `messages` to answer; "
        "- is the standard input",
    )  # fmt: skip
    parser.add_argument(
        "--chat", action="store_true", help="a conversation: what is typed is answered, by the chat template"
    )
    parser.add_argument(
        "--system", type=written, default="", metavar="TEXT", help="with --chat, what the model is told first"
    )
    parser.add_argument(
        "--chat-template", metavar="FILE", help="a Jinja template as transformers has them; by default the tokenizer's"
    )
    parser.add_argument("--num-samples", type=whole, default=1, metavar="N", help="texts for each prompt (%(default)s)")
    for option in dataclasses.fields(GenerateOptions):
        about: dict[str, Any] = {"help": option.metadata["help"]}
        if option.name == "stop":
            about |= {"action": "append", "default": [], "metavar": "TEXT"}
        else:
            kind, letter = (whole, "N") if isinstance(option.default, int) else (real, "X")
            about |= {"type": kind, "default": option.default, "metavar": letter}
            about["help"] += " (%(default)s)"
        parser.add_argument(_flag(option.name), **about)
    parser.add_argument(
        "--dtype", choices=("auto", "fp32", "bf16"), default="auto",
        help="of weights and activations; auto: on a GPU as in training, on a CPU fp32",
    )  # fmt: skip
    parser.add_argument(
        "--stream", action=argparse.BooleanOptionalAction, default=None,
        help="show text as it is written, not when it is done; by default on a terminal",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print one JSON object when all is done")
    return parser


def options_from(arguments: argparse.Namespace) -> GenerateOptions:
    """Return the checked options that the arguments hold.

    Raises:
        ConfigError: a value means nothing.
    """
    given = {option.name: getattr(arguments, option.name) for option in dataclasses.fields(GenerateOptions)}
    options = GenerateOptions(**given | {"stop": tuple(arguments.stop)})
    options.check()
    return options


def prompts_from(arguments: argparse.Namespace) -> list[str | list[dict[str, str]]]:
    """Return the prompts that the arguments name, each as often as texts are wanted for it; none for a conversation.

    Raises:
        ConfigError: there is none, or the file cannot be read; they do not go with `--chat`, or `--system` without.
    """
    if arguments.chat:
        unused: dict[str, Any] = {"prompt": [], "prompt_file": None, "json": False, "num_samples": 1, "stream": None}
        for name, default in unused.items():
            if (value := getattr(arguments, name)) != default:
                raise ConfigError(f"{_flag(name)} is {value}; expected none with --chat. Leave one of them out.")
        return []
    if arguments.system:
        raise ConfigError(f"--system is {arguments.system!r}; expected none without --chat. Add --chat.")
    if arguments.num_samples < 1:
        raise ConfigError(f"--num-samples is {arguments.num_samples}; expected at least 1. Use 1 or more.")
    prompts: list[str | list[dict[str, str]]] = list(arguments.prompt)
    if arguments.prompt_file is not None:
        prompts += read_prompts(arguments.prompt_file)
    if not prompts:
        where = "is missing" if arguments.prompt_file is None else f"is missing and {arguments.prompt_file} holds none"
        raise ConfigError(f"--prompt {where}; expected at least one prompt. Add --prompt TEXT or --prompt-file FILE.")
    if arguments.chat_template is not None and all(isinstance(prompt, str) for prompt in prompts):
        raise ConfigError(
            f"--chat-template is {arguments.chat_template}; expected none for prompts that are plain text. Leave it "
            "out, or use --chat, or `messages` in the lines of a .jsonl file."
        )
    return [prompt for prompt in prompts for _ in range(arguments.num_samples)]


def read_text(option: str, name: str) -> str:
    """Read a file of text that an option of the command line names, or the standard input (`-`).

    Raises:
        ConfigError: it cannot be read or is not UTF-8.
    """
    try:
        return sys.stdin.read() if name == "-" else Path(name).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"{option} is {name}; expected a readable file of UTF-8 text ({error}). Name another."
        ) from None


def read_prompts(name: str) -> list[str | list[dict[str, str]]]:
    """Read prompts from a file of lines or JSON lines, or from the standard input (`-`).

    Raises:
        ConfigError: it cannot be read, is not UTF-8, or a JSON line holds no prompt.
    """
    text = read_text("--prompt-file", name)
    # Not splitlines(): it cuts at form feeds and U+2028 too, which may well stand inside a prompt.
    lines = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    if not name.endswith(".jsonl"):
        return [line.removesuffix("\r") for _, line in lines]
    return list(_json_prompts(name, lines))


def _json_prompts(name: str, lines: Sequence[tuple[int, str]]) -> Iterator[str | list[dict[str, str]]]:
    for number, line in lines:
        try:
            record = json.loads(line)
            prompt = record["messages"] if "messages" in record else record["prompt"]
        except (ValueError, KeyError, TypeError):
            prompt = None
        if not isinstance(prompt, str) and not _are_messages(prompt):
            shown = line if len(line) <= 60 else line[:57] + "..."
            raise ConfigError(
                f'{name}:{number}: the line is {shown}; expected JSON such as {{"prompt": "text"}} or {{"messages": '
                f'[{{"role": "user", "content": "text"}}]}}. Correct the line.'
            )
        yield prompt


def _are_messages(value: Any) -> bool:
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(one, dict) and set(one) == {"role", "content"} for one in value)
        and all(isinstance(text, str) for one in value for text in one.values())
    )
