"""The exported tokenizer gives the ids of the trained one, whatever the text."""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import random
from pathlib import Path

import pytest
import tokenizers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pretrain.errors import ExportError
from pretrain.options.config import TokenizerSection
from pretrain.tokenizers import hf_tokenizer
from pretrain.tokenizers.hf_tokenizer import build_tokenizer, check_ids
from pretrain.tokenizers.sentencepiece_tokenizer import (
    BOS_ID,
    CONTROL_SYMBOLS,
    EOS_ID,
    PAD_ID,
    UNK_ID,
    SentencePieceTokenizer,
    choose_sample,
    fit,
)
from pretrain.tokenizers.tokenizer_files import write_tokenizer_files
from pretrain.tokenizers.varied_texts import varied_texts
from tests.helpers.tokenizer_helpers import train_sentencepiece

LIBRARY = Path(os.__file__).parent
SOURCES = [(LIBRARY / f"{name}.py").read_text(encoding="utf-8") for name in ("argparse", "ast", "calendar", "datetime")]


def make_tokenizer(folder: Path, vocab_size: int, texts: list[str]) -> SentencePieceTokenizer:
    section = TokenizerSection(model=str(folder / f"{vocab_size}.model"), vocab_size=vocab_size)
    Path(section.model).write_bytes(fit(choose_sample(texts, 300_000, seed=0), section))
    return SentencePieceTokenizer(section.model)


@pytest.fixture(scope="module")
def tokenizer_of(tmp_path_factory):
    """A small tokenizer that knows ASCII alone, and a larger one that knows many scripts, by vocabulary size."""
    folder = tmp_path_factory.mktemp("tokenizers")
    return {
        400: make_tokenizer(folder, 400, SOURCES),
        3000: make_tokenizer(folder, 3000, SOURCES + varied_texts(900, 1)),
    }


@pytest.mark.parametrize("vocab_size", [400, 3000])
def test_ids_and_text_are_the_same_for_thousands_of_texts(tokenizer_of, vocab_size):
    tokenizer = tokenizer_of[vocab_size]
    assert any("\n" in piece for piece, *_ in tokenizer.file.pieces), "trained on chunks with newlines"
    texts = varied_texts(4000, 2, SOURCES) + SOURCES
    assert check_ids(tokenizer, texts) == []
    exported = build_tokenizer(tokenizer)
    ids = [tokenizer.encode(text) for text in texts]
    assert exported.decode_batch(ids) == [tokenizer.decode(row) for row in ids] == texts


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=200))
def test_ids_are_the_same_for_any_text(tokenizer_of, text):
    exported = build_tokenizer(tokenizer_of[400])
    exported.encode_special_tokens = True
    assert exported.encode(text, add_special_tokens=False).ids == tokenizer_of[400].encode(text)


@pytest.mark.parametrize("by_age", [True, False])
def test_ids_are_the_same_for_vocabularies_made_to_differ(tokenizer_of, tmp_path, by_age):
    """Few letters and pieces with many splits, scored in the order of their making or at random."""
    protobuf = pytest.importorskip("sentencepiece.sentencepiece_model_pb2")
    rng = random.Random(by_age)
    for alphabet in ("a", "ab", "a\u2581", "abc") * 8:
        pieces = list(alphabet)
        while len(pieces) < (7 if len(alphabet) == 1 else 30):
            piece = rng.choice(pieces) + rng.choice(pieces)
            pieces += [piece] if len(piece) <= 8 and piece not in pieces else []
        merged = pieces[len(alphabet) :]
        if not by_age:
            rng.shuffle(merged)
        model = protobuf.ModelProto.FromString(tokenizer_of[400].files["tokenizer.model"])
        others = [piece for piece in model.pieces if piece.type != 1]
        del model.pieces[:]
        model.pieces.extend(others)
        for index, piece in enumerate([*merged, *alphabet]):
            model.pieces.add(piece=piece, score=-index, type=1)
        (tmp_path / "made.model").write_bytes(model.SerializeToString())
        letters = alphabet.replace("\u2581", " ")
        texts = ["".join(rng.choices(letters, k=rng.randint(1, 30))) for _ in range(100)]
        texts += [text[:4] * 5 + text[4:7] for text in texts]
        assert check_ids(SentencePieceTokenizer(tmp_path / "made.model"), texts) == []


