"""Saving and loading beside DeepSpeed's own checkpoints, torch's distributed ones and the bare disk, in turn.

All keep the same state of a config's model: fp32 masters and AdamW's two moments, 12 bytes a parameter. A save counts
until its bytes are on the disk: those that do not sync by themselves are synced afterwards. Before a load the files
leave the page cache, so that all read from the disk. `blocked` is what an asynchronous save takes of the step at most:
the copy, with no forward pass to hide it behind. `resume` is a rank's start with an existing checkpoint from the
engine's end to the last byte loaded: sha256, reading, filling.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

if sys.path[0] == str(Path(__file__).resolve().parent):  # run as a file
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
import torch.distributed.checkpoint as dcp

from benchmarks.record import ROOT, Record
from benchmarks.step import SHRINK
from pretrain.checkpoints.checkpoint import Checkpoints
from pretrain.checkpoints.checkpoint_folder import FolderPlace
from pretrain.options.batch_plan import BatchPlan
from pretrain.options.families import resolve_shape
from pretrain.options.settings import load_config
from pretrain.ranks.distributed import Ranks, leave_distributed
from pretrain.transformer.model import Transformer
from pretrain.zero.engine import Engine, init_distributed

EXAMPLES = """examples:
  python benchmarks/checkpoint.py configs/llama-350m.yaml --out bench-results/checkpoint.json
  python benchmarks/checkpoint.py configs/llama-350m.yaml --ranks 4 --stage 3 --rounds 2
  python benchmarks/checkpoint.py configs/llama-1.3b.yaml --only longhaul,disk --rounds 1 --precision bf16 --synchronous
  python benchmarks/checkpoint.py configs/gpt2-124m.yaml --shrink         (shows that it runs, not how fast)"""

Action = Callable[[], None]


class Subject:
    """One way to keep the state, in a folder of its own."""

    def __init__(self, name: str, save: Action, load: Action, folder: Path) -> None:
        """Take what saves to, and what loads from, a folder."""
        self.name, self.save, self.load, self.folder = name, save, load, folder


class Longhaul:
    """Our checkpoints of an engine."""

    def __init__(self, engine: Engine, ranks: Ranks, folder: Path, config: Any) -> None:
        """Keep them in a folder."""
        self.engine, self.folder, self.step = engine, folder, 0
        self.checkpoints = Checkpoints(
            FolderPlace(folder), config.checkpoint, ranks, lambda *_: None, folder.parent, "benchmark"
        )

    def start(self) -> None:
        """Begin to save, and wait for the copy."""
        self.step += 1
        self.checkpoints.start_save(self.engine, self.step, {}, {}, None)
        self.checkpoints.wait_for_copy()

    def save(self) -> None:
        """Save and wait for all of it."""
        self.start()
        self.checkpoints.finish_save()

    def load(self) -> None:
        """Verify and load the newest."""
        assert self.checkpoints.load_newest(self.engine) is not None


def tensors_of(engine: Engine) -> dict[str, torch.Tensor]:
    """What this rank owns, by parameter, state and place."""
    return {
        f"{one.name}/{state}/{one.start}": tensor.detach()
        for one in engine.fragments()
        for state, tensor in one.tensors.items()
    }


def sync_files(folder: Path, evict: bool = False) -> None:
    """Have the files of a folder on the disk, and by choice out of the page cache."""
    for path in folder.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            os.fsync(descriptor)
            if evict:
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


def subjects(engine: Engine, ranks: Ranks, folder: Path, config: Any, only: str) -> tuple[list[Subject], Longhaul]:
    """Make the ways to keep the engine's state."""
    ours = Longhaul(engine, ranks, folder / "longhaul", config)
    deepspeed, distributed, bare = (folder / name for name in ("deepspeed", "dcp", "disk"))
    held = tensors_of(engine)
    num_bytes = sum(tensor.nbytes for tensor in held.values())
    block = memoryview(bytearray(os.urandom(2**24)))

    def save_by_deepspeed() -> None:
        engine._engine.save_checkpoint(str(deepspeed), tag="one")
        ranks.barrier()
        if ranks.is_first:
            sync_files(deepspeed)
        ranks.barrier()

    def save_by_torch() -> None:
        if ranks.is_first:
            shutil.rmtree(distributed, ignore_errors=True)
        ranks.barrier()
        dcp.save(held, checkpoint_id=distributed)

    def write_bare() -> None:
        bare.mkdir(exist_ok=True)
        with open(bare / f"{ranks.rank}", "wb", buffering=0) as file:
            for done in range(0, num_bytes, len(block)):
                file.write(block[: num_bytes - done])
            os.fsync(file.fileno())
        ranks.barrier()

    def read_bare() -> None:
        with open(bare / f"{ranks.rank}", "rb", buffering=0) as file:
            while file.readinto(block):
                pass
        ranks.barrier()

    found = [
        Subject("longhaul", ours.save, ours.load, folder / "longhaul"),
        Subject("deepspeed", save_by_deepspeed, lambda: _loaded(engine._engine.load_checkpoint(str(deepspeed), "one")),
                deepspeed),
        Subject("torch dcp", save_by_torch, lambda: dcp.load(held, checkpoint_id=distributed), distributed),
        Subject("disk", write_bare, read_bare, bare),
    ]  # fmt: skip
    return [one for one in found if not only or one.name in only.split(",")], ours


def _loaded(outcome: tuple[Any, Any]) -> None:
    assert outcome[0] is not None, "DeepSpeed found nothing to load"


