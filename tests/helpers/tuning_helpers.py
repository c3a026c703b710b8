"""A small task to tune for: which of ten kinds a sentence is of, told by one word in it; and what it takes to train."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path

from pretrain.options.config import TokenizerSection
from pretrain.tokenizers.sentencepiece_tokenizer import fit
from pretrain.tokenizers.tokenizer import save_file

KINDS = {"oak": "tree", "carp": "fish", "hawk": "bird", "rose": "flower", "iron": "metal", "jazz": "music",
         "ruby": "stone", "rain": "weather", "bread": "food", "chess": "game"}  # fmt: skip
FILLERS = ("the", "a", "we", "saw", "had", "old", "new", "one", "by", "near", "there", "once", "again", "today")


def make_examples(number: int, seed: int = 0) -> list[dict[str, str]]:
    """Prompts and responses, all different."""
    rng, made = random.Random(seed), {}
    while len(made) < number:
        word = rng.choice(list(KINDS))
        words = [rng.choice(FILLERS) for _ in range(rng.randint(2, 5))]
        words.insert(rng.randint(0, len(words)), word)
        made[" ".join(words)] = KINDS[word]
    return [{"prompt": prompt, "response": response} for prompt, response in made.items()]


def make_conversation(examples: Sequence[dict[str, str]], system: str = "Name the kind.") -> dict:
    """A conversation of several turns."""
    messages = [{"role": "system", "content": system}]
    for one in examples:
        messages += [
            {"role": "user", "content": one["prompt"]},
            {"role": "assistant", "content": one["response"]},
        ]
    return {"messages": messages}


def write_lines(path: Path, records: Sequence[object]) -> Path:
    """Write JSON lines."""
    path.write_text("".join(json.dumps(one) + "\n" for one in records), encoding="utf-8")
    return path


def write_task(folder: Path, num_examples: int = 300) -> Path:
    """Write a tokenizer, plain text, examples and the configs `base.yaml` and `tune.yaml`; return the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    examples = make_examples(num_examples)
    texts = [f"{' '.join(sorted(one['prompt'].split()))} and {one['response']}." for one in make_examples(300, 5)]
    section = TokenizerSection(model="t.model", vocab_size=360, sample_bytes=100_000)
    save_file(folder / "t.model", fit([" ".join(texts).encode()], section))
    write_lines(folder / "text.jsonl", [{"text": text} for text in texts])
    write_lines(folder / "examples.jsonl", examples)
    common = f"""\
tokenizer: {{model: {folder}/t.model, vocab_size: 360}}
model: {{family: llama, dim: 64, num_layers: 2, num_heads: 4, num_kv_heads: 2, ffn_dim: 128}}
parallel: {{zero_stage: 1}}
log: {{tensorboard: false}}
"""
    data = "seq_len: 96, val_fraction: 0.15, prepare_processes: 1"
    (folder / "base.yaml").write_text(
        f"""{common}
run: {{dir: {folder}/base, seed: 3}}
data: {{sources: [{{name: text, paths: ["{folder}/text.jsonl"], shards: {folder}/text-shards}}], {data}}}
optim: {{lr: 3e-3}}
train: {{num_steps: 20, global_batch_size: 8, micro_batch_size: 8, precision: fp32}}
""",
        encoding="utf-8",
    )
    (folder / "tune.yaml").write_text(
        f"""{common}
run: {{dir: {folder}/tuned, seed: 3}}
data:
  sources: [{{name: kinds, paths: ["{folder}/examples.jsonl"], shards: {folder}/kinds-shards, examples: {{template: "{{prompt}} ="}}}}]
  seq_len: 96
  val_fraction: 0.15
  prepare_processes: 1
resume: {{from: {folder}/base, optimizer: false, schedule: false, data: false}}
optim: {{lr: 3e-3, weight_decay: 0}}
train: {{num_steps: 120, global_batch_size: 8, micro_batch_size: 8, precision: fp32}}
""",
        encoding="utf-8",
    )
    return folder
