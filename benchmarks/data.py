"""The data side of training on one core, beside other readers: packing, reading, seeking, memory.

- packing: what `prepare` does once per `data.seq_len`, on documents of log-normal length;
- reading: what a rank's thread does: locate each row, fetch its documents, check their crc32, fill a step's tensors;
- whole rows: the same where each row is one document, beside others that read such rows, in turns;
- plan: from nothing to the places of the first 1,024 rows, of two trillion tokens that exist as numbers only;
- first step: from a stream's beginning to its first batch, at row 0 and far on, of the corpus on disk;
- memory: what reading adds to a process.

Rates are tokens a second of CPU time, with files in the page cache. MosaicML's library needs an environment of its own:
`python -m venv mosaic && mosaic/bin/pip install mosaicml-streaming`, then `--mosaic-python mosaic/bin/python`.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

if sys.path[0] == str(Path(__file__).resolve().parent):  # run as a file
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np
import psutil
import torch

from benchmarks.data_peers import READERS
from benchmarks.record import ROOT, Record, first_line
from pretrain.data.data_plan import DataPlan
from pretrain.data.mixture import Mixture
from pretrain.data.packing import pack
from pretrain.data.row_table import build_row_tables
from pretrain.data.shards import MANIFEST_VERSION, Manifest, ShardWriter
from pretrain.data.stream import TokenStream
from pretrain.options.batch_plan import BatchPlan
from pretrain.options.config import Config

EXAMPLES = """examples:
  python benchmarks/data.py --out bench-results/data.json
  python benchmarks/data.py --tokens 2000000 --seq-lens 512 --plan-shards 200"""

VOCAB_SIZE = 32_000
FINGERPRINT = "0" * 64
MEAN_TOKENS = 813  # of a web document, as measured by FineWeb's authors
BATCH_SIZE, STEP_ROWS = 8, 32  # rows of a micro-batch, and of a step of ours
PLAN_SEQ_LEN, PLAN_CORPORA, PLAN_ROWS, FAR_ROW = 8192, 8, 1024, 10**8
PLAN_ROWS_PER_SHARD = 12_207  # of 8,192 tokens: 20,000 shards are two trillion
OURS = "ours"


def draw_lengths(num_tokens: int, seed: int = 1) -> np.ndarray:
    """Draw documents' lengths, log-normal with a long tail, int64; together about `num_tokens`."""
    random = np.random.default_rng(seed)
    spread = 1.2
    lengths = random.lognormal(np.log(MEAN_TOKENS) - spread**2 / 2, spread, max(int(num_tokens / MEAN_TOKENS), 1))
    return np.maximum(lengths, 1).astype(np.int64)


def write_corpus(folder: Path, lengths: np.ndarray, seq_lens: Sequence[int]) -> Manifest:
    """Write shards of random ids, documents of these lengths between bos and eos, and their row tables."""
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


def open_stream(folder: Path, seq_len: int, cursor: int = 0) -> TokenStream:
    """A stream of steps of four micro-batches."""
    config = Config.model_validate(
        {
            "data": {"sources": [{"name": "random", "shards": str(folder)}], "seq_len": seq_len},
            "model": {"dim": 8, "num_layers": 1, "num_heads": 1},
            "tokenizer": {"model": "none", "vocab_size": VOCAB_SIZE},
            "optim": {"lr": 1e-3},
            "train": {"num_steps": 1, "global_batch_size": STEP_ROWS, "micro_batch_size": BATCH_SIZE},
        }
    )
    return TokenStream(config, BatchPlan.of(config, 1), 0, FINGERPRINT, cursor)


