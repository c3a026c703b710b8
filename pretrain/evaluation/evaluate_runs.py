"""Evaluating runs from the command line, and showing what comes out."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any

from pretrain.console import LiveLine
from pretrain.evaluation.answers import Answered
from pretrain.evaluation.answers import describe as describe_answers
from pretrain.evaluation.comparison import aligned, differences, table, task_table
from pretrain.evaluation.evaluate_options import EvaluateOptions
from pretrain.evaluation.evaluations import Judge, Judged
from pretrain.ranks.distributed import join_for_evaluation, leave_distributed

TIMEOUT_SECONDS = 1800  # that ranks wait for each other, while one reads a data set for example


def evaluate_runs(
    runs: Sequence[str], step: int | None, steps: Sequence[int] | None, options: EvaluateOptions, as_json: bool
) -> None:
    """Evaluate, on all ranks, and print on rank 0.

    Args:
        runs: run folders.
        step: checkpoint of each, if one is wanted.
        steps: otherwise those of each, all if empty; None: the newest.
        options: what to do with them.
        as_json: print one JSON object.

    Raises:
        LonghaulError: one message; nothing was printed on stdout.
    """
    ranks = join_for_evaluation(TIMEOUT_SECONDS)
    line = LiveLine()  # its stream is the real one: libraries are kept from printing

    def show(what: str, done: int, total: int) -> None:
        line.show(f"{what}: {done} of {total} batches", plain=False)

    judge = Judge(options, ranks, show)
    wanted: list[tuple[str, int | None]] = [(run, step) for run in runs]
    if steps is not None:
        wanted = [(run, one) for run in runs for one in judge.steps_of(run, steps)]
    judged = [judge.judge(*one) for one in wanted]
    line.end()
    if ranks.is_first:
        if kept := sum(one.is_kept for one in judged):
            which = "" if len(judged) == 1 else f" of {kept} of {len(judged)} checkpoints"
            line.say(f"results{which} as evaluated before; --again evaluates anew")
        _print(judged, as_json)
    leave_distributed()


def _print(judged: Sequence[Judged], as_json: bool) -> None:
    rows = [one.row() for one in judged]
    if as_json and len(judged) == 1:
        print(json.dumps(_finite(judged[0].numbers())))
    elif as_json:
        found = {"evaluations": [one.numbers() for one in judged], "differences": differences(rows)}
        print(json.dumps(_finite(found)))
    elif len(judged) == 1:
        print(_page(judged[0]))
    else:
        print(table(rows))


def _finite(value: Any) -> Any:
    """Replace NaN and infinity, which JSON does not have, by null."""
    if isinstance(value, dict):
        return {key: _finite(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _page(judged: Judged) -> str:
    numbers, parts = judged.numbers(), []
    if "loss" in numbers:
        parts.append(
            f"step {judged.step}: loss {numbers['loss']:.4f} nats per token, perplexity {numbers['perplexity']:.2f}, "
            f"{numbers['bits_per_byte']:.4f} bits per byte, over {numbers['tokens']} tokens ({numbers['bytes']} bytes)"
        )
        if len(numbers["sources"]) > 1:
            lines = [["source", "loss", "perplexity", "bits per byte", "tokens"]]
            lines += [
                [name, f"{part['loss']:.4f}", f"{part['perplexity']:.2f}", f"{part['bits_per_byte']:.4f}",
                 str(part["tokens"])] for name, part in numbers["sources"].items()
            ]  # fmt: skip
            parts.append(aligned(lines))
    if "answers" in numbers:
        parts.append(describe_answers(Answered(numbers["answers"]["values"], numbers["answers"]["num_examples"])))
    if "tasks" in numbers:
        parts.append(task_table(numbers["tasks"]))
    return "\n\n".join(parts)
