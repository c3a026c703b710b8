"""Killing `launch/prepare.py` at random, and starting it again, with sources of every kind."""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from pretrain.options.config import TokenizerSection
from pretrain.tokenizers.sentencepiece_tokenizer import SentencePieceTokenizer, train_tokenizer
from tests.helpers.rank_helpers import ROOT
from tests.helpers.token_writers import write_megatron
from tests.preparing.test_prepare import text_of
from tests.preparing.test_table_files import save_dataset, write_csv

pytestmark = [pytest.mark.slow, pytest.mark.launches, pytest.mark.timeout(600)]
NUM_KILLS = 20
KINDS = ("text", "jsonl", "parquet", "csv", "dataset", "megatron")


def write_sources(raw: Path, num_texts: int) -> dict[str, list[str]]:
    """Files of every kind, of different texts, and a tokenizer; returns the paths of two sources."""
    raw.mkdir()
    texts = {kind: [text_of(1000 * number + n, 200) for n in range(num_texts)] for number, kind in enumerate(KINDS)}
    section = TokenizerSection(model=str(raw / "t.model"), vocab_size=600, sample_bytes=100_000)
    train_tokenizer(texts["text"], section, 1)
    tokenizer = SentencePieceTokenizer(raw / "t.model")
    for number, text in enumerate(texts["text"]):
        (raw / f"{number:05d}.txt").write_text(text, newline="")
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts["jsonl"])
    (raw / "a.jsonl.zst").write_bytes(zstandard.compress(lines.encode()))
    pq.write_table(pa.table({"text": texts["parquet"]}), raw / "a.parquet", row_group_size=30)
    write_csv(raw / "a.csv", [["text"], *([text] for text in texts["csv"])])
    save_dataset(raw / "dataset", texts["dataset"])
    ids = [[*tokenizer.encode(text), tokenizer.eos_id] for text in texts["megatron"]]
    write_megatron(raw / "ids_text_document", ids)
    documents = ["*.txt", "a.jsonl.zst", "a.parquet", "a.csv", "dataset"]
    return {
        "documents": [str(raw / name) for name in documents],
        "ids": [str(raw / "ids_text_document")],
    }


def write_config(folder: Path, raw: Path, sources: dict[str, list[str]]) -> Path:
    listed = [{"name": name, "paths": paths, "shards": str(folder / name)} for name, paths in sources.items()]
    config = {
        "tokenizer": {"model": str(raw / "t.model"), "vocab_size": 600},
        "data": {"sources": listed, "seq_len": 64, "val_fraction": 0.1, "shard_bytes": 32_768, "prepare_processes": 2},
        "model": {"dim": 16, "num_layers": 1, "num_heads": 1},
        "optim": {"lr": 0.001},
        "train": {"num_steps": 1, "global_batch_size": 1, "micro_batch_size": 1},
    }
    folder.mkdir()
    (folder / "config.yaml").write_text(json.dumps(config))  # which is YAML too
    return folder / "config.yaml"


def start(config: Path) -> subprocess.Popen:
    with open(config.with_suffix(".log"), "a") as log:
        return subprocess.Popen(
            [sys.executable, str(ROOT / "launch/prepare.py"), str(config)], stdout=log, stderr=log, cwd="/"
        )


def hashes(folder: Path) -> dict[str, str]:
    files = [path for path in folder.glob("*/**/*") if path.is_file()]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def num_complete(folder: Path) -> str:
    """How far it is: files of the first and the second pass."""
    return f"{len(list(folder.glob('*/*/spill-*')))} spills, {len(list(folder.glob('*/*.tar')))} shards"


def test_killed_twenty_times_at_random_it_ends_with_the_same_bytes(tmp_path: Path) -> None:
    seed = int(os.environ.get("KILL_SEED", time.time_ns() % 10**6))
    print(f"KILL_SEED={seed}")  # shown if the test fails
    rng = random.Random(seed)
    raw = tmp_path / "raw"
    sources = write_sources(raw, 100)
    whole = write_config(tmp_path / "whole", raw, sources)
    begin = time.monotonic()
    assert start(whole).wait(200) == 0, whole.with_suffix(".log").read_text()
    duration = time.monotonic() - begin
    expected = hashes(whole.parent)
    assert sum(name.endswith("manifest.json") for name in expected) == len(sources)

    config = write_config(tmp_path / "killed", raw, sources)
    states, orphans = [], []
    while len(states) < NUM_KILLS:
        process = start(config)
        try:
            status = process.wait(rng.uniform(0.0, duration))
        except subprocess.TimeoutExpired:
            orphans += psutil.Process(process.pid).children(recursive=True)
            process.send_signal(signal.SIGKILL)
            process.wait(30)
            states.append(f"{config.parent.name} {num_complete(config.parent)}")
        else:  # it was quicker than its end: begin another one
            assert status == 0, config.with_suffix(".log").read_text()
            assert hashes(config.parent) == expected
            config = write_config(tmp_path / f"killed-after-{len(list(tmp_path.iterdir()))}", raw, sources)
    assert start(config).wait(200) == 0, config.with_suffix(".log").read_text()
    found = hashes(config.parent)
    assert found == expected, sorted(set(found.items()) ^ set(expected.items()))
    print("complete at each kill:", states)
    assert len(set(states)) >= 4, states  # it really was killed at several places
    _, alive = psutil.wait_procs(orphans, timeout=10)
    assert alive == []  # the processes that tokenize end with it