def time_reading(folder: Path, seq_len: int, seconds: float) -> float:
    """Take steps from a stream; tokens per second of CPU time, padding included."""
    stream = open_stream(folder, seq_len)
    for _ in range(20):  # opens the shards and draws the first window's permutation
        stream.next_step()
    num_tokens = 0
    begin, end = time.process_time(), time.monotonic() + seconds
    while time.monotonic() < end or num_tokens == 0:
        num_tokens += sum(batch.tokens_BT.numel() for batch in stream.next_step().micro_batches)
    rate = num_tokens / (time.process_time() - begin)
    stream.close()
    return rate


def time_first_step(folder: Path, seq_len: int, cursor: int) -> float:
    """Seconds from opening a stream at a row to its first step."""
    begin = time.perf_counter()
    stream = open_stream(folder, seq_len, cursor)
    stream.next_step()
    seconds = time.perf_counter() - begin
    stream.close()
    return seconds


def memory_of_reading(folder: Path, seq_len: int) -> int:
    """Bytes that a stream and 200 steps of it add to this process, the steps read ahead included."""
    before = psutil.Process().memory_full_info().uss
    stream = open_stream(folder, seq_len)
    for _ in range(200):
        stream.next_step()
    after = psutil.Process().memory_full_info().uss
    stream.close()
    return after - before


def time_plan(num_shards: int, first_row: int) -> float:
    """Seconds in which the plan of eight corpora is made and the first 1,024 rows from a row on are located."""
    random = np.random.default_rng(3)
    shares = random.dirichlet(np.ones(PLAN_CORPORA) * 4)
    corpora = []
    for number, share in enumerate(shares.tolist()):
        num_blocks = max(int(share * num_shards), 1)
        rows = random.integers(PLAN_ROWS_PER_SHARD - 500, PLAN_ROWS_PER_SHARD + 501, num_blocks)
        corpora.append((f"corpus{number}", rows, share))
    begin = time.perf_counter()
    plan = DataPlan([Mixture(0, PLAN_SEQ_LEN, corpora)], 1, 16)
    for t in range(first_row, first_row + PLAN_ROWS):
        plan.locate(t)
    return time.perf_counter() - begin


