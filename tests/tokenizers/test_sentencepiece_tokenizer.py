"""sentencepiece: exact round trips, the same ids in the export, and what its training refuses."""

from __future__ import annotations

import hashlib
import random
import sysconfig
from pathlib import Path

import numpy as np
import pytest

from pretrain.errors import ConfigError, DataError
from pretrain.options.config import TokenizerSection
from pretrain.tokenizers import sentencepiece_tokenizer as tokenizer_module
from pretrain.tokenizers import tokenizer as base_module
from pretrain.tokenizers.hf_tokenizer import build_tokenizer, check_ids
from pretrain.tokenizers.sentencepiece_tokenizer import (
    BOS_ID,
    CHUNK_CHARACTERS,
    CONTROL_SYMBOLS,
    EOS_ID,
    PAD_ID,
    UNK_ID,
    SentencePieceTokenizer,
    choose_sample,
    chunk_text,
    fit,
    report,
    train_tokenizer,
)
from pretrain.tokenizers.tokenizer import check_round_trip, save_file
from pretrain.tokenizers.varied_texts import varied_texts

VOCAB_SIZE = 700


def section_of(model: str | Path, **options: object) -> TokenizerSection:
    return TokenizerSection(**{"model": str(model), "vocab_size": VOCAB_SIZE, "sample_bytes": 300_000} | options)


def library_texts() -> list[str]:
    folder = Path(sysconfig.get_paths()["stdlib"])
    return [path.read_text(encoding="utf-8") for path in sorted(folder.glob("*.py"))[:60]]


@pytest.fixture(scope="module")
def texts() -> list[str]:
    return library_texts()


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, texts: list[str]) -> SentencePieceTokenizer:
    path = tmp_path_factory.mktemp("tokenizer") / "deep/tokenizer.model"
    train_tokenizer(iter(texts[10:]), section_of(path), seed=1)
    assert [file.name for file in path.parent.iterdir()] == ["tokenizer.model"]
    return SentencePieceTokenizer(path)


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "   ",
        "\t",
        "\t\ta\t",
        "\n",
        "\n\n\n",
        "a\nb\n",
        "a\r\nb\r\n\r\n",
        "\r",
        "two  three   four    ",
        "  leading and trailing  ",
        "def f(x):\n    return x\n\n\n\tif y:\n\t\tpass",
        "🎉 👩‍👩‍👧‍👦 👍🏽",
        "你好，世界。日本語 한국어",
        "e\u0301 \u1112\u1161\u11ab ﬁ ½ Ⅷ Å",  # decomposed and compatibility characters
        "\ufeffbyte order mark \u00a0\u3000\u200b\u202e",
        "nul \x00 bell \x07 escape \x1b",
        "<s></s><unk><pad><|im_start|><|reserved_0|>",
        "<0x41>",
        " ⁇ \u2585",
        "123456 3.14159",
        "\U0010ffff\ue000",
    ],
)
def test_texts_come_back_exactly(trained: SentencePieceTokenizer, text: str) -> None:
    ids = trained.encode(text)
    assert trained.decode(ids) == text
    assert all(id_ > PAD_ID and id_ < trained.vocab_size for id_ in ids)
    assert trained.token_bytes()[ids].sum() == len(text.encode())


def test_held_out_and_made_up_texts_come_back_and_get_the_same_ids_in_the_export(
    trained: SentencePieceTokenizer, texts: list[str]
) -> None:
    judged = texts[:10] + varied_texts(1000, 3, texts[:10])
    assert check_round_trip(trained, judged) == []
    assert check_ids(trained, judged) == []
    assert check_round_trip(trained, ["fine", "\u2581", "a\u2581b"]) == ["\u2581", "a\u2581b"]


def test_long_texts_get_the_ids_that_sentencepiece_gives_them_whole(
    trained: SentencePieceTokenizer, texts: list[str]
) -> None:
    assert trained._cuts_text
    varied = varied_texts(300, 4, texts)
    joined = ["".join(varied[begin : begin + 30]) for begin in range(0, 300, 30)]
    spaces = [
        "a " * 500,
        " " * 2000,
        "a" * 2000,
        ("  " * 200 + "b") * 9,
        "x\n " * 400,
        "\u2581 \u2581" * 300,
        "word\u2581 " * 99,
    ]
    for text in texts + joined + spaces:
        assert trained.encode(text) == trained._processor.encode(text)


