"""Sampling text from a trained model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from pretrain.errors import ConfigError
from pretrain.model import KVCache, Transformer
from pretrain.tokenizer import Tokenizer


@dataclass(frozen=True)
class GenerateOptions:
    """How text is sampled.

    Args:
        max_new_tokens: at most this many tokens after the prompt.
        temperature: divides the logits; 0 always takes the most probable token.
        top_k: sample from the k most probable tokens only; 0: from all.
        top_p: sample from the most probable tokens that together hold this probability; 1: from all.
        seed: the same seed gives the same text, whatever other prompts are in the batch.
        stop: strings that end the text, which is cut before the first of them.
    """

    max_new_tokens: int = 128
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 1
    stop: tuple[str, ...] = ()

    def check(self) -> None:
        """Refuse values that mean nothing.

        Raises:
            ConfigError: one line for each of them.
        """
        rules = [
            ("max-new-tokens", self.max_new_tokens, self.max_new_tokens >= 1, "at least 1", "1 or more"),
            ("temperature", self.temperature, 0 <= self.temperature < float("inf"), "0 or more", "0 for greedy text"),
            ("top-k", self.top_k, self.top_k >= 0, "0 or more", "0 for all tokens"),
            ("top-p", self.top_p, 0 < self.top_p <= 1, "more than 0 and at most 1", "1 for all tokens"),
            ("seed", self.seed, 0 <= self.seed < 2**63, "0 to 2^63 - 1", "such a number"),
            ("stop", repr(""), "" not in self.stop, "text", "strings of at least one character"),
        ]
        problems = [
            f"--{name} is {value}; expected {rule}. Use {fix}." for name, value, ok, rule, fix in rules if not ok
        ]
        if problems:
            raise ConfigError("\n".join(problems))


@dataclass
class Completion:
    """What followed a prompt.

    Args:
        prompt: as given.
        text: what was generated, without the prompt, a stop string or the end of the document.
        ids: the generated token ids, without eos; with a stop string they may hold more than `text`.
        finish: `eos` (the document ended), `stop` (a stop string), `length` (max_new_tokens), or `context` (prompt and
            text fill the length that the model was trained on).
    """

    prompt: str
    text: str = ""
    ids: list[int] = field(default_factory=list)
    finish: str = ""


@torch.inference_mode()
def generate(
    model: Transformer, tokenizer: Tokenizer, prompts: Sequence[str], options: GenerateOptions
) -> list[Completion]:
    """Continue each prompt as the beginning of a document.

    Prompt and text together never exceed `data.seq_len`: a model has learned no positions past it, and RoPE turned
    further than in training degrades without an error.

    Args:
        model: on any device.
        tokenizer: the run's.
        prompts: one or more, computed as one batch.
        options: how to sample.

    Returns:
        One completion a prompt.

    Raises:
        ConfigError: an option means nothing, or a prompt leaves no room for a token.
    """
    options.check()
    prompt_ids = [[tokenizer.bos_id, *tokenizer.encode(prompt)] for prompt in prompts]
    seq_len = model.shape.seq_len
    for ids in prompt_ids:
        if len(ids) >= seq_len:
            raise ConfigError(
                f"--prompt is {len(ids)} tokens with the beginning of the document; expected fewer than data.seq_len "
                f"({seq_len}). Shorten it by at least {len(ids) - seq_len + 1} tokens."
            )
    done = [Completion(prompt) for prompt in prompts]
    if not done:
        return done
    device = model.embedding.weight.device
    longest = max(map(len, prompt_ids))
    # The shortest prompt has the most room.
    num_steps = min(options.max_new_tokens, seq_len - min(map(len, prompt_ids)))
    start_B = torch.tensor([longest - len(ids) for ids in prompt_ids], device=device)
    cache = KVCache(model.shape, start_B, longest + num_steps, model.embedding.weight.dtype)
    tokens_BT = torch.tensor([[tokenizer.pad_id] * (longest - len(ids)) + ids for ids in prompt_ids], device=device)
    generators = _generators(prompts, options.seed)
    for _ in range(num_steps):
        logits_BV = model.logits(tokens_BT, cache, last_only=True)[:, 0].cpu()
        chosen = [_choose(*row, options) for row in zip(logits_BV, generators, strict=True)]
        for row, completion in enumerate(done):
            if not completion.finish:
                before = prompt_ids[row]
                _append(completion, chosen[row], tokenizer, options, before, room=seq_len - len(before))
                if completion.finish:
                    start_B[row] = cache.num_slots  # from here on padding, so that no position passes seq_len
        if all(completion.finish for completion in done):
            break
        tokens_BT = torch.tensor(chosen, device=device)[:, None]
    for row, completion in enumerate(done):
        if completion.finish != "stop":
            completion.text = _text_after(tokenizer, prompt_ids[row], completion.ids)
    return done


def _generators(prompts: Sequence[str], seed: int) -> list[torch.Generator]:
    """Seed each row by itself, so that its text is the same in any batch; a repeated prompt gives other text."""
    times: dict[str, int] = {}
    generators = []
    for prompt in prompts:
        times[prompt] = times.get(prompt, -1) + 1
        generators.append(torch.Generator().manual_seed((seed + times[prompt] * 0x9E3779B97F4A7C15) % 2**63))
    return generators


def _text_after(tokenizer: Tokenizer, before: Sequence[int], ids: Sequence[int]) -> str:
    """The text of ids after others: of ids alone, a tokenizer with a dummy prefix drops the first space."""
    last = before[-1:]
    return tokenizer.decode([*last, *ids])[len(tokenizer.decode(last)) :]


def _append(
    completion: Completion, token: int, tokenizer: Tokenizer, options: GenerateOptions, before: Sequence[int], room: int
) -> None:
    if token == tokenizer.eos_id:
        completion.finish = "eos"
        return
    completion.ids.append(token)
    if options.stop:
        text = _text_after(tokenizer, before, completion.ids)
        ends = [position for position in (text.find(stop) for stop in options.stop) if position >= 0]
        if ends:
            completion.text, completion.finish = text[: min(ends)], "stop"
            return
    if len(completion.ids) == options.max_new_tokens:
        completion.finish = "length"
    elif len(completion.ids) == room:
        completion.finish = "context"


def _choose(logits_V: Tensor, generator: torch.Generator, options: GenerateOptions) -> int:
    if options.temperature == 0:
        return int(logits_V.argmax())
    # fp64: with fp32, the tail of a large vocabulary falls out of the cumulative sum
    ordered_V, index_V = (logits_V.double() / options.temperature).sort(descending=True, stable=True)
    probs_V = ordered_V.softmax(-1)
    if options.top_k:
        probs_V[options.top_k :] = 0.0
    if options.top_p < 1:
        # A token is kept while those before it hold less than top_p of what top_k left: the first one always is.
        total = probs_V.sum()
        probs_V[probs_V.cumsum(-1) - probs_V >= options.top_p * total] = 0.0
    return int(index_V[torch.multinomial(probs_V, 1, generator=generator)])
