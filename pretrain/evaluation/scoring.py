"""Requests that evaluation tasks make of a model: how probable continuations are, and texts that go on from prompts.

Rank 0 has the requests and hands them to all ranks, which compute a share each. Batches are formed before they are
divided, so that every answer is the same number whatever the number of ranks.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch

from pretrain.errors import LonghaulError, TrainingError
from pretrain.generation.generate import generate
from pretrain.generation.generate_options import GenerateOptions
from pretrain.ranks.distributed import Ranks, is_communication_failure
from pretrain.tokenizers.tokenizer import Tokenizer
from pretrain.transformer.model import Transformer

logger = logging.getLogger("longhaul")
T = TypeVar("T")


@dataclass(frozen=True)
class Continuation:
    """Ids whose probability is asked for, and at least one before them; all but the last fit the model."""

    context: tuple[int, ...]
    ids: tuple[int, ...]

    @property
    def inputs(self) -> tuple[int, ...]:
        """What the model is shown; the last id is only predicted."""
        return (self.context + self.ids)[:-1]


@dataclass(frozen=True)
class Prompt:
    """Ids to go on from, their text, which keys random numbers, and how to go on."""

    text: str
    ids: tuple[int, ...]
    options: GenerateOptions


class Scorer:
    """A model that answers requests, on all ranks.

    Rank 0 calls `score` and `generate`, and `end` when it has no more to ask; the others call `serve`.
    """

    def __init__(
        self, model: Transformer, tokenizer: Tokenizer, batch_tokens: int, ranks: Ranks | None = None,
        computes_together: bool = False, end_ids: Sequence[int] = (),
        on_progress: Callable[[int, int], None] | None = None,
    ) -> None:  # fmt: skip
        """Take the model, in evaluation mode.

        Args:
            model: on any device, with all its weights or, at ZeRO stage 3, a part of them.
            tokenizer: the run's.
            batch_tokens: tokens computed at once, padding included; a longer row is computed alone.
            ranks: all ranks; None for one process.
            computes_together: no rank has all weights, so that each forward pass is one of all ranks.
            end_ids: token ids that end a text, beside that of the end of a document.
            on_progress: told, of this rank, batches done and to do.
        """
        self._model, self._tokenizer, self._batch_tokens = model, tokenizer, batch_tokens
        self._ranks = ranks if ranks and ranks.world_size > 1 else None
        self._heartbeat = ranks.heartbeat if ranks else None
        self._computes_together = computes_together and self._ranks is not None
        self._end_ids, self._on_progress = frozenset(end_ids), on_progress

    def score(self, requests: Sequence[Continuation]) -> list[tuple[float, bool]]:
        """Return each continuation's log-probability, and whether each of its ids is the most probable one.

        Raises:
            LonghaulError: a rank cannot go on.
        """
        return self._answer("score", list(requests))

    def generate(self, requests: Sequence[Prompt]) -> list[str]:
        """Return the text that follows each prompt, up to a stop string, an id that ends texts, or the document's end.

        Raises:
            LonghaulError: the model computes NaN or infinity.
        """
        times: Counter[str] = Counter()
        distinct = []
        for request in requests:  # so that a prompt that is repeated gives other text on whatever rank it is
            times[request.text] += 1
            distinct.append(replace(request, text=f"{times[request.text]}:{request.text}"))
        return self._answer("generate", distinct)

    def serve(self) -> None:
        """Compute this rank's share of what rank 0 is asked, until that has no more."""
        assert self._ranks is not None
        while True:
            kind, requests = self._ranks.from_first(None)
            if kind == "end":
                return
            try:
                self._compute(kind, requests)
            except LonghaulError:
                continue  # rank 0 raises it too

    def end(self) -> None:
        """Let the other ranks go on."""
        if self._ranks:
            self._ranks.from_first(("end", None))

    def _answer(self, kind: str, requests: list[Any]) -> list[Any]:
        if self._ranks:
            self._ranks.from_first((kind, requests))
        return self._compute(kind, requests)

    def _compute(self, kind: str, requests: list[Any]) -> list[Any]:
        rank, world_size = (self._ranks.rank, self._ranks.world_size) if self._ranks else (0, 1)
        is_score = kind == "score"
        batches: list[Any] = self._score_batches(requests) if is_score else self._prompt_batches(requests)
        compute: Callable[..., Mapping[int, Any]] = self._score_batch if is_score else self._generate_batch
        own = batches[rank::world_size]
        answers: dict[int, Any] = {}
        problem: LonghaulError | None = None
        try:
            with self._together():
                for number, batch in enumerate(own, 1):
                    answers |= compute(batch, requests)
                    if self._heartbeat:
                        self._heartbeat.beat()
                    if self._on_progress:
                        self._on_progress(number, len(own))
        except LonghaulError as error:
            problem = error
        except Exception as error:
            if self._ranks is None or self._computes_together or is_communication_failure(error):
                raise
            logger.exception("a share of the requests of tasks")
            problem = TrainingError(f"tasks: rank {rank} failed: {type(error).__name__}: {error}")
        parts = self._ranks.gather((answers, problem)) if self._ranks else [(answers, problem)]
        for part, found in parts:
            if found is not None:
                raise found
            answers |= part
        return [answers[index] for index in range(len(requests))]

    @contextmanager
    def _together(self) -> Iterator[None]:
        """Have every forward pass of one rank be one of all: who has none left computes what is not needed."""
        if not self._computes_together or self._ranks is None:
            yield
            return
        ranks = self._ranks
        # Before DeepSpeed's own hooks, which gather weights: all ranks ask the same in the same order.
        hook = self._model.register_forward_pre_hook(lambda *_: ranks.sum([1.0]) and None, prepend=True)
        try:
            yield
        except LonghaulError as error:
            problem: LonghaulError | None = error
        else:
            problem = None
        finally:
            hook.remove()
        nothing_BT = torch.full((1, 1), self._tokenizer.bos_id, device=ranks.device)
        while ranks.sum([0.0])[0]:
            self._model.logits(nothing_BT)
        if problem:
            raise problem

    def _score_batches(self, requests: list[Continuation]) -> list[list[list[int]]]:
        """Group requests of the same inputs, as choices of one token are, and these by length."""
        same: dict[tuple[int, ...], list[int]] = {}
        for index, request in enumerate(requests):
            same.setdefault(request.inputs, []).append(index)
        ordered = sorted(same, key=lambda inputs: (-len(inputs), inputs))
        return [[same[inputs] for inputs in batch] for batch in _in_batches(ordered, len, self._batch_tokens)]

    def _score_batch(self, batch: list[list[int]], requests: list[Continuation]) -> dict[int, tuple[float, bool]]:
        inputs = [requests[same[0]].inputs for same in batch]
        longest = len(inputs[0])
        tokens_BT = torch.tensor([[*ids, *[self._tokenizer.pad_id] * (longest - len(ids))] for ids in inputs])
        places: list[int] = []
        targets: list[int] = []
        ends: list[tuple[int, int]] = []
        for row, same in enumerate(batch):
            for index in same:
                ids = requests[index].ids
                last = row * longest + len(inputs[row])
                places += range(last - len(ids), last)
                targets += ids
                ends.append((index, len(targets)))
        device = self._model.embedding.weight.device
        log_probs_N, is_first_N = self._model.score(
            tokens_BT.to(device), torch.tensor(places, device=device), torch.tensor(targets, device=device)
        )
        log_probs, is_first = log_probs_N.tolist(), is_first_N.tolist()
        answers, begin = {}, 0
        for index, end in ends:
            answers[index] = sum(log_probs[begin:end]), all(is_first[begin:end])
            begin = end
        return answers

    def _prompt_batches(self, requests: list[Prompt]) -> list[list[int]]:
        """Group prompts that go on in the same way, and these by length."""
        by_options: dict[GenerateOptions, list[int]] = {}
        for index, request in enumerate(requests):
            by_options.setdefault(request.options, []).append(index)
        batches: list[list[int]] = []
        for options, numbers in by_options.items():
            numbers.sort(key=lambda index: (-len(requests[index].ids), requests[index].text))
            lengths = {index: len(requests[index].ids) + options.max_new_tokens for index in numbers}
            batches += _in_batches(numbers, lengths.__getitem__, self._batch_tokens)
        return batches

    def _generate_batch(self, batch: list[int], requests: list[Prompt]) -> dict[int, str]:
        own = [requests[index] for index in batch]
        completions = generate(
            self._model, self._tokenizer, [request.text for request in own],
            replace(own[0].options, batch_size=len(own)), prompt_ids=[list(request.ids) for request in own],
            also_end=self._end_ids,
        )  # fmt: skip
        return {index: one.text for index, one in zip(batch, completions, strict=True)}


def _in_batches(items: Sequence[T], length: Callable[[T], int], batch_tokens: int) -> list[list[T]]:
    """Cut items, longest first, into batches of at most so many tokens with padding, but of one item at least."""
    batches: list[list[T]] = []
    for item in items:
        if not batches or (len(batches[-1]) + 1) * length(batches[-1][0]) > batch_tokens:
            batches.append([])
        batches[-1].append(item)
    return batches
