"""The sentencepiece tokenizer: training it, and text to ids and back.

The options were chosen by measurement: sentencepiece's defaults lose runs of spaces, tabs and decomposed letters, and
other libraries give other ids for 60 to 95% of texts; with these every text comes back byte for byte, except U+2581,
and `hf_tokenizer` builds a tokenizer that gives the same ids. Models that others trained are read as they are.
"""

from __future__ import annotations

import hashlib
import heapq
import io
import re
import struct
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import sentencepiece

from pretrain.errors import ConfigError, DataError
from pretrain.options.config import TokenizerSection
from pretrain.tokenizers.sentencepiece_model import ModelFile, read_model, round_scores, surface
from pretrain.tokenizers.tokenizer import (
    CARRIED_FILES,
    SPACE_PIECE,
    Tokenizer,
    find_special_ids,
    fingerprint_of,
    read_file,
    save_file,
)

UNK_ID, BOS_ID, EOS_ID, PAD_ID = 0, 1, 2, 3
NUM_RESERVED = 8
CONTROL_SYMBOLS: tuple[str, ...] = (
    "<|im_start|>",
    "<|im_end|>",
    *(f"<|reserved_{index}|>" for index in range(NUM_RESERVED)),
)
CHUNK_CHARACTERS = 2000  # whole documents as "sentences" would be dropped, lines would never give pieces with newlines

# Encoding pieces of a text this long is 1.3 times as quick as whole files of code, 3 times as a text of 4 MB, and
# its memory does not grow with the text; measured from 100 to 16,000. A unigram model's sums stay exact, too.
_SEGMENT_CHARACTERS = 256
# Characters of control symbols and byte pieces. In a unigram model of `tokenizers` the text of such a piece is one way
# to cut that text; it is never the best one if the characters have pieces of their own.
_SYMBOL_CHARACTERS = "".join(sorted(set("".join(CONTROL_SYMBOLS) + "<unk></s><pad><0x0123456789ABCDEF>")))
_WORD_END = re.compile(f"[^ {SPACE_PIECE}] ")  # a place that no token crosses lies inside


class SentencePieceTokenizer(Tokenizer):
    """A sentencepiece model that was read from its file.

    Args:
        path: the model file.
        bos, eos: pieces that begin and end documents; by default those that the model says.

    Attributes:
        file: what is inside the model file.

    Raises:
        DataError: the file is missing, or is not a whole sentencepiece model.
        ConfigError: there is no such piece, or nothing says which piece ends documents.
    """

    loses_u2581 = True

    def __init__(self, path: str | Path, bos: str | None = None, eos: str | None = None) -> None:
        path = Path(path)
        model = read_file(path)
        self._processor = sentencepiece.SentencePieceProcessor()
        try:
            self.file: ModelFile = read_model(model)
            self._processor.LoadFromSerializedProto(model)
        except (RuntimeError, ValueError, IndexError, KeyError, struct.error) as error:
            raise DataError(
                f"{path}: the tokenizer is damaged ({_first_line(error)}); expected a sentencepiece model. Delete it "
                "and run `launch/prepare.py` to train it again, or restore the file."
            ) from None
        self._cuts_text = self.file.words_are_independent
        self.files = {"tokenizer.model": model}
        self.files |= {name: file.read_bytes() for name in CARRIED_FILES if (file := path.with_name(name)).is_file()}
        self.kind = f"sentencepiece {self.file.model_type}" + (" with byte fallback" if self.file.has_bytes else "")
        self.is_exact = self.file.keeps_text
        self.vocab_size: int = self._processor.vocab_size()
        self.unk_id: int = self._processor.unk_id()
        own = {
            name: None if token_id < 0 else token_id
            for name, token_id in (("bos", self._processor.bos_id()), ("eos", self._processor.eos_id()))
        }
        pieces = {piece: index for index, (piece, _, _) in enumerate(self.file.pieces)}
        candidates = self.file.of_kind("control", "user_defined")
        self.bos_id, self.eos_id = find_special_ids(path, {"bos": bos, "eos": eos}, own, pieces, candidates)
        self.pad_id: int = self._processor.pad_id() if self._processor.pad_id() >= 0 else self.eos_id
        own_ids = (own["eos"] if own["bos"] is None else own["bos"], own["eos"])
        special_ids = (self.bos_id, self.eos_id)
        self.fingerprint = fingerprint_of(model, None if special_ids == own_ids else special_ids)

    def encode(self, text: str) -> list[int]:
        """Turn a text into ids, without bos and eos; the text of control symbols is plain text."""
        if len(text) <= _SEGMENT_CHARACTERS or not self._cuts_text:
            return self._processor.encode(text)
        ids: list[int] = []
        start = 0
        while word_end := _WORD_END.search(text, start + _SEGMENT_CHARACTERS):
            end = word_end.start() + 1
            ids += self._processor.encode(text[start:end])
            start = end
        return ids + self._processor.encode(text[start:])

    def places_to_cut(self, text: str, min_characters: int) -> list[int]:
        """Where pieces of a text begin whose ids are, one after the other, those of the text; the first place is 0.

        They are places at which `encode` cuts, as it does from a place on what it does from the text's beginning.
        """
        places, start = [0], 0
        while self._cuts_text and (word_end := _WORD_END.search(text, start + _SEGMENT_CHARACTERS)):
            start = word_end.start() + 1
            if start - places[-1] >= min_characters:
                places.append(start)
        return places

    def decode(self, ids: Iterable[int]) -> str:
        """Turn ids back into their text; special ids give nothing, bytes that are not UTF-8 give U+FFFD."""
        return self._processor.decode([int(token_id) for token_id in ids])

    def bytes_of(self, token_id: int) -> bytes:
        """The bytes that an id puts into a text; a dummy prefix is the space that it is."""
        piece, _, kind = self.file.pieces[token_id]
        return surface(piece, kind)

    def name_of(self, token_id: int) -> str:
        """The piece."""
        return self.file.pieces[token_id][0]

    def special_tokens(self) -> dict[str, int]:
        """The control pieces: no text gives them."""
        return {piece: index for index, (piece, _, kind) in enumerate(self.file.pieces) if kind == "control"}

    def own_symbols(self) -> list[str]:
        """The pieces that were defined by users, as they stand in texts."""
        return [piece.replace(SPACE_PIECE, " ") for piece in self.file.of_kind("user_defined")]


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
        section: kind, vocabulary size and character coverage.

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
            model_type=section.kind,
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
            required_chars=_SYMBOL_CHARACTERS if section.kind == "unigram" else "",
            max_sentence_length=8 * CHUNK_CHARACTERS,  # in bytes; longer ones would be dropped silently
            num_threads=1,  # more give no gain, and one is deterministic
            minloglevel=2,
        )
    except RuntimeError as error:
        raise _training_error(str(error), sample, section) from None
    return round_scores(model.getvalue()) if section.kind == "unigram" else model.getvalue()


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
    save_file(section.model, fit(choose_sample(texts, section.sample_bytes, seed), section))


def report(tokenizer: SentencePieceTokenizer, texts: Sequence[str], kind: str = "held-out") -> str:
    """Describe a tokenizer in a few lines: compression, pieces with newlines, longest pieces, an example.

    Args:
        tokenizer: the tokenizer.
        texts: documents, better ones that it was not trained on.
        kind: what they are called.
    """
    num_bytes = sum(len(text.encode()) for text in texts)
    num_tokens = sum(len(tokenizer.encode(text)) for text in texts)
    words = [surface(piece, kind).decode() for piece, _, kind in tokenizer.file.pieces if kind == "normal"]
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
