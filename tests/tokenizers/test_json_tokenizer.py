"""A tokenizer.json of others is used exactly as the library uses it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tokenizers

from pretrain.errors import ConfigError, DataError
from pretrain.options.config import TokenizerSection
from pretrain.preparing.workers import QueuedDocument, encode_batches
from pretrain.tokenizers.hf_tokenizer import JsonTokenizer
from pretrain.tokenizers.tokenizer import check_round_trip
from pretrain.tokenizers.tokenizer_files import open_tokenizer
from pretrain.tokenizers.varied_texts import varied_texts
from tests.helpers.tokenizer_helpers import JSON_KINDS, SOURCES, train_json

TEXTS = SOURCES + varied_texts(2000, 3, SOURCES, ["<|endoftext|>", "<|im_start|>", "<tool_call>", "<s>", "</s>"])


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("json")
    return {kind: train_json(kind, folder / kind) for kind in JSON_KINDS}


@pytest.mark.parametrize("kind", JSON_KINDS)
def test_ids_and_text_are_the_librarys(paths: dict[str, Path], kind: str) -> None:
    ours, library = JsonTokenizer(paths[kind]), tokenizers.Tokenizer.from_file(str(paths[kind]))
    library.encode_special_tokens = True
    expected = [library.encode(text, add_special_tokens=False).ids for text in TEXTS]
    assert ours.encode_batch(TEXTS) == expected == [ours.encode(text) for text in TEXTS]
    assert [ours.decode(ids) for ids in expected] == library.decode_batch(expected)
    special = {token_id for name, token_id in ours.special_tokens().items() if name != "<unk>"}
    assert not any(special & set(ids) for ids in expected)


@pytest.mark.parametrize("kind", ["gpt2", "llama3", "metaspace"])
def test_texts_come_back_and_their_bytes_are_counted(paths: dict[str, Path], kind: str) -> None:
    assert check_round_trip(JsonTokenizer(paths[kind]), TEXTS) == []


def test_what_a_normalizer_changes_is_found(paths: dict[str, Path]) -> None:
    """Qwen's composes letters: all else comes back, and the bytes of what comes back are counted."""
    qwen = JsonTokenizer(paths["qwen"])
    token_bytes = qwen.token_bytes()
    assert check_round_trip(qwen, ["re\u0301sume\u0301"]) == ["re\u0301sume\u0301"]
    for text in TEXTS:
        ids = qwen.encode(text)
        assert token_bytes[ids].sum() == len(qwen.decode(ids).encode())
    assert qwen.encode("a<tool_call>b")[1] == qwen.vocab_size - 1 and qwen.own_symbols() == ["<tool_call>"]
    assert token_bytes[-1] == len("<tool_call>")


@pytest.mark.parametrize(
    ("kind", "bos", "eos", "pad", "unk"),
    [
        ("gpt2", "<|endoftext|>", "<|endoftext|>", "<|endoftext|>", "<|endoftext|>"),
        ("llama3", "<|begin_of_text|>", "<|end_of_text|>", "<|end_of_text|>", None),
        ("qwen", "<|endoftext|>", "<|endoftext|>", "<|im_end|>", None),
        ("metaspace", "<s>", "</s>", "</s>", "<unk>"),
    ],
)
def test_special_tokens_come_from_the_files_beside(paths, kind, bos, eos, pad, unk) -> None:
    tokenizer = JsonTokenizer(paths[kind])
    found = [tokenizer.name_of(i) for i in (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id)]
    assert found == [bos, eos, pad]
    assert (None if tokenizer.unk_id is None else tokenizer.name_of(tokenizer.unk_id)) == unk
    document = tokenizer.encode_document("some text")
    assert document.dtype == np.dtype("<u2")
    assert document.tolist() == [tokenizer.bos_id, *tokenizer.encode("some text"), tokenizer.eos_id]
    assert tokenizer.decode(document) == "some text"
    assert tokenizer.token_bytes()[document].sum() == len("some text")


def test_special_tokens_map_is_read_and_the_config_has_the_last_word(tmp_path: Path) -> None:
    path = train_json("llama3", tmp_path, files=False)
    (tmp_path / "special_tokens_map.json").write_text(
        json.dumps({"eos_token": {"content": "<|eot_id|>", "lstrip": False}, "bos_token": "<|begin_of_text|>"})
    )
    assert JsonTokenizer(path).name_of(JsonTokenizer(path).eos_id) == "<|eot_id|>"
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|end_of_text|>", "bos_token": None}))
    tokenizer = JsonTokenizer(path)
    assert tokenizer.name_of(tokenizer.eos_id) == "<|end_of_text|>"
    assert tokenizer.name_of(tokenizer.bos_id) == "<|begin_of_text|>"


def test_the_config_may_name_bos_and_eos(tmp_path: Path) -> None:
    path = train_json("qwen", tmp_path, files=False)
    with pytest.raises(ConfigError) as error:
        JsonTokenizer(path)
    assert str(error.value) == (
        f"{path}: it does not say which token ends documents; expected one. Set tokenizer.eos to the token's name: it "
        "has <|endoftext|>, <|im_start|>, <|im_end|>, <tool_call>."
    )
    with pytest.raises(ConfigError, match=r"tokenizer.eos is '<eos>'; expected a token of .*, such as <\|endoftext"):
        JsonTokenizer(path, eos="<eos>")
    one, two = JsonTokenizer(path, eos="<|endoftext|>"), JsonTokenizer(path, bos="<|im_start|>", eos="<|im_end|>")
    assert one.bos_id == one.eos_id == two.eos_id - 2 and two.bos_id == two.eos_id - 1
    assert one.fingerprint != two.fingerprint == JsonTokenizer(path, "<|im_start|>", "<|im_end|>").fingerprint


