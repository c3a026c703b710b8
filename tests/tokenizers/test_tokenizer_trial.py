"""What is said of a tokenizer that others made."""

from __future__ import annotations

from pathlib import Path

import pytest

from pretrain.tokenizers import tokenizer_trial
from pretrain.tokenizers.hf_tokenizer import JsonTokenizer
from pretrain.tokenizers.sentencepiece_tokenizer import SentencePieceTokenizer
from pretrain.tokenizers.tokenizer_trial import try_out
from tests.helpers.tokenizer_helpers import SOURCES, train_json, train_sentencepiece


@pytest.fixture(autouse=True)
def few_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizer_trial, "NUM_TEXTS", 200)


def test_nothing_is_warned_of_where_nothing_is_lost(tmp_path: Path) -> None:
    tokenizer = JsonTokenizer(train_json("gpt2", tmp_path))
    (line,) = try_out(tokenizer, [*SOURCES, "\u2581"], 1)
    num_bytes = sum(len(text.encode()) for text in SOURCES) + 3
    assert line.startswith("tokenizer.json, byte-level BPE, 600 ids, ")
    assert line.endswith(
        f" bytes per token on {num_bytes:,} bytes of the corpus; documents begin with <|endoftext|> and end with "
        "<|endoftext|>"
    )


def test_losses_are_counted_and_shown(tmp_path: Path) -> None:
    path = train_sentencepiece(tmp_path / "a.model", model_type="bpe", normalization_rule_name="identity",
                               byte_fallback=True)  # fmt: skip
    lines = try_out(SentencePieceTokenizer(path), ["one two", "one  two", "three\n"], 1)
    assert (
        "warning: 1 of 3 documents do not come back from their ids exactly, such as 'one  two', which becomes"
        in lines[1]
    )
    assert "'one two'" in lines[1] and lines[1].endswith("The model learns the text as it comes back.")
    assert lines[2] == "its ids stand for 109.524% of the bytes of the text, so bits per byte are off by as much"
    assert lines[3].startswith("its tokenizer.json for exports gives the same ids for 203 documents and made-up texts")


def test_no_more_is_read_than_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizer_trial, "SAMPLE_CHARACTERS", 100)
    read: list[int] = []

    def documents():
        for number in range(1000):
            read.append(number)
            yield "0123456789"

    assert "on 100 bytes of the corpus" in try_out(JsonTokenizer(train_json("llama3", tmp_path)), documents(), 1)[0]
    assert len(read) == 10


def test_what_cannot_be_exported_is_said_before_training(tmp_path: Path) -> None:
    path = train_sentencepiece(
        tmp_path / "a.model", treat_whitespace_as_suffix=True, normalization_rule_name="identity"
    )
    lines = try_out(SentencePieceTokenizer(path), ["one two"], 1)
    assert lines[-1].startswith(
        "warning: a model that is trained with it cannot be exported to Hugging Face's format: tokenizer: the space of a "
        "word is put behind it (treat_whitespace_as_suffix), which has no exact counterpart in tokenizer.json; expected"
    )
