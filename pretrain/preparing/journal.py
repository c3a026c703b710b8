"""What `prepare` has done in a corpus folder: one line a complete shard, so that an interrupted run goes on.

The first line is the recipe, everything that the shards' bytes depend on. A shard that is not in the journal is not
part of the corpus, and is deleted when a run goes on.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

from pretrain.data.shards import JOURNAL_NAME, PREPARE_COMMAND, Shard, index_path
from pretrain.data.text_index import INDEX_KEY
from pretrain.errors import ConfigError, DataError
from pretrain.storage.whole_file import write_atomically

LOCK_NAME = ".prepare.lock"
SPLITS = ("train", "val")
Recipe = dict[str, str | int | float | None]
ORDER_KEY, ORDER, FORMER_ORDER = "the order of documents", "that of their hashes", "that of the files"

_SHARD_FILE = re.compile(r"\.?((?:train|val)-\d{6,})\.(?:tar|index\.npy)(\.tmp)?")
_LEFT_OVER = re.compile(r"\.(?:manifest\.json|prepare\.jsonl|rows-\d+(?:-[a-z_]+)?)\.tmp")
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP)


@contextmanager
def file_lock(path: Path, subject: str) -> Iterator[None]:
    """Hold a lock file, so that two runs do not write the same thing; it is deleted at the end.

    Where the file system has no locks, nothing is locked.

    Args:
        path: the lock file; its folder is made if missing.
        subject: what is being written, for the message.

    Raises:
        ConfigError: another process holds it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    while True:
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = os.read(file, 200).decode(errors="replace").strip() or "another process"
            os.close(file)
            if error.errno in _NO_LOCKS:
                path.unlink()
                yield
                return
            raise ConfigError(
                f"{subject} is being written by {holder}; expected one `prepare` at a time. Wait for it, or stop it "
                "and run again: it goes on where it stopped."
            ) from None
        if _is_same_file(file, path):
            break
        os.close(file)  # its holder deleted it between our opening and locking it
    try:
        os.ftruncate(file, 0)
        os.write(file, f"process {os.getpid()} on {socket.gethostname()}".encode())
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(file)


def _is_same_file(file: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file), os.stat(path))
    except FileNotFoundError:
        return False


def read_recipe(folder: Path) -> Recipe | None:
    """The recipe of a corpus folder, or None if it has no journal."""
    entries = read_lines(folder / JOURNAL_NAME)
    return entries[0]["recipe"] if entries else None


def check_recipe(folder: Path, recipe: Recipe, old: Recipe, holds_tars: bool = False) -> None:
    """Check that a folder's shards are made of the same things.

    Args:
        folder: of the corpus.
        recipe: what they would be made of now.
        old: what they are made of.
        holds_tars: there may be tars of others in it, so that it is not to be deleted.

    Raises:
        ConfigError: something differs; names it and the ways on.
    """
    if (old.get(INDEX_KEY) is None) != (recipe.get(INDEX_KEY) is None):
        raise wrong_kind(folder, holds_index=recipe.get(INDEX_KEY) is None)
    old = Recipe({ORDER_KEY: FORMER_ORDER}) | old
    changes = [
        f"{key} from {_short(old.get(key))} to {_short(recipe[key])}" for key in recipe if old.get(key) != recipe[key]
    ]
    if changes:
        otherwise = "" if holds_tars else ", or delete this folder to prepare it again"
        raise ConfigError(
            f"{folder} holds shards that were prepared otherwise; changed since then: {'; '.join(changes)}. Set "
            f"another `shards` folder for this source{otherwise}."
        )


def _short(value: object) -> str:
    return re.sub(r"\b([0-9a-f]{12})[0-9a-f]{52}\b", r"\1…", str(value))  # a sha256 is told by its beginning


def wrong_kind(folder: Path, holds_index: bool) -> ConfigError:
    """The error for an index of tars where shards of ids are to be written, or the other way round."""
    if holds_index:
        return ConfigError(
            f"{folder} holds an index of tars that is not complete; expected --index to go on with it. Run: "
            f"{PREPARE_COMMAND} --index, or set another `shards` folder for this source."
        )
    return ConfigError(
        f"{folder} holds shards of ids and not an index of tars; expected another folder for --index. Set another "
        "`shards` folder for this source, or run without --index."
    )


