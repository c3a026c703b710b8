"""What is inside a model file, and when two segmentations of a unigram model are equally good."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from pretrain.tokenizers.sentencepiece_model import ModelFile, read_model, round_scores, scores_tie
from tests.helpers.tokenizer_helpers import train_sentencepiece

protobuf = pytest.importorskip("sentencepiece.sentencepiece_model_pb2")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("models")
    options = {
        "defaults": {},
        "bpe": {"model_type": "bpe", "normalization_rule_name": "identity", "add_dummy_prefix": False,
                "remove_extra_whitespaces": False, "byte_fallback": True},
        "other": {"treat_whitespace_as_suffix": True, "user_defined_symbols": ["<tool>"],
                  "normalization_rule_name": "nfkc"},
    }  # fmt: skip
    return {name: train_sentencepiece(folder / name, **option).read_bytes() for name, option in options.items()}


@pytest.mark.parametrize("name", ["defaults", "bpe", "other"])
def test_the_file_is_read_as_the_library_reads_it(models: dict[str, bytes], name: str) -> None:
    file, proto = read_model(models[name]), protobuf.ModelProto.FromString(models[name])
    kinds = ["", "normal", "unknown", "control", "user_defined", "unused", "byte"]
    assert list(file.pieces) == [(piece.piece, piece.score, kinds[piece.type]) for piece in proto.pieces]
    spec = proto.normalizer_spec
    assert (file.normalizer, file.charsmap) == (spec.name, spec.precompiled_charsmap)
    assert (file.add_dummy_prefix, file.remove_extra_whitespaces, file.escape_whitespaces) == (
        spec.add_dummy_prefix, spec.remove_extra_whitespaces, spec.escape_whitespaces
    )  # fmt: skip
    assert file.model_type == ("bpe" if name == "bpe" else "unigram")
    assert file.whitespace_is_suffix == proto.trainer_spec.treat_whitespace_as_suffix == (name == "other")
    assert file.keeps_text == file.words_are_independent == file.has_bytes == (name == "bpe")
    assert not file.denormalizes


def test_only_scores_of_normal_pieces_are_rounded(models: dict[str, bytes]) -> None:
    before, after = (
        protobuf.ModelProto.FromString(model) for model in (models["other"], round_scores(models["other"]))
    )
    assert len(after.pieces) == len(before.pieces)
    for old, new in zip(before.pieces, after.pieces, strict=True):
        assert (new.score * 128) % 1 == 0 and abs(new.score - old.score) <= 1 / 256
        assert old.type == 1 or new.score == old.score
        new.score = old.score
    assert after == before
    assert round_scores(round_scores(models["other"])) == round_scores(models["other"])


def file_of(*pieces: tuple[str, float, str]) -> ModelFile:
    return ModelFile(
        pieces=(("<unk>", 0.0, "unknown"), *pieces), model_type="unigram", normalizer="identity", charsmap=b"",
        add_dummy_prefix=False, remove_extra_whitespaces=False, escape_whitespaces=True, whitespace_is_suffix=False,
        denormalizes=False,
    )  # fmt: skip


def test_ties_are_told_from_worse_segmentations() -> None:
    #               1: a          2: aa           3: aaa         4: b          5: ab        6: the first byte of é, 7
    file = file_of(
        ("a", -3.0, "normal"), ("aa", -4.0, "normal"), ("aaa", -5.0, "normal"), ("b", -2.5, "normal"),
        ("ab", -5.5, "normal"), ("<0xC3>", 0.0, "byte"), ("<0xA9>", 0.0, "byte"), ("<t>", 0.0, "user_defined"),
    )  # fmt: skip
    assert scores_tie(file, [3, 2], [2, 3])  # the same pieces in another order
    assert scores_tie(file, [1, 4], [5])  # -3 - 2.5 = -5.5
    assert not scores_tie(file, [1, 1], [2])  # -6 against -4
    assert not scores_tie(file, [3, 2], [2, 1, 2])
    assert not scores_tie(file, [2, 3], [2, 2])  # another text
    assert not scores_tie(file, [1], [1, 1])
    assert scores_tie(file, [6, 7, 3, 2], [6, 7, 2, 3]) and not scores_tie(file, [6, 7], [7, 6])
    assert scores_tie(file, [0, 3, 2], [0, 2, 3]) and not scores_tie(file, [0, 3, 2], [2, 0, 3])
    assert scores_tie(file, [8, 1, 4], [8, 5]) and scores_tie(file, [], [])
    assert file.unigram_scores()[8] == pytest.approx(0.2)


def test_what_fp32_cannot_tell_is_a_tie_and_no_more() -> None:
    unit = float(np.spacing(np.float32(8.0)))
    file = file_of(("a", -4.0, "normal"), ("aa", -8.0 - unit, "normal"), ("b", -1000.0, "normal"))
    assert scores_tie(file, [1, 1], [2])
    worse = dataclasses.replace(file, pieces=(*file.pieces[:2], ("aa", -8.0 - 8 * unit, "normal"), file.pieces[3]))
    assert not scores_tie(worse, [1, 1], [2])
    assert scores_tie(worse, [3, 1, 1], [3, 2])  # behind a thousand nats, fp32 is coarser
