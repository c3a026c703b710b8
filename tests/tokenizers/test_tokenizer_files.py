"""Which tokenizer a config means, and keeping all of its files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pretrain.errors import ConfigError
from pretrain.options.config import TokenizerSection
from pretrain.tokenizers.hf_tokenizer import JsonTokenizer
from pretrain.tokenizers.sentencepiece_tokenizer import SentencePieceTokenizer
from pretrain.tokenizers.tokenizer_files import keep_files, open_tokenizer, write_tokenizer_files
from tests.helpers.tokenizer_helpers import train_json, train_sentencepiece


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer.json with its config, and a sentencepiece model without bos."""
    folder = tmp_path_factory.mktemp("files")
    train_json("llama3", folder / "json")
    train_sentencepiece(folder / "t5" / "tokenizer.model", bos_id=-1, pad_id=0, eos_id=1, unk_id=2,
                        user_defined_symbols=["<doc>"])  # fmt: skip
    return folder


def section(model: Path, vocab_size: int, **options: object) -> TokenizerSection:
    return TokenizerSection(model=str(model), vocab_size=vocab_size, **options)


def test_a_kept_tokenizer_is_the_same_and_leaves_no_other(folder: Path, tmp_path: Path) -> None:
    one = open_tokenizer(section(folder / "t5", 1500))
    two = open_tokenizer(section(folder / "json" / "tokenizer.json", 600))
    assert isinstance(one, SentencePieceTokenizer) and isinstance(two, JsonTokenizer)
    (tmp_path / "config.yaml").write_text("kept")
    for tokenizer, names, size in (
        (two, ["tokenizer.json", "tokenizer_config.json"], 600),
        (one, ["tokenizer.model"], 1500),
        (two, ["tokenizer.json", "tokenizer_config.json"], 600),
    ):
        keep_files(tokenizer, tmp_path)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["config.yaml", *names]
        again = open_tokenizer(section(Path("elsewhere"), size), tmp_path)
        assert (again.fingerprint, again.files) == (tokenizer.fingerprint, tokenizer.files)


def test_without_bos_eos_begins_documents_and_the_config_may_say_otherwise(folder: Path) -> None:
    plain = open_tokenizer(section(folder / "t5", 1500))
    assert (plain.bos_id, plain.eos_id, plain.pad_id, plain.unk_id) == (1, 1, 0, 2)
    named = open_tokenizer(section(folder / "t5", 1500, bos="<doc>"))
    assert named.name_of(named.bos_id) == "<doc>" and named.eos_id == 1
    assert (
        named.fingerprint != plain.fingerprint == open_tokenizer(section(folder / "t5", 1500, eos="</s>")).fingerprint
    )
    with pytest.raises(ConfigError, match="tokenizer.bos is '<s>'; expected a token of .*, such as <pad>, </s>, <doc>"):
        open_tokenizer(section(folder / "t5", 1500, bos="<s>"))


def test_a_model_without_eos_needs_one_named(folder: Path, tmp_path: Path) -> None:
    path = train_sentencepiece(tmp_path / "a.model", bos_id=-1, eos_id=-1, user_defined_symbols=["<end>"])
    with pytest.raises(
        ConfigError, match=r"does not say which token ends documents; .* Set tokenizer.eos .* has <end>"
    ):
        open_tokenizer(section(path, 1500))
    tokenizer = open_tokenizer(section(path, 1500, eos="<end>"))
    assert tokenizer.name_of(tokenizer.bos_id) == tokenizer.name_of(tokenizer.eos_id) == "<end>"


def test_a_tokenizer_json_is_written_as_it_is(folder: Path, tmp_path: Path) -> None:
    source = folder / "json"
    write_tokenizer_files(JsonTokenizer(source / "tokenizer.json"), tmp_path, 128)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / name).read_bytes() == (source / name).read_bytes()


def test_what_the_config_says_of_eos_is_written_into_its_settings(folder: Path, tmp_path: Path) -> None:
    tokenizer = JsonTokenizer(folder / "json" / "tokenizer.json", eos="<|eot_id|>")
    write_tokenizer_files(tokenizer, tmp_path, 128, tokenizer_class="PreTrainedTokenizerFast")
    own = json.loads((folder / "json" / "tokenizer_config.json").read_text())
    assert json.loads((tmp_path / "tokenizer_config.json").read_text()) == own | {"eos_token": "<|eot_id|>"}


def test_settings_are_made_where_there_are_none(tmp_path: Path) -> None:
    path = train_json("gpt2", tmp_path / "bare", files=False)
    (tmp_path / "out").mkdir()
    write_tokenizer_files(JsonTokenizer(path, eos="<|endoftext|>"), tmp_path / "out", 128)
    settings = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert settings["tokenizer_class"] == "PreTrainedTokenizerFast" and settings["model_max_length"] == 128
    assert {settings[f"{which}_token"] for which in ("bos", "eos", "pad")} == {"<|endoftext|>"}
    assert "unk_token" not in settings and settings["model_input_names"] == ["input_ids", "attention_mask"]
