"""What a model answers to held-out examples, and how good that is by the metric of its task.

The examples are those of the held-out rows, so that loss and metric are of the same data: of each, the ids up to its
last answer are the prompt, and that answer is the reference.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from pretrain.data.row_reader import IGNORED_TARGET
from pretrain.data.stream import ValRows
from pretrain.errors import DataError
from pretrain.evaluation.scoring import Prompt, Scorer
from pretrain.generation.generate_options import GenerateOptions
from pretrain.ranks.distributed import Ranks
from pretrain.tasks.task_metrics import score
from pretrain.tokenizers.chat import stop_ids
from pretrain.tokenizers.tokenizer import Tokenizer
from pretrain.transformer.model import Transformer

_ROWS_AT_ONCE = 64
_LEAST_TOKENS = 8192  # computed at once, however few training does: keys and values of a gigabyte or two at most
_ROOM = 2  # times the longest reference, in tokens, that an answer may have


@dataclass(frozen=True)
class HeldOutExample:
    """Ids of a prompt, and of the right answers to it: the one that is scored, whose last id ends it, and others."""

    prompt: tuple[int, ...]
    answers: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Answered:
    """How good answers are: numbers from 0 to 100, the first of which the task is judged by, over so many examples."""

    values: dict[str, float]
    num_examples: int


def judge_answers(
    metric: str, model: Transformer, tokenizer: Tokenizer, rows: ValRows, batch_tokens: int,
    ranks: Ranks | None = None, is_divided: bool = False,
) -> Answered:  # fmt: skip
    """Let the model, in evaluation mode, answer the examples of held-out rows, each by its most probable tokens.

    Args:
        metric: one of `task_metrics.METRICS`.
        model: on any device, with all its weights or, at ZeRO stage 3, a part of them.
        tokenizer: the run's.
        rows: the held-out rows.
        batch_tokens: tokens computed at once.
        ranks: all ranks, which call this together and divide the examples; None for one process.
        is_divided: no rank has all weights.

    Returns:
        The same on all ranks.

    Raises:
        DataError: the rows hold no example.
        TrainingError: the model computes NaN or infinity.
    """
    size = max(batch_tokens, _LEAST_TOKENS)
    scorer = Scorer(model, tokenizer, size, ranks, is_divided, _all_ends(tokenizer))

    def work() -> Answered | None:
        if ranks and not ranks.is_first:
            scorer.serve()
            return None
        try:
            examples = read_examples(rows, tokenizer.eos_id)
            longest = max(len(answer) for one in examples for answer in one.answers)
            options = GenerateOptions(max_new_tokens=_ROOM * longest, temperature=0)
            requests = [Prompt(str(number), one.prompt, options) for number, one in enumerate(examples)]
            answers = scorer.generate(requests)
        finally:
            scorer.end()
        references = [[tokenizer.decode(answer) for answer in one.answers] for one in examples]
        return Answered(score(metric, answers, references), len(examples))

    if ranks is None or ranks.world_size == 1:
        answered = work()
    else:
        answered = ranks.from_first(ranks.agree(work))
    assert answered is not None
    return answered


def _all_ends(tokenizer: Tokenizer) -> list[int]:
    """Ids that end an answer: no text gives a special token, so none is a part of one."""
    return [*stop_ids(tokenizer), *tokenizer.special_tokens().values()]


def read_examples(rows: ValRows, eos_id: int) -> list[HeldOutExample]:
    """Return the examples of held-out rows, in the order of the rows.

    Args:
        rows: the held-out rows.
        eos_id: that ends each right answer but the first.

    Raises:
        DataError: there are none.
    """
    numbers = [number for part in rows.example_rows() for number in part]
    found: list[HeldOutExample] = []
    for begin in range(0, len(numbers), _ROWS_AT_ONCE):
        batch = rows.batch(numbers[begin : begin + _ROWS_AT_ONCE])
        for row in zip(batch.tokens_BT, batch.targets_BT, batch.doc_start_BT, strict=True):
            tokens_T, targets_T, doc_start_T = (tensor.numpy() for tensor in row)
            found += _examples_of(tokens_T, targets_T, doc_start_T, eos_id)
    if not found:
        raise DataError(
            "eval.metric is set, and the held-out rows hold no example; expected some. Hold some out "
            "(data.val_fraction), or raise eval.max_rows."
        )
    return found


def _examples_of(
    tokens_T: np.ndarray, targets_T: np.ndarray, doc_start_T: np.ndarray, eos_id: int
) -> Iterator[HeldOutExample]:
    """The examples of a row; padding and damaged documents have no target."""
    begins = np.unique(doc_start_T)
    for begin, end in zip(begins, [*begins[1:], len(tokens_T)], strict=True):
        is_scored = targets_T[begin:end] != IGNORED_TARGET
        places = np.flatnonzero(is_scored)
        if not len(places):
            continue
        last = int(places[-1])
        context = np.flatnonzero(~is_scored[:last])
        first = int(context[-1]) + 1 if len(context) else 0
        prompt, answer = tokens_T[begin : begin + first + 1], targets_T[begin + first : begin + last + 1]
        behind = tokens_T[begin + last + 2 : end]  # the last id of a document is only predicted, so no input
        others = [part[part != eos_id] for part in np.split(behind, np.flatnonzero(behind == eos_id))]
        yield HeldOutExample(
            tuple(prompt.tolist()), (tuple(answer.tolist()), *(tuple(one.tolist()) for one in others if len(one)))
        )


def describe(answered: Answered) -> str:
    """Say in words what came out."""
    numbers = "  ".join(f"{name} {value:.2f}" for name, value in answered.values.items())
    return f"{numbers}  over {answered.num_examples:,} held-out examples"
