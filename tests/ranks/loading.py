"""What a rank loads, and what it trains on: noted in the run folder, for the test of other topologies."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pretrain.checkpoints.checkpoint import Checkpoints
from pretrain.checkpoints.checkpoint_folder import FolderPlace
from pretrain.storage.tensor_files import TensorFile
from pretrain.training.run import Run
from pretrain.zero.replicas import check_replicas


def watched(open_run: Callable[..., Run]) -> Callable[..., Run]:
    """An `open_run` after which `loads.jsonl` and `batches.jsonl` say what was loaded, and what each step was of.

    What was loaded is saved again at once, in `reloaded-<ranks>/`, before any update.
    """

    def open_and_note(*arguments: Any) -> Run:
        read, num_elements = TensorFile.read, 0

        def counted(self: TensorFile, key: str, start: int, stop: int) -> Any:
            nonlocal num_elements
            num_elements += stop - start
            return read(self, key, start, stop)

        TensorFile.read = counted  # type: ignore[method-assign]
        try:
            run = open_run(*arguments)
        finally:
            TensorFile.read = read  # type: ignore[method-assign]
        if run.progress.step:
            note_load(run, num_elements)
        note_batches(run)
        return run

    return open_and_note


def note_load(run: Run, num_elements: int) -> None:
    """Save what is loaded, and note how much each rank has read."""
    check_replicas(run.engine, run.ranks, run.progress.step, every=1)
    path = Path(run.config.run.dir)
    place = FolderPlace(path / f"reloaded-{run.ranks.world_size}")
    again = Checkpoints(place, run.config.checkpoint, run.ranks, print, path, "reloaded")
    again.start_save(run.engine, run.progress.step, {}, {}, None)
    again.finish_save()
    append(run, "loads.jsonl", [run.progress.step, run.engine.stage, run.ranks.gather(num_elements)])


def note_batches(run: Run) -> None:
    """Have every step note the hash of all ranks' rows, in their order; of shared ones, put together again."""
    take = run.feed.take

    def noted() -> Any:
        rows = take()
        own = [
            (int(row_id), *(part[place].numpy().tobytes() for part in parts))
            for *parts, row_ids in rows.micro_batches for place, row_id in enumerate(row_ids)
        ]  # fmt: skip
        size, hashes = run.group.size, []
        gathered = run.ranks.gather(own)
        for first in range(0, len(gathered), size):
            for shares in zip(*gathered[first : first + size], strict=True):
                row_ids, tokens, targets, doc_starts = zip(*shares, strict=True)
                assert len(set(row_ids)) == len(set(doc_starts)) == 1
                row = b"".join([*tokens, *targets, doc_starts[0]])
                hashes.append((row_ids[0], hashlib.sha256(row).hexdigest()))
        append(run, "batches.jsonl", [run.progress.step + 1, sorted(hashes)])
        return rows

    run.feed.take = noted  # type: ignore[method-assign]


def append(run: Run, name: str, value: Any) -> None:
    """Add a line to a file of the run folder, once."""
    if run.ranks.is_first:
        with open(Path(run.config.run.dir) / name, "a", encoding="utf-8") as file:
            file.write(json.dumps(value) + "\n")
