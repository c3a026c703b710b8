"""What each of `data.filters` costs: CPU seconds of `prepare` with it over those without; and `--verify` beside sha256.

    python benchmarks/filters.py --megabytes 30 --out bench-results/filters.json

The text is that of `benchmarks/prepare.py`, which is code: more of it is dropped than of prose, and what is dropped is
not tokenized. The share that is kept is given beside the ratio.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

if sys.path[0] == str(Path(__file__).resolve().parent):
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks.prepare import CONFIG, run_prepare, write_corpus
from benchmarks.record import Record
from benchmarks.table import render
from pretrain.data.shards import Manifest
from pretrain.options.config import TokenizerSection
from pretrain.preparing.verify_shards import check_shard
from pretrain.tokenizers.sentencepiece_tokenizer import train_tokenizer

FILTERS = {
    "none": [],
    "secrets": ["secrets=mask"],
    "personal data": ["personal_data=mask"],
    "alphanumerics": ["min_alphanumeric=0.01"],
    "repetition": ["repetition=true"],
    "languages": ["languages=[en, de, fr]"],
    "near-duplicates": ["near_duplicates=0.8"],
}


def best_cpu_seconds(function: Callable[[], object], repeats: int = 5) -> float:
    """The least CPU seconds of a few calls."""
    seconds = []
    for _ in range(repeats):
        begin = time.process_time()
        function()
        seconds.append(time.process_time() - begin)
    return min(seconds)


def sha256_of(path: Path) -> str:
    """Hash a file as `sha256sum` does."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(prog="filters", description=__doc__.splitlines()[0])
    parser.add_argument("--megabytes", type=float, default=30, help="text to prepare")
    parser.add_argument("--processes", type=int, default=1, help="of prepare")
    parser.add_argument("--filters", nargs="+", choices=FILTERS, default=list(FILTERS), help="beside none")
    parser.add_argument("--vocab-size", type=int, default=16384, help="of the tokenizer, trained on 10 MB first")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    arguments = parser.parse_args(argv)
    record = Record("filters", arguments.out, {key: value for key, value in vars(arguments).items() if key != "out"})
    with tempfile.TemporaryDirectory(prefix="longhaul-filters-") as name:
        folder = Path(name)
        texts = write_corpus(folder / "raw", arguments.megabytes)
        num_bytes = sum(len(text.encode()) for text in texts)
        model = str(folder / "t.model")
        train_tokenizer(texts, TokenizerSection(model=model, vocab_size=arguments.vocab_size, sample_bytes=10**7), 1)
        (folder / "config.yaml").write_text(CONFIG.format(folder=folder, vocab_size=arguments.vocab_size))
        plain_seconds = 0.0
        for what in dict.fromkeys(["none", *arguments.filters]):
            options = FILTERS[what]
            row = run_prepare(folder, arguments.processes, [f"data.filters.{option}" for option in options])
            manifest = Manifest.load(row["shards"])
            plain_seconds = plain_seconds or row["cpu_seconds"]
            record.add(
                filter=what,
                cpu_seconds=row["cpu_seconds"],
                ratio=row["cpu_seconds"] / plain_seconds,
                kept_bytes=sum(manifest.text_bytes.values()) / num_bytes,
            )
            if what == "none":
                shard, plain_folder = manifest.train[0], Path(row["shards"])
        path = plain_folder / f"{shard.name}.tar"
        checking = best_cpu_seconds(lambda: check_shard(plain_folder, manifest.dtype, manifest.vocab_size, shard))
        hashing = best_cpu_seconds(lambda: sha256_of(path))
        record.add(filter="--verify", cpu_seconds=checking, ratio=checking / hashing)
        verified = f"{shard.num_bytes / checking / 1e6:.0f} MB a CPU second; sha256 alone"
        print(f"--verify reads {verified} {shard.num_bytes / hashing / 1e6:.0f}", flush=True)
    print(render([record.content]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
