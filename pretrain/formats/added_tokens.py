"""More tokens for a tokenizer that exists: new ids behind its last one; all others stay what they are."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pretrain.errors import ConfigError
from pretrain.tokenizers.hf_tokenizer import TOKENIZER_CONFIG
from pretrain.tokenizers.sentencepiece_model import append_pieces
from pretrain.tokenizers.sentencepiece_tokenizer import SentencePieceTokenizer
from pretrain.tokenizers.tokenizer import Tokenizer


@dataclass(frozen=True)
class AddedTokens:
    """What is added to a vocabulary, in the order of the new ids.

    Args:
        special: tokens that no plain text gives, such as those around the turns of a conversation.
        symbols: texts that become one token wherever they stand.
    """

    special: tuple[str, ...] = ()
    symbols: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.special) + len(self.symbols)


def read_tokens(given: Sequence[str]) -> tuple[str, ...]:
    """Return tokens that are given by name, or as a file with one a line.

    Raises:
        ConfigError: a file is not there, or not UTF-8.
    """
    tokens: list[str] = []
    for one in given:
        if not Path(one).is_file():
            if one.endswith(".txt"):  # a misspelt name would be a token for ever
                raise ConfigError(
                    f"--add-tokens, --add-symbols: {one} is no file; expected one with a token a line. Correct the "
                    "path; a token that ends in .txt goes into such a file."
                )
            tokens.append(one)
            continue
        try:
            tokens += [line for line in Path(one).read_text(encoding="utf-8").splitlines() if line]
        except UnicodeDecodeError:
            raise ConfigError(f"{one}: is not UTF-8; expected a token a line. Convert the file.") from None
    return tuple(tokens)


def add_tokens(tokenizer: Tokenizer, added: AddedTokens) -> dict[str, bytes]:
    """Return the tokenizer's files with the tokens in them.

    Raises:
        ConfigError: a token is in the vocabulary already, is given twice, or is empty.
    """
    names = [*added.special, *added.symbols]
    vocabulary = {tokenizer.name_of(index) for index in range(tokenizer.vocab_size)}
    for place, name in enumerate(names):
        written = name.replace(" ", "\u2581") if isinstance(tokenizer, SentencePieceTokenizer) else name
        if not name or name in names[:place] or written in vocabulary or name in vocabulary:
            raise ConfigError(
                f"--add-tokens, --add-symbols: {name!r} is empty, given twice or a token already; expected new ones. "
                "Leave it out."
            )
    if isinstance(tokenizer, SentencePieceTokenizer):
        model = append_pieces(tokenizer.files["tokenizer.model"], added.special, "control")
        return tokenizer.files | {"tokenizer.model": append_pieces(model, added.symbols, "user_defined")}
    entries: list[dict[str, Any]] = [
        {"id": tokenizer.vocab_size + place, "content": name, "single_word": False, "lstrip": False, "rstrip": False,
         "normalized": False, "special": place < len(added.special)}
        for place, name in enumerate(names)
    ]  # fmt: skip
    files = dict(tokenizer.files)
    spec = json.loads(files["tokenizer.json"])
    spec["added_tokens"] = [*spec.get("added_tokens", []), *entries]
    files["tokenizer.json"] = json.dumps(spec, indent=2, ensure_ascii=False).encode()
    settings = json.loads(files.get(TOKENIZER_CONFIG, b"{}"))
    if "added_tokens_decoder" in settings:  # transformers adds what is listed here by itself
        for entry in entries:
            described = {key: value for key, value in entry.items() if key != "id"}
            settings["added_tokens_decoder"][str(entry["id"])] = described
        files[TOKENIZER_CONFIG] = json.dumps(settings, indent=2, ensure_ascii=False).encode()
    return files
