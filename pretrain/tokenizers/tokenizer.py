"""What a tokenizer is to the rest of the project, and what is common to all kinds of it.

`sentencepiece_tokenizer` trains and reads sentencepiece models, `hf_tokenizer` reads Hugging Face's `tokenizer.json`,
and `tokenizer_files.open_tokenizer` opens whichever a config names.
"""

from __future__ import annotations

import hashlib
import json
import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from pretrain.errors import ConfigError, DataError

# What may lie beside a tokenizer of any kind, and goes along with it into run folders and exports.
CARRIED_FILES = ("chat_template.jinja", "generation_config.json")
SPACE_PIECE = "\u2581"  # how sentencepiece writes a space inside a piece; in a text it would come back as a space


class Tokenizer(ABC):
    """Text to token ids and back.

    Attributes:
        kind: what it is, in a few words.
        vocab_size: number of ids, special ones and holes included: every id is below it.
        fingerprint: identifies everything that ids depend on, in hex; sha256.
        bos_id, eos_id: begin and end every document; the same id where a tokenizer has no bos.
        pad_id: fills rows; eos where a tokenizer has no pad.
        unk_id: stands for what the vocabulary cannot express; None if there is nothing such.
        files: everything that it takes to open it again, by file name; the first is the one to open.
        loses_u2581: whether U+2581 comes back as a space.
        is_exact: whether it is known by construction that every text without U+2581 comes back byte for byte.
    """

    kind: str
    vocab_size: int
    fingerprint: str
    bos_id: int
    eos_id: int
    pad_id: int
    unk_id: int | None
    files: dict[str, bytes]
    loses_u2581: bool
    is_exact: bool

    @property
    def id_dtype(self) -> np.dtype:
        """Of ids in shards: little-endian uint16 up to a vocabulary of 65,536, else uint32."""
        return np.dtype("<u2" if self.vocab_size <= 65536 else "<u4")

    @abstractmethod
    def encode(self, text: str) -> list[int]:
        """Turn a text into ids, without bos and eos; the text of special tokens is plain text."""

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Do what `encode` does for each of several texts, in this thread."""
        return [self.encode(text) for text in texts]

    def encode_document(self, text: str) -> np.ndarray:
        """Turn a document into bos, its ids and eos, of `id_dtype`, shape [tokens + 2]."""
        return self.encode_documents([text])[0]

    def encode_documents(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Do what `encode_document` does for each of several documents."""
        return [np.array([self.bos_id, *ids, self.eos_id], dtype=self.id_dtype) for ids in self.encode_batch(texts)]

    def places_to_cut(self, text: str, min_characters: int) -> list[int]:
        """Where pieces of a text begin whose ids are, one after the other, those of the text; the first place is 0.

        Pieces are as short as this tokenizer knows how to make them, but of at least `min_characters`, the last apart.
        """
        return [0]

    @abstractmethod
    def decode(self, ids: Iterable[int]) -> str:
        """Turn ids back into their text; special ids give nothing, bytes that are not UTF-8 give U+FFFD."""

    @abstractmethod
    def bytes_of(self, token_id: int) -> bytes:
        """The bytes that an id puts into a text, which may be a part of a character; none for special ids."""

    def token_bytes(self) -> np.ndarray:
        """Number of UTF-8 bytes that each id stands for, int32[vocab_size]; 0 for special ids."""
        return np.array([len(self.bytes_of(token_id)) for token_id in range(self.vocab_size)], dtype=np.int32)

    @abstractmethod
    def name_of(self, token_id: int) -> str:
        """The token as it stands in the vocabulary."""

    @abstractmethod
    def special_tokens(self) -> dict[str, int]:
        """Tokens that no plain text gives, by name."""

    @abstractmethod
    def own_symbols(self) -> list[str]:
        """Texts that become one token by declaration and not by statistics, special tokens apart."""


def find_special_ids(
    path: Path, wanted: Mapping[str, str | None], own: Mapping[str, int | None], tokens: Mapping[str, int],
    candidates: Sequence[str],
) -> tuple[int, int]:  # fmt: skip
    """Find which tokens begin and end documents; without a bos, eos does both.

    Args:
        path: the tokenizer's main file.
        wanted: names that the config gives, `bos` and `eos`; None: the tokenizer's own.
        own: ids that the tokenizer itself says; None if it does not.
        tokens: ids of all tokens.
        candidates: tokens that may be meant, for the error.

    Raises:
        ConfigError: the config names no token, or nothing says which token ends documents.
    """
    shown = ", ".join(candidates[:8]) + (f" and {len(candidates) - 8} more" if len(candidates) > 8 else "")
    found = dict(own)
    for which, name in wanted.items():
        if name is None:
            continue
        if name not in tokens:
            expected = f"a token of {path}" + (f", such as {shown}" if shown else "")
            raise ConfigError(f"tokenizer.{which} is {name!r}; expected {expected}. Correct the name.")
        found[which] = tokens[name]
    eos = found["eos"]
    if eos is None:
        raise ConfigError(
            f"{path}: it does not say which token ends documents; expected one. Set tokenizer.eos to the token's name"
            + (f": it has {shown}." if shown else ".")
        )
    bos = found["bos"]
    return (eos if bos is None else bos), eos


def fingerprint_of(model: bytes, special_ids: object = None) -> str:
    """sha256 of a model file, and of its special ids where they are not the file's own."""
    digest = hashlib.sha256(model)
    if special_ids is not None:
        digest.update(json.dumps(special_ids, sort_keys=True).encode())
    return digest.hexdigest()


def read_file(path: Path) -> bytes:
    """Read a tokenizer's main file.

    Raises:
        DataError: it cannot be read.
    """
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(
            f"{path}: the tokenizer is not readable ({error.strerror}); expected a sentencepiece model or a "
            "tokenizer.json. Run `launch/prepare.py` with the config, which trains one, or set tokenizer.model to an "
            "existing one."
        ) from None


def save_file(path: str | Path, content: bytes) -> None:
    """Write a file under a temporary name, then rename it."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    with open(partial, "wb") as file:
        file.write(content)
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
    texts = list(texts)
    token_bytes = tokenizer.token_bytes()
    different = []
    for text, ids in zip(texts, tokenizer.encode_batch(texts), strict=True):
        if tokenizer.decode(ids) != text or int(token_bytes[ids].sum()) != len(text.encode()):
            different.append(text)
    return different