@pytest.mark.parametrize(
    "options",
    [
        {"add_dummy_prefix": True},
        {"remove_extra_whitespaces": True},
        {"normalization_rule_name": "nmt_nfkc"},
        {"treat_whitespace_as_suffix": True},
        {"split_by_whitespace": False},
        {"byte_fallback": False},
    ],
    ids=str,
)
def test_foreign_models_encode_whole_texts(
    texts: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, object]
) -> None:
    train = tokenizer_module.sentencepiece.SentencePieceTrainer.train
    monkeypatch.setattr(
        tokenizer_module.sentencepiece.SentencePieceTrainer, "train", lambda **named: train(**(named | options))
    )
    sample = choose_sample(texts[:20], 100_000, seed=1)
    save_file(tmp_path / "foreign.model", fit(sample, section_of("unused", vocab_size=500)))
    foreign = SentencePieceTokenizer(tmp_path / "foreign.model")
    assert not foreign._cuts_text
    assert foreign.encode(texts[30]) == foreign._processor.encode(texts[30])


@pytest.mark.parametrize("name", ["trained", "unigram"])
def test_any_run_of_pieces_has_the_ids_that_it_has_in_the_text(
    name: str, texts: list[str], request: pytest.FixtureRequest
) -> None:
    tokenizer: SentencePieceTokenizer = request.getfixturevalue(name)
    long = [*texts[:6], " ".join(varied_texts(150, 5, texts[:3])), "x" * 3000, "日本語" * 900, "a " * 1500, "", "short"]
    rng, num_pieces = random.Random(3), 0
    for text in long:
        places = [*tokenizer.places_to_cut(text, 512), len(text)]
        assert places[0] == 0 and all(end - begin >= 512 for begin, end in zip(places, places[1:-1], strict=False))
        ids = [tokenizer.encode(text[begin:end]) for begin, end in zip(places, places[1:], strict=False)]
        assert sum(ids, []) == tokenizer.encode(text)
        num_pieces += len(ids)
        for _ in range(10):
            first, last = sorted(rng.sample(range(len(places)), 2))
            assert tokenizer.encode(text[places[first] : places[last]]) == sum(ids[first:last], [])
    assert num_pieces > 100


def test_special_ids_and_pieces(trained: SentencePieceTokenizer) -> None:
    assert (trained.unk_id, trained.bos_id, trained.eos_id, trained.pad_id) == (UNK_ID, BOS_ID, EOS_ID, PAD_ID)
    pieces = trained.file.pieces
    assert len(pieces) == trained.vocab_size == VOCAB_SIZE
    assert [piece for piece, _, kind in pieces if kind == "control"] == ["<s>", "</s>", "<pad>", *CONTROL_SYMBOLS]
    assert [piece for piece, _, kind in pieces if kind == "unknown"] == ["<unk>"]
    assert [piece for piece, _, kind in pieces if kind == "byte"] == [f"<0x{byte:02X}>" for byte in range(256)]
    assert {kind for *_, kind in pieces} == {"unknown", "control", "byte", "normal"}
    scores = [score for _, score, kind in pieces if kind == "normal"]
    assert scores == sorted(scores, reverse=True)
    assert trained.decode([BOS_ID, *trained.encode("text"), EOS_ID, PAD_ID]) == "text"


def test_digits_are_split_and_newlines_merged(trained: SentencePieceTokenizer) -> None:
    words = [piece for piece, _, kind in trained.file.pieces if kind == "normal"]
    assert not any(len(word) > 1 and any(char.isdigit() for char in word) for word in words)
    assert sum("\n" in word for word in words) > 10
    assert any(set(word) == {"\u2581"} and len(word) >= 4 for word in words)  # indentation


def test_token_bytes_match_the_pieces(trained: SentencePieceTokenizer) -> None:
    token_bytes = trained.token_bytes()
    assert token_bytes.dtype == np.int32 and token_bytes.shape == (VOCAB_SIZE,)
    for id_, (_, _, kind) in enumerate(trained.file.pieces):
        if kind == "normal":
            assert token_bytes[id_] == len(trained.decode([id_]).encode())
        else:
            assert token_bytes[id_] == (1 if kind == "byte" else 0)


def test_documents_get_bos_and_eos(trained: SentencePieceTokenizer) -> None:
    ids = trained.encode_document("some text")
    assert ids.dtype == np.dtype("<u2")
    assert ids.tolist() == [BOS_ID, *trained.encode("some text"), EOS_ID]
    assert trained.encode_document("").tolist() == [BOS_ID, EOS_ID]
    assert trained.decode(ids) == "some text"


