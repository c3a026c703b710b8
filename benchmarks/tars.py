"""Reading of tars that others made, tokenized on the way, beside bare sentencepiece on the same documents.

    python benchmarks/tars.py --megabytes 40 --out bench-results/tars.json

The text is that of `benchmarks/prepare.py`, once as its files are and once in documents of a megabyte, which rows cut.
Tokens a second of CPU time, in turns: sentencepiece's own `encode` of whole documents, and an epoch of rows as training
reads them, of `.txt` and of `.json` members. Both have one thread.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

if sys.path[0] == str(Path(__file__).resolve().parent):
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import sentencepiece
import torch
import webdataset

from benchmarks.prepare import python_texts
from benchmarks.record import Record
from benchmarks.table import render
from pretrain.data.data_plan import open_plan
from pretrain.data.row_reader import IGNORED_TARGET
from pretrain.data.shards import Manifest
from pretrain.data.stream import TokenStream
from pretrain.options.batch_plan import BatchPlan
from pretrain.options.config import Config, TokenizerSection
from pretrain.preparing.prepare import prepare
from pretrain.tokenizers.sentencepiece_tokenizer import train_tokenizer
from pretrain.tokenizers.tokenizer_files import open_tokenizer

LONG_CHARACTERS = 1 << 20
_TAR_CHARACTERS = 1 << 23


def write_tars(folder: Path, texts: Sequence[str], kind: str) -> None:
    """Write documents into tars of about 8 MB, as `.txt` or as `.json`."""
    folder.mkdir(parents=True)
    tar, size, number = None, 0, 0
    for index, text in enumerate(texts):
        if tar is None:
            tar = webdataset.TarWriter(str(folder / f"web-{number:06d}.tar"), mtime=0)
            size, number = 0, number + 1
        content = text.encode() if kind == "txt" else json.dumps({"id": index, "text": text}).encode()
        tar.write({"__key__": f"{index:08d}", kind: content})
        size += len(text)
        if size >= _TAR_CHARACTERS:
            tar.close()
            tar = None
    if tar is not None:
        tar.close()


def config_of(folder: Path, model: str, vocab_size: int, seq_len: int) -> Config:
    """A config of the tars in a folder."""
    source = {"name": "web", "paths": [str(folder / "raw/*.tar")], "shards": str(folder / "index")}
    return Config.model_validate(
        {
            "data": {"sources": [source], "seq_len": seq_len, "prepare_processes": 1},
            "model": {"dim": 8, "num_layers": 1, "num_heads": 1},
            "tokenizer": {"model": model, "vocab_size": vocab_size},
            "optim": {"lr": 1e-3},
            "train": {"num_steps": 1, "global_batch_size": 8, "micro_batch_size": 8},
        }
    )


def time_bare(model: str, texts: Sequence[str]) -> float:
    """Tokens a CPU second of sentencepiece alone."""
    processor = sentencepiece.SentencePieceProcessor(model_file=model)
    begin = time.process_time()
    num_tokens = sum(len(processor.encode(text)) for text in texts)
    return num_tokens / (time.process_time() - begin)


def time_rows(config: Config) -> float:
    """Tokens that are scored a CPU second, in the rows of an epoch."""
    fingerprint = open_tokenizer(config.tokenizer).fingerprint
    num_rows = open_plan(config, fingerprint)[0].epoch_rows_at(0)["web"]
    with closing(TokenStream(config, BatchPlan.of(config, 1), 0, fingerprint)) as stream:
        begin, num_targets = time.process_time(), 0
        for _ in range(num_rows // config.train.global_batch_size):
            for batch in stream.next_step().micro_batches:
                num_targets += int((batch.targets_BT != IGNORED_TARGET).sum())
        return num_targets / (time.process_time() - begin)


def measure(folder: Path, texts: Sequence[str], model: str, arguments: argparse.Namespace, kind: str) -> dict[str, Any]:
    """Index tars of documents, and read them; the best of a few times, in turns with sentencepiece."""
    write_tars(folder / "raw", texts, kind)
    config = config_of(folder, model, arguments.vocab_size, arguments.seq_len)
    begin = time.process_time()
    prepare(config, makes_index=True)
    index_seconds = time.process_time() - begin
    turns = [(time_bare(model, texts), time_rows(config)) for _ in range(arguments.repeats)]
    bare, rows = max(bare for bare, _ in turns), max(rows for _, rows in turns)
    manifest = Manifest.load(folder / "index")
    num_tokens = sum(shard.num_tokens for shard in manifest.train + manifest.val)
    return {
        "bare_tokens_per_second": bare,
        "rows_tokens_per_second": rows,
        "ratio": rows / bare,
        "index_tokens_per_second": num_tokens / index_seconds,
        "num_documents": sum(shard.num_documents for shard in manifest.train + manifest.val),
        "index_bytes": sum(path.stat().st_size for path in (folder / "index").glob("*.index.npy")),
        "text_bytes": sum(manifest.text_bytes.values()),
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(prog="tars", description=__doc__.splitlines()[0])
    parser.add_argument("--megabytes", type=float, default=40, help="text (%(default)s)")
    parser.add_argument("--seq-len", type=int, default=2048, help="tokens in a row (%(default)s)")
    parser.add_argument("--vocab-size", type=int, default=16384, help="of the tokenizer, trained on 10 MB first")
    parser.add_argument("--repeats", type=int, default=3, help="times of each, in turns (%(default)s)")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    record = Record("tars", arguments.out, {key: value for key, value in vars(arguments).items() if key != "out"})
    with tempfile.TemporaryDirectory(prefix="longhaul-tars-") as name:
        folder = Path(name)
        texts = list(python_texts(arguments.megabytes * 1e6))
        joined = "\n".join(texts)
        long = [joined[begin : begin + LONG_CHARACTERS] for begin in range(0, len(joined), LONG_CHARACTERS)]
        model = str(folder / "t.model")
        train_tokenizer(texts, TokenizerSection(model=model, vocab_size=arguments.vocab_size, sample_bytes=10**7), 1)
        for case, documents, kind in (("files", texts, "txt"), ("files", texts, "json"), ("long", long, "txt")):
            row = measure(folder / f"{case}-{kind}", documents, model, arguments, kind)
            record.add(documents=case, kind=kind, **row)
    print(render([record.content]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
