"""The sentencepiece tokenizer: training it, and text to ids and back without loss.

The options were chosen by measurement: sentencepiece's defaults lose runs of spaces, tabs and decomposed letters, and
other libraries give other ids for 60 to 95% of texts; with these every text comes back byte for byte, except U+2581,
and `hf_tokenizer` builds a tokenizer that gives the same ids.
"""

from __future__ import annotations

import hashlib
import heapq
import io
import os
import re
import struct
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import sentencepiece

from pretrain.config import TokenizerSection
from pretrain.errors import ConfigError, DataError

UNK_ID, BOS_ID, EOS_ID, PAD_ID = 0, 1, 2, 3
NUM_RESERVED = 8
CONTROL_SYMBOLS: tuple[str, ...] = (
    "<|im_start|>",
    "<|im_end|>",
    *(f"<|reserved_{index}|>" for index in range(NUM_RESERVED)),
)
SPACE_PIECE = "\u2581"  # how sentencepiece writes a space inside a piece; in a text it would come back as a space
CHUNK_CHARACTERS = 2000  # whole documents as "sentences" would be dropped, lines would never give pieces with newlines

# Encoding pieces of a text this long is 1.3 times as quick as whole files of code, 3 times as a text of 4 MB, and
# its memory does not grow with the text; measured from 100 to 16,000.
_SEGMENT_CHARACTERS = 256
_WORD_END = re.compile(f"[^ {SPACE_PIECE}] ")  # a place that no token crosses lies inside
_KINDS = {1: "normal", 2: "unknown", 3: "control", 4: "user_defined", 5: "unused", 6: "byte"}


class Tokenizer:
    """A sentencepiece model that was read from its file.

    Args:
        path: the model file.

    Attributes:
        vocab_size: number of ids, special and byte ones included.
        fingerprint: sha256 of the model file, in hex.
        model_bytes: the model file.
        unk_id, bos_id, eos_id, pad_id: the special ids; pad is eos in a foreign model that has none.

    Raises:
        DataError: the file is missing, is not a whole sentencepiece model, or has no bos or eos.
    """

    def __init__(self, path: str | Path) -> None:
        try:
            self.model_bytes = Path(path).read_bytes()
        except OSError as error:
            raise DataError(
                f"{path}: the tokenizer is not readable ({error.strerror}); expected a sentencepiece model. Run "
                "`launch/prepare.py` with the config, which trains it, or set tokenizer.model to an existing one."
            ) from None
        self._processor = sentencepiece.SentencePieceProcessor()
        try:
            # An empty model loads without an error and then answers everything with zeros.
            if not self.model_bytes:
                raise ValueError("the file is empty")
            self._pieces = _read_pieces(self.model_bytes)
            self._processor.LoadFromSerializedProto(self.model_bytes)
            self._words_are_independent = _words_are_independent(self.model_bytes, self._pieces)
        except (RuntimeError, ValueError, IndexError, KeyError, struct.error) as error:
            raise DataError(
                f"{path}: the tokenizer is damaged ({_first_line(error)}); expected a sentencepiece model. Delete it "
                "and run `launch/prepare.py` to train it again, or restore the file."
            ) from None
        self.vocab_size: int = self._processor.vocab_size()
        self.fingerprint = hashlib.sha256(self.model_bytes).hexdigest()
        self.unk_id: int = self._processor.unk_id()
        self.bos_id: int = self._processor.bos_id()
        self.eos_id: int = self._processor.eos_id()
        if self.bos_id < 0 or self.eos_id < 0:
            raise DataError(
                f"{path}: bos id is {self.bos_id} and eos id is {self.eos_id}; expected both in the vocabulary, since "
                "every document begins and ends with them. Train a tokenizer with `launch/prepare.py`."
            )
        self.pad_id: int = self._processor.pad_id() if self._processor.pad_id() >= 0 else self.eos_id
        self.id_dtype = np.dtype("<u2" if self.vocab_size <= 65536 else "<u4")

    def encode(self, text: str) -> list[int]:
        """Turn a text into ids, without bos and eos; the text of special symbols is plain text."""
        if len(text) <= _SEGMENT_CHARACTERS or not self._words_are_independent:
            return self._processor.encode(text)
        ids: list[int] = []
        start = 0
        while word_end := _WORD_END.search(text, start + _SEGMENT_CHARACTERS):
            end = word_end.start() + 1
            ids += self._processor.encode(text[start:end])
            start = end
        return ids + self._processor.encode(text[start:])

    def encode_document(self, text: str) -> np.ndarray:
        """Turn a document into bos, its ids and eos.

        Returns:
            Little-endian uint16 up to a vocabulary of 65,536, else uint32; shape [tokens + 2].
        """
        return np.array([self.bos_id, *self.encode(text), self.eos_id], dtype=self.id_dtype)

    def decode(self, ids: Iterable[int]) -> str:
        """Turn ids back into their text; special ids give nothing, bytes that are not UTF-8 give U+FFFD."""
        return self._processor.decode([int(token_id) for token_id in ids])

    def token_bytes(self) -> np.ndarray:
        """Number of UTF-8 bytes that each id stands for, int32[vocab_size]; 0 for special ids."""
        return np.array([len(_surface(piece, kind)) for piece, _, kind in self._pieces], dtype=np.int32)

    def pieces(self) -> list[tuple[str, float, str]]:
        """All pieces by id: (piece, score, normal | unknown | control | user_defined | byte | unused)."""
        return list(self._pieces)


