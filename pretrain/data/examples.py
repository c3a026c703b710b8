"""Examples of what is asked and what is to be answered: from a line of JSON to ids, of which the answers are scored.

An example goes through `prepare` as a short JSON text of its own, as other documents do as plain text; only where it is
tokenized does it become ids. In its shard, the top bit of an id says that the token is context: it is seen, and not
scored.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from pretrain.data.decoding import SURROGATE, checked_text, parse_record
from pretrain.data.source_files import Bad
from pretrain.errors import ConfigError
from pretrain.options.config import ExamplesSection
from pretrain.tokenizers.chat import chat_template
from pretrain.tokenizers.messages import ROLES, encode_messages
from pretrain.tokenizers.tokenizer import Tokenizer

_FIELD = re.compile(r"\{\{|\}\}|\{([^{}]*)\}")


def parse_example(data: bytes, section: ExamplesSection) -> str | Bad:
    """The example of a JSON object, as `example_of` gives it."""
    record = parse_record(data)
    return record if isinstance(record, Bad) else example_of(record, section)


def example_of(record: dict[str, Any], section: ExamplesSection, references: Sequence[str] = ()) -> str | Bad:
    """The example of a record of fields, as a text that `encode_example` reads.

    One that has the field of `messages` is a conversation; any other is a prompt and a response.

    Args:
        record: a text by each name.
        section: which of them are used, and how.
        references: further right answers, for a metric that takes the best.
    """
    example = _conversation(record, section) if section.messages in record else _pair(record, section)
    if isinstance(example, Bad):
        return example
    example |= {"references": list(references)} if references else {}
    return checked_text(json.dumps(example, ensure_ascii=False), SURROGATE)


def _pair(record: dict[str, Any], section: ExamplesSection) -> dict[str, Any] | Bad:
    missing = [name for name in (*fields_of(section.template), section.response) if name not in record]
    if missing:
        return Bad("no_example", f"its field {missing[0]!r} is missing (it has: {', '.join(sorted(record)[:8])})")
    texts = {name: record[name] for name in (*fields_of(section.template), section.response)}
    for name, text in texts.items():
        if not isinstance(text, str):
            return Bad("no_example", f"its field {name!r} is {type(text).__name__}, not a string")
    if not texts[section.response]:
        return Bad("no_response", f"its field {section.response!r} is empty")
    return {"prompt": fill_in(section.template, texts), "response": texts[section.response]}


def _conversation(record: dict[str, Any], section: ExamplesSection) -> dict[str, list] | Bad:
    where, messages = f"its field {section.messages!r}", record[section.messages]
    if not isinstance(messages, list):
        return Bad("no_example", f"{where} is {type(messages).__name__}, not a list")
    own = []
    for number, message in enumerate(messages, 1):
        role, content = (message.get("role"), message.get("content")) if isinstance(message, dict) else (None, None)
        if role not in ROLES:
            return Bad(
                "no_example", f"{where} has a message {number} whose role is {role!r}, none of {', '.join(ROLES)}"
            )
        if not isinstance(content, str):
            return Bad("no_example", f"{where} has a message {number} without a text `content`")
        own.append({"role": role, "content": content})
    if not any(one["role"] == "assistant" and one["content"].strip() for one in own):
        return Bad("no_response", f"{where} has no answer of the assistant")
    return {"messages": own}


def fields_of(template: str) -> list[str]:
    """Names of the fields that a template puts in, each once.

    Raises:
        ConfigError: it has a brace that begins or ends no name.
    """
    rest = _FIELD.sub("", template)
    names = list(dict.fromkeys(name for name in _FIELD.findall(template) if name))
    if "{" in rest or "}" in rest or "{}" in template.replace("{{", "").replace("}}", ""):
        raise ConfigError(
            f"template is {template!r}; expected a name between each pair of braces, such as {{prompt}}. Write a brace "
            "that is meant as {{ or }}."
        )
    return names


def fill_in(template: str, texts: dict[str, str]) -> str:
    """Put texts into a template; what stands in the texts stays as it is."""
    return _FIELD.sub(lambda found: texts[found[1]] if found[1] else found[0][0], template)


def plain_text(example: str) -> str:
    """All that is said in an example, without what stands around it."""
    content = json.loads(example)
    return (
        "".join(one["content"] for one in content["messages"])
        if "messages" in content
        else (content["prompt"] + content["response"])
    )


def context_bit(tokenizer: Tokenizer) -> int:
    """The bit of a stored id that marks context: the highest of uint16 if the vocabulary leaves it, else of uint32."""
    return 15 if tokenizer.vocab_size <= 1 << 15 else 31


def example_dtype(tokenizer: Tokenizer) -> np.dtype:
    """Of the ids of examples in shards, little-endian."""
    return np.dtype("<u2" if context_bit(tokenizer) == 15 else "<u4")


def encode_example(tokenizer: Tokenizer, text: str) -> np.ndarray:
    """Turn an example into ids as they are stored, of `example_dtype`, with the bit of context.

    A pair is the beginning of a document, the prompt, the response and the end of the document, of which the last two
    are scored; behind them further right answers, each with an end, as context of nothing. A conversation is what the
    chat template makes of it, up to its last answer's end; answers are scored.

    Args:
        tokenizer: of the run.
        text: as `example_of` gave it.

    Raises:
        ConfigError: the chat template refuses the conversation, or there is none.
    """
    example = json.loads(text)
    if "messages" in example:
        ids, is_scored = encode_messages(tokenizer, example["messages"])
        end = len(ids) - is_scored[::-1].index(True)
        ids, is_scored = ids[:end], is_scored[:end]
    else:
        context = [tokenizer.bos_id, *tokenizer.encode(example["prompt"])]
        answer = [*tokenizer.encode(example["response"]), tokenizer.eos_id]
        others = [id for text in example.get("references", ()) for id in (*tokenizer.encode(text), tokenizer.eos_id)]
        ids = context + answer + others
        is_scored = [False] * len(context) + [True] * len(answer) + [False] * len(others)
    stored = np.array(ids, dtype=example_dtype(tokenizer))
    stored[~np.array(is_scored)] |= stored.dtype.type(1 << context_bit(tokenizer))
    return stored


def check_examples(section: ExamplesSection) -> None:
    """Check what a config says of examples before any is read.

    Raises:
        ConfigError: the template is not one.
    """
    fields_of(section.template)


def identity(section: ExamplesSection, tokenizer: Tokenizer) -> str:
    """Everything but the tokenizer that the ids of examples depend on, as a text."""
    template = chat_template(tokenizer)
    digest = template and hashlib.sha256(template.encode()).hexdigest()[:12]
    return json.dumps(section.model_dump(mode="json") | {"chat template": digest}, sort_keys=True)
