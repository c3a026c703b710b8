"""Tiny random models of every architecture that is imported, as transformers saves them, and their tokenizers."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import tokenizers
import torch
import transformers
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

from pretrain.options.config import TokenizerSection
from pretrain.tokenizers.sentencepiece_tokenizer import choose_sample, fit

NUM_IDS = 421
_LLAMA: dict[str, Any] = dict(
    hidden_size=32, intermediate_size=56, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    vocab_size=NUM_IDS, max_position_embeddings=96, tie_word_embeddings=False, initializer_range=0.2,
)  # fmt: skip
_GPT2: dict[str, Any] = dict(n_embd=32, n_layer=2, n_head=4, n_positions=96, vocab_size=NUM_IDS, initializer_range=0.2)
LLAMA3 = dict(rope_type="llama3", factor=8.0, original_max_position_embeddings=32, low_freq_factor=1.0,
              high_freq_factor=4.0, rope_theta=5e5)  # fmt: skip
YARN = dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=24, rope_theta=1e4)
# name -> class of the config, its options
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", _LLAMA | dict(rms_norm_eps=1e-5)),
    "llama3-tied": ("LlamaConfig", _LLAMA | dict(rope_parameters=LLAMA3, tie_word_embeddings=True, head_dim=12)),
    "llama-biased": ("LlamaConfig", _LLAMA | dict(attention_bias=True, mlp_bias=True, num_key_value_heads=4)),
    "llama-yarn": ("LlamaConfig", _LLAMA | dict(rope_parameters=YARN)),
    "mistral": ("MistralConfig", _LLAMA | dict(sliding_window=9, rms_norm_eps=1e-5, head_dim=12)),
    "mistral-full": ("MistralConfig", _LLAMA | dict(sliding_window=None)),
    "qwen2": ("Qwen2Config", _LLAMA | dict(sliding_window=32, max_window_layers=1, use_sliding_window=False)),
    "qwen2-window": ("Qwen2Config", _LLAMA | dict(sliding_window=9, max_window_layers=0, use_sliding_window=True,
                                                  tie_word_embeddings=True)),
    "qwen3": ("Qwen3Config", _LLAMA | dict(head_dim=12, tie_word_embeddings=True)),
    "gpt2": ("GPT2Config", _GPT2),
    "stablelm": ("StableLmConfig", _LLAMA | dict(use_qkv_bias=True)),  # RoPE on a quarter of a head is the default
    "stablelm-half": ("StableLmConfig", _LLAMA | dict(
        rope_parameters=dict(rope_type="default", rope_theta=1e4, partial_rotary_factor=0.5))),
    "starcoder2": ("Starcoder2Config", _LLAMA | dict(sliding_window=9, tie_word_embeddings=True)),
    "olmo2": ("Olmo2Config", _LLAMA | dict(rms_norm_eps=1e-6, rope_parameters=dict(rope_type="default", rope_theta=5e5))),
}  # fmt: skip


@cache
def sample_text() -> str:
    """Real text."""
    return Path(os.__file__).with_name("argparse.py").read_text(encoding="utf-8")


@cache
def sentencepiece_model() -> bytes:
    """A sentencepiece model of 421 pieces."""
    return fit(choose_sample([sample_text()], 100_000, seed=0), TokenizerSection(model="x", vocab_size=NUM_IDS))


@cache
def byte_level_tokenizer(is_qwen: bool = False) -> str:
    """A byte-level BPE tokenizer of 421 ids with one special token, as GPT-2's or Qwen's, in JSON."""
    built = tokenizers.Tokenizer(models.BPE())
    built.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if is_qwen:
        split = pre_tokenizers.Split(tokenizers.Regex(PRETOKENIZE_REGEX), "isolated")
        built.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
        built.normalizer = normalizers.NFC()
    built.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=NUM_IDS, special_tokens=["<|endoftext|>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )  # fmt: skip
    built.train_from_iterator([sample_text()], trainer)
    return built.to_str()


def write_byte_level(folder: Path, is_qwen: bool = False) -> None:
    """Write a tokenizer.json and its tokenizer_config.json."""
    (folder / "tokenizer.json").write_text(byte_level_tokenizer(is_qwen), encoding="utf-8")
    named = {
        "tokenizer_class": "Qwen2Tokenizer" if is_qwen else "PreTrainedTokenizerFast",
        "eos_token": "<|endoftext|>",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(named), encoding="utf-8")


def make_model(name: str, folder: Path, **more: Any) -> torch.nn.Module:
    """Save a random model by transformers; no parameter keeps a value, such as 0 or 1, that would hide a mistake."""
    kind, options = MODELS[name]
    config = getattr(transformers, kind)(**options | more)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    model.save_pretrained(folder)
    write_byte_level(folder, is_qwen=name.startswith("qwen2"))
    return model


def change_config(folder: Path, changes: Mapping[str, Any]) -> None:
    """Change keys of a config.json."""
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | dict(changes)))


def copy_of(folder: Path, to: Path) -> Path:
    """Copy a model to change it."""
    shutil.copytree(folder, to)
    return to
