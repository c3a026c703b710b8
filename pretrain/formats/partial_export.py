"""The folder of an export in the making: files that grow part by part, and are gone on with after an interruption.

A part is as much as is made at once, a parameter. Behind each, a journal gets the sha256 of the file up to there, so
that a later start reads what is there, keeps what is whole and makes the rest: a full disk or a time limit does not
cost the hours that a large model takes.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from pretrain.console import LiveLine, format_bytes, format_duration
from pretrain.errors import ConfigError, ExportError
from pretrain.storage.whole_file import sync_folder

JOURNAL, _LOCK = ".journal.jsonl", ".lock"
_CHUNK_BYTES = 16 << 20
_SHOW_SECONDS, _SAY_SECONDS = 0.5, 15.0
Buffer = bytes | memoryview


@dataclass(frozen=True)
class Part:
    """A stretch of a file.

    Args:
        num_bytes: its size.
        make: makes its bytes, in buffers that are valid until the next one is asked for.
        is_head: depends on more than the key, such as the run's name, and is quickly made: compared at each start.
    """

    num_bytes: int
    make: Callable[[], Iterable[Buffer]]
    is_head: bool = False


class Progress:
    """Says on stderr how far a conversion is: often on a terminal, now and then elsewhere."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self._line = LiveLine(stream)
        self._began = self._shown = self._said = time.monotonic()

    def begin(self) -> None:
        """Begin something else, whose speed is to be told."""
        self._began = time.monotonic()

    def show(self, what: str, done_bytes: int, all_bytes: int, kept_bytes: int = 0) -> None:
        """Tell of `done_bytes` of `all_bytes`, of which `kept_bytes` were there before."""
        now = time.monotonic()
        if now - self._shown < _SHOW_SECONDS:
            return
        self._shown, plain = now, now - self._said >= _SAY_SECONDS
        if plain:
            self._said = now
        speed = max(done_bytes - kept_bytes, 1) / max(now - self._began, 1e-6)
        left = format_duration((all_bytes - done_bytes) / speed)
        self._line.show(
            f"{what}: {100 * done_bytes / max(all_bytes, 1):.0f}% of {format_bytes(all_bytes)}, "
            f"{format_bytes(speed)}/s, {left} left",
            plain=plain,
        )

    def tell(self, text: str) -> None:
        """Say what goes on now, on a terminal."""
        self._line.show(text, plain=False)

    def say(self, text: str) -> None:
        """Say something that stays."""
        self._line.say(text)

    def end(self) -> None:
        """Leave the line."""
        self._line.end()


