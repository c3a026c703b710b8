"""Conversations are written alike by us, by transformers and for llama.cpp."""

from __future__ import annotations

import json
from pathlib import Path

import jinja2.sandbox
import pytest

from pretrain.formats.hf_export import load_tokenizer
from pretrain.tokenizers.chat import chat_template, own_template, speaks_chatml, stop_ids
from pretrain.tokenizers.hf_tokenizer import JsonTokenizer
from pretrain.tokenizers.tokenizer_files import write_tokenizer_files
from tests.formats.test_hf_export import tokenizer  # noqa: F401
from tests.helpers.tokenizer_helpers import train_json

MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi\n"},
    {"role": "assistant", "content": " Hello "},
]


def render(template: str, **variables: object) -> str:
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(template).render(variables)


def test_our_tokenizers_write_chatml_behind_the_beginning_of_a_document(tokenizer):  # noqa: F811
    template = chat_template(tokenizer)
    turns = (
        "<s><|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi\n<|im_end|>\n"
        "<|im_start|>assistant\n Hello <|im_end|>\n"
    )
    assert render(template, messages=MESSAGES) == turns
    assert render(template, messages=MESSAGES, add_generation_prompt=True) == turns + "<|im_start|>assistant\n"
    assert speaks_chatml(tokenizer) and own_template(tokenizer) is None
    special = tokenizer.special_tokens()
    assert stop_ids(tokenizer) == [tokenizer.eos_id, special["<|im_end|>"]]


@pytest.mark.parametrize(
    ("kind", "template", "ends"),
    [
        ("llama3", "{{ messages[0]['content'] }}", ["<|end_of_text|>"]),
        ("gpt2", None, ["<|endoftext|>"]),
        ("qwen", "ChatML", ["<|endoftext|>", "<|im_end|>"]),
    ],
)
def test_tokenizers_of_others_bring_theirs(tmp_path: Path, kind, template, ends):
    theirs = JsonTokenizer(train_json(kind, tmp_path, 400))
    found = chat_template(theirs)
    assert found == template or (template == "ChatML" and found.startswith('{{- "<|endoftext|>" }}{%- for'))
    assert [theirs.name_of(token) for token in stop_ids(theirs)] == ends


def test_a_template_in_its_own_file_comes_first_and_the_default_one_of_several(tmp_path: Path):
    path = train_json("llama3", tmp_path, 400)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    several = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "plain"}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": several}))
    assert chat_template(JsonTokenizer(path)) == "plain"
    (tmp_path / "chat_template.jinja").write_text("own {{ bos_token }}")
    assert chat_template(JsonTokenizer(path)) == "own {{ bos_token }}"


def test_transformers_writes_conversations_as_the_template_says(tokenizer, tmp_path: Path):  # noqa: F811
    write_tokenizer_files(tokenizer, tmp_path, 64)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert settings["chat_template"] == (tmp_path / "chat_template.jinja").read_text() == chat_template(tokenizer)
    theirs = load_tokenizer(tmp_path)
    special = tokenizer.special_tokens()
    expected = [tokenizer.bos_id]
    for message in MESSAGES:
        text = f"{message['role']}\n{message['content']}"
        expected += [special["<|im_start|>"], *tokenizer.encode(text), special["<|im_end|>"], *tokenizer.encode("\n")]
    expected += [special["<|im_start|>"], *tokenizer.encode("assistant\n")]
    assert theirs.apply_chat_template(MESSAGES, add_generation_prompt=True, return_dict=False) == expected
