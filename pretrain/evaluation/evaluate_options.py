"""The command line of `launch/evaluate.py`. Without torch: `--help` is quick."""

from __future__ import annotations

import argparse
from dataclasses import dataclass

from pretrain.command_line import whole
from pretrain.errors import ConfigError


@dataclass(frozen=True)
class EvaluateOptions:
    """What is evaluated, and how; `--help` of `launch/evaluate.py` says what each option does."""

    held_out: bool = True
    max_rows: int = 0
    tasks: tuple[str, ...] = ()
    include_path: str | None = None
    num_fewshot: int | None = None
    limit: int = 0
    chat: bool = False
    begins_with_bos: bool = True
    dtype: str = "fp32"
    again: bool = False
    allow_pipe: bool = False


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what is evaluated, on what, and how it is shown."""
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run folder; several are compared")
    parser.add_argument("--step", type=whole, metavar="N", help="checkpoint to judge; the newest good one by default")
    parser.add_argument("--steps", metavar="N,…", help="checkpoints to compare, such as 100,200, or all")
    held_out = parser.add_argument_group("held-out documents")
    held_out.add_argument("--max-rows", type=whole, default=0, metavar="N", help="rows to use; all by default")
    held_out.add_argument("--no-held-out", action="store_true", help="tasks only; needs no shards")
    held_out.add_argument("--allow-pipe", action="store_true", help="run the commands of sources that are pipe:")
    tasks = parser.add_argument_group("tasks of lm-eval (pip install 'longhaul[evals]')")
    tasks.add_argument("--tasks", metavar="NAME,…", help="names, patterns or task files, with commas between")
    tasks.add_argument("--include-path", metavar="DIR", help="folder of task files of your own")
    tasks.add_argument(
        "--num-fewshot", type=whole, metavar="N", help="examples before each question; by default as the task says"
    )
    tasks.add_argument(
        "--limit", type=whole, default=0, metavar="N", help="documents of each task to use; all by default"
    )
    tasks.add_argument("--apply-chat-template", action="store_true", help="ask questions as in a conversation")
    tasks.add_argument("--no-bos", action="store_true", help="do not begin contexts as documents begin in training")
    parser.add_argument("--dtype", choices=["fp32", "bf16"], default="fp32", help="arithmetic (%(default)s)")
    parser.add_argument("--again", action="store_true", help="compute what the run folder keeps, too")
    parser.add_argument("--json", action="store_true", help="print one JSON object on stdout and nothing else there")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # DeepSpeed's launcher adds it


def options_from(arguments: argparse.Namespace) -> EvaluateOptions:
    """Return the checked options that the arguments hold.

    Raises:
        ConfigError: they mean nothing.
    """
    names = None if arguments.tasks is None else [name for part in arguments.tasks.split(",") if (name := part.strip())]
    if names == []:
        raise ConfigError("--tasks is empty; expected names with commas between. Write --tasks hellaswag,arc_easy.")
    for flag in ("include_path", "num_fewshot", "limit", "apply_chat_template", "no_bos"):
        if names is None and getattr(arguments, flag):
            raise ConfigError(f"--{flag.replace('_', '-')} is for tasks; expected --tasks too. Add --tasks NAMES.")
    for flag in ("num_fewshot", "limit", "max_rows"):
        if (getattr(arguments, flag) or 0) < 0:
            value = getattr(arguments, flag)
            raise ConfigError(f"--{flag.replace('_', '-')} is {value}; expected 0 or more. Leave it out for all.")
    if arguments.no_held_out and names is None:
        raise ConfigError("--no-held-out leaves nothing to do; expected --tasks too. Add --tasks NAMES.")
    return EvaluateOptions(
        not arguments.no_held_out, arguments.max_rows, tuple(dict.fromkeys(names or ())), arguments.include_path,
        arguments.num_fewshot, arguments.limit, arguments.apply_chat_template, not arguments.no_bos, arguments.dtype,
        arguments.again, arguments.allow_pipe,
    )  # fmt: skip


def steps_from(arguments: argparse.Namespace) -> list[int] | None:
    """Return the steps that `--steps` names; None if it does not, an empty list for all.

    Raises:
        ConfigError: they are no numbers.
    """
    if arguments.steps is None:
        return None
    if arguments.step is not None:
        raise ConfigError("--step and --steps are both given; expected one of them. Drop --step.")
    if arguments.steps == "all":
        return []
    try:
        return [int(step) for step in arguments.steps.split(",")]
    except ValueError:
        raise ConfigError(
            f"--steps is {arguments.steps}; expected numbers with commas between, or all. Write --steps 100,200."
        ) from None