@contextmanager
def complete_or_absent(out: Path) -> Iterator[Path]:
    """Give a hidden folder to fill, which gets the name `out` when that is done, and is removed where it fails.

    What a process that was killed has left in it, which may be as large as a model, is removed first.

    Args:
        out: no such folder, or an empty one.

    Raises:
        ConfigError: another process is making it.
        ExportError: it cannot be written.
    """
    partial = out.with_name(f".{out.name}.making")
    try:
        partial.mkdir(parents=True, exist_ok=True)
        lock = _locked(partial / _LOCK, out)
    except OSError as error:
        with suppress(OSError):
            partial.rmdir()
        raise ExportError(
            f"{out}: cannot be written ({error}); expected a folder on a disk with room. Name another."
        ) from error
    try:
        for entry in partial.iterdir():
            if entry.name != _LOCK:
                shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
        yield partial
        (partial / _LOCK).unlink()
        os.rename(partial, out)  # which takes the place of an empty folder
        sync_folder(out.parent)
    except OSError as error:
        raise ExportError(
            f"{out}: cannot be written ({error}); expected a folder on a disk with room. Name another."
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        lock.close()


def _locked(path: Path, out: Path) -> TextIO:
    """Open a file that one process at a time holds.

    Raises:
        ConfigError: another one holds it.
        OSError: it cannot be written.
    """
    file = open(path, "a+", encoding="utf-8")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise ConfigError(
            f"{out}: another process is making it; expected one. Wait for it, or name another folder."
        ) from None
    return file


class PartialExport:
    """A folder beside the one that is to be made, which one process at a time works in."""

    def __init__(self, out: Path, key: Mapping[str, Any], progress: Progress) -> None:
        """Take up the folder, or make it; what was begun of another checkpoint or with other options is removed.

        Args:
            out: the folder that is to be made.
            key: what the files depend on, JSON.
            progress: shows how far it is.

        Raises:
            ConfigError: another process is making this export.
            OSError: it cannot be written.
        """
        self.folder = out.with_name(f".{out.name}.partial")
        self.progress, self._out = progress, out
        self._digests: dict[str, list[str]] = {}
        self.folder.mkdir(parents=True, exist_ok=True)
        self._journal = _locked(self.folder / JOURNAL, out)
        self._take_up(json.loads(json.dumps(key)))

    def _take_up(self, key: Any) -> None:
        self._journal.seek(0)
        entries = []
        for line in self._journal:
            try:
                entries.append(json.loads(line))
            except ValueError:  # cut off when the process was killed
                break
        if entries and entries[0] == key:
            for entry in entries[1:]:
                self._digests.setdefault(entry["file"], []).append(entry["sha256"])
        for entry in self.folder.iterdir():
            if entry.name != JOURNAL and entry.name not in self._digests:
                shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
        lines = [key, *({"file": name, "sha256": one} for name, all_ in self._digests.items() for one in all_)]
        self._journal.truncate(0)
        self._journal.writelines(json.dumps(line) + "\n" for line in lines)
        self._journal.flush()

    def write(self, files: Mapping[str, Sequence[Part]]) -> dict[str, dict[str, Any]]:
        """Write files, or go on with them.

        Args:
            files: by name, each of its parts in order, which must be the same at every start.

        Returns:
            Size and sha256 of each file.

        Raises:
            OSError: the disk has no room for them, is read-only or gone; or what a part's making raises.
        """
        total = sum(part.num_bytes for parts in files.values() for part in parts)
        there = sum(path.stat().st_size for name in files if (path := self.folder / name).exists())
        disk = os.statvfs(self.folder)
        if (free := disk.f_bavail * disk.f_frsize) < total - there:
            raise OSError(errno.ENOSPC, f"it takes {total - there:,} bytes, and {free:,} are free")
        done, described = 0, {}
        for name, parts in files.items():
            described[name] = self._write_file(name, parts, done, total)
            done += described[name]["bytes"]
        self.progress.end()
        return described

    def _write_file(self, name: str, parts: Sequence[Part], before: int, total: int) -> dict[str, Any]:
        path = self.folder / name
        num_kept, kept_bytes, digest = self._kept(path, parts)
        self._digests[name] = self._digests.get(name, [])[:num_kept]
        if num_kept == len(parts) and path.stat().st_size == kept_bytes:
            return {"bytes": kept_bytes, "sha256": digest.hexdigest()}
        with open(path, "r+b" if num_kept else "wb") as file:
            file.truncate(kept_bytes)
            file.seek(kept_bytes)
            done = kept_bytes
            self.progress.begin()
            for part in parts[num_kept:]:
                begin = done
                for buffer in part.make():
                    for start in range(0, len(buffer), _CHUNK_BYTES):
                        piece = memoryview(buffer)[start : start + _CHUNK_BYTES]
                        file.write(piece)
                        digest.update(piece)
                        done += len(piece)
                        self.progress.show(f"writing {name}", before + done, total, before + kept_bytes)
                assert done - begin == part.num_bytes, f"{name}: a part has {done - begin} bytes, not {part.num_bytes}"
                file.flush()
                self._journal.write(json.dumps({"file": name, "sha256": digest.hexdigest()}) + "\n")
                self._journal.flush()
                self._digests[name].append(digest.hexdigest())
            os.fsync(file.fileno())
        path.chmod(self.folder.stat().st_mode & 0o666)  # whoever may read the folder may read the file
        return {"bytes": done, "sha256": digest.hexdigest()}

    def _kept(self, path: Path, parts: Sequence[Part]) -> tuple[int, int, Any]:
        """Read what is there; return how many parts are whole, their bytes, and their digest."""
        digest, kept, num_bytes = hashlib.sha256(), 0, 0
        if not path.exists():
            return 0, 0, digest
        with open(path, "rb") as file:
            for part, expected in zip(parts, self._digests.get(path.name, []), strict=False):
                further, left = digest.copy(), part.num_bytes
                if part.is_head:
                    for buffer in part.make():
                        further.update(buffer)
                    if further.hexdigest() != expected:
                        break
                    further = digest.copy()
                while left and (chunk := file.read(min(left, _CHUNK_BYTES))):
                    further.update(chunk)
                    left -= len(chunk)
                if left or further.hexdigest() != expected:
                    break
                digest, kept, num_bytes = further, kept + 1, num_bytes + part.num_bytes
        if kept:
            self.progress.say(f"{path.name}: {format_bytes(num_bytes)} of an earlier start are whole and kept")
        return kept, num_bytes, digest

    def finish(self) -> None:
        """Give the folder its name.

        Raises:
            OSError: it cannot be renamed.
        """
        (self.folder / JOURNAL).unlink()
        os.rename(self.folder, self._out)
        sync_folder(self._out.parent)

    def keeps_files(self) -> bool:
        """Whether a later start has something to go on with."""
        return any(self._digests.values())

    def close(self, *, discard: bool) -> None:
        """Let others have the folder; with `discard`, or if nothing of use is in it, remove it."""
        if discard or not self.keeps_files():
            shutil.rmtree(self.folder, ignore_errors=True)
        self._journal.close()
