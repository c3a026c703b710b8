"""Small real tokenizers of the kinds that others publish, trained on the spot."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Sequence
from pathlib import Path

import sentencepiece
import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers

from pretrain.tokenizers.sentencepiece_tokenizer import choose_sample
from pretrain.tokenizers.varied_texts import varied_texts

LIBRARY = Path(os.__file__).parent
SOURCES = [(LIBRARY / f"{name}.py").read_text(encoding="utf-8") for name in ("argparse", "ast", "calendar", "datetime")]
LLAMA3_REGEX = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
JSON_KINDS = ("gpt2", "llama3", "qwen", "metaspace")


def train_json(kind: str, folder: Path, vocab_size: int = 600, files: bool = True) -> Path:
    """Train a tokenizer.json of a kind and write it with its config, or alone; return its path."""
    folder.mkdir(parents=True, exist_ok=True)
    special = {"gpt2": ["<|endoftext|>"], "llama3": ["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"],
               "qwen": ["<|endoftext|>", "<|im_start|>", "<|im_end|>"], "metaspace": ["<unk>", "<s>", "</s>"]}[kind]  # fmt: skip
    built = _metaspace() if kind == "metaspace" else _byte_level(kind)
    alphabet = [] if kind == "metaspace" else pre_tokenizers.ByteLevel.alphabet()
    first = special + ([f"<0x{byte:02X}>" for byte in range(256)] if kind == "metaspace" else [])
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=first, initial_alphabet=alphabet, show_progress=False
    )
    built.train_from_iterator(SOURCES + varied_texts(200, 1), trainer)
    if kind == "metaspace":  # the trainer makes all of them added tokens
        spec = json.loads(built.to_str())
        spec["added_tokens"] = spec["added_tokens"][:3]
        built = tokenizers.Tokenizer.from_str(json.dumps(spec))
    built.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    if kind == "qwen":
        built.add_tokens([AddedToken("<tool_call>", special=False, normalized=False)])
    if kind == "llama3":
        bos = special[0]
        built.post_processor = processors.Sequence(
            [
                processors.ByteLevel(trim_offsets=False),
                processors.TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, built.token_to_id(bos))]),
            ]
        )
    path = folder / "tokenizer.json"
    built.save(str(path))
    if files:
        settings = {
            "gpt2": {"tokenizer_class": "GPT2Tokenizer", "bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>",
                     "unk_token": "<|endoftext|>"},
            "llama3": {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>",
                       "chat_template": "{{ messages[0]['content'] }}"},
            "qwen": {"tokenizer_class": "Qwen2Tokenizer", "bos_token": None, "eos_token": {"content": "<|endoftext|>", "__type": "AddedToken"},
                     "pad_token": "<|im_end|>", "unk_token": None},
            "metaspace": {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"},
        }[kind]  # fmt: skip
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return path


def _byte_level(kind: str) -> tokenizers.Tokenizer:
    built = tokenizers.Tokenizer(models.BPE())
    if kind == "gpt2":
        built.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    else:
        split = pre_tokenizers.Split(Regex(LLAMA3_REGEX), "isolated")
        built.pre_tokenizer = pre_tokenizers.Sequence(
            [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
        )
    if kind == "qwen":
        built.normalizer = normalizers.NFC()
    built.decoder = decoders.ByteLevel()
    return built


def _metaspace() -> tokenizers.Tokenizer:
    built = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    built.normalizer = normalizers.Replace(" ", "\u2581")
    built.pre_tokenizer = pre_tokenizers.Split(Regex("(?<!\u2581)(?=\u2581)|\n"), "merged_with_previous")
    built.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    return built


def train_sentencepiece(path: Path, texts: Sequence[str] = (), vocab_size: int = 1500, **options: object) -> Path:
    """Train a sentencepiece model with the library's own defaults but for some options."""
    sample = choose_sample(texts or SOURCES + varied_texts(900, 1), 200_000, seed=0)
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=(chunk.decode() for chunk in sample), model_writer=model, vocab_size=vocab_size,
        num_threads=1, minloglevel=2, max_sentence_length=16000, **options,
    )  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(model.getvalue())
    return path