def test_the_fingerprint_follows_the_file(paths: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes(paths["gpt2"].read_bytes())
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<|endoftext|>"}')
    assert JsonTokenizer(tmp_path / "tokenizer.json").fingerprint == JsonTokenizer(paths["gpt2"]).fingerprint
    (tmp_path / "tokenizer.json").write_bytes(paths["gpt2"].read_bytes() + b"\n")
    assert JsonTokenizer(tmp_path / "tokenizer.json").fingerprint != JsonTokenizer(paths["gpt2"]).fingerprint


def test_ids_with_holes_count_to_the_largest(paths: dict[str, Path], tmp_path: Path) -> None:
    spec = json.loads(paths["gpt2"].read_text())
    vocabulary = spec["model"]["vocab"]
    merged = max(vocabulary, key=vocabulary.get)
    spec["model"]["vocab"][merged] += 500
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    tokenizer = JsonTokenizer(tmp_path / "tokenizer.json", eos="<|endoftext|>")
    assert tokenizer.vocab_size == vocabulary[merged] + 1 > len(vocabulary) + 400
    assert tokenizer.token_bytes().shape == (tokenizer.vocab_size,) and tokenizer.token_bytes()[-2] == 0
    assert tokenizer.decode([tokenizer.vocab_size - 2]) == "" and tokenizer.name_of(tokenizer.vocab_size - 2) == ""


def test_only_byte_level_tokenizers_keep_u2581(paths: dict[str, Path]) -> None:
    assert [JsonTokenizer(paths[kind]).loses_u2581 for kind in JSON_KINDS] == [False, False, False, True]
    gpt2 = JsonTokenizer(paths["gpt2"])
    assert gpt2.decode(gpt2.encode("a\u2581b")) == "a\u2581b"


def test_truncation_and_padding_of_the_file_do_not_count(paths: dict[str, Path], tmp_path: Path) -> None:
    library = tokenizers.Tokenizer.from_file(str(paths["gpt2"]))
    library.enable_truncation(8)
    library.enable_padding(length=8)
    library.save(str(tmp_path / "tokenizer.json"))
    tokenizer = JsonTokenizer(tmp_path / "tokenizer.json", eos="<|endoftext|>")
    plain = JsonTokenizer(paths["gpt2"])
    assert tokenizer.encode_batch(["a", SOURCES[0]]) == plain.encode_batch(["a", SOURCES[0]])


@pytest.mark.parametrize("damage", ["empty", "cut", "text", "config"])
def test_a_damaged_file_is_an_error(paths: dict[str, Path], tmp_path: Path, damage: str) -> None:
    content = paths["gpt2"].read_bytes()
    content = {"empty": b"", "cut": content[:5000], "text": b"no tokenizer", "config": content}[damage]
    (tmp_path / "tokenizer.json").write_bytes(content)
    (tmp_path / "tokenizer_config.json").write_text("{" if damage == "config" else "{}")
    with pytest.raises(DataError, match=r"tokenizer.json: the tokenizer is damaged \(.*\); expected a tokenizer.json"):
        JsonTokenizer(tmp_path / "tokenizer.json")


def test_random_merges_are_refused(paths: dict[str, Path], tmp_path: Path) -> None:
    spec = json.loads(paths["gpt2"].read_text())
    spec["model"]["dropout"] = 0.1
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    with pytest.raises(DataError, match="model.dropout is 0.1; expected none, because ids would be drawn at random"):
        JsonTokenizer(tmp_path / "tokenizer.json")


def test_the_folder_or_the_file_is_named_and_the_size_must_fit(paths: dict[str, Path], tmp_path: Path) -> None:
    folder = paths["llama3"].parent
    size = JsonTokenizer(paths["llama3"]).vocab_size
    for name in (folder, f"{folder}/", paths["llama3"]):
        assert isinstance(open_tokenizer(TokenizerSection(model=str(name), vocab_size=size)), JsonTokenizer)
    with pytest.raises(
        ConfigError, match=f"tokenizer.vocab_size is 900; expected {size}, the size of .*tokenizer.json"
    ):
        open_tokenizer(TokenizerSection(model=str(folder), vocab_size=900))
    with pytest.raises(ConfigError, match="a folder; expected one that holds tokenizer.json or tokenizer.model"):
        open_tokenizer(TokenizerSection(model=str(tmp_path), vocab_size=900))
    with pytest.raises(ConfigError, match=r"no.json, which does not exist; expected a tokenizer.json that does"):
        open_tokenizer(TokenizerSection(model=str(tmp_path / "no.json"), vocab_size=900))


def test_processes_tokenize_alike(paths: dict[str, Path]) -> None:
    tokenizer = JsonTokenizer(paths["llama3"])
    section = TokenizerSection(model=str(paths["llama3"]), vocab_size=tokenizer.vocab_size)
    queued = [QueuedDocument("a.txt", b"", b"", len(text), text) for text in TEXTS[:60]]
    batches = [queued[begin : begin + 3] for begin in range(0, 60, 3)]
    results = [
        [
            ids.tolist()
            for _, documents in encode_batches(iter(batches), section, tokenizer, number)
            for ids in documents
        ]
        for number in (1, 2)
    ]
    assert results[0] == results[1] == [tokenizer.encode_document(text).tolist() for text in TEXTS[:60]]


def test_threads_of_the_library_are_off() -> None:
    check = "import os, pretrain.tokenizers.hf_tokenizer; print(os.environ['TOKENIZERS_PARALLELISM'], end='')"
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, timeout=60)
    assert done.stdout == "false"