def _surface(piece: str, kind: str) -> bytes:
    """The bytes that a piece puts into a text."""
    if kind == "byte":
        return bytes([int(piece[3:5], 16)])
    return piece.replace(SPACE_PIECE, " ").encode() if kind in ("normal", "user_defined") else b""


def _read_pieces(model: bytes) -> list[tuple[str, float, str]]:
    """Read the pieces from the model's protobuf message; the library does not tell user-defined pieces from others.

    Source: sentencepiece_model.proto: ModelProto.pieces = 1; SentencePiece has piece = 1, score = 2, type = 3.
    """
    pieces = []
    for field, value in _protobuf_fields(model):
        if field == 1:
            piece = dict(_protobuf_fields(value))
            score = struct.unpack("<f", piece.get(2, b"\0\0\0\0"))[0]
            pieces.append((piece[1].decode(), score, _KINDS[int.from_bytes(piece.get(3, b"\1"), "little")]))
    return pieces


def _words_are_independent(model: bytes, pieces: list[tuple[str, float, str]]) -> bool:
    """Whether a text may be cut before any space that follows another character, and the parts encoded alone.

    So it is if nothing is added to a text or taken away, and no piece has a space after another character: BPE's
    merges then never cross such a place. It holds for every model that `fit` trains, and not for many foreign ones.

    Source: sentencepiece_model.proto: ModelProto.trainer_spec = 2, normalizer_spec = 3; TrainerSpec.model_type = 3;
        NormalizerSpec has name = 1, add_dummy_prefix = 3, remove_extra_whitespaces = 4.
    """
    fields = dict(_protobuf_fields(model))
    trainer, normalizer = (dict(_protobuf_fields(fields.get(number, b""))) for number in (2, 3))
    is_bpe = int.from_bytes(trainer.get(3, b"\1"), "little") == 2
    is_plain = normalizer.get(1) == b"identity" and not any(any(normalizer.get(number, b"\1")) for number in (3, 4))
    has_bytes = any(kind == "byte" for *_, kind in pieces)
    crossing = re.compile(f"[^{SPACE_PIECE}]{SPACE_PIECE}")
    return is_bpe and is_plain and has_bytes and not any(crossing.search(piece) for piece, *_ in pieces)


def _protobuf_fields(message: bytes) -> Iterator[tuple[int, bytes]]:
    """Yield (field number, raw value) of a protobuf message; varints come as 8 little-endian bytes."""
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
            yield key >> 3, (varint() & (2**64 - 1)).to_bytes(8, "little")
            continue
        if wire not in (1, 2, 5):
            raise ValueError(f"protobuf wire type {wire}")
        length = varint() if wire == 2 else 8 if wire == 1 else 4
        if position + length > len(message):
            raise ValueError("it ends too early")
        yield key >> 3, message[position : position + length]
        position += length


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def chunk_text(text: str) -> Iterator[str]:
    """Cut a text into chunks of at most `CHUNK_CHARACTERS`, after a line end where one is in the second half."""
    start = 0
    while start < len(text):
        end = start + CHUNK_CHARACTERS
        if end < len(text):
            line_end = text.rfind("\n", start + CHUNK_CHARACTERS // 2, end)
            end = line_end + 1 if line_end >= 0 else end
        yield text[start:end]
        start = end


def choose_sample(texts: Iterable[str], sample_bytes: int, seed: int) -> list[bytes]:
    """Choose the chunks with the smallest hashes, in the order of their hashes, which is a shuffled one.

    The choice depends on what the texts are, not on their order, and holds equal chunks once. Memory is bounded by
    `sample_bytes` whatever the size of the corpus.

    Args:
        texts: documents.
        sample_bytes: size of the sample in UTF-8 bytes; it ends with the chunk that reaches it.
        seed: another seed gives another sample.

    Returns:
        Chunks in UTF-8.
    """
    key = seed.to_bytes(8, "little")
    heap: list[tuple[int, bytes]] = []  # (-rank, chunk): the largest rank is at the top
    ranks: set[int] = set()
    total = 0
    for text in texts:
        for chunk in chunk_text(text):
            data = chunk.encode()
            rank = int.from_bytes(hashlib.blake2b(data, digest_size=16, key=key).digest(), "big")
            if rank in ranks or (total >= sample_bytes and rank > -heap[0][0]):
                continue
            heapq.heappush(heap, (-rank, data))
            ranks.add(rank)
            total += len(data)
            while total - len(heap[0][1]) >= sample_bytes:
                negative_rank, dropped = heapq.heappop(heap)
                ranks.remove(-negative_rank)
                total -= len(dropped)
    return [data for _, data in sorted(heap, reverse=True)]


def fit(sample: Sequence[bytes], section: TokenizerSection) -> bytes:
    """Train a model on a sample.

    Args:
        sample: UTF-8 chunks of text, with their newlines.
        section: vocabulary size and character coverage.

    Returns:
        The sentencepiece model file; the same bytes for the same sample.

    Raises:
        DataError: the sample is empty.
        ConfigError: the sample does not hold as many pieces as the vocabulary, or has more characters.
    """
    if not any(sample):
        raise DataError("tokenizer: the training sample is empty; expected text. Check data.sources[].paths.")
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=(chunk.decode() for chunk in sample),
            model_writer=model,
            model_type="bpe",
            vocab_size=section.vocab_size,
            character_coverage=section.character_coverage,
            byte_fallback=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            allow_whitespace_only_pieces=True,
            split_digits=True,
            unk_id=UNK_ID,
            bos_id=BOS_ID,
            eos_id=EOS_ID,
            pad_id=PAD_ID,
            control_symbols=list(CONTROL_SYMBOLS),
            max_sentence_length=8 * CHUNK_CHARACTERS,  # in bytes; longer ones would be dropped silently
            num_threads=1,  # more give no gain, and one is deterministic
            minloglevel=2,
        )
    except RuntimeError as error:
        raise _training_error(str(error), sample, section) from None
    return model.getvalue()


