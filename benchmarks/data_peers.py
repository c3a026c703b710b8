"""Other readers of rows of token ids, for `data.py`: each writes the same documents in its own format and reads them.

`python benchmarks/data_peers.py JOB.json` runs one of them in a process of its own and prints JSON: MosaicML's library
wants other versions of numpy and transformers than this project, so it has to live in an environment of its own, which
needs neither this project nor its other packages. A document here has one token more than a row, so that each is a row.
"""

from __future__ import annotations

import itertools
import json
import resource
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

Batches = Iterator[tuple[torch.Tensor, torch.Tensor]]  # tokens and targets, int64 [batch_size, row_tokens]


def write_memmap(folder: Path, documents: np.ndarray) -> None:
    """Write one flat file of uint16."""
    documents.tofile(folder / "flat.bin")


def nanogpt_batches(folder: Path, row_tokens: int, batch_size: int) -> Batches:
    """Yield batches as nanoGPT's `get_batch` does: the map is opened anew for each, since one that stays open leaks."""
    while True:
        data = np.memmap(folder / "flat.bin", dtype=np.uint16, mode="r")
        starts = torch.randint(len(data) - row_tokens, (batch_size,))
        tokens = torch.stack([torch.from_numpy(data[i : i + row_tokens].astype(np.int64)) for i in starts])
        targets = torch.stack([torch.from_numpy(data[i + 1 : i + 1 + row_tokens].astype(np.int64)) for i in starts])
        yield tokens, targets


def memmap_batches(folder: Path, row_tokens: int, batch_size: int) -> Batches:
    """Yield batches from one open map, in the fewest operations: no order to keep, no checksum, no documents."""
    data = np.memmap(folder / "flat.bin", dtype=np.uint16, mode="r")
    random = np.random.default_rng(1)
    shape = (batch_size, row_tokens)
    while True:
        tokens, targets = np.empty(shape, np.int64), np.empty(shape, np.int64)
        for row, start in enumerate(random.integers(0, len(data) - row_tokens, batch_size).tolist()):
            tokens[row] = data[start : start + row_tokens]
            targets[row] = data[start + 1 : start + 1 + row_tokens]
        yield torch.from_numpy(tokens), torch.from_numpy(targets)


def write_webdataset(folder: Path, documents: np.ndarray) -> None:
    """Write tar files of 32 MB, a document a member."""
    import webdataset

    with webdataset.ShardWriter(str(folder / "%06d.tar"), maxsize=32 * 2**20, verbose=0, mtime=0) as writer:
        for number, document in enumerate(documents):
            writer.write({"__key__": f"{number:09d}", "bin": document.tobytes()})


def webdataset_batches(folder: Path, row_tokens: int, batch_size: int) -> Batches:
    """Yield batches of `webdataset.WebDataset`, shuffled in a buffer of 1,000 samples."""
    import webdataset

    shards = sorted(str(path) for path in folder.glob("*.tar"))
    samples = iter(webdataset.WebDataset(shards, shardshuffle=len(shards), seed=1).repeat().shuffle(1000))
    while True:
        batch = [np.frombuffer(sample["bin"], np.uint16) for sample in itertools.islice(samples, batch_size)]
        yield _stack(batch)


def write_mosaic(folder: Path, documents: np.ndarray) -> None:
    """Write MosaicML's shards of 32 MB, a document a sample."""
    from streaming import MDSWriter

    with MDSWriter(out=str(folder), columns={"ids": "bytes"}, size_limit=32 * 2**20) as writer:
        for document in documents:
            writer.write({"ids": document.tobytes()})


def mosaic_batches(folder: Path, row_tokens: int, batch_size: int) -> Batches:
    """Yield batches of MosaicML's `StreamingDataset`, shuffled by its default."""
    from streaming import StreamingDataset

    dataset = StreamingDataset(local=str(folder), shuffle=True, batch_size=batch_size)
    while True:
        samples = iter(dataset)
        while batch := [np.frombuffer(s["ids"], np.uint16) for s in itertools.islice(samples, batch_size)]:
            yield _stack(batch)


def _stack(batch: list[np.ndarray]) -> tuple[torch.Tensor, torch.Tensor]:
    rows = torch.from_numpy(np.stack(batch).astype(np.int64))
    return rows[:, :-1], rows[:, 1:]


WRITERS: dict[str, Callable[[Path, np.ndarray], None]] = {
    "nanoGPT's get_batch": write_memmap,
    "one open memmap": write_memmap,
    "wds.WebDataset": write_webdataset,
    "MosaicML streaming": write_mosaic,
}
READERS: dict[str, Callable[[Path, int, int], Batches]] = {
    "nanoGPT's get_batch": nanogpt_batches,
    "one open memmap": memmap_batches,
    "wds.WebDataset": webdataset_batches,
    "MosaicML streaming": mosaic_batches,
}


def rate(batches: Batches, seconds: float) -> float:
    """Tokens per second of CPU time of this process, all threads, from the 21st batch on."""
    for _ in range(20):
        next(batches)
    num_tokens, begin, end = 0, time.process_time(), time.monotonic() + seconds
    while time.monotonic() < end or num_tokens == 0:
        num_tokens += next(batches)[0].numel()
    return num_tokens / (time.process_time() - begin)


def mosaic_plan(num_shards: int, rows_per_shard: int, first_row: int) -> dict[str, float]:
    """Seconds and bytes of what MosaicML's rank 0 computes at every start: the order of the whole epoch."""
    from streaming.base.partition import get_partitions
    from streaming.base.shuffle import get_shuffle

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    begin = time.monotonic()
    sizes = np.full(num_shards, rows_per_shard, np.int64)
    ids = get_partitions("relaxed", int(sizes.sum()), 64, 1, 8, 1, 8, first_row, 1)
    shuffle = get_shuffle("py1e", sizes, 64, 1, 0)
    ids = np.where(ids != -1, shuffle[ids], -1)
    seconds = time.monotonic() - begin
    assert ids.size
    return {"seconds": seconds, "bytes": 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)}


def run_job(job: dict[str, Any]) -> dict[str, Any]:
    """Do one job: `write`, `rate` or `mosaic_plan`, with its arguments."""
    torch.set_num_threads(1)
    folder = Path(job.get("folder", "."))
    if job["job"] == "write":
        documents = np.load(job["documents"], mmap_mode="r")
        WRITERS[job["reader"]](folder, documents)
        return {}
    if job["job"] == "rate":
        batches = READERS[job["reader"]](folder, job["row_tokens"], job["batch_size"])
        return {"tokens_per_second": rate(batches, job["seconds"])}
    return mosaic_plan(job["num_shards"], job["rows_per_shard"], job["first_row"])


if __name__ == "__main__":
    print(json.dumps(run_job(json.loads(Path(sys.argv[1]).read_text()))))