def test_check_ids_returns_the_texts_that_differ(tokenizer_of, monkeypatch):
    right = hf_tokenizer._merges
    monkeypatch.setattr(hf_tokenizer, "_merges", lambda normal: right(normal)[::-1])
    assert check_ids(tokenizer_of[3000], ["q", SOURCES[0], "z"]) == [SOURCES[0]]


def test_special_tokens_keep_their_ids_and_are_parsed(tokenizer_of):
    exported = build_tokenizer(tokenizer_of[400])
    assert [exported.token_to_id(piece) for piece in ("<unk>", "<s>", "</s>", "<pad>")] == [
        UNK_ID,
        BOS_ID,
        EOS_ID,
        PAD_ID,
    ]
    for symbol in CONTROL_SYMBOLS:
        ids = exported.encode(f"a{symbol} b", add_special_tokens=False).ids
        assert ids[1] == exported.token_to_id(symbol) < tokenizer_of[400].vocab_size
        assert exported.decode(ids) == "a b"
    assert exported.get_vocab_size() == tokenizer_of[400].vocab_size


def test_special_tokens_text_can_be_plain(tokenizer_of):
    exported = build_tokenizer(tokenizer_of[400])
    exported.encode_special_tokens = True
    for symbol in ("<s>", "</s>", "<unk>", *CONTROL_SYMBOLS):
        ids = exported.encode(symbol, add_special_tokens=False).ids
        assert len(ids) > 1 and exported.decode(ids) == symbol


def test_the_template_puts_bos_first(tokenizer_of):
    exported = build_tokenizer(tokenizer_of[400])
    assert exported.encode("x").ids == [BOS_ID, *tokenizer_of[400].encode("x")]
    assert exported.encode("").ids == [BOS_ID]
    assert exported.encode("x", "y").ids == [
        BOS_ID, *tokenizer_of[400].encode("x"), BOS_ID, *tokenizer_of[400].encode("y")
    ]  # fmt: skip


def test_files_hold_the_same_tokenizer(tokenizer_of, tmp_path):
    tokenizer = tokenizer_of[3000]
    write_tokenizer_files(tokenizer, tmp_path, max_length=512)
    assert (tmp_path / "tokenizer.model").read_bytes() == tokenizer.files["tokenizer.model"]
    read = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    texts = varied_texts(300, 3)
    assert [read.encode(text).ids for text in texts] == [build_tokenizer(tokenizer).encode(text).ids for text in texts]
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast" and config["model_max_length"] == 512
    assert config["bos_token"] == "<s>" and config["add_bos_token"] is True and config["add_eos_token"] is False


def altered(tokenizer: SentencePieceTokenizer, **changes: object) -> SentencePieceTokenizer:
    """A tokenizer whose model file says something else."""
    other = copy.copy(tokenizer)
    other.file = dataclasses.replace(tokenizer.file, **changes)
    return other


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "word"}, "the model is of type word"),
        ({"whitespace_is_suffix": True}, "the space of a word is put behind it"),
        ({"escape_whitespaces": False}, "spaces stay spaces in pieces"),
        ({"denormalizes": True}, "text is changed again when it is decoded"),
    ],
)
def test_models_without_a_counterpart_are_refused(tokenizer_of, changes, message):
    with pytest.raises(ExportError, match=f"tokenizer: {message}.*, which has no exact counterpart in tokenizer.json"):
        build_tokenizer(altered(tokenizer_of[400], **changes))


