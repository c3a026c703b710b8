"""The journal of a corpus folder: what goes on, what is deleted, what is refused."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import numpy as np
import pytest

from pretrain.data.shards import JOURNAL_NAME, Shard, ShardWriter
from pretrain.errors import ConfigError, DataError
from pretrain.preparing import journal as journal_module
from pretrain.preparing.journal import Journal, file_lock, read_recipe

RECIPE = {"data.val_fraction": 0.1, "the tokenizer": "abc"}


def write_shard(folder: Path, split: str, number: int) -> Shard:
    writer = ShardWriter(folder, split, "uint16", 1 << 20, number)
    assert writer.add(np.arange(100, dtype=np.uint16)) is None
    shard = writer.close()
    assert shard is not None
    return shard


def fill(folder: Path) -> list[Shard]:
    """A journal with two training shards and one held-out one."""
    journal = Journal(folder, RECIPE)
    shards = [write_shard(folder, "train", 0), write_shard(folder, "val", 0), write_shard(folder, "train", 1)]
    for shard in shards:
        journal.add(shard.name.partition("-")[0], shard, "documents")
    return shards


def test_a_journal_is_read_again(tmp_path: Path) -> None:
    train_0, val_0, train_1 = fill(tmp_path)
    journal = Journal(tmp_path, RECIPE)
    assert journal.shards == {"train": [train_0, train_1], "val": [val_0]}
    assert journal.documents == "documents"
    assert read_recipe(tmp_path) == RECIPE and read_recipe(tmp_path / "elsewhere") is None


def test_a_line_that_was_cut_short_is_dropped_with_its_shard(tmp_path: Path) -> None:
    train_0, val_0, _ = fill(tmp_path)
    content = (tmp_path / JOURNAL_NAME).read_bytes()
    (tmp_path / JOURNAL_NAME).write_bytes(content[:-1])
    journal = Journal(tmp_path, RECIPE)
    assert journal.shards == {"train": [train_0], "val": [val_0]}
    assert journal.documents == "documents"
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        JOURNAL_NAME, "train-000000.index.npy", "train-000000.tar", "val-000000.index.npy", "val-000000.tar",
    ]  # fmt: skip
    journal.add("train", write_shard(tmp_path, "train", 1), "documents")
    assert (tmp_path / JOURNAL_NAME).read_bytes() == content


@pytest.mark.parametrize("damage", ["missing tar", "short tar", "missing index"])
def test_shards_after_one_that_is_not_whole_are_made_again(tmp_path: Path, damage: str) -> None:
    _, val_0, _ = fill(tmp_path)
    if damage == "missing tar":
        (tmp_path / "train-000000.tar").unlink()
    elif damage == "short tar":
        os.truncate(tmp_path / "train-000000.tar", 512)
    else:
        (tmp_path / "train-000000.index.npy").unlink()
    assert Journal(tmp_path, RECIPE).shards == {"train": [], "val": [val_0]}
    assert [path.name for path in tmp_path.glob("*.tar")] == ["val-000000.tar"]


def test_leftovers_are_deleted_and_other_files_are_not(tmp_path: Path) -> None:
    fill(tmp_path)
    leftovers = [".train-000002.tar.tmp", ".train-000002.index.npy.tmp", "train-000002.index.npy", "train-000002.tar",
                 ".manifest.json.tmp", ".prepare.jsonl.tmp"]  # fmt: skip
    for name in leftovers:
        (tmp_path / name).write_text("x")
    for name in (".rows-64.tmp", ".rows-64-concat.tmp"):
        (tmp_path / name).mkdir()
    (tmp_path / "notes.txt").write_text("x")
    (tmp_path / "rows-64").mkdir()
    Journal(tmp_path, RECIPE)
    names = {path.name for path in tmp_path.iterdir()}
    assert not names & {*leftovers, ".rows-64.tmp", ".rows-64-concat.tmp"}
    assert {"notes.txt", "rows-64", "train-000001.tar"} <= names


def test_a_first_shard_without_its_line_is_made_again(tmp_path: Path) -> None:
    Journal(tmp_path, RECIPE)
    write_shard(tmp_path, "train", 0)
    assert Journal(tmp_path, RECIPE).shards == {"train": [], "val": []}
    assert [path.name for path in tmp_path.iterdir()] == [JOURNAL_NAME]


def test_another_recipe_is_refused_once_there_are_shards(tmp_path: Path) -> None:
    Journal(tmp_path, RECIPE)
    Journal(tmp_path, RECIPE | {"data.val_fraction": 0.2})  # nothing was made yet
    fill(tmp_path)
    with pytest.raises(ConfigError, match=r"prepared otherwise; changed since then: data.val_fraction from 0.1 to 0.3. Set "
                       "another `shards` folder for this source, or delete this folder"):  # fmt: skip
        Journal(tmp_path, RECIPE | {"data.val_fraction": 0.3})
    assert len(list(tmp_path.glob("*.tar"))) == 3


def test_shards_of_unknown_origin_are_refused(tmp_path: Path) -> None:
    write_shard(tmp_path, "train", 0)
    with pytest.raises(
        ConfigError, match="holds shards such as train-000000.tar, but neither manifest.json nor prepare"
    ):
        Journal(tmp_path, RECIPE)
    assert (tmp_path / "train-000000.tar").exists()


def test_an_unreadable_journal_is_an_error(tmp_path: Path) -> None:
    (tmp_path / JOURNAL_NAME).mkdir()
    with pytest.raises(DataError, match=r"prepare.jsonl is not readable \(Is a directory\)"):
        Journal(tmp_path, RECIPE)


def test_a_lock_names_its_holder_and_leaves_no_file(tmp_path: Path) -> None:
    path = tmp_path / "new" / ".lock"
    with file_lock(path, "data/web"):
        with pytest.raises(
            ConfigError, match=rf"data/web is being written by process {os.getpid()} on .+; expected one"
        ):
            with file_lock(path, "data/web"):
                pass
        assert path.exists()
    assert not path.exists()
    path.write_text("process 1 on a machine that is gone")  # what a killed run leaves does not lock
    with file_lock(path, "data/web"):
        pass


def test_a_file_system_without_locks_is_used_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(file: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(journal_module.fcntl, "flock", refuse)
    entered = False
    with file_lock(tmp_path / ".lock", "data/web"):
        entered = True
    assert entered


def test_errors_inside_a_lock_are_not_mistaken_for_the_locks_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(OSError, match="inside"), file_lock(tmp_path / ".lock", "data/web"):
        raise OSError(errno.ENOLCK, "inside")
    assert not (tmp_path / ".lock").exists()
