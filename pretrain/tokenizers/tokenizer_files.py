"""A tokenizer on disk: opening the one that a config names, keeping its files, and writing them into an export."""

from __future__ import annotations

import json
from pathlib import Path

from pretrain.errors import ConfigError
from pretrain.options.config import TokenizerSection
from pretrain.tokenizers.chat import TEMPLATE_FILE, chat_template, own_template
from pretrain.tokenizers.hf_tokenizer import FILES_BESIDE, TOKENIZER_CONFIG, JsonTokenizer, build_tokenizer
from pretrain.tokenizers.sentencepiece_tokenizer import SentencePieceTokenizer
from pretrain.tokenizers.tokenizer import Tokenizer, save_file

MAIN_FILES = ("tokenizer.json", "tokenizer.model")


def main_file(path: str | Path) -> Path:
    """The file that a path means: itself, or in a folder `tokenizer.json`, or else `tokenizer.model`.

    Raises:
        ConfigError: it is a folder that holds neither, or the name of a tokenizer.json that does not exist.
    """
    given = str(path)
    path = Path(path)
    if path.is_dir() or given.endswith("/"):
        for name in MAIN_FILES:
            if (path / name).exists():
                return path / name
        raise ConfigError(
            f"tokenizer.model is {given}, a folder; expected one that holds tokenizer.json or tokenizer.model. Name "
            "such a folder, or a file; a sentencepiece model is trained if the file does not exist."
        )
    if path.suffix == ".json" and not path.exists():
        raise ConfigError(
            f"tokenizer.model is {given}, which does not exist; expected a tokenizer.json that does. Correct the path, "
            "or name a file that ends in .model, which `launch/prepare.py` trains."
        )
    return path


def open_tokenizer(section: TokenizerSection, path: str | Path | None = None) -> Tokenizer:
    """Open the tokenizer of a config, of whatever kind.

    Args:
        section: names it, its size, and tokens for bos and eos where it does not.
        path: another place where it lies, such as a run folder.

    Raises:
        DataError: the file is missing or damaged.
        ConfigError: the section does not fit it.
    """
    file = main_file(section.model if path is None else path)
    read = JsonTokenizer if file.suffix == ".json" else SentencePieceTokenizer
    tokenizer = read(file, section.bos, section.eos)
    if tokenizer.vocab_size != section.vocab_size and path is not None:
        raise ConfigError(
            f"{file}: holds {tokenizer.vocab_size} ids; expected the {section.vocab_size} of the tokenizer with which "
            "the run was trained. Restore the tokenizer's files there."
        )
    if tokenizer.vocab_size != section.vocab_size:
        raise ConfigError(
            f"tokenizer.vocab_size is {section.vocab_size}; expected {tokenizer.vocab_size}, the size of {file}. Set "
            f"tokenizer.vocab_size={tokenizer.vocab_size}, or another tokenizer.model to train a new one."
        )
    return tokenizer


def keep_files(tokenizer: Tokenizer, folder: Path) -> None:
    """Write a tokenizer's files into a folder, which thereby is all that opening it needs, and remove any other's."""
    for name in (*MAIN_FILES, *FILES_BESIDE):
        content, path = tokenizer.files.get(name), folder / name
        if content is None:
            path.unlink(missing_ok=True)
        elif not path.exists() or path.read_bytes() != content:
            save_file(path, content)


def write_tokenizer_files(
    tokenizer: Tokenizer, out_dir: Path, max_length: int, tokenizer_class: str | None = None
) -> None:
    """Write the files from which transformers loads a tokenizer.

    A sentencepiece model gets a `tokenizer.json` of our own and goes along as it is: llama.cpp splits text differently
    without `tokenizer.model` and says nothing. A `tokenizer.json` is written byte for byte, with what lay beside it.

    Args:
        tokenizer: the trained tokenizer.
        out_dir: an existing folder.
        max_length: longest input in tokens that the model was trained on; clients warn beyond it.
        tokenizer_class: the class to load it with, in place of the one that its own `tokenizer_config.json` names.
    """
    for name, content in tokenizer.files.items():
        (out_dir / name).write_bytes(content)
    if isinstance(tokenizer, SentencePieceTokenizer):
        # Not by `save`, for which a full disk is an Exception of no kind.
        (out_dir / "tokenizer.json").write_text(build_tokenizer(tokenizer).to_str(pretty=True), encoding="utf-8")
    if (template := chat_template(tokenizer)) and own_template(tokenizer) is None:
        (out_dir / TEMPLATE_FILE).write_text(template, encoding="utf-8")
    names = {
        f"{which}_token": tokenizer.name_of(token_id)
        for which in ("bos", "eos", "unk", "pad")
        if (token_id := getattr(tokenizer, f"{which}_id")) is not None
    }
    if TOKENIZER_CONFIG in tokenizer.files:
        assert isinstance(tokenizer, JsonTokenizer)
        settings = json.loads(tokenizer.files[TOKENIZER_CONFIG])
        # What the config of the run says of bos and eos is what the model was trained with.
        own = tokenizer.own_ids
        changed = {
            f"{which}_token": names[f"{which}_token"]
            for which, token_id in (("bos", tokenizer.bos_id), ("eos", tokenizer.eos_id))
            if own[which] != token_id and not (which == "bos" and own["bos"] is None and token_id == tokenizer.eos_id)
        }
        changed |= {"tokenizer_class": tokenizer_class} if tokenizer_class else {}
        if not changed:
            return
        settings |= changed
    else:
        settings = {
            # Neither LlamaTokenizer, which rebuilds the tokenizer without the files' normalizer in transformers 5, nor
            # transformers 5's own TokenizersBackend, which transformers 4 does not know.
            "tokenizer_class": "PreTrainedTokenizerFast",
            **names,
            "clean_up_tokenization_spaces": False,
            "model_max_length": max_length,
            # transformers 4 would also give token_type_ids, which `generate` refuses.
            "model_input_names": ["input_ids", "attention_mask"],
        }
        if isinstance(tokenizer, SentencePieceTokenizer):
            settings |= {"add_bos_token": True, "add_eos_token": False, "add_prefix_space": False, "legacy": False}
        if template := chat_template(tokenizer):
            settings["chat_template"] = template  # for clients that do not read the file
    text = json.dumps(settings, indent=2, ensure_ascii=False)
    (out_dir / TOKENIZER_CONFIG).write_text(text + "\n", encoding="utf-8")
