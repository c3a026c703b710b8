"""Everything done with Hugging Face's `tokenizers`: reading a `tokenizer.json`, and building one for an export.

The building is by hand, from the sentencepiece model: transformers' own converters change ids, as `LlamaTokenizer`
rebuilds the normalizer.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors

from pretrain.errors import DataError, ExportError
from pretrain.tokenizers.sentencepiece_model import ModelFile, scores_tie
from pretrain.tokenizers.sentencepiece_tokenizer import SentencePieceTokenizer
from pretrain.tokenizers.tokenizer import (
    CARRIED_FILES,
    SPACE_PIECE,
    Tokenizer,
    find_special_ids,
    fingerprint_of,
    read_file,
)

# `prepare` has processes of its own; the library's threads would contend with them, and warn after a fork.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

TOKENIZER_CONFIG = "tokenizer_config.json"
FILES_BESIDE = (TOKENIZER_CONFIG, "special_tokens_map.json", "added_tokens.json", *CARRIED_FILES)
_BYTE_TOKEN = re.compile("<0x[0-9A-F]{2}>")
# How byte-level vocabularies write bytes: printable characters of Latin-1 as themselves, the others from U+0100 on.
# Source: Radford et al. 2019 (GPT-2).
_PRINTABLE = (*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100))
_ALPHABET = {chr(byte): byte for byte in _PRINTABLE} | {
    chr(0x100 + number): byte for number, byte in enumerate(sorted(set(range(256)) - set(_PRINTABLE)))
}
_UNKNOWN = "\U0010ffff"  # a noncharacter: no vocabulary has it


class JsonTokenizer(Tokenizer):
    """A `tokenizer.json` and what lies beside it, used as the library uses it.

    Args:
        path: the file; `tokenizer_config.json` and `special_tokens_map.json` beside it name bos, eos, pad and unk.
        bos, eos: tokens that begin and end documents; by default those that the files name.

    Attributes:
        own_ids: ids of bos and eos as the files name them; None where they do not.

    Raises:
        DataError: the file is missing, damaged, or draws ids at random.
        ConfigError: there is no such token, or nothing says which token ends documents.
    """

    is_exact = False  # it depends on the normalizer, the alphabet and the added tokens: `prepare` tries it out

    def __init__(self, path: str | Path, bos: str | None = None, eos: str | None = None) -> None:
        path = Path(path)
        content = read_file(path)
        self.files = {"tokenizer.json": content}
        self.files |= {name: file.read_bytes() for name in FILES_BESIDE if (file := path.with_name(name)).is_file()}
        try:
            self._spec: dict[str, Any] = json.loads(content)
            self._library = tokenizers.Tokenizer.from_str(content.decode())
            named = _named_tokens(self.files)
        except Exception as error:  # the library raises nothing more special
            raise DataError(
                f"{path}: the tokenizer is damaged ({error}); expected a tokenizer.json of Hugging Face and, beside "
                "it, JSON files. Restore them."
            ) from None
        if self._spec["model"].get("dropout"):
            raise DataError(
                f"{path}: model.dropout is {self._spec['model']['dropout']}; expected none, because ids would be drawn "
                "at random. Set it to null in the file."
            )
        self._library.no_truncation()
        self._library.no_padding()
        self._library.encode_special_tokens = True
        self._vocabulary: dict[str, int] = self._library.get_vocab(with_added_tokens=True)
        self._added: dict[int, AddedToken] = self._library.get_added_tokens_decoder()
        self.vocab_size = max(self._vocabulary.values()) + 1
        ids = {which: self._vocabulary.get(name) if name is not None else None for which, name in named.items()}
        self.own_ids = {"bos": ids["bos"], "eos": ids["eos"]}
        candidates = [token.content for _, token in sorted(self._added.items(), key=lambda item: not item[1].special)]
        self.bos_id, self.eos_id = find_special_ids(
            path, {"bos": bos, "eos": eos}, self.own_ids, self._vocabulary, candidates
        )
        self.pad_id = self.eos_id if ids["pad"] is None else ids["pad"]
        self.unk_id = ids["unk"]
        self.fingerprint = fingerprint_of(content, {"bos": self.bos_id, "eos": self.eos_id})
        self._decoders = list(_components(self._spec["decoder"]))
        self._writes_spaces = any(
            part["type"] == "Metaspace" or (part["type"] == "Replace" and part["pattern"] == {"String": SPACE_PIECE})
            for part in self._decoders
        )
        self._has_bytes = any(part["type"] == "ByteFallback" for part in self._decoders)
        self._is_byte_level = any(part["type"] == "ByteLevel" for part in self._decoders)
        self.kind = f"tokenizer.json, {'byte-level ' if self._is_byte_level else ''}{self._spec['model']['type']}"
        text = f"a{SPACE_PIECE}b"
        self.loses_u2581 = self.decode(self.encode(text)) != text

    def encode(self, text: str) -> list[int]:
        """Turn a text into ids, without bos and eos; the text of special tokens is plain text."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Do what `encode` does for each of several texts, in this thread."""
        encodings = self._library.encode_batch_fast(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def decode(self, ids: Iterable[int]) -> str:
        """Turn ids back into their text; special ids give nothing, bytes that are not UTF-8 give U+FFFD."""
        return self._library.decode([int(token_id) for token_id in ids], skip_special_tokens=True)

    def bytes_of(self, token_id: int) -> bytes:
        """The bytes that an id puts into a text; none for special ids and holes.

        Exact for byte-level tokens and byte fallback; a dummy prefix is the space that it is; a token of other kinds of
        vocabularies is what it is decoded to alone.
        """
        token = self._library.id_to_token(token_id)
        if token is None:
            return b""
        if token_id in self._added:
            return b"" if self._added[token_id].special else token.encode()
        if self._is_byte_level:
            return b"".join(bytes([_ALPHABET[char]]) if char in _ALPHABET else char.encode() for char in token)
        if self._has_bytes and _BYTE_TOKEN.fullmatch(token):
            return bytes([int(token[3:5], 16)])
        return token.replace(SPACE_PIECE, " ").encode() if self._writes_spaces else self.decode([token_id]).encode()

    def name_of(self, token_id: int) -> str:
        """The token as it stands in the vocabulary."""
        return self._library.id_to_token(token_id) or ""

    @property
    def puts_bos(self) -> bool:
        """Whether the library, asked for special tokens, puts bos before a text."""
        return self._library.encode("a").ids[:1] == [self.bos_id]

    def special_tokens(self) -> dict[str, int]:
        """The added tokens that are special: their text is plain text here."""
        return {token.content: token_id for token_id, token in self._added.items() if token.special}

    def own_symbols(self) -> list[str]:
        """The added tokens that are not special: wherever their text stands, it is one token."""
        return [token.content for token in self._added.values() if not token.special]


def _named_tokens(files: dict[str, bytes]) -> dict[str, str | None]:
    """What the files beside a tokenizer.json call bos, eos, pad and unk; `tokenizer_config.json` has the last word."""
    named: dict[str, str | None] = dict.fromkeys(("bos", "eos", "pad", "unk"))
    for file in ("special_tokens_map.json", TOKENIZER_CONFIG):
        values = json.loads(files.get(file, b"{}"))
        for which in named:
            value = values.get(f"{which}_token")
            named[which] = (value["content"] if isinstance(value, dict) else value) or named[which]
    return named


def _components(part: dict[str, Any] | None) -> Iterator[dict[str, Any]]:
    """The members of a decoder, which may be a sequence."""
    if part is not None and part["type"] == "Sequence":
        for member in part["decoders"]:
            yield from _components(member)
    elif part is not None:
        yield part


def _merges(normal: dict[str, float]) -> list[tuple[str, str]]:
    """All splits of normal pieces into two normal pieces, in the order in which sentencepiece would merge them.

    sentencepiece gives the splits of one piece the same score and takes the leftmost in the text; here each has a rank
    of its own. That could matter only where two of them overlap, as in `x y z` with x+y = y+z, which merging from the
    left does not produce: with 3,000 random vocabularies of random scores over one to four letters, no order among the
    splits of a piece changed the ids of any of 600,000 texts.
    """
    merges: list[tuple[float, int, str, str]] = []
    for piece, score in normal.items():
        splits = [s for s in range(1, len(piece)) if piece[:s] in normal and piece[s:] in normal]
        if len(piece) > 1 and not splits:
            raise ExportError(
                f"tokenizer: piece {piece!r} is not made of two other pieces; expected so in a BPE model, since no "
                "merge leads to it in tokenizer.json. Train the tokenizer with `launch/prepare.py`."
            )
        merges += [(-score, -s, piece[:s], piece[s:]) for s in splits]
    return [(left, right) for *_, left, right in sorted(merges)]


def _check_kind(file: ModelFile) -> None:
    """Refuse what has no exact counterpart in tokenizer.json, whatever the text."""
    unused = file.of_kind("unused")
    faults = {
        f"the model is of type {file.model_type}": file.model_type not in ("bpe", "unigram"),
        f"{len(unused)} pieces such as {unused[:1]} are unused": bool(unused),
        "the space of a word is put behind it (treat_whitespace_as_suffix)": file.whitespace_is_suffix,
        "spaces stay spaces in pieces (escape_whitespaces is false)": not file.escape_whitespaces,
        "text is changed again when it is decoded (denormalizer)": file.denormalizes,
    }
    for fault, is_so in faults.items():
        if is_so:
            raise ExportError(
                f"tokenizer: {fault}, which has no exact counterpart in tokenizer.json; expected a BPE or unigram "
                "model without. Train a tokenizer with `launch/prepare.py` to export models in this format."
            )


def build_tokenizer(tokenizer: SentencePieceTokenizer) -> tokenizers.Tokenizer:
    """Build the tokenizer that gives the same ids in `tokenizers`, with bos put first by its template.

    Args:
        tokenizer: a sentencepiece BPE or unigram model.

    Returns:
        A tokenizer that reads the text of special tokens as these tokens, as transformers expects; set
        `encode_special_tokens` to read it as plain text, as `Tokenizer.encode` does.

    Raises:
        ExportError: the model does something that has no exact counterpart.

    Source: sentencepiece `normalizer.cc`, `bpe_model.cc` (highest score first, then leftmost), `unigram_model.cc`;
        tokenizers `bpe/word.rs` (lowest rank first, then leftmost), `unigram/model.rs`.
    """
    file = tokenizer.file
    _check_kind(file)
    built = tokenizers.Tokenizer(_unigram(file) if file.model_type == "unigram" else _bpe(tokenizer))
    built.normalizer = normalizers.Sequence(list(_normalizers(file)))
    symbols = [symbol for symbol in file.of_kind("user_defined") if " " not in symbol]  # spaces are U+2581 by then
    if symbols and file.model_type == "bpe":
        if _changes_spaces_only(file):
            built.add_tokens([AddedToken(symbol, special=False, normalized=True) for symbol in symbols])
        else:  # as added tokens they would cut the text into parts that are normalized one by one
            built.pre_tokenizer = pre_tokenizers.Split(Regex(_symbol_pattern(tokenizer, symbols)), "isolated")
    strip = [decoders.Strip(" ", 1, 0)] if file.add_dummy_prefix or file.remove_extra_whitespaces else []
    built.decoder = decoders.Sequence(
        [decoders.Replace(SPACE_PIECE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    built.add_special_tokens(
        [AddedToken(piece, special=True, normalized=False) for piece in file.of_kind("unknown", "control")]
    )
    bos = tokenizer.name_of(tokenizer.bos_id)
    built.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos}:0 $A:0 {bos}:1 $B:1", special_tokens=[(bos, tokenizer.bos_id)]
    )
    return built


def _normalizers(file: ModelFile) -> Iterator[normalizers.Normalizer]:
    """What sentencepiece does to a text before it cuts it, step by step."""
    if file.charsmap:
        yield normalizers.Precompiled(file.charsmap)
    if file.remove_extra_whitespaces:
        yield normalizers.Replace(Regex(r"\A +| +\z"), "")
        yield normalizers.Replace(Regex(" {2,}"), " ")
    if file.add_dummy_prefix:
        yield normalizers.Prepend(SPACE_PIECE)
    yield normalizers.Replace(" ", SPACE_PIECE)
    if file.model_type == "unigram" and not file.has_bytes:
        known = set("".join(file.of_kind("normal", "user_defined")))
        for piece in file.of_kind("unknown", "control"):
            # The piece's own text would be one way to cut it. A character of it that is unknown is as well another one.
            if unknown := sorted(set(piece) - known):
                yield normalizers.Replace(unknown[0], _UNKNOWN)


def _changes_spaces_only(file: ModelFile) -> bool:
    return not (file.charsmap or file.add_dummy_prefix or file.remove_extra_whitespaces)


def _symbol_pattern(tokenizer: SentencePieceTokenizer, symbols: Sequence[str]) -> str:
    """Where BPE must not merge: around symbols that users defined.

    No merge leads to such a symbol, so the model has `ignore_merges`: a stretch of text that is in the vocabulary is
    that piece. A stretch that spells a control or byte piece must not be taken for it: its first piece is cut off,
    where it stands right behind the symbol that was matched before (`\\G`).
    """
    longest_first = sorted(symbols, key=lambda symbol: (-len(symbol), symbol))
    symbol = "|".join(map(re.escape, longest_first))
    rests: dict[str, list[str]] = {}
    around = longest_first[0].replace(SPACE_PIECE, " ")
    marker = tokenizer.file.pieces.index((longest_first[0], 0.0, "user_defined"))
    for piece in tokenizer.file.of_kind("control", "unknown", "byte"):
        ids = tokenizer.encode(around + piece + around)
        name, _, kind = tokenizer.file.pieces[ids[ids.index(marker) + 1]]
        head = name if kind == "normal" else piece[0]
        rests.setdefault(head, []).append(piece.removeprefix(head))
    cuts = [
        rf"\G{re.escape(head)}(?=(?:{'|'.join(map(re.escape, rest))})(?:{symbol}|\z))" for head, rest in rests.items()
    ]
    return "|".join([symbol, *cuts])


def _bpe(tokenizer: SentencePieceTokenizer) -> models.BPE:
    file = tokenizer.file
    return models.BPE(
        vocab={piece: index for index, (piece, _, _) in enumerate(file.pieces)},
        merges=_merges({piece: score for piece, score, kind in file.pieces if kind == "normal"}),
        unk_token=tokenizer.name_of(tokenizer.unk_id),
        fuse_unk=True,
        byte_fallback=file.has_bytes,
        ignore_merges=bool(file.of_kind("user_defined")) and not _changes_spaces_only(file),
    )


def _unigram(file: ModelFile) -> models.Unigram:
    """The model, with scores that keep text from being cut into control and byte pieces of the same spelling.

    An unknown character scores 10 less than the lowest piece, here less than in sentencepiece. That changes nothing:
    the characters of all pieces are pieces themselves, so every way to cut a text has the same unknown ones.
    """
    scores = file.unigram_scores()
    unreachable = 1000.0 * min([*scores, -1.0])
    vocabulary = [
        (piece, score if kind in ("normal", "user_defined") else unreachable)
        for (piece, _, kind), score in zip(file.pieces, scores, strict=True)
    ]
    unk_id = next(index for index, (*_, kind) in enumerate(file.pieces) if kind == "unknown")
    return models.Unigram(vocabulary, unk_id=unk_id, byte_fallback=file.has_bytes)


def is_tie(tokenizer: Tokenizer, ours: Sequence[int], theirs: Sequence[int]) -> bool:
    """Whether other ids are as good: a unigram model's, of the same score and for the same text."""
    if not isinstance(tokenizer, SentencePieceTokenizer) or tokenizer.file.model_type != "unigram":
        return False
    return scores_tie(tokenizer.file, ours, theirs) and tokenizer.decode(ours) == tokenizer.decode(theirs)


def check_ids(tokenizer: SentencePieceTokenizer, texts: Iterable[str]) -> list[str]:
    """Find texts to which the exported tokenizer gives other ids than the trained one, ties excepted.

    Args:
        tokenizer: the trained tokenizer.
        texts: texts of any kind; special tokens' text counts as plain text.

    Returns:
        The texts whose ids differ, in order; empty when all agree.

    Raises:
        ExportError: the model does something that has no exact counterpart.
    """
    texts = list(texts)
    exported = build_tokenizer(tokenizer)
    exported.encode_special_tokens = True
    encodings = exported.encode_batch_fast(texts, add_special_tokens=False)
    different = []
    for text, ours, encoding in zip(texts, tokenizer.encode_batch(texts), encodings, strict=True):
        if encoding.ids != ours and not is_tie(tokenizer, ours, encoding.ids):
            different.append(text)
    return different