def _training_error(message: str, sample: Sequence[bytes], section: TokenizerSection) -> Exception:
    """What sentencepiece's failure means for the config."""
    where = f"tokenizer.vocab_size is {section.vocab_size}; expected"
    if match := re.search(r"size too high .*<= (\d+)", message):
        largest = int(match[1])
        num_bytes = sum(map(len, sample))
        fix = f"Set tokenizer.vocab_size={largest}, or give more text" if largest >= 300 else "Give more text"
        return ConfigError(
            f"{where} at most {largest}, the pieces that {num_bytes:,} bytes of sample text give. {fix} "
            "(data.sources[].paths; at most tokenizer.sample_bytes of it are used)."
        )
    if match := re.search(r"smaller than required_chars\. \d+ vs (\d+)", message):
        return ConfigError(
            f"{where} at least {match[1]}, which the sample's characters, the bytes and the special symbols take. Set "
            f"tokenizer.vocab_size={match[1]} or more, or lower tokenizer.character_coverage "
            f"({section.character_coverage})."
        )
    return DataError(f"tokenizer: training failed in sentencepiece: {message.strip()}")


def train_tokenizer(texts: Iterable[str], section: TokenizerSection, seed: int) -> None:
    """Train a tokenizer on a sample of the texts and write it to `section.model`, complete or not at all.

    Args:
        texts: documents; read once.
        section: where to write, vocabulary size, sample size.
        seed: chooses the sample.

    Raises:
        DataError: there is no text.
        ConfigError: the sample does not hold as many pieces as the vocabulary, or has more characters.
    """
    save_model(section.model, fit(choose_sample(texts, section.sample_bytes, seed), section))


def save_model(path: str | Path, model: bytes) -> None:
    """Write a model file under a temporary name, then rename it."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    with open(partial, "wb") as file:
        file.write(model)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def check_round_trip(tokenizer: Tokenizer, texts: Iterable[str]) -> list[str]:
    """Find texts that do not come back from their ids exactly, or whose ids do not stand for their bytes.

    Returns:
        The texts that differ, in order; empty when all are exact.
    """
    token_bytes = tokenizer.token_bytes()
    different = []
    for text in texts:
        ids = tokenizer.encode(text)
        if tokenizer.decode(ids) != text or int(token_bytes[ids].sum()) != len(text.encode()):
            different.append(text)
    return different


def report(tokenizer: Tokenizer, texts: Sequence[str], kind: str = "held-out") -> str:
    """Describe a tokenizer in a few lines: compression, pieces with newlines, longest pieces, an example.

    Args:
        tokenizer: the tokenizer.
        texts: documents, better ones that it was not trained on.
        kind: what they are called.
    """
    num_bytes = sum(len(text.encode()) for text in texts)
    num_tokens = sum(len(tokenizer.encode(text)) for text in texts)
    words = [_surface(piece, kind).decode() for piece, _, kind in tokenizer.pieces() if kind == "normal"]
    newlines = sum("\n" in word for word in words)
    longest = sorted((word for word in words if not word.isspace()), key=lambda word: (-len(word), word))[:6]
    lines = [
        f"{tokenizer.vocab_size:,} pieces, {newlines:,} with a newline; {num_bytes / max(num_tokens, 1):.2f} bytes per "
        f"token on {num_bytes:,} bytes of {kind} text",
        f"longest pieces: {' '.join(map(repr, longest))}",
    ]
    example = next((text.strip() for text in texts if len(text.strip()) >= 40), "")[:80]
    if example:
        lines.append(f"example: {' '.join(repr(tokenizer.decode([i])) for i in tokenizer.encode(example))}")
    return "\n".join(lines)