@contextmanager
def anonymous_memory() -> Iterator[list[int]]:
    """Watch how far this process's memory that is not of files grows; yields a list with the most so far."""
    growth, ended = [0], threading.Event()

    def resident() -> int:
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
        return 1024 * int(next(line for line in lines if line.startswith("RssAnon")).split()[1])

    def watch() -> None:
        while not ended.wait(0.005):
            growth[0] = max(growth[0], resident() - before)

    before = resident()
    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield growth
    finally:
        ended.set()
        watcher.join()


def timed(action: Action, ranks: Ranks) -> float:
    """Seconds of an action, until the last rank is through."""
    ranks.barrier()
    begin = time.perf_counter()
    action()
    ranks.barrier()
    return time.perf_counter() - begin


def work(arguments: argparse.Namespace) -> None:
    """Measure on one rank; rank 0 prints the rows as JSON."""
    ranks = init_distributed(1800)
    overrides = [
        f"train.precision={arguments.precision}", f"parallel.zero_stage={arguments.stage}", "train.micro_batch_size=1",
        f"train.global_batch_size={ranks.world_size}", "checkpoint.keep_last=2", "checkpoint.keep_best=false",
        f"checkpoint.asynchronous={str(not arguments.synchronous).lower()}",
        *(SHRINK if arguments.shrink else ()),
    ]  # fmt: skip
    config = load_config(arguments.config, overrides)
    shape = resolve_shape(config.model, config.tokenizer.vocab_size, config.data.max_seq_len)
    engine = Engine(Transformer(shape, config.run.seed), config, BatchPlan.of(config, ranks.world_size), ranks)
    num_owned = sum(tensor.nbytes for tensor in tensors_of(engine).values())
    total = int(ranks.sum([num_owned])[0])
    folder = Path(ranks.from_first(tempfile.mkdtemp(dir=arguments.folder) if ranks.is_first else ""))
    rows: list[dict[str, Any]] = []
    try:
        every, ours = subjects(engine, ranks, folder, config, arguments.only)
        seconds: dict[str, list[float]] = {}
        growth = 0
        for number in range(arguments.rounds):
            for one in every[number % len(every) :] + every[: number % len(every)]:  # none is always the first
                seconds.setdefault(f"{one.name} save", []).append(timed(one.save, ranks))
                if ranks.is_first:
                    sync_files(one.folder, evict=True)
                with anonymous_memory() as grown:
                    seconds.setdefault(f"{one.name} load", []).append(timed(one.load, ranks))
                if one.name == "longhaul":
                    growth = max(growth, grown[0])
            if arguments.synchronous:
                continue
            blocked = timed(ours.start, ranks)
            seconds.setdefault("longhaul blocked", []).append(blocked)
            rest = timed(lambda: _ignore(ours.checkpoints.finish_save()), ranks)
            seconds.setdefault("longhaul asynchronous", []).append(blocked + rest)
        for name, values in seconds.items():
            rows.append({"what": name, "seconds": statistics.median(values), "all_seconds": values,
                         "megabytes_per_second": total / statistics.median(values) / 1e6})  # fmt: skip
        share = max(ranks.gather(num_owned))
        rows.append({"what": "memory of loading", "bytes": max(ranks.gather(growth)), "share_bytes": share})
    finally:
        ranks.barrier()
        if ranks.is_first:
            shutil.rmtree(folder, ignore_errors=True)
    if ranks.is_first:
        print("ROWS " + json.dumps({"bytes": total, "rows": rows}), flush=True)
    leave_distributed()


def _ignore(_: object) -> None:
    pass


def main(argv: Sequence[str] | None = None) -> int:
    """Start the ranks and record what they measured."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", help="YAML file, for the model")
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--stage", type=int, default=1, help="ZeRO stage")
    parser.add_argument("--rounds", type=int, default=3, help="of all in turn")
    parser.add_argument("--only", default="", help="names with commas: longhaul, deepspeed, torch dcp, disk")
    parser.add_argument("--folder", help="on the disk to be measured (default: where temporary files go)")
    parser.add_argument("--precision", default="fp32", help="of the model: bf16 leaves more memory")
    parser.add_argument("--synchronous", action="store_true", help="save without a copy, and leave out `blocked`")
    parser.add_argument("--shrink", action="store_true", help="a tiny model")
    parser.add_argument("--out", type=Path, help="JSON file")
    arguments = parser.parse_args(argv)
    if "RANK" in os.environ:
        work(arguments)
        return 0
    named = {key: value for key, value in vars(arguments).items() if key not in ("out", "folder")}
    record = Record("checkpoint", arguments.out, named)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    processes = [
        subprocess.Popen(
            [sys.executable, __file__, *(sys.argv[1:] if argv is None else argv)], cwd=ROOT, text=True,
            stdout=subprocess.PIPE if rank == 0 else subprocess.DEVNULL,
            env=os.environ | {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(arguments.ranks),
                              "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"},
        )
        for rank in range(arguments.ranks)
    ]  # fmt: skip
    output, _ = processes[0].communicate()
    statuses = [process.wait(60) for process in processes]
    line = next((line for line in output.splitlines() if line.startswith("ROWS ")), None)
    if any(statuses) or line is None:
        record.fail("ranks", f"statuses {statuses}")
        print(f"checkpoint: the ranks ended with {statuses}", file=sys.stderr)
        return 1
    measured = json.loads(line.removeprefix("ROWS "))
    record.content["settings"]["bytes"] = measured["bytes"]
    for row in measured["rows"]:
        record.add(**row)
    from benchmarks.table import render

    print(render([record.content]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
