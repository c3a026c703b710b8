"""What is inside a sentencepiece model file: its pieces and how it changes text; read without the library.

Source: sentencepiece's `sentencepiece_model.proto`. ModelProto has pieces = 1, trainer_spec = 2, normalizer_spec = 3,
denormalizer_spec = 5; SentencePiece has piece = 1, score = 2, type = 3; TrainerSpec has model_type = 3,
treat_whitespace_as_suffix = 24; NormalizerSpec has name = 1, precompiled_charsmap = 2, add_dummy_prefix = 3,
remove_extra_whitespaces = 4, escape_whitespaces = 5.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from pretrain.tokenizers.tokenizer import SPACE_PIECE

Piece = tuple[str, float, str]

_KINDS = {1: "normal", 2: "unknown", 3: "control", 4: "user_defined", 5: "unused", 6: "byte"}
_MODEL_TYPES = {1: "unigram", 2: "bpe", 3: "word", 4: "char"}
UNKNOWN_PENALTY = 10.0  # unigram: an unknown character scores this much less than the worst piece
SCORES_PER_NAT = 128  # the resolution to which `round_scores` rounds


@dataclass(frozen=True)
class ModelFile:
    """A model file's content.

    Args:
        pieces: (piece, score, normal | unknown | control | user_defined | byte | unused) by id.
        model_type: `bpe`, `unigram`, `word` or `char`.
        normalizer: name of its rules, such as `identity` or `nmt_nfkc`.
        charsmap: these rules as sentencepiece compiles them; empty for `identity`.
        add_dummy_prefix: a space is put before each text.
        remove_extra_whitespaces: spaces at both ends are dropped, runs of them become one.
        escape_whitespaces: spaces are U+2581 in pieces.
        whitespace_is_suffix: a word's space is behind it.
        denormalizes: text is changed by further rules when it is decoded.
    """

    pieces: tuple[Piece, ...]
    model_type: str
    normalizer: str
    charsmap: bytes
    add_dummy_prefix: bool
    remove_extra_whitespaces: bool
    escape_whitespaces: bool
    whitespace_is_suffix: bool
    denormalizes: bool

    @property
    def has_bytes(self) -> bool:
        """Whether unknown characters become the pieces of their bytes."""
        return any(kind == "byte" for *_, kind in self.pieces)

    @property
    def keeps_text(self) -> bool:
        """Whether every text comes back exactly, except U+2581: nothing is added, dropped or replaced."""
        changes = self.add_dummy_prefix or self.remove_extra_whitespaces or self.charsmap or self.denormalizes
        return self.has_bytes and self.escape_whitespaces and not changes and not self.whitespace_is_suffix

    @property
    def words_are_independent(self) -> bool:
        """Whether a text may be cut before any space that follows another character, and the parts encoded alone.

        So it is if nothing is added to a text or taken away, and no piece has a space after another character: then no
        piece and no merge crosses such a place. It holds for every model that `fit` trains, and not for many others.
        """
        crossing = re.compile(f"[^{SPACE_PIECE}]{SPACE_PIECE}")
        is_known = self.model_type in ("bpe", "unigram") and not self.of_kind("user_defined", "unused")
        return is_known and self.keeps_text and not any(crossing.search(piece) for piece, *_ in self.pieces)

    def unigram_scores(self) -> list[float]:
        """What each piece adds to the score of a unigram segmentation, by id; of those that text never gives, 0.

        A piece that users defined has a score of its own, above that of most others, which sentencepiece 0.2.3 was
        measured to give: 0 for one byte, and 0.1 more for each further byte.
        """
        user_defined = {piece: 0.1 * len(piece.encode()) - 0.1 for piece in self.of_kind("user_defined")}
        return [user_defined.get(piece, score if kind == "normal" else 0.0) for piece, score, kind in self.pieces]

    def of_kind(self, *kinds: str) -> list[str]:
        """The pieces of some kinds, by id."""
        return [piece for piece, _, kind in self.pieces if kind in kinds]


def surface(piece: str, kind: str) -> bytes:
    """The bytes that a piece puts into a text."""
    if kind == "byte":
        return bytes([int(piece[3:5], 16)])
    return piece.replace(SPACE_PIECE, " ").encode() if kind in ("normal", "user_defined") else b""


def read_model(model: bytes) -> ModelFile:
    """Read a model file.

    Raises:
        ValueError, IndexError, KeyError, struct.error: it is not one.
    """
    if not model:
        raise ValueError("the file is empty")  # sentencepiece loads it without an error and answers with zeros
    fields: dict[int, bytes] = {}
    pieces = []
    for number, value in _protobuf_fields(model):
        if number == 1:
            pieces.append(_piece(value))
        fields[number] = value
    trainer, normalizer, denormalizer = (dict(_protobuf_fields(fields.get(number, b""))) for number in (2, 3, 5))

    def flag(spec: dict[int, bytes], number: int, default: bool) -> bool:
        return any(spec[number]) if number in spec else default

    return ModelFile(
        pieces=tuple(pieces),
        model_type=_MODEL_TYPES[int.from_bytes(trainer.get(3, b"\1"), "little")],
        normalizer=normalizer.get(1, b"").decode(),
        charsmap=normalizer.get(2, b""),
        add_dummy_prefix=flag(normalizer, 3, True),
        remove_extra_whitespaces=flag(normalizer, 4, True),
        escape_whitespaces=flag(normalizer, 5, True),
        whitespace_is_suffix=flag(trainer, 24, False),
        denormalizes=bool(denormalizer.get(2)),
    )


def round_scores(model: bytes) -> bytes:
    """Round the scores of a unigram model's normal pieces to multiples of 1/128, so that sums of them are exact.

    sentencepiece adds scores in fp32, `tokenizers` in fp64, and both take the first of equal sums. Trained scores are
    any numbers: sums that are equal in mathematics, as of `aaa` + `aa` and `aa` + `aaa`, are told apart by rounding,
    and differently by the two. Sums of multiples of 1/128 below 2^17 are exact in both.
    """
    rounded = bytearray(model)
    for begin, end in _piece_spans(model):
        fields = dict(_protobuf_fields(model[begin:end]))
        if int.from_bytes(fields.get(3, b"\1"), "little") != 1 or 2 not in fields:
            continue
        (score,) = struct.unpack("<f", fields[2])
        # The score follows the piece, as field 2 of wire type 5: found by walking, not by searching the piece's text.
        position = begin + _score_offset(model[begin:end])
        rounded[position : position + 4] = struct.pack("<f", round(score * SCORES_PER_NAT) / SCORES_PER_NAT)
    return bytes(rounded)


def scores_tie(file: ModelFile, first: Sequence[int], second: Sequence[int]) -> bool:
    """Whether two segmentations of a text by a unigram model have the same score, as far as fp32 can tell.

    They are compared piece by piece between the places where both cut the text. Where they differ, the scores of the
    two stretches must be as near to each other as sums in fp32 are exact: one unit in the last place of the score up
    to there, for each of their pieces.

    Args:
        file: the model.
        first, second: ids of the two segmentations.
    """
    scores, worst = file.unigram_scores(), min(score for _, score, kind in file.pieces if kind == "normal")

    def parts(ids: Sequence[int]) -> list[tuple[bytes, float]]:
        """(bytes, score) of each id; an unknown character's score is at its first byte."""
        listed = []
        for token_id in ids:
            piece, _, kind = file.pieces[token_id]
            data, score = surface(piece, kind) or b"\xff", scores[token_id]  # an unknown piece: both must have it there
            if kind in ("byte", "unknown"):
                score = 0.0 if kind == "byte" and data[0] & 0xC0 == 0x80 else worst - UNKNOWN_PENALTY
            listed.append((data, score))
        return listed

    ours, theirs = parts(first), parts(second)
    if b"".join(data for data, _ in ours) != b"".join(data for data, _ in theirs):
        return False
    total, i, j = 0.0, 0, 0
    while i < len(ours) and j < len(theirs):
        begin_i, begin_j = i, j
        length_i, length_j = len(ours[i][0]), len(theirs[j][0])
        i, j = i + 1, j + 1
        while length_i != length_j:
            if length_i < length_j:
                length_i, i = length_i + len(ours[i][0]), i + 1
            else:
                length_j, j = length_j + len(theirs[j][0]), j + 1
        ours_sum = sum(score for _, score in ours[begin_i:i])
        theirs_sum = sum(score for _, score in theirs[begin_j:j])
        total += max(abs(ours_sum), abs(theirs_sum))
        if abs(ours_sum - theirs_sum) > (i - begin_i + j - begin_j) * total * 2.0**-23:
            return False
    return True


