"""A tokenizer as it stands in a GGUF file, and which tokenizers llama.cpp can be trusted with.

Source: llama.cpp's `src/llama-vocab.cpp` (as vendored in llama-cpp-python 0.3.36): `llm_tokenizer_spm`, which merges
what the highest score has, as sentencepiece does, with no look at the type of a token; `llm_tokenizer_bpe`, whose way
to split a text goes by a name; gguf's `TokenType`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from pretrain.errors import ExportError
from pretrain.tokenizers.chat import chat_template, stop_ids
from pretrain.tokenizers.hf_tokenizer import JsonTokenizer
from pretrain.tokenizers.sentencepiece_model import ModelFile
from pretrain.tokenizers.sentencepiece_tokenizer import SentencePieceTokenizer
from pretrain.tokenizers.tokenizer import Tokenizer

_TYPES = {"normal": 1, "unknown": 2, "control": 3, "user_defined": 4, "unused": 5, "byte": 6}
_GPT2 = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
_LLAMA3_REGEX = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
# How a text is split before merging -> the name by which llama.cpp knows it, and whether it then takes whole tokens
# before it merges. Others' tokenizers split so: GPT-2; Llama 3; Qwen2 and 3.
_SPLITS: Mapping[str, tuple[str, bool]] = {
    "gpt-2": ("", False),
    "llama-bpe": (_LLAMA3_REGEX, True),
    "qwen2": (_LLAMA3_REGEX.replace(r"\p{N}{1,3}", r"\p{N}"), False),
}
FIX = "Export to Hugging Face's format (--to hf)."


def begins_texts(tokenizer: Tokenizer, step: int) -> bool:
    """Whether a text begins with bos: where the model was trained here, or the tokenizer puts it first by itself."""
    return step > 0 or not isinstance(tokenizer, JsonTokenizer) or tokenizer.puts_bos


def gguf_tokenizer(tokenizer: Tokenizer, step: int) -> tuple[dict[str, Any], list[str]]:
    """Return what a GGUF file says of a tokenizer, and what is to be known of it.

    Args:
        tokenizer: what the model was trained with.
        step: of the checkpoint; 0: an import, as it was published.

    Returns:
        Keys behind `tokenizer.`: texts, numbers, flags and lists; and sentences about texts that llama.cpp reads
        otherwise.

    Raises:
        ExportError: llama.cpp would give other ids.
    """
    if isinstance(tokenizer, SentencePieceTokenizer):
        keys, notes = _sentencepiece(tokenizer)
    else:
        assert isinstance(tokenizer, JsonTokenizer)
        keys, notes = _byte_level(tokenizer)
    keys |= {
        "ggml.bos_token_id": tokenizer.bos_id,
        "ggml.eos_token_id": tokenizer.eos_id,
        "ggml.padding_token_id": tokenizer.pad_id,
        "ggml.add_bos_token": begins_texts(tokenizer, step),
        "ggml.add_eos_token": False,
    }
    if tokenizer.unk_id is not None:
        keys["ggml.unknown_token_id"] = tokenizer.unk_id
    if len(ends := stop_ids(tokenizer)) > 1:
        keys["ggml.eot_token_id"] = ends[1]
    if template := chat_template(tokenizer):
        keys["chat_template"] = template
    return keys, notes


def read_as_special(tokenizer: Tokenizer) -> list[str]:
    """Return special tokens whose text llama.cpp can read as the token where it stands in plain text."""
    return _merged_to_special(tokenizer.file) if isinstance(tokenizer, SentencePieceTokenizer) else []


def _sentencepiece(tokenizer: SentencePieceTokenizer) -> tuple[dict[str, Any], list[str]]:
    file = tokenizer.file
    faults = {
        f"is a {file.model_type} model, which llama.cpp reads as T5's, without its bytes": file.model_type != "bpe",
        "has no pieces for bytes, without which llama.cpp fails on unknown characters": not file.has_bytes,
        f"normalizes text ({file.normalizer}), which llama.cpp does not": bool(file.charsmap),
        "drops spaces (remove_extra_whitespaces), which llama.cpp does not": file.remove_extra_whitespaces,
        "changes text when it is decoded, which llama.cpp does not": file.denormalizes,
        "puts the space of a word behind it, which llama.cpp does not": file.whitespace_is_suffix,
        "keeps spaces in pieces, which llama.cpp does not": not file.escape_whitespaces,
        "has pieces defined by users, at which llama.cpp cuts in the order of their length": bool(
            file.of_kind("user_defined")
        ),
        "has unused pieces, which llama.cpp uses": bool(file.of_kind("unused")),
    }
    for fault, is_so in faults.items():
        if is_so:
            raise ExportError(f"tokenizer: {fault}; expected one that gives the same ids there. {FIX}")
    notes = []
    if special := _merged_to_special(file):
        shown = ", ".join(special[:3]) + (" …" if len(special) > 3 else "")
        notes.append(f"Where plain text holds {shown}, llama.cpp reads the token and not its letters.")
    return {
        "ggml.model": "llama",
        "ggml.pre": "default",
        "ggml.tokens": [piece for piece, _, _ in file.pieces],
        "ggml.scores": [score for _, score, _ in file.pieces],
        "ggml.token_type": [_TYPES[kind] for _, _, kind in file.pieces],
        "ggml.add_space_prefix": file.add_dummy_prefix,
        "ggml.remove_extra_whitespaces": False,
    }, notes


def _merged_to_special(file: ModelFile) -> list[str]:
    """The control, unknown and byte pieces that two others spell: llama.cpp merges these, sentencepiece does not."""
    pieces = {piece for piece, _, kind in file.pieces if kind == "normal"}
    return [
        piece
        for piece in file.of_kind("control", "unknown", "byte")
        if any(piece[:cut] in pieces and piece[cut:] in pieces for cut in range(1, len(piece)))
    ]


def _byte_level(tokenizer: JsonTokenizer) -> tuple[dict[str, Any], list[str]]:
    spec = json.loads(tokenizer.files["tokenizer.json"])
    model, notes = spec["model"], []
    if model["type"] != "BPE" or model.get("byte_fallback") or model.get("unk_token") or model.get("fuse_unk"):
        raise ExportError(f"tokenizer: is {tokenizer.kind}; expected byte-level BPE for llama.cpp. {FIX}")
    if not model["merges"]:
        raise ExportError(f"tokenizer: merges nothing; expected byte-level BPE with merges for llama.cpp. {FIX}")
    name = _name_of_split(spec["pre_tokenizer"])
    if name is None or (name and _SPLITS[name][1]) != bool(model.get("ignore_merges")):
        raise ExportError(
            "tokenizer: splits text in a way that llama.cpp has no name for; expected that of "
            f"{', '.join(_SPLITS)}. {FIX}"
        )
    normalizer = spec["normalizer"]
    if normalizer is not None:
        if normalizer != {"type": "NFC"}:
            raise ExportError(f"tokenizer: normalizes text ({normalizer['type']}), which llama.cpp does not. {FIX}")
        notes.append(
            "Text that is not in Unicode's form NFC gets other ids in llama.cpp, which does not compose letters."
        )
    added = {one["id"]: one for one in spec["added_tokens"]}
    if plain := [one["content"] for one in added.values() if not one["special"] and one["normalized"]]:
        raise ExportError(f"tokenizer: {plain[0]} is looked for in normalized text, which llama.cpp does not do. {FIX}")
    vocabulary = {index: token for token, index in model["vocab"].items()}
    vocabulary |= {index: one["content"] for index, one in added.items()}
    tokens = [vocabulary.get(index, f"[PAD{index}]") for index in range(tokenizer.vocab_size)]
    types = [
        _TYPES["control" if added[index]["special"] else "user_defined"] if index in added
        else _TYPES["normal" if index in vocabulary else "unused"]
        for index in range(tokenizer.vocab_size)
    ]  # fmt: skip
    merges = [one if isinstance(one, str) else " ".join(one) for one in model["merges"]]
    return {
        "ggml.model": "gpt2", "ggml.pre": name, "ggml.tokens": tokens, "ggml.token_type": types, "ggml.merges": merges,
    }, notes  # fmt: skip


def _name_of_split(spec: Any) -> str | None:
    """The name by which llama.cpp knows how a tokenizer splits text."""
    members: Sequence[dict[str, Any]] = spec["pretokenizers"] if spec and spec["type"] == "Sequence" else [spec or {}]
    if len(members) == 1 and members[0] | {"trim_offsets": True} == _GPT2 | {"trim_offsets": True}:
        return "gpt-2"
    if len(members) != 2 or members[0].get("type") != "Split" or members[1].get("type") != "ByteLevel":
        return None
    split, bytes_ = members
    if bytes_.get("use_regex") or bytes_.get("add_prefix_space") or split.get("behavior") != "Isolated":
        return None
    regex = split["pattern"].get("Regex")
    return next((name for name, (known, _) in _SPLITS.items() if known == regex and not split.get("invert")), None)
