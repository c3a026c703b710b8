"""A conversation with a model, whose keys and values stay: a turn computes what is new in it, and nothing again."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass

import torch

from pretrain.errors import ConfigError
from pretrain.generation.generate import check_finite, end_ids
from pretrain.generation.generate_options import GenerateOptions
from pretrain.generation.sampling import TextStream, choose_tokens
from pretrain.tokenizers.messages import Message, encode_messages
from pretrain.tokenizers.tokenizer import Tokenizer
from pretrain.transformer.model import KVCache, Transformer

_FIRST_SLOTS = 256  # of the cache; it grows as the conversation does
_ROOM_SHARE = 4  # this part of data.seq_len is kept free for an answer, unless it is to be shorter


@dataclass(frozen=True)
class Answer:
    """What the model said.

    Args:
        text: of the answer.
        finish: `eos`, `stop`, `length` or `context` as of a `Completion`, or `interrupted`.
        num_dropped: messages at the beginning that were forgotten, because all did not fit.
    """

    text: str
    finish: str
    num_dropped: int = 0


class Conversation:
    """The messages so far, and what the model keeps of them.

    Attributes:
        messages: with `role` and `content`; those that were forgotten are not among them.
    """

    def __init__(self, model: Transformer, tokenizer: Tokenizer, options: GenerateOptions, system: str = "") -> None:
        """Begin.

        Args:
            model: on any device.
            tokenizer: the run's; it has a chat template.
            options: how to sample each answer.
            system: what the model is told first; empty: nothing.

        Raises:
            ConfigError: the tokenizer has no chat template, or it takes no such messages.
        """
        self._model, self._tokenizer, self._options, self._system = model, tokenizer, options, system
        self._end_ids = end_ids(tokenizer)
        self._special_ids = frozenset(tokenizer.special_tokens().values())
        self.reset()
        encode_messages(tokenizer, [*self.messages, {"role": "user", "content": "?"}], add_generation_prompt=True)

    def reset(self) -> None:
        """Forget all but the system's message."""
        self.messages: list[Message] = [{"role": "system", "content": self._system}] if self._system else []
        self._num_turns = 0
        self._written: list[int] = []  # the messages as the template writes them, up to the last answer
        self._ids: list[int] = []  # the same with answers by the very tokens that the model chose
        self._cached: list[int] = []  # the ids in the cache
        weight = self._model.embedding.weight
        start_B = torch.zeros(1, dtype=torch.int64, device=weight.device)
        self._cache = KVCache(self._model.shape, start_B, _FIRST_SLOTS, weight.dtype)

    @torch.no_grad()
    def answer(
        self, text: str, on_text: Callable[[str], None], is_stopped: Callable[[], bool] = lambda: False
    ) -> Answer:
        """Take a message and answer it.

        Where all messages do not fit `data.seq_len` with some room for an answer, the oldest are forgotten.

        Args:
            text: the user's message.
            on_text: called with each new piece of the answer.
            is_stopped: asked after each token whether to stop.

        Raises:
            ConfigError: the message does not fit; it is not part of the conversation then.
            TrainingError: the model computes NaN or infinity.
        """
        messages, num_dropped = self._fit([*self.messages, {"role": "user", "content": text}])
        ids = self._next_ids(messages, is_same=num_dropped == 0)
        prompt_ids, stream = list(ids), TextStream(self._tokenizer.decode, ids, self._options.stop)
        num_steps = min(self._options.max_new_tokens, self._model.shape.seq_len - len(ids))
        finish = "length" if num_steps == self._options.max_new_tokens else "context"
        uniform_S = torch.rand(num_steps, generator=self._generator(), dtype=torch.float64)
        for step in range(num_steps):
            token = self._choose(ids, uniform_S[step : step + 1])
            if token in self._end_ids:
                finish = "eos"
                break
            ids.append(token)
            if new := stream.add(token):
                on_text(new)
            if stream.stopped or is_stopped():
                finish = "stop" if stream.stopped else "interrupted"
                break
        if new := stream.end():
            on_text(new)
        self._written, _ = encode_messages(self._tokenizer, messages, add_generation_prompt=True)
        self._ids, self._num_turns = ids, self._num_turns + 1
        self.messages = [*messages, {"role": "assistant", "content": stream.text}]
        if finish == "stop":  # its tokens may hold more than the text
            self._ids = [*prompt_ids, *self._tokenizer.encode(stream.text)]
        return Answer(stream.text, finish, num_dropped)

    def _fit(self, messages: list[Message]) -> tuple[list[Message], int]:
        """Leave out the oldest turns, but never the system's message or the last one."""
        seq_len, room = self._model.shape.seq_len, self._room()
        num_kept_first = 1 if self._system else 0
        for first in range(num_kept_first, len(messages)):
            if messages[first]["role"] == "assistant":
                continue  # a conversation begins with a question
            kept = [*messages[:num_kept_first], *messages[first:]]
            num_tokens = len(encode_messages(self._tokenizer, kept, add_generation_prompt=True)[0])
            is_last = first == len(messages) - 1
            if num_tokens + (1 if is_last else room) <= seq_len:
                return kept, first - num_kept_first
        raise ConfigError(
            f"message: it is {num_tokens} tokens with what the template and --system put before it; expected fewer "
            f"than data.seq_len ({seq_len}). Shorten it."
        )

    def _room(self) -> int:
        """Tokens that are kept free for an answer."""
        return min(self._options.max_new_tokens, self._model.shape.seq_len // _ROOM_SHARE)

    def _next_ids(self, messages: list[Message], is_same: bool) -> list[int]:
        """Return the ids to answer to: those that are there already and what is new, if the template only adds."""
        written, _ = encode_messages(self._tokenizer, messages, add_generation_prompt=True)
        begin = len(self._written)
        if not is_same or not begin or written[:begin] != self._written:
            return written
        # No text gives special ids: the next one ends the answer.
        end = next((place for place in range(begin, len(written)) if written[place] in self._special_ids), None)
        said = None if end is None else self._tokenizer.decode(written[begin:end])
        if said is None or said.strip() != messages[-2]["content"].strip():  # the template leaves some of it out
            return written
        kept = [*self._ids, *written[end:]]
        # The model may have chosen more tokens than its text takes, and by far: what was made room for is the text.
        return kept if len(kept) + self._room() <= self._model.shape.seq_len else written

    def _choose(self, ids: list[int], uniform_1: torch.Tensor) -> int:
        """Compute what is not in the cache, and choose the next token."""
        known = _num_common(ids[:-1], self._cached)  # the last one's logits are needed
        self._cache.forget_after(known)
        self._cache.reserve(len(ids))
        device = self._cache.start_B.device
        self._cached = self._cached[:known]  # should the forward pass be interrupted
        logits_BV = self._model.logits(torch.tensor([ids[known:]], device=device), self._cache, last_only=True)[:, 0]
        self._cached = list(ids)
        seen_BV = None
        if self._options.repetition_penalty != 1:
            seen_BV = torch.zeros(logits_BV.shape, dtype=torch.bool, device=device)
            seen_BV[:, ids] = True
        token = int(choose_tokens(logits_BV, uniform_1.to(device), self._options, seen_BV))
        check_finite(token)
        return token

    def _generator(self) -> torch.Generator:
        digest = hashlib.sha256(f"{self._options.seed}:chat:{self._num_turns}".encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def _num_common(ids: list[int], others: list[int]) -> int:
    pairs = enumerate(zip(ids, others, strict=False))
    return next((place for place, (one, other) in pairs if one != other), min(len(ids), len(others)))