def _piece(message: bytes) -> Piece:
    fields = dict(_protobuf_fields(message))
    score = struct.unpack("<f", fields.get(2, b"\0\0\0\0"))[0]
    return fields[1].decode(), score, _KINDS[int.from_bytes(fields.get(3, b"\1"), "little")]


def _piece_spans(model: bytes) -> Iterator[tuple[int, int]]:
    """Where each piece's message begins and ends in the file."""
    return ((begin, end) for number, begin, end in _spans(model) if number == 1)


def _score_offset(piece: bytes) -> int:
    return next(begin for number, begin, _ in _spans(piece) if number == 2)


def _protobuf_fields(message: bytes) -> Iterator[tuple[int, bytes]]:
    """Yield (field number, raw value) of a protobuf message; varints come as 8 little-endian bytes."""
    for number, begin, end in _spans(message):
        if end < 0:
            yield number, (begin & (2**64 - 1)).to_bytes(8, "little")
        else:
            yield number, message[begin:end]


def _spans(message: bytes) -> Iterator[tuple[int, int, int]]:
    """Yield (field number, begin, end) of a protobuf message's values; of a varint its value and -1."""
    position = 0

    def varint() -> int:
        nonlocal position
        value = shift = 0
        while True:
            byte = message[position]
            position += 1
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return value

    while position < len(message):
        key = varint()
        wire = key & 7
        if wire == 0:
            yield key >> 3, varint(), -1
            continue
        if wire not in (1, 2, 5):
            raise ValueError(f"protobuf wire type {wire}")
        length = varint() if wire == 2 else 8 if wire == 1 else 4
        if position + length > len(message):
            raise ValueError("it ends too early")
        yield key >> 3, position, position + length
        position += length


def append_pieces(model: bytes, pieces: Sequence[str], kind: str) -> bytes:
    """Return a model file with more pieces behind its last one; the ids of all others stay.

    A message may be continued behind its end: the entries of a repeated field, which pieces are, are then all of them.

    Args:
        model: the file.
        pieces: the new ones, as they stand in texts.
        kind: `control` or `user_defined`.

    Source: protobuf's encoding; `sentencepiece_model.proto`.
    """
    number = next(number for number, name in _KINDS.items() if name == kind)
    for piece in pieces:
        name = piece.replace(" ", SPACE_PIECE).encode()
        message = b"\x0a" + _varint(len(name)) + name + b"\x15" + struct.pack("<f", 0.0) + b"\x18" + _varint(number)
        model += b"\x0a" + _varint(len(message)) + message
    return model


def _varint(number: int) -> bytes:
    encoded = bytearray()
    while number >= 0x80:
        encoded.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes([*encoded, number])
