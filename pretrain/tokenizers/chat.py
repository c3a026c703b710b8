"""How a conversation is written as text: the chat template of a tokenizer, and the tokens that it uses.

Tokenizers that are trained here reserve two control tokens for ChatML. A `tokenizer.json` of others brings its own
template, or has the tokens of ChatML, or is not meant for conversations.
"""

from __future__ import annotations

import json

from pretrain.tokenizers.tokenizer import Tokenizer

TURN_BEGIN, TURN_END = "<|im_start|>", "<|im_end|>"
TEMPLATE_FILE = "chat_template.jinja"
# Beginning of a document, as it stands in training; then each turn. Jinja, as transformers and llama.cpp render it:
# with `messages` (each `role` and `content`) and `add_generation_prompt`. `BOS` is replaced by the tokenizer's token.
_CHATML = (
    "{{- BOS }}"
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}"
    "{{- '<|im_start|>assistant\\n' }}"
    "{%- endif %}"
)


def chat_template(tokenizer: Tokenizer) -> str | None:
    """Return the Jinja template by which conversations are written for this tokenizer.

    Args:
        tokenizer: of any kind.

    Returns:
        The template that lies beside a `tokenizer.json`, in a file of its own or in `tokenizer_config.json`; else
        ChatML where the tokenizer has its two tokens; else None. ChatML begins with the token that begins documents.
    """
    if own := own_template(tokenizer):
        return own
    if not speaks_chatml(tokenizer):
        return None
    return _CHATML.replace("BOS", json.dumps(tokenizer.name_of(tokenizer.bos_id), ensure_ascii=False))


def own_template(tokenizer: Tokenizer) -> str | None:
    """Return the template that others made for a tokenizer; None if it came without."""
    if TEMPLATE_FILE in tokenizer.files:
        return tokenizer.files[TEMPLATE_FILE].decode()
    found = json.loads(tokenizer.files.get("tokenizer_config.json", b"{}")).get("chat_template")
    if isinstance(found, list):  # several, by name
        found = {one["name"]: one["template"] for one in found}.get("default")
    return found or None


def speaks_chatml(tokenizer: Tokenizer) -> bool:
    """Whether the tokenizer has both tokens of ChatML, which no plain text gives."""
    return tokenizer.special_tokens().keys() >= {TURN_BEGIN, TURN_END}


def stop_ids(tokenizer: Tokenizer) -> list[int]:
    """Return the ids that end a text: the end of a document, then that of a turn where ChatML is spoken."""
    turn_end = tokenizer.special_tokens()[TURN_END] if speaks_chatml(tokenizer) else tokenizer.eos_id
    return list(dict.fromkeys([tokenizer.eos_id, turn_end]))
