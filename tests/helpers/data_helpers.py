"""Small prepared corpora made on the fly, for tests of everything that reads shards."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from pretrain.data.data_plan import open_plan
from pretrain.data.row_table import build_row_tables
from pretrain.data.shards import MANIFEST_VERSION, Manifest, Shard, ShardWriter, load_index
from pretrain.options.batch_plan import BatchPlan
from pretrain.options.config import Config

TOKENIZER = "a" * 64
BOS, EOS, PAD = 1, 2, 3


def batch_plan(global_batch_size: int, world_size: int, micro_batch_size: int, seq_len: int) -> BatchPlan:
    """A step's sizes, without a config."""
    rows_per_rank = global_batch_size // world_size
    assert rows_per_rank * world_size == global_batch_size and rows_per_rank % micro_batch_size == 0
    return BatchPlan(
        global_batch_size=global_batch_size,
        micro_batch_size=micro_batch_size,
        num_micro_steps=rows_per_rank // micro_batch_size,
        rows_per_rank=rows_per_rank,
        seq_len=seq_len,
        tokens_per_step=global_batch_size * seq_len,
        num_steps=1,
        world_size=world_size,
    )


def random_documents(num_documents: int, seed: int, vocab_size: int = 1000, mean: float = 30.0) -> list[np.ndarray]:
    """Documents of log-normal length: bos, random ids, eos."""
    random = np.random.default_rng(seed)
    lengths = np.maximum(1, random.lognormal(np.log(mean), 1.0, num_documents)).astype(int)
    return [document(random.integers(4, vocab_size, n)) for n in lengths]


def document(ids: Sequence[int] | np.ndarray, dtype: str = "uint16") -> np.ndarray:
    """Puts bos before and eos after."""
    return np.concatenate([[BOS], ids, [EOS]]).astype(dtype)


def write_shards(
    folder: Path, split: str, documents: Sequence[np.ndarray], shard_bytes: int = 8192
) -> tuple[Shard, ...]:
    """Writes documents into shards of the documents' dtype."""
    writer = ShardWriter(folder, split, documents[0].dtype.name if documents else "uint16", shard_bytes)
    shards = [writer.add(document) for document in documents] + [writer.close()]
    return tuple(shard for shard in shards if shard is not None)


def make_corpus(
    folder: Path,
    train: Sequence[np.ndarray],
    val: Sequence[np.ndarray] = (),
    seq_lens: Sequence[int] = (32,),
    packings: Sequence[str] = ("best_fit",),
    shard_bytes: int = 8192,
    tokenizer: str = TOKENIZER,
    vocab_size: int = 1000,
) -> Manifest:
    """Writes a prepared corpus: shards, row tables, manifest."""
    manifest = Manifest(
        version=MANIFEST_VERSION,
        corpus=folder.name,
        dtype=train[0].dtype.name,
        tokenizer_fingerprint=tokenizer,
        vocab_size=vocab_size,
        train=write_shards(folder, "train", train, shard_bytes),
        val=write_shards(folder, "val", val, shard_bytes),
        text_bytes={"train": sum(map(len, train)), "val": sum(map(len, val))},
        counts={"documents": len(train) + len(val)},
        source_fingerprint="b" * 64,
    )
    for seq_len in seq_lens:
        for packing in packings:
            build_row_tables(folder, manifest, seq_len, packing)
    manifest.save(folder)
    return manifest


def make_config(sources: dict[Path, float], seq_len: int = 32, seed: int = 1, **data: Any) -> Config:
    """A config over prepared corpora; a corpus's name is its folder's."""
    return Config.model_validate(
        {
            "run": {"dir": "run", "seed": seed},
            "data": {
                "sources": [
                    {"name": folder.name, "shards": str(folder), "weight": weight} for folder, weight in sources.items()
                ],
                "seq_len": seq_len,
                **data,
            },
            "model": {"dim": 8, "num_layers": 1, "num_heads": 1},
            "tokenizer": {"model": "tokenizer.model", "vocab_size": 1000},
            "optim": {"lr": 1e-3},
            "train": {"num_steps": 1, "global_batch_size": 1, "micro_batch_size": 1},
        }
    )


def flip_bit(path: Path, offset: int) -> None:
    """Damages one bit of a file."""
    with open(path, "r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 1]))


@contextmanager
def file_size_limit(num_bytes: int) -> Iterator[None]:
    """Lets no file of this process grow beyond a size, so that writing fails as on a full disk."""
    import resource

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def damage_last_needed(config: Config, corpus: str, folder: Path) -> Path:
    """Flip a bit of the document of a corpus that a run of 20 steps is the last to need; return its tar in `folder`."""
    plan, corpora = open_plan(config, Manifest.load(folder).tokenizer_fingerprint)
    needed: dict[tuple[Shard, int], int] = {}  # the first step of each document
    for t in range(20 * config.train.global_batch_size):
        number, _, block, row = plan.locate(t)
        if plan.names[number] == corpus:
            for document, _, _ in corpora[number].rows[config.data.seq_len].row(block, row):
                needed.setdefault((corpora[number].shards[block], document), t // config.train.global_batch_size + 1)
    (shard, document), step = max(needed.items(), key=lambda item: item[1])
    assert step > 2
    path = folder / f"{shard.name}.tar"
    flip_bit(path, int(load_index(folder, shard)["offset"][document]) + 2)
    return path