def test_training_is_deterministic_and_ignores_the_order_of_documents(
    trained: SentencePieceTokenizer, texts: list[str], tmp_path: Path
) -> None:
    shuffled = texts[10:]
    random.Random(0).shuffle(shuffled)
    train_tokenizer(shuffled, section_of(tmp_path / "again.model"), seed=1)
    again = SentencePieceTokenizer(tmp_path / "again.model")
    assert again.files["tokenizer.model"] == trained.files["tokenizer.model"]
    assert again.fingerprint == trained.fingerprint == hashlib.sha256(trained.files["tokenizer.model"]).hexdigest()
    assert choose_sample(texts, 50_000, seed=1) != choose_sample(texts, 50_000, seed=2)


def test_training_is_quiet(texts: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    fit(choose_sample(texts[:20], 60_000, seed=1), section_of("unused", vocab_size=450))
    assert capfd.readouterr() == ("", "")


def test_the_sample_is_bounded_and_has_each_chunk_once(texts: list[str]) -> None:
    everything = choose_sample(texts, 10**9, seed=1)
    assert sorted(everything) == sorted({chunk.encode() for text in texts for chunk in chunk_text(text)})
    sample = choose_sample(texts + texts, 100_000, seed=1)
    assert 100_000 <= sum(map(len, sample)) < 100_000 + 4 * CHUNK_CHARACTERS
    assert sample == everything[: len(sample)]  # the smallest hashes, in their order
    assert sum(map(len, sample[:-1])) < 100_000
    assert choose_sample(["one huge document " * 100_000], 10_000, seed=1)


def test_chunks_join_to_the_text_and_end_after_lines(texts: list[str]) -> None:
    for text in [*texts[:5], "x" * (2 * CHUNK_CHARACTERS + 1), "", "a\n" + "b" * CHUNK_CHARACTERS]:
        chunks = list(chunk_text(text))
        assert "".join(chunks) == text
        assert all(0 < len(chunk) <= CHUNK_CHARACTERS for chunk in chunks)
    assert sum(chunk.endswith("\n") for chunk in chunk_text(texts[0])) >= len(list(chunk_text(texts[0]))) - 1


def test_a_vocabulary_that_is_too_large_names_the_largest_that_works(texts: list[str]) -> None:
    sample = [texts[0].encode()[:6000]]
    with pytest.raises(ConfigError) as error:
        fit(sample, section_of("unused", vocab_size=5000))
    largest = int(str(error.value).split("at most ")[1].split(",")[0])
    assert str(error.value).startswith(
        f"tokenizer.vocab_size is 5000; expected at most {largest}, the pieces that {len(sample[0]):,} bytes of sample text give. "
        f"Set tokenizer.vocab_size={largest}, or give more text"
    )
    assert fit(sample, section_of("unused", vocab_size=largest))
    with pytest.raises(ConfigError, match=f"expected at most {largest},"):
        fit(sample, section_of("unused", vocab_size=largest + 1))


def test_a_text_that_is_too_small_for_any_vocabulary_says_so() -> None:
    with pytest.raises(ConfigError, match="expected at most 2.., the pieces that 12 bytes .* Give more text "):
        fit([b"hello world\n"], section_of("unused", vocab_size=300))


def test_a_vocabulary_that_is_too_small_names_the_smallest(texts: list[str]) -> None:
    sample = [chr(0x4E00 + number).encode() for number in range(400)]
    with pytest.raises(
        ConfigError, match=r"vocab_size is 300; expected at least 67\d, .*or lower tokenizer.character_"
    ):
        fit(sample, section_of("unused", vocab_size=300, character_coverage=1.0))


@pytest.mark.parametrize("texts", [[], [""]])
def test_no_text_is_an_error(texts: list[str], tmp_path: Path) -> None:
    with pytest.raises(DataError, match="the training sample is empty; expected text"):
        train_tokenizer(texts, section_of(tmp_path / "a.model"), seed=1)
    assert list(tmp_path.iterdir()) == []


def test_a_missing_tokenizer_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"a.model: the tokenizer is not readable \(No such file.* Run `launch/prepare"):
        SentencePieceTokenizer(tmp_path / "a.model")


