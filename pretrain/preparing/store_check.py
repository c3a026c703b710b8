"""`launch/prepare.py --inspect` and `--verify` of shards in a store, without a copy of them on this machine's disk."""

from __future__ import annotations

import hashlib
import json
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from pretrain.console import LiveLine, counted, format_bytes
from pretrain.data.shards import MANIFEST_NAME, Manifest, Shard, index_path
from pretrain.options.config import Config
from pretrain.preparing.inspect_shards import inspect
from pretrain.preparing.verify_shards import Problem, manifest_problems, size_text
from pretrain.storage.store_errors import LostFileError
from pretrain.storage.stores import Store, shown

_RETRY_SECONDS = 60.0
_NUM_THREADS = 8  # that wait for the store; sha256 and the network let go of the interpreter


def inspect_store(url: str, config: Config | None = None, tokenizer: str | None = None) -> dict[str, Any]:
    """Look into a corpus that lies in a store; only its manifest and indexes are downloaded, and not kept.

    Args:
        url: as in `data.sources[].shards`.
        config: names the tokenizer.
        tokenizer: a tokenizer's file or folder, instead.

    Returns:
        As `inspect` of a folder, without rows and samples, for which tables and shards would have to be downloaded.

    Raises:
        DataError: the store cannot be read, or an index is damaged.
        ConfigError: the tokenizer that is named is not the corpus's.
    """
    store = Store(url, _RETRY_SECONDS, option="")
    with tempfile.TemporaryDirectory() as temporary:
        folder, manifest = Path(temporary), _manifest_of(store, Path(temporary))
        names = [index_path(folder, shard.name).name for shard in manifest.train + manifest.val]
        with ThreadPoolExecutor(_NUM_THREADS) as threads:
            for name, content in zip(names, threads.map(store.read, names), strict=True):
                (folder / name).write_bytes(content)
        return inspect(folder, config, tokenizer, num_samples=0) | {"folder": shown(url)}


def verify_store(url: str, num_threads: int = 0) -> dict[str, Any]:
    """Read every shard and index of a corpus from its store and compare size and sha256; nothing is written.

    Args:
        url: as in `data.sources[].shards`.
        num_threads: files that are read at a time; 0: 8.

    Returns:
        As `verify_shards.verify`.

    Raises:
        DataError: the store cannot be read.
    """
    store, line = Store(url, _RETRY_SECONDS, option=""), LiveLine()
    with tempfile.TemporaryDirectory() as temporary:
        manifest = _manifest_of(store, Path(temporary))
    shards = manifest.train + manifest.val
    num_threads = min(num_threads or _NUM_THREADS, max(len(shards), 1))
    begin, num_bytes, problems = time.monotonic(), 0, manifest_problems(manifest)
    try:
        with ThreadPoolExecutor(num_threads) as threads:
            for number, (read, found) in enumerate(threads.map(partial(_check_shard, store), shards), 1):
                num_bytes, problems = num_bytes + read, problems + found
                speed = num_bytes / max(time.monotonic() - begin, 1e-9)
                of = counted(len(shards), "shard")
                text = f"{number:,} of {of}, {format_bytes(speed)}/s, problems: {len(problems):,}"
                line.show(text, plain=number % max(len(shards) // 20, 1) == 0)
    finally:
        line.end()
    return {
        "folder": shown(url),
        "corpus": manifest.corpus,
        "num_shards": len(shards),
        "num_documents": sum(shard.num_documents for shard in shards),
        "num_bytes": num_bytes,
        "seconds": time.monotonic() - begin,
        "num_processes": num_threads,
        "problems": [asdict(problem) for problem in problems],
    }


def _manifest_of(store: Store, folder: Path) -> Manifest:
    (folder / MANIFEST_NAME).write_bytes(store.read(MANIFEST_NAME, check=json.loads))
    return Manifest.load(folder)


def _check_shard(store: Store, shard: Shard) -> tuple[int, list[Problem]]:
    """Bytes that were read, and what is wrong with a tar and its index."""
    total, problems = 0, []
    index = index_path(Path(), shard.name).name
    for name, num_bytes, expected in (
        (f"{shard.name}.tar", shard.num_bytes, shard.sha256),
        (index, None, shard.index_sha256),
    ):
        try:
            size, sha256 = store.fetch(name, _hash)
        except LostFileError:
            problems.append(Problem(name, "it is missing"))
            continue
        total += size
        if num_bytes not in (None, size):
            problems.append(Problem(name, size_text(size, shard)))
        elif sha256 != expected:
            problems.append(Problem(name, "its sha256 is not the manifest's"))
    return total, problems


def _hash(chunks: Iterator[bytes]) -> tuple[int, str]:
    digest, size = hashlib.sha256(), 0
    for chunk in chunks:
        size += len(chunk)
        digest.update(chunk)
    return size, digest.hexdigest()
