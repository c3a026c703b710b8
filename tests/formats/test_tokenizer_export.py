"""The tokenizer of an export is what the model was trained with, or there is no export."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pretrain.errors import ExportError
from pretrain.formats.hf_export import load_tokenizer
from pretrain.formats.tokenizer_export import export_tokenizer
from pretrain.tokenizers.hf_tokenizer import JsonTokenizer
from pretrain.tokenizers.sentencepiece_tokenizer import SentencePieceTokenizer
from tests.helpers.tokenizer_helpers import JSON_KINDS, SOURCES, train_json, train_sentencepiece


@pytest.mark.parametrize("kind", JSON_KINDS)
@pytest.mark.parametrize("with_files", [True, False])
def test_every_tokenizer_json_is_exported_as_it_is(tmp_path: Path, kind: str, with_files: bool) -> None:
    path = train_json(kind, tmp_path / "own", files=with_files)
    eos = None if with_files else {"llama3": "<|end_of_text|>", "metaspace": "</s>"}.get(kind, "<|endoftext|>")
    (tmp_path / "out").mkdir()
    report = export_tokenizer(JsonTokenizer(path, eos=eos), tmp_path / "out", 64, SOURCES, 1000, load_tokenizer)
    assert (tmp_path / "out/tokenizer.json").read_bytes() == path.read_bytes()
    assert report["mismatches"] == report["ties"] == 0 and report["texts"] == 1000
    assert ("class_replaced_because" in report) == (with_files and kind in REPLACED)
    if with_files:
        own, written = (
            json.loads((folder / "tokenizer_config.json").read_text()) for folder in (path.parent, tmp_path / "out")
        )
        assert written == own | ({"tokenizer_class": "PreTrainedTokenizerFast"} if kind in REPLACED else {})


REPLACED = ("qwen",)  # transformers' class has a splitting rule of its own


@pytest.mark.parametrize("kind", ["json", "sentencepiece"])
def test_other_ids_are_an_error_that_says_what_to_do(tmp_path: Path, kind: str) -> None:
    train_json("llama3", tmp_path / "other", 500)
    if kind == "json":
        tokenizer = JsonTokenizer(train_json("llama3", tmp_path / "own", 600))
    else:
        tokenizer = SentencePieceTokenizer(train_sentencepiece(tmp_path / "a.model"))
    (tmp_path / "out").mkdir()
    what = {"json": "transformers does not use this tokenizer.json as it is", "sentencepiece": "no exact counterpart"}
    with pytest.raises(
        ExportError, match=f"vocab_size is 500 in transformers; expected .* Nothing was exp.*{what[kind]}"
    ):
        export_tokenizer(tokenizer, tmp_path / "out", 64, [], 100, lambda _: load_tokenizer(tmp_path / "other"))