def run_peer(job: dict[str, Any], python: str) -> dict[str, Any]:
    """Run a job of `data_peers.py` in a process of its own.

    Raises:
        RuntimeError: it failed.
    """
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        json.dump(job, file)
        file.flush()
        command = [python, str(ROOT / "benchmarks/data_peers.py"), file.name]
        done = subprocess.run(command, capture_output=True, text=True, timeout=1200, check=False)
    if done.returncode:
        raise RuntimeError(f"{job['job']} of {job.get('reader', 'MosaicML streaming')}: {done.stderr.strip()[-300:]}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def compare_whole_rows(folder: Path, arguments: argparse.Namespace, record: Record) -> None:
    """Rows that are one document each: ours beside the others, `rounds` times in turns; medians."""
    row_tokens = arguments.row_tokens
    num_rows = max(arguments.tokens // row_tokens, 100)
    write_corpus(folder / "ours", np.full(num_rows, row_tokens - 1), [row_tokens])
    documents = np.random.default_rng(2).integers(4, VOCAB_SIZE, (num_rows, row_tokens + 1)).astype(np.uint16)
    np.save(folder / "documents.npy", documents)
    pythons = {name: sys.executable for name in READERS}
    pythons["MosaicML streaming"] = arguments.mosaic_python
    jobs = {}
    for name in READERS:
        place = folder / name.replace(" ", "-").replace("'", "")
        place.mkdir()
        jobs[name] = {"reader": name, "folder": str(place), "row_tokens": row_tokens, "batch_size": BATCH_SIZE,
                      "seconds": arguments.seconds, "documents": str(folder / "documents.npy")}  # fmt: skip
        try:
            if not pythons[name]:
                raise RuntimeError("it was not asked for (--mosaic-python)")
            run_peer(jobs[name] | {"job": "write"}, pythons[name])
        except (RuntimeError, OSError) as error:
            record.fail(f"whole rows, {name}", first_line(error))
            jobs.pop(name)
    rates: dict[str, list[float]] = {name: [] for name in (OURS, *jobs)}
    for _ in range(arguments.rounds):
        rates[OURS].append(time_reading(folder / "ours", row_tokens, arguments.seconds))
        for name, job in jobs.items():
            rates[name].append(run_peer(job | {"job": "rate"}, pythons[name])["tokens_per_second"])
    for name, found in rates.items():
        ratio = statistics.median(ours / other for ours, other in zip(rates[OURS], found, strict=True))
        rate = statistics.median(found)
        record.add(part="whole rows", seq_len=row_tokens, reader=name, tokens_per_second=rate, ratio=ratio)


def compare_plans(arguments: argparse.Namespace, record: Record) -> None:
    """The place of the first rows at row 0 and far on; what MosaicML does instead."""
    num_rows = arguments.plan_shards * PLAN_ROWS_PER_SHARD
    for row in (0, min(FAR_ROW, num_rows // 2)):
        seconds = statistics.median(time_plan(arguments.plan_shards, row) for _ in range(5))
        record.add(part="plan", reader=OURS, num_rows=num_rows, first_row=row, seconds=seconds)
        if not arguments.mosaic_python:
            continue
        job = {"job": "mosaic_plan", "num_shards": arguments.plan_shards, "rows_per_shard": PLAN_ROWS_PER_SHARD}
        try:
            result = run_peer(job | {"first_row": row}, arguments.mosaic_python)
            record.add(part="plan", reader="MosaicML streaming", num_rows=num_rows, first_row=row, **result)
        except (RuntimeError, OSError, subprocess.TimeoutExpired) as error:
            record.fail(f"plan of MosaicML at row {row}", first_line(error))


def measure(folder: Path, arguments: argparse.Namespace, record: Record) -> None:
    """Measure all parts."""
    seq_lens = [int(length) for length in arguments.seq_lens.split(",")]
    lengths = draw_lengths(arguments.tokens)
    corpus = folder / "documents"
    write_corpus(corpus, lengths, seq_lens)
    for seq_len in seq_lens:
        record.add(part="packing", seq_len=seq_len, **time_packing(lengths, seq_len, arguments.seconds))
        record.add(part="reading", seq_len=seq_len, tokens_per_second=time_reading(corpus, seq_len, arguments.seconds))
    for cursor in (0, FAR_ROW):
        seconds = statistics.median(time_first_step(corpus, seq_lens[0], cursor) for _ in range(5))
        record.add(part="first step", seq_len=seq_lens[0], first_row=cursor, seconds=seconds)
    with multiprocessing.get_context("spawn").Pool(1) as pool:  # a process in which nothing else has used memory
        record.add(part="memory", bytes=pool.apply(memory_of_reading, (corpus, seq_lens[0])))
    compare_whole_rows(folder, arguments, record)
    compare_plans(arguments, record)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return its exit status."""
    parser = argparse.ArgumentParser(
        prog="data", description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--tokens", type=int, default=40_000_000, help="size of the corpora (%(default)s)")
    parser.add_argument("--seq-lens", default="512,2048,8192", help="tokens in a row of documents (%(default)s)")
    parser.add_argument("--row-tokens", type=int, default=4096, help="tokens in a whole row (%(default)s)")
    parser.add_argument("--seconds", type=float, default=3.0, help="for each figure (%(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="turns of the readers (%(default)s)")
    parser.add_argument("--plan-shards", type=int, default=20_000, help="shards of the plan (%(default)s)")
    parser.add_argument("--mosaic-python", help="Python that has mosaicml-streaming; without it, MosaicML is left out")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    settings = {name: value for name, value in vars(arguments).items() if name not in ("out", "mosaic_python")}
    record = Record("data", arguments.out, settings)
    with tempfile.TemporaryDirectory() as folder:
        measure(Path(folder), arguments, record)
    from benchmarks.table import render

    print(render([record.content]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