def test_pieces_without_a_counterpart_are_refused(tokenizer_of):
    pieces = tokenizer_of[400].file.pieces
    with pytest.raises(ExportError, match=r"1 pieces such as \['x'\] are unused, which has no exact counterpart"):
        build_tokenizer(altered(tokenizer_of[400], pieces=(*pieces, ("x", 0.0, "unused"))))
    with pytest.raises(ExportError, match="piece 'ж7ж' is not made of two other pieces; expected so in a BPE model"):
        build_tokenizer(altered(tokenizer_of[400], pieces=(*pieces, ("ж7ж", -1e6, "normal"))))


PLAIN = {"normalization_rule_name": "identity", "byte_fallback": True}
SYMBOLS = ["<tool>", "<|sep|>", "\u2581\u2581", "\n", "\t", "ab  c"]
FOREIGN = {
    "llama2": {"model_type": "bpe", "remove_extra_whitespaces": False, "split_digits": True, **PLAIN},
    "llama2-symbols": {"model_type": "bpe", "remove_extra_whitespaces": False, "user_defined_symbols": SYMBOLS, **PLAIN},
    "bpe-defaults": {"model_type": "bpe", "normalization_rule_name": "identity"},
    "bpe-symbols": {"model_type": "bpe", "remove_extra_whitespaces": False, "add_dummy_prefix": False,
                    "user_defined_symbols": SYMBOLS, **PLAIN},
    "unigram-defaults": {"normalization_rule_name": "identity"},
    "unigram-no-bos": {"bos_id": -1, "pad_id": 0, "eos_id": 1, "unk_id": 2, "normalization_rule_name": "identity"},
    "unigram-symbols": {"user_defined_symbols": SYMBOLS, "remove_extra_whitespaces": False, **PLAIN},
}  # fmt: skip


@pytest.mark.parametrize("name", FOREIGN)
def test_models_of_others_get_the_same_ids_or_ties(tmp_path, name):
    tokenizer = SentencePieceTokenizer(train_sentencepiece(tmp_path / "a.model", **FOREIGN[name]))
    texts = varied_texts(3000, 2, SOURCES, [*tokenizer.special_tokens(), *tokenizer.own_symbols()]) + SOURCES
    assert check_ids(tokenizer, texts) == []
    exported = build_tokenizer(tokenizer)
    for text, ids in zip(texts, tokenizer.encode_batch(texts), strict=True):
        if tokenizer.unk_id not in ids:
            assert exported.decode(ids) == tokenizer.decode(ids), text
    exported.encode_special_tokens = True
    theirs = exported.encode_batch_fast(texts, add_special_tokens=False)
    different = sum(e.ids != ids for e, ids in zip(theirs, tokenizer.encode_batch(texts), strict=True))
    assert (different > 0) == name.startswith("unigram"), "only unigram models have ties"


@pytest.mark.parametrize("model_type", ["bpe", "unigram"])
def test_compatibility_normalizers_are_found_to_differ(tmp_path, model_type):
    tokenizer = SentencePieceTokenizer(train_sentencepiece(tmp_path / "a.model", model_type=model_type))
    assert check_ids(tokenizer, ["plain text", "\ufb01ne \u00bd \u3000 ok"]) == []
    hangul = "\u1112\u1161\u11ab"  # sentencepiece composes it
    assert check_ids(tokenizer, [hangul, "x"]) == [hangul]


def test_rules_for_single_characters_have_a_counterpart(tmp_path):
    rules = tmp_path / "rules.tsv"
    rules.write_text("41\t61\nE9\t65\n", encoding="utf-8")  # A to a, and e acute to e
    tokenizer = SentencePieceTokenizer(
        train_sentencepiece(
            tmp_path / "a.model", model_type="bpe", byte_fallback=True, normalization_rule_tsv=str(rules)
        )
    )
    assert tokenizer.file.charsmap and tokenizer.decode(tokenizer.encode("A\u00e9B")) == "aeB"
    assert check_ids(tokenizer, varied_texts(3000, 2, SOURCES) + SOURCES) == []
