"""Packing and reading of rows on one core: tokens a second of CPU time, on documents of log-normal length.

Packing is what `prepare` does once per `data.seq_len`; reading is what a rank's thread does during training: locate
each row, fetch its documents from the shards, check their crc32, and fill the tensors of a step.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

if sys.path[0] == str(Path(__file__).resolve().parent):  # run as a file
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np
import torch

from benchmarks.record import Record
from pretrain.batch_plan import BatchPlan
from pretrain.config import Config
from pretrain.packing import pack
from pretrain.row_table import build_row_tables
from pretrain.shards import MANIFEST_VERSION, Manifest, ShardWriter
from pretrain.stream import TokenStream

EXAMPLES = """examples:
  python benchmarks/reading.py --out bench-results/reading.json
  python benchmarks/reading.py --tokens 2000000 --seq-lens 512"""

VOCAB_SIZE = 32_000
FINGERPRINT = "0" * 64
MEAN_TOKENS = 813  # of a web document, as measured by FineWeb's authors


def draw_lengths(num_tokens: int, seed: int = 1) -> np.ndarray:
    """Draw documents' lengths, log-normal with a long tail, int64; together about `num_tokens`."""
    random = np.random.default_rng(seed)
    spread = 1.2
    lengths = random.lognormal(np.log(MEAN_TOKENS) - spread**2 / 2, spread, max(int(num_tokens / MEAN_TOKENS), 1))
    return np.maximum(lengths, 1).astype(np.int64)


def write_corpus(folder: Path, lengths: np.ndarray, seq_lens: Sequence[int]) -> Manifest:
    """Write shards of random ids and their row tables."""
    random = np.random.default_rng(2)
    writer = ShardWriter(folder, "train", "uint16", 32 * 2**20)
    written = []
    for length in lengths.tolist():
        ids = random.integers(4, VOCAB_SIZE, length + 2).astype(np.uint16)
        ids[0], ids[-1] = 1, 2
        written.append(writer.add(ids))
    written.append(writer.close())
    manifest = Manifest(
        version=MANIFEST_VERSION, corpus="random", dtype="uint16", tokenizer_fingerprint=FINGERPRINT,
        vocab_size=VOCAB_SIZE, train=tuple(shard for shard in written if shard), val=(),
        text_bytes={"train": int(lengths.sum()), "val": 0}, counts={}, source_fingerprint=FINGERPRINT,
    )  # fmt: skip
    for seq_len in seq_lens:
        build_row_tables(folder, manifest, seq_len)
    manifest.save(folder)
    return manifest


def time_packing(lengths: np.ndarray, seq_len: int, seconds: float) -> dict[str, Any]:
    """Pack the documents again and again; tokens per second of CPU time, and how full the rows are."""
    best = float("inf")
    end = time.monotonic() + seconds
    while time.monotonic() < end or best == float("inf"):
        begin = time.process_time()
        _, offsets = pack(lengths + 1, seq_len)
        best = min(best, time.process_time() - begin)
    slots = int((lengths + 1).sum())
    return {"tokens_per_second": slots / best, "fill": slots / ((len(offsets) - 1) * seq_len)}


def time_reading(folder: Path, seq_len: int, seconds: float) -> dict[str, Any]:
    """Take steps of eight rows from a stream; tokens per second of CPU time, padding included."""
    config = Config.model_validate(
        {
            "data": {"sources": [{"name": "random", "shards": str(folder)}], "seq_len": seq_len},
            "model": {"dim": 8, "num_layers": 1, "num_heads": 1},
            "tokenizer": {"model": "none", "vocab_size": VOCAB_SIZE},
            "optim": {"lr": 1e-3},
            "train": {"num_steps": 1, "global_batch_size": 8, "micro_batch_size": 8},
        }
    )
    stream = TokenStream(config, BatchPlan.of(config, 1), 0, FINGERPRINT)
    stream.next_step()  # opens the shards and draws the first window's permutation
    num_tokens = 0
    begin, end = time.process_time(), time.monotonic() + seconds
    while time.monotonic() < end or num_tokens == 0:
        num_tokens += sum(batch.tokens_BT.numel() for batch in stream.next_step().micro_batches)
    rate = num_tokens / (time.process_time() - begin)
    stream.close()
    return {"tokens_per_second": rate, "fill": None}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return its exit status."""
    parser = argparse.ArgumentParser(
        prog="reading", description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--tokens", type=int, default=40_000_000, help="size of the corpus (%(default)s)")
    parser.add_argument("--seq-lens", default="512,2048,8192", help="tokens in a row (%(default)s)")
    parser.add_argument("--seconds", type=float, default=3.0, help="for each figure (%(default)s)")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    settings = {name: value for name, value in vars(arguments).items() if name != "out"}
    record = Record("reading", arguments.out, settings)
    seq_lens = [int(length) for length in arguments.seq_lens.split(",")]
    lengths = draw_lengths(arguments.tokens)
    with tempfile.TemporaryDirectory() as folder:
        write_corpus(Path(folder), lengths, seq_lens)
        for seq_len in seq_lens:
            record.add(part="packing", seq_len=seq_len, **time_packing(lengths, seq_len, arguments.seconds))
            record.add(part="reading", seq_len=seq_len, **time_reading(Path(folder), seq_len, arguments.seconds))
    from benchmarks.table import render

    print(render([record.content]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
