"""The row table: which documents' pieces lie in which row, packed once per `seq_len` and packing, memory-mapped.

`prepare` builds it, so that no training start waits for packing. A block is a shard; its rows hold
documents of that shard only.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from pretrain.data.packing import PACKING_VERSIONS, SEGMENT_DTYPE, count_segments, pack
from pretrain.data.shards import PREPARE_COMMAND, Manifest, file_sha256, load_index
from pretrain.errors import DataError
from pretrain.storage.whole_file import sync_folder, write_atomically

_SPLITS = ("train", "val")
IDENTITY_NAME = "identity.json"


def build_row_tables(folder: str | Path, manifest: Manifest, seq_len: int, packing: str = "best_fit") -> None:
    """Pack both splits into rows of `seq_len` and store the tables in `table_folder`.

    The folder appears complete or not at all. Nothing is done if it is there for this very manifest.

    Args:
        folder: Folder of the corpus, with its shards.
        manifest: The corpus's manifest; need not be saved yet.
        seq_len: Slots in a row.
        packing: How documents are packed.

    Raises:
        DataError: An index is damaged, or the tables cannot be written.
    """
    target = table_folder(folder, seq_len, packing)
    identity = _identity(manifest, seq_len, packing)
    found = read_identity(target)
    if found is not None and _difference(found, identity) == []:
        return
    temporary = target.with_name(f".{target.name}.tmp")
    try:
        for old in (temporary, target):
            if old.exists():
                shutil.rmtree(old)
        temporary.mkdir(parents=True)
        for split in _SPLITS:
            _build_split(Path(folder), temporary, manifest, split, seq_len, packing)
        identity["files"] = {
            path.name: {"bytes": path.stat().st_size, "sha256": file_sha256(path)}
            for split in _SPLITS
            for path in array_paths(temporary, split).values()
        }
        write_atomically(temporary / IDENTITY_NAME, (json.dumps(identity) + "\n").encode())
        os.replace(temporary, target)
        sync_folder(target.parent)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise DataError(
            f"{target} cannot be written: {error.strerror or error}. The shards are complete and kept. "
            f"Mend this (free some space) and run again: {PREPARE_COMMAND}"
        ) from error


def _build_split(folder: Path, target: Path, manifest: Manifest, split: str, seq_len: int, packing: str) -> None:
    """Pack each shard and write the split's three arrays; segments go to disk shard by shard."""
    shards = manifest.shards(split)
    num_segments = 0
    for shard in shards:
        num_segments += count_segments(_num_slots(load_index(folder, shard)), seq_len, packing)
    paths = array_paths(target, split)
    segments = np.lib.format.open_memmap(paths["segments"], "w+", SEGMENT_DTYPE, (num_segments,))
    offsets, blocks = [np.zeros(1, np.uint64)], np.zeros(len(shards) + 1, np.uint64)
    begin = 0
    for block, shard in enumerate(shards):
        block_segments, block_offsets = pack(_num_slots(load_index(folder, shard)), seq_len, packing)
        segments[begin : begin + len(block_segments)] = block_segments
        offsets.append(block_offsets[1:] + np.uint64(begin))
        begin += len(block_segments)
        blocks[block + 1] = blocks[block] + np.uint64(len(block_offsets) - 1)
    segments.flush()
    del segments
    np.save(paths["offsets"], np.concatenate(offsets))
    np.save(paths["blocks"], blocks)
    for path in paths.values():
        with open(path, "rb") as file:
            os.fsync(file.fileno())


def _num_slots(index: np.ndarray) -> np.ndarray:
    return np.maximum(index["num_tokens"].astype(np.int64) - 1, 0)


def table_folder(folder: str | Path, seq_len: int, packing: str = "best_fit") -> Path:
    """Where a corpus keeps the rows of `seq_len`: `rows-<seq_len>`, the packing behind it if it is not best-fit."""
    return Path(folder) / (f"rows-{seq_len}" if packing == "best_fit" else f"rows-{seq_len}-{packing}")


def stored_tables(folder: str | Path) -> list[tuple[int, str]]:
    """The length of rows and the packing of each table that a corpus has, the shortest rows first."""
    found = []
    for path in Path(folder).glob("rows-*"):
        seq_len, _, packing = path.name.removeprefix("rows-").partition("-")
        packing = packing or "best_fit"
        if seq_len.isdigit() and packing in PACKING_VERSIONS and path == table_folder(folder, int(seq_len), packing):
            found.append((int(seq_len), packing))
    return sorted(found)


def array_paths(target: Path, split: str) -> dict[str, Path]:
    """The three arrays of a split's table, by name."""
    return {name: target / f"{split}.{name}.npy" for name in ("segments", "offsets", "blocks")}


def _identity(manifest: Manifest, seq_len: int, packing: str) -> dict[str, Any]:
    return {"packing": PACKING_VERSIONS[packing], "seq_len": seq_len, "manifest": manifest.fingerprint()}


def _difference(found: dict[str, Any], expected: dict[str, Any]) -> list[str]:
    """What a table is of that it should not be; its `files` follow from the rest."""
    return [key for key in expected if found.get(key) != expected[key]]


def read_identity(target: Path) -> dict[str, Any] | None:
    """What a table's folder says that it is, or None if it does not."""
    try:
        identity = json.loads((target / IDENTITY_NAME).read_bytes())
    except (OSError, ValueError):
        return None
    return identity if isinstance(identity, dict) else None


def listed_file(identity: dict[str, Any], name: str) -> tuple[int | None, str | None]:
    """Size and sha256 of an array as its table lists them; tables that were made before these were listed have none."""
    try:
        one = identity.get("files", {}).get(name, {})
        return one.get("bytes"), one.get("sha256")
    except AttributeError:
        return None, None