@pytest.mark.parametrize("damage", ["empty", "cut", "cut a lot", "text", "cut after a piece"])
def test_a_damaged_tokenizer_is_an_error(trained: SentencePieceTokenizer, tmp_path: Path, damage: str) -> None:
    model = trained.files["tokenizer.model"]
    end_of_first_piece = 2 + model[1]
    damaged = {
        "empty": b"",
        "cut": model[:-7],
        "cut a lot": model[: len(model) // 2],
        "text": b"this is not a tokenizer\n" * 50,
        "cut after a piece": model[:end_of_first_piece],
    }[damage]
    (tmp_path / "a.model").write_bytes(damaged)
    with pytest.raises(
        (DataError, ConfigError),
        match=r"a.model: (the tokenizer is damaged \(.+\); expected a sent|it does not say which token ends)",
    ):
        SentencePieceTokenizer(tmp_path / "a.model")


def test_saving_replaces_the_file_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_file(tmp_path / "a.model", b"old")
    monkeypatch.setattr(base_module.os, "fsync", lambda file: (_ for _ in ()).throw(OSError(28, "No space left")))
    with pytest.raises(OSError, match="No space left"):
        save_file(tmp_path / "a.model", b"new")
    assert (tmp_path / "a.model").read_bytes() == b"old"


def test_large_vocabularies_use_four_bytes(trained: SentencePieceTokenizer, tmp_path: Path) -> None:
    # No small text gives 65,537 pieces: add unused ones to a real model, in protobuf as sentencepiece writes it.
    extra = b"".join(
        b"\x0a" + bytes([len(body)]) + body
        for number in range(65_537 - VOCAB_SIZE)
        for body in [b"\x0a" + bytes([len(str(number)) + 1]) + b"x" + str(number).encode() + b"\x18\x05"]
    )
    (tmp_path / "large.model").write_bytes(trained.files["tokenizer.model"] + extra)
    large = SentencePieceTokenizer(tmp_path / "large.model")
    assert large.vocab_size == 65_537 and large.encode_document("text").dtype == np.dtype("<u4")
    assert large.file.pieces[-1][2] == "unused"
    assert large.token_bytes()[-1] == 0


def test_the_report_says_what_was_learned(trained: SentencePieceTokenizer, texts: list[str]) -> None:
    lines = report(trained, texts[:3]).splitlines()
    num_bytes = sum(len(text.encode()) for text in texts[:3])
    assert lines[0].startswith("700 pieces, ") and "with a newline" in lines[0]
    assert lines[0].endswith(f"bytes per token on {num_bytes:,} bytes of held-out text")
    assert lines[1].startswith("longest pieces: '")
    assert lines[2].startswith("example: '")
    assert len(report(trained, ["short"], "sampled").splitlines()) == 2
    assert report(trained, ["short"], "sampled").splitlines()[0].endswith("on 5 bytes of sampled text")


@pytest.fixture(scope="module")
def unigram(tmp_path_factory: pytest.TempPathFactory, texts: list[str]) -> SentencePieceTokenizer:
    path = tmp_path_factory.mktemp("unigram") / "tokenizer.model"
    train_tokenizer(iter(texts[10:]), section_of(path, kind="unigram"), seed=1)
    return SentencePieceTokenizer(path)


def test_unigram_models_are_as_exact_as_bpe(unigram: SentencePieceTokenizer, texts: list[str]) -> None:
    """Not even ties: sums of rounded scores are exact, and both libraries take the first of equal ones."""
    judged = texts + varied_texts(3000, 3, texts, list(unigram.special_tokens()))
    assert check_round_trip(unigram, judged) == []
    exported = build_tokenizer(unigram)
    exported.encode_special_tokens = True
    encodings = exported.encode_batch_fast(judged, add_special_tokens=False)
    assert [encoding.ids for encoding in encodings] == unigram.encode_batch(judged)
    assert unigram.kind == "sentencepiece unigram with byte fallback" and unigram.is_exact and unigram._cuts_text
    assert all((score * 128) % 1 == 0 for _, score, _ in unigram.file.pieces)


def test_unigram_training_is_deterministic(texts: list[str]) -> None:
    sample = choose_sample(texts[10:], 300_000, seed=1)
    first = fit(sample, section_of("unused", kind="unigram"))
    assert first == fit(sample, section_of("unused", kind="unigram")) != fit(sample, section_of("unused"))


def test_a_unigram_vocabulary_that_does_not_fit_is_explained(texts: list[str]) -> None:
    with pytest.raises(ConfigError, match=r"vocab_size is 5000; expected at most \d+, the pieces that"):
        fit([texts[0].encode()[:6000]], section_of("unused", vocab_size=5000, kind="unigram"))