class Journal:
    """The journal of one folder, opened for writing; the folder's lock must be held.

    Opening it deletes what an interrupted run left half-written.

    Args:
        folder: the corpus folder.
        recipe: what the shards are made of.

    Attributes:
        shards: the complete shards by split, in order.
        documents: identifies the documents that they were made of, all of the source; empty if there are none.

    Raises:
        ConfigError: the folder was begun with another recipe, or holds shards without a journal.
    """

    def __init__(self, folder: Path, recipe: Recipe) -> None:
        self._folder = folder
        self._path = folder / JOURNAL_NAME
        self.shards: dict[str, list[Shard]] = {split: [] for split in SPLITS}
        self.documents = ""
        lines = [{"recipe": recipe}]
        old = read_lines(self._path)
        if len(old) > 1:
            check_recipe(folder, recipe, old[0]["recipe"])
            lines += self._restore(old[1:])
        elif not old:
            self._refuse_unknown_shards()
        write_lines(self._path, lines)
        self._remove_leftovers()

    def add(self, split: str, shard: Shard, documents: str) -> None:
        """Note a shard that is complete on disk."""
        append_line(self._path, _line(split, shard, documents))
        self.shards[split].append(shard)
        self.documents = documents

    def _restore(self, old: list[dict]) -> list[dict]:
        """Take over the shards whose files are there, of each split up to the first that is not."""
        lines, broken = [], set()
        for entry in old:
            split, shard, documents = entry["split"], Shard(**entry["shard"]), entry["documents"]
            if split in broken or not _is_whole(self._folder, shard):
                broken.add(split)
                continue
            self.shards[split].append(shard)
            self.documents = documents
            lines.append(_line(split, shard, documents))
        return lines

    def _refuse_unknown_shards(self) -> None:
        found = self._folder.is_dir() and sorted(
            path.name for path in self._folder.iterdir() if path.suffix == ".tar" and _SHARD_FILE.fullmatch(path.name)
        )
        if found:
            raise ConfigError(
                f"{self._folder} holds shards such as {found[0]}, but neither manifest.json nor {JOURNAL_NAME}; "
                "expected an empty folder or one that `prepare` began. Set another `shards` folder for this source, or "
                "delete this folder."
            )

    def _remove_leftovers(self) -> None:
        known = {shard.name for split in SPLITS for shard in self.shards[split]}
        for path in self._folder.iterdir():
            match = _SHARD_FILE.fullmatch(path.name)
            if _LEFT_OVER.fullmatch(path.name) or (match and (match[1] not in known or match[2])):
                shutil.rmtree(path) if path.is_dir() else path.unlink()


def _is_whole(folder: Path, shard: Shard) -> bool:
    """Whether a shard's files are there and the tar has its size."""
    tar = folder / f"{shard.name}.tar"
    return index_path(folder, shard.name).is_file() and tar.is_file() and tar.stat().st_size == shard.num_bytes


def _line(split: str, shard: Shard, documents: str) -> dict:
    return {"split": split, "shard": asdict(shard), "documents": documents}


def append_line(path: Path, line: dict) -> None:
    """Add a line to a journal; it is on the disk then."""
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")
        file.flush()
        os.fsync(file.fileno())


def write_lines(path: Path, lines: list[dict]) -> None:
    """Make these the lines of a journal, which gets its folder if it has none; a line that was cut short goes."""
    content = "".join(json.dumps(line) + "\n" for line in lines).encode()
    if not path.is_file() or path.read_bytes() != content:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, content)


def read_lines(path: Path) -> list[dict]:
    """A journal's lines up to the first that was not written to its end; none if there is no journal."""
    lines: list[dict] = []
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return []
    except OSError as error:
        raise DataError(f"{path} is not readable ({error.strerror}); expected the journal of `prepare`.") from None
    for line in content.split(b"\n")[:-1]:
        try:
            lines.append(json.loads(line))
        except ValueError:
            break
    return lines
