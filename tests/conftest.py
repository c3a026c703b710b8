"""What several tests share: a small corpus of real text, prepared once a session."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.fork_server import ForkServer
from tests.helpers.rank_helpers import prepare

os.environ.setdefault("OMP_NUM_THREADS", "1")

TINY_CONFIG = """\
run: {{dir: {folder}/run, seed: 7}}
model: {{family: llama, dim: 32, num_layers: 2, num_heads: 4, num_kv_heads: 2, ffn_dim: 64}}
tokenizer: {{model: {folder}/tokenizer.model, vocab_size: 512, sample_bytes: 400000}}
data:
  sources:
    - {{name: code, paths: ["{folder}/code"], shards: {folder}/shards/code, weight: 3}}
    - {{name: prose, paths: ["{folder}/prose.jsonl"], shards: {folder}/shards/prose, weight: 1}}
  seq_len: 32
  val_fraction: 0.1
  shard_bytes: 65536
  prepare_processes: 1
optim: {{name: adamw, lr: 3e-3, weight_decay: 0.1, clip_norm: 1.0}}
schedule: {{name: cosine, warmup_steps: 3}}
train: {{num_steps: 20, global_batch_size: 16, micro_batch_size: 16, precision: fp32}}
parallel: {{zero_stage: 1}}
log: {{tensorboard: false}}
"""

CODE_MODULES = ("ast", "bisect", "calendar", "cmd", "copy", "csv", "dis", "enum", "fractions", "functools", "glob",
                "gzip", "heapq", "inspect", "io", "keyword", "linecache", "numbers", "opcode", "operator", "pickle",
                "queue", "random", "reprlib", "sched", "shelve", "shlex", "stat", "string", "struct", "tabnanny",
                "textwrap", "token", "tokenize", "trace", "types", "uuid", "warnings", "wave", "weakref")  # fmt: skip


def pytest_configure() -> None:
    """Have the programs that tests start heed what `nohup` and a script's `&` ignore, which they would inherit."""
    for number in (signal.SIGINT, signal.SIGHUP):
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, lambda *_: None)  # a handler is not inherited


def write_tiny_corpus(folder: Path) -> Path:
    """Write raw text from the standard library and a config for it; return the config's path."""
    (folder / "code").mkdir(parents=True)
    library = Path(os.__file__).parent
    for name in CODE_MODULES:
        source = library / f"{name}.py"
        if source.exists():
            (folder / "code" / f"{name}.py").write_text(source.read_text(encoding="utf-8")[:12000], encoding="utf-8")
    paragraphs = [part for part in (library / "this.py").read_text().split("\n") if part] * 3
    documentation = [f"{index}: {text}\nA short document of its own." for index, text in enumerate(paragraphs)]
    with open(folder / "prose.jsonl", "w", encoding="utf-8") as file:
        for text in documentation:
            file.write(json.dumps({"text": text}) + "\n")
    config = folder / "tiny.yaml"
    config.write_text(TINY_CONFIG.format(folder=folder), encoding="utf-8")
    return config


@pytest.fixture(autouse=True)
def drawn_the_same_each_time() -> None:
    """Seed torch before each test: what passes today passes tomorrow."""
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)


@pytest.fixture(scope="session")
def tiny_config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A config file whose corpora and tokenizer have been prepared."""
    config = write_tiny_corpus(tmp_path_factory.mktemp("tiny") / "corpus")
    prepare(config)
    return config


@pytest.fixture(scope="session")
def fork_server() -> Iterator[ForkServer]:
    """What starts ranks in a second."""
    server = ForkServer()
    yield server
    server.close()