class RowTable:
    """The rows of one split, read from disk when they are asked for."""

    def __init__(self, path: Path, segments: np.ndarray, offsets: np.ndarray, blocks: np.ndarray) -> None:
        """Take the three arrays of a split; use `open`."""
        self.path, self._segments, self._offsets, self._blocks = path, segments, offsets, blocks
        self._first_rows: list[int] = blocks.tolist()
        self._numbers = segments.view("<u4").reshape(-1, 3)  # quicker to read than records

    @classmethod
    def open(
        cls, folder: str | Path, manifest: Manifest, split: str, seq_len: int, packing: str = "best_fit"
    ) -> RowTable:
        """Map the table of a split.

        Raises:
            DataError: There is no table for this `seq_len` and packing, it is of other shards, or it is damaged.
        """
        target = table_folder(folder, seq_len, packing)
        paths = array_paths(target, split)
        identity, expected = read_identity(target), _identity(manifest, seq_len, packing)
        if identity is None:
            raise DataError(
                f"{target} is missing; expected the rows of {manifest.corpus} for data.seq_len {seq_len}"
                f"{'' if packing == 'best_fit' else f' and data.packing {packing}'}. Run: {PREPARE_COMMAND}"
            )
        if changed := _difference(identity, expected):
            raise DataError(
                f"{target}: its {', '.join(changed)} differs; expected rows of the shards that the manifest lists. "
                f"Run: {PREPARE_COMMAND}"
            )
        try:
            for path in paths.values():
                listed, size = listed_file(identity, path.name)[0], path.stat().st_size
                if listed not in (None, size):
                    raise ValueError(f"{path.name} has {size} bytes; expected {listed}")
            segments, offsets = (  # plain views of the maps: quicker to index
                np.asarray(np.load(paths[name], mmap_mode="r", allow_pickle=False)) for name in ("segments", "offsets")
            )
            blocks = np.load(paths["blocks"], allow_pickle=False).astype(np.int64)
        except (OSError, ValueError, EOFError) as error:
            raise _damaged(target, str(error)) from error
        if len(blocks) != len(manifest.shards(split)) + 1 or blocks[-1] + 1 != len(offsets):
            raise _damaged(target, "its arrays do not fit each other")
        return cls(target, segments, offsets, blocks)

    @property
    def num_rows(self) -> int:
        """Rows of the split."""
        return int(self._blocks[-1])

    @property
    def rows_per_block(self) -> np.ndarray:
        """Rows of each block, int64 [num_blocks]; a block is a shard."""
        return np.diff(self._blocks)

    def slots_per_block(self) -> np.ndarray:
        """Filled slots of each block's rows, int64 [num_blocks].

        Raises:
            DataError: the offsets do not fit the segments.
        """
        bounds = self._offsets[self._blocks].astype(np.int64)
        if bounds[0] != 0 or bounds[-1] != len(self._segments) or (np.diff(bounds) < 0).any():
            raise _damaged(self.path, "its rows and segments do not fit each other")
        parts = [self._segments["length"][begin:end] for begin, end in zip(bounds[:-1], bounds[1:], strict=True)]
        return np.array([part.sum(dtype=np.int64) for part in parts], dtype=np.int64)

    def locate(self, row: int) -> tuple[int, int]:
        """Return the block of the split's row number `row`, and its number there."""
        block = int(self._blocks.searchsorted(row, side="right")) - 1
        return block, row - int(self._blocks[block])

    def row(self, block: int, i: int) -> list[list[int]]:
        """Return [document, start, length] of each segment of row `i` of a block; documents count within the block."""
        place = self._first_rows[block] + i
        begin, end = self._offsets[place : place + 2].tolist()
        if not begin <= end <= len(self._segments):
            raise _damaged(self.path, f"row {i} of block {block} has segments {begin} to {end}")
        return self._numbers[begin:end].tolist()


def damaged_tables(folder: Path, manifest: Manifest) -> Iterator[tuple[str, str]]:
    """Find what is wrong with a corpus's row tables: each must be as it was written, and hold every slot once.

    Returns:
        Names of files or tables in the folder, each with what is wrong with it.
    """
    for seq_len, packing in stored_tables(folder):
        target = table_folder(folder, seq_len, packing)
        try:
            tables = {split: RowTable.open(folder, manifest, split, seq_len, packing) for split in _SPLITS}
            if damaged := list(_other_hashes(target)):
                yield from damaged
                continue
            slots = {split: table.slots_per_block() for split, table in tables.items()}
        except DataError as error:
            yield target.name, str(error)
            continue
        for split, num_slots in slots.items():
            for shard, one in zip(manifest.shards(split), num_slots.tolist(), strict=True):
                if one != shard.num_tokens - shard.num_documents:
                    text = f"its rows of {shard.name} hold {one:,} tokens to ask for, and the shard "
                    yield target.name, f"{text}{shard.num_tokens - shard.num_documents:,}"


def _other_hashes(target: Path) -> Iterator[tuple[str, str]]:
    """Compare the arrays of a row table with the sha256 that were written with them, if they were."""
    identity = read_identity(target) or {}
    for path in (path for split in _SPLITS for path in array_paths(target, split).values()):
        sha256 = listed_file(identity, path.name)[1]
        if sha256 is not None and file_sha256(path) != sha256:
            yield f"{target.name}/{path.name}", "its sha256 is not that in identity.json"


def _damaged(path: Path, reason: str) -> DataError:
    return DataError(f"{path} is damaged: {reason}. Delete this folder and run: {PREPARE_COMMAND}")
