"""Continuing prompts with a trained model, in batches with a key-value cache."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from pretrain.errors import ConfigError, TrainingError
from pretrain.generation.generate_options import GenerateOptions
from pretrain.generation.sampling import NOT_FINITE, TextStream, choose_tokens
from pretrain.ranks.hardware import best_device
from pretrain.tokenizers.chat import stop_ids
from pretrain.tokenizers.messages import Message, encode_messages
from pretrain.tokenizers.tokenizer import Tokenizer
from pretrain.transformer.model import KVCache, Transformer

Prompt = str | Sequence[Message]  # the beginning of a document, or a conversation to answer in


@dataclass
class Completion:
    """What followed a prompt.

    Args:
        prompt: as given.
        text: what was generated, without the prompt, a stop string or the end of the document.
        ids: the generated token ids, without eos; with a stop string they may hold more than `text`.
        finish: `eos` (the document or the answer ended), `stop` (a stop string), `length` (max_new_tokens), or
            `context` (prompt and text fill the length that the model was trained on).
    """

    prompt: Prompt
    text: str = ""
    ids: list[int] = field(default_factory=list)
    finish: str = ""


@dataclass
class _Row:
    """A completion in the making: number, prompt ids, what ends it, text so far, random numbers of its tokens."""

    index: int
    prompt_ids: list[int]
    end_ids: Collection[int]
    completion: Completion
    stream: TextStream
    uniform_S: Tensor


@torch.no_grad()  # not inference_mode: ZeRO-3 keeps weights that it gathers, and training could not use such tensors
def generate(
    model: Transformer,
    tokenizer: Tokenizer,
    prompts: Sequence[Prompt],
    options: GenerateOptions,
    on_text: Callable[[int, str, str], None] | None = None,
    agree: Callable[[Tensor], Tensor] | None = None,
    prompt_ids: Sequence[list[int]] | None = None,
    also_end: Collection[int] = (),
) -> list[Completion]:
    """Continue each prompt as the beginning of a document, or answer in a conversation.

    Prompt and text together never exceed `data.seq_len`: a model has learned no positions past it, and RoPE turned
    further than in training degrades without an error.

    Args:
        model: on any device.
        tokenizer: the run's.
        prompts: `options.batch_size` of them are computed at once.
        options: how to sample.
        on_text: called with the prompt's number, new text of its completion, and why it is complete (else empty).
        agree: makes the ranks that compute together take the same tokens, int64 `[B]`.
        prompt_ids: ids of each prompt, at most `data.seq_len`, where they are not those of its text as a document.
        also_end: ids that end a text, beside those that end a document or, in a conversation, an answer.

    Returns:
        One completion a prompt.

    Raises:
        ConfigError: an option means nothing, or a prompt leaves no room for a token.
        TrainingError: the model computes NaN or infinity.
    """
    options.check()
    if prompt_ids is None:
        prompt_ids = encode_prompts(tokenizer, prompts, model.shape.seq_len)
    rows = []
    for index, (ids, generator) in enumerate(zip(prompt_ids, _generators(prompts, options.seed), strict=True)):
        num_steps = max(min(options.max_new_tokens, model.shape.seq_len - len(ids)), 1)  # one follows a full row
        uniform_S = torch.rand(num_steps, generator=generator, dtype=torch.float64)
        stream = TextStream(tokenizer.decode, ids, options.stop)
        ends = [tokenizer.eos_id] if isinstance(prompts[index], str) else end_ids(tokenizer)
        rows.append(_Row(index, ids, {*ends, *also_end}, Completion(prompts[index]), stream, uniform_S))
    for begin in range(0, len(rows), options.batch_size):
        _generate_batch(model, tokenizer, rows[begin : begin + options.batch_size], options, on_text, agree)
    return [row.completion for row in rows]


def encode_prompts(
    tokenizer: Tokenizer, prompts: Sequence[Prompt], seq_len: int, name: str = "--prompt"
) -> list[list[int]]:
    """Return the ids of each prompt; `name` is what errors call them.

    Raises:
        ConfigError: a prompt leaves no room for a token.
    """
    prompt_ids = [
        [tokenizer.bos_id, *tokenizer.encode(prompt)]
        if isinstance(prompt, str)
        else encode_messages(tokenizer, prompt, add_generation_prompt=True)[0]
        for prompt in prompts
    ]
    for number, ids in enumerate(prompt_ids, 1):
        if len(ids) >= seq_len:
            which = "" if len(prompts) == 1 else f" (number {number})"
            raise ConfigError(
                f"{name}{which} is {len(ids)} tokens with the beginning of the document; expected fewer than "
                f"data.seq_len ({seq_len}). Shorten it by at least {len(ids) - seq_len + 1} tokens."
            )
    return prompt_ids


def place(model: Transformer, precision: str, dtype: str) -> Transformer:
    """Move a model to the best device, in the dtype that text is sampled in.

    Args:
        model: fp32.
        precision: that it was trained in.
        dtype: `fp32`, `bf16`, or `auto`: on a GPU that of training, with the kernels of training; on a CPU fp32.
    """
    device = best_device()
    if dtype == "auto":
        dtype = "bf16" if precision == "bf16" and device.type == "cuda" else "fp32"
    return model.to(device, torch.bfloat16 if dtype == "bf16" else torch.float32)


def end_ids(tokenizer: Tokenizer) -> list[int]:
    """Return the ids that end an answer: those that end a text, and what the chat template puts behind an answer.

    Raises:
        ConfigError: the tokenizer has no chat template, or one that takes no question with its answer.
    """
    exchange = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]
    ids, is_answer = encode_messages(tokenizer, exchange)
    of_answer = [token for token, is_own in zip(ids, is_answer, strict=True) if is_own]
    own = [token for token in of_answer[-1:] if token in tokenizer.special_tokens().values()]
    return list(dict.fromkeys([*stop_ids(tokenizer), *own]))


def _generators(prompts: Sequence[Prompt], seed: int) -> list[torch.Generator]:
    """Seed each row by its prompt, so that its text is the same in any batch; a repeated prompt gives other text."""
    times: dict[str, int] = {}
    generators = []
    for prompt in map(str, prompts):
        times[prompt] = times.get(prompt, -1) + 1
        digest = hashlib.sha256(f"{seed}:{times[prompt]}:{prompt}".encode()).digest()
        generators.append(torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1))
    return generators


def _generate_batch(
    model: Transformer,
    tokenizer: Tokenizer,
    rows: Sequence[_Row],
    options: GenerateOptions,
    on_text: Callable[[int, str, str], None] | None,
    agree: Callable[[Tensor], Tensor] | None,
) -> None:
    device, dtype = model.embedding.weight.device, model.embedding.weight.dtype
    longest = max(len(row.prompt_ids) for row in rows)
    num_steps = max(len(row.uniform_S) for row in rows)
    tokens_BT = torch.tensor([[tokenizer.pad_id] * (longest - len(row.prompt_ids)) + row.prompt_ids for row in rows])
    start_B = torch.tensor([longest - len(row.prompt_ids) for row in rows])
    uniform_BS = torch.nn.utils.rnn.pad_sequence([row.uniform_S for row in rows], batch_first=True).to(device)
    cache = KVCache(model.shape, start_B.to(device), longest + num_steps, dtype)
    seen_BV = None
    if options.repetition_penalty != 1:
        seen_BV = torch.zeros(len(rows), model.shape.vocab_size, dtype=torch.bool, device=device)
        for row_seen_V, row in zip(seen_BV, rows, strict=True):
            row_seen_V[row.prompt_ids] = True
    tokens_BT = tokens_BT.to(device)
    for step in range(num_steps):
        logits_BV = model.logits(tokens_BT, cache, last_only=True)[:, 0]
        chosen_B = choose_tokens(logits_BV, uniform_BS[:, step], options, seen_BV)
        if agree:
            chosen_B = agree(chosen_B)
        for row, token in zip(rows, chosen_B.tolist(), strict=True):
            text = _append(row, token, options.max_new_tokens)
            if on_text and (text or row.completion.finish):
                on_text(row.index, text, row.completion.finish)
        running = [place for place, row in enumerate(rows) if not row.completion.finish]
        if not running:
            break
        if len(running) < len(rows):  # those that are complete cost nothing from here on
            running_B = torch.tensor(running, device=device)
            cache.keep(running_B)
            rows, chosen_B, uniform_BS = [rows[place] for place in running], chosen_B[running_B], uniform_BS[running_B]
            seen_BV = None if seen_BV is None else seen_BV[running_B]
        tokens_BT = chosen_B[:, None]
        if seen_BV is not None:
            seen_BV.scatter_(1, tokens_BT, True)


def check_finite(token: int) -> None:
    """Refuse what was chosen where the logits were no numbers.

    Raises:
        TrainingError: the model computes NaN or infinity.
    """
    if token == NOT_FINITE:
        raise TrainingError(
            "model: its logits are NaN or infinite; expected numbers. Use an earlier checkpoint (--step)."
        )


def _append(row: _Row, token: int, max_new_tokens: int) -> str:
    """Take a token; return the text that is sure now, and set `finish` if it was the last one."""
    completion, stream, text = row.completion, row.stream, ""
    check_finite(token)
    if token in row.end_ids:
        completion.finish = "eos"
    else:
        completion.ids.append(token)
        text = stream.add(token)
        if len(completion.ids) == len(row.uniform_S):
            completion.finish = "length" if len(completion.ids) == max_new_tokens else "context"
    if completion.finish:
        text += stream.end()
    if stream.stopped:
        completion.finish = "stop"
    if completion.finish:
        completion.text = stream.text
    return text
