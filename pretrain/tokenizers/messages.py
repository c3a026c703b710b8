"""Conversations as token ids, by a tokenizer's chat template: the only file that imports jinja2.

What people write is text, whatever it looks like: the template is rendered with placeholders for it, special tokens are
looked for in what the template itself wrote, and the contents are put in as plain text afterwards.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from typing import Any, NoReturn

from pretrain.errors import ConfigError
from pretrain.tokenizers.chat import chat_template
from pretrain.tokenizers.tokenizer import Tokenizer

ROLES = ("system", "user", "assistant")
Message = Mapping[str, str]  # role and content
_Names = tuple[str, str]  # of bos and eos
_MARK = re.compile("\ue000([0-9]+)\ue001")  # private characters around a message's number


def encode_messages(
    tokenizer: Tokenizer, messages: Sequence[Message], add_generation_prompt: bool = False
) -> tuple[list[int], list[bool]]:
    """Write a conversation as ids.

    Args:
        tokenizer: it has a chat template.
        messages: each with a `role` of `ROLES` and its `content`.
        add_generation_prompt: end with the beginning of an answer.

    Returns:
        The ids, and of each whether it is the assistant's: its words, the white space before them that the template's
        prompt for an answer does not have, and the token behind them that ends its turn.

    Raises:
        ConfigError: the tokenizer has no template; the template refuses the messages, or changes their contents
            or leaves out those of the last one.
    """
    source = chat_template(tokenizer)
    if source is None:
        raise ConfigError(
            "tokenizer.model has no chat template; expected one beside tokenizer.json, or a tokenizer with "
            "<|im_start|> and <|im_end|>. Use prompts and responses instead of messages."
        )
    names = tokenizer.name_of(tokenizer.bos_id), tokenizer.name_of(tokenizer.eos_id)
    contents = [message["content"] for message in messages]
    text = _render(names, source, messages, [f"\ue000{index}\ue001" for index in range(len(messages))],
                   add_generation_prompt)  # fmt: skip
    # What jinja does not know is empty to it. Earlier messages some templates leave out on purpose.
    if messages and f"\ue000{len(messages) - 1}\ue001" not in text:
        raise ConfigError(
            f"tokenizer: its chat template leaves out what the last message, of the {messages[-1]['role']}, says; "
            "expected one that puts it in. Look for a misspelt name: a message has `role` and `content`."
        )
    given = _render(names, source, messages, contents, add_generation_prompt)
    if _filled(text, contents) != given:  # many leave out white space around them, some what was only thought
        contents = [
            _kept(names, source, messages, number, text, add_generation_prompt) for number in range(len(messages))
        ]
        if _filled(text, contents) != given:
            raise ConfigError(
                "tokenizer: its chat template changes what messages say, by more than leaving out what they begin or "
                "end with; expected one that puts them in as they are. Simplify the template."
            )
    lead = _space_before_answers(names, source)
    ids: list[int] = []
    is_scored: list[bool] = []
    for part, scored in _runs(_parts(tokenizer, text, messages, contents, lead)):
        new = [part] if isinstance(part, int) else tokenizer.encode(part)
        ids += new
        is_scored += [scored] * len(new)
    if messages and messages[-1]["role"] == "assistant" and not add_generation_prompt and is_scored and is_scored[-1]:
        if ids[-1] not in tokenizer.special_tokens().values():  # the template ends answers by no token
            ids, is_scored = [*ids, tokenizer.eos_id], [*is_scored, True]
    return ids, is_scored


@cache
def _compiled(source: str) -> Any:
    """The template, in the environment that transformers renders it in: it is others' code, and gets at nothing."""
    from jinja2.sandbox import ImmutableSandboxedEnvironment  # 60 ms, for those who need it

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.globals["raise_exception"] = _refuse
    return environment.from_string(source)


def _refuse(message: str) -> NoReturn:
    import jinja2

    raise jinja2.TemplateError(message)


def _render(
    names: _Names, source: str, messages: Sequence[Message], contents: Sequence[str], add_generation_prompt: bool
) -> str:
    import jinja2

    own = [{"role": one["role"], "content": content} for one, content in zip(messages, contents, strict=True)]
    try:
        return _compiled(source).render(
            messages=own, add_generation_prompt=add_generation_prompt,
            bos_token=names[0], eos_token=names[1],
        )  # fmt: skip
    except jinja2.TemplateError as error:
        raise ConfigError(
            f"tokenizer: its chat template refuses a conversation of {', '.join(one['role'] for one in messages)} "
            f"({error}); expected one that it is made for. Change the messages."
        ) from None


def _kept(
    names: _Names, source: str, messages: Sequence[Message], number: int, text: str, add_generation_prompt: bool
) -> str:
    """What the template makes of a message's content, if that is a part of it; else the content."""
    marks = [f"\ue000{index}\ue001" for index in range(len(messages))]
    content = messages[number]["content"]
    before, _, behind = text.partition(marks[number])
    marks[number] = content
    given = _render(names, source, messages, marks, add_generation_prompt)
    kept = given[len(before) : len(given) - len(behind)]
    return kept if given == before + kept + behind and kept in content else content


@cache
def _space_before_answers(names: _Names, source: str) -> str:
    """White space that the template writes before an answer's words, and not where it asks for an answer."""
    exchange: list[Message] = [{"role": "user", "content": ""}, {"role": "assistant", "content": ""}]
    marks = ["\ue0000\ue001", "\ue0001\ue001"]
    try:
        asked = _render(names, source, exchange[:1], marks[:1], True)
        before, _, _ = _render(names, source, exchange, marks, False).partition(marks[1])
    except ConfigError:  # it is made for other conversations
        return ""
    space = before[len(asked) :]
    return space if before.startswith(asked) and space.isspace() else ""


def _filled(text: str, contents: Sequence[str]) -> str:
    return _MARK.sub(lambda mark: contents[int(mark[1])], text)


def _parts(
    tokenizer: Tokenizer, text: str, messages: Sequence[Message], contents: Sequence[str], lead: str
) -> Iterator[tuple[str | int, bool]]:
    """Texts and special tokens of a rendered template, and whether each is the assistant's; `lead` begins answers."""
    special = tokenizer.special_tokens()
    names = re.compile("|".join(map(re.escape, sorted(special, key=len, reverse=True))) or r"(?!)")
    answers = False  # an answer has begun and not ended
    pieces = _MARK.split(text)
    for index, piece in enumerate(pieces):
        if index % 2:
            answers = messages[int(piece)]["role"] == "assistant"
            space = lead if answers and pieces[index - 1].endswith(lead) else ""
            yield space + contents[int(piece)], answers
            continue
        if index + 1 < len(pieces) and messages[int(pieces[index + 1])]["role"] == "assistant":
            piece = piece.removesuffix(lead)
        begin = 0
        for found in names.finditer(piece):
            if begin < found.start():
                yield piece[begin : found.start()], answers
            yield special[found[0]], answers
            answers, begin = False, found.end()
        if begin < len(piece):
            answers = answers and index == len(messages) * 2  # white space before the next message is not the answer's
            yield piece[begin:], answers


def _runs(parts: Iterator[tuple[str | int, bool]]) -> Iterator[tuple[str | int, bool]]:
    """Join neighbouring texts of one kind, which the tokenizer is to see as one."""
    held, held_scored = "", False
    for part, scored in parts:
        if isinstance(part, str) and scored == held_scored:
            held += part
            continue
        if held:
            yield held, held_scored
        held, held_scored = "", scored
        if isinstance(part, str):
            held = part
        else:
            yield part, scored
    if held:
        yield held, held_scored
