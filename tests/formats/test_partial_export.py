"""An export that is interrupted goes on with what is whole, and is in its place complete or not at all."""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from pretrain.errors import ConfigError
from pretrain.formats import partial_export
from pretrain.formats.partial_export import JOURNAL, Part, PartialExport, Progress
from tests.helpers.data_helpers import file_size_limit

KEY = {"checkpoint": "a", "dtype": "bf16"}


class Parts:
    """Parts of 1000 bytes each, and which of them were made."""

    def __init__(self, count: int = 5) -> None:
        self.made: list[int] = []
        self.all = [Part(1000, lambda number=number: self._make(number)) for number in range(count)]

    def _make(self, number: int):
        self.made.append(number)
        yield bytes([number]) * 400
        yield memoryview(bytes([number]) * 600)


CONTENT = b"".join(bytes([number]) * 1000 for number in range(5))


def begin(out: Path, key: dict = KEY) -> tuple[PartialExport, io.StringIO]:
    said = io.StringIO()
    return PartialExport(out, key, Progress(said)), said


def stop_after(out: Path, num_bytes: int) -> Parts:
    """Begin an export whose disk is full after so many bytes."""
    export, _ = begin(out)
    parts = Parts()
    with file_size_limit(num_bytes), pytest.raises(OSError, match="File too large"):
        export.write({"x": parts.all})
    export.close(discard=False)
    return parts


def test_files_are_written_whole_and_described(tmp_path: Path) -> None:
    export, _ = begin(tmp_path / "out")
    assert export.write({"x": Parts().all, "y": Parts(1).all}) == {
        "x": {"bytes": 5000, "sha256": hashlib.sha256(CONTENT).hexdigest()},
        "y": {"bytes": 1000, "sha256": hashlib.sha256(bytes(1000)).hexdigest()},
    }
    assert not (tmp_path / "out").exists()
    export.finish()
    export.close(discard=True)
    assert sorted(os.listdir(tmp_path)) == ["out"] and sorted(os.listdir(tmp_path / "out")) == ["x", "y"]
    assert (tmp_path / "out/x").read_bytes() == CONTENT


def test_a_later_start_makes_only_what_is_missing(tmp_path: Path) -> None:
    stop_after(tmp_path / "out", 2700)
    export, said = begin(tmp_path / "out")
    parts = Parts()
    assert export.write({"x": parts.all})["x"]["sha256"] == hashlib.sha256(CONTENT).hexdigest()
    assert parts.made == [2, 3, 4] and "x: 2.0 kB of an earlier start are whole and kept" in said.getvalue()
    assert (export.folder / "x").read_bytes() == CONTENT
    export.close(discard=True)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove", "journal"])
def test_what_is_damaged_meanwhile_is_made_again(tmp_path: Path, damage: str) -> None:
    stop_after(tmp_path / "out", 2700)
    folder = tmp_path / ".out.partial"
    content = bytearray((folder / "x").read_bytes())
    if damage == "flip":
        content[1500] ^= 1
    (folder / "x").write_bytes(content[:1999] if damage == "truncate" else content)
    if damage == "remove":
        (folder / "x").unlink()
    if damage == "journal":  # its last line was cut off by a kill
        (folder / JOURNAL).write_bytes((folder / JOURNAL).read_bytes()[:-9])
    export, _ = begin(tmp_path / "out")
    parts = Parts()
    export.write({"x": parts.all})
    assert parts.made == ([0, 1, 2, 3, 4] if damage == "remove" else [1, 2, 3, 4])
    assert (export.folder / "x").read_bytes() == CONTENT
    export.close(discard=True)


def test_another_checkpoint_or_other_options_begin_anew(tmp_path: Path) -> None:
    stop_after(tmp_path / "out", 2700)
    export, _ = begin(tmp_path / "out", KEY | {"dtype": "fp32"})
    assert os.listdir(export.folder) == [JOURNAL]
    export.close(discard=False)
    assert os.listdir(tmp_path) == [], "nothing of use is left"


def test_files_that_are_no_parts_are_not_taken_over(tmp_path: Path) -> None:
    stop_after(tmp_path / "out", 2700)
    (tmp_path / ".out.partial/config.json").write_text("{}")
    (tmp_path / ".out.partial/.reference").mkdir()
    export, _ = begin(tmp_path / "out")
    assert sorted(os.listdir(export.folder)) == [JOURNAL, "x"]
    export.close(discard=True)


def test_a_killed_process_is_gone_on_from(tmp_path: Path) -> None:
    if (child := os.fork()) == 0:
        export, _ = begin(tmp_path / "out")
        parts = Parts().all
        parts[3] = Part(1000, lambda: os._exit(9))
        export.write({"x": parts})
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    export, _ = begin(tmp_path / "out")
    parts = Parts()
    export.write({"x": parts.all})
    assert parts.made == [3, 4] and (export.folder / "x").read_bytes() == CONTENT
    export.close(discard=True)


def test_one_process_at_a_time(tmp_path: Path) -> None:
    export, _ = begin(tmp_path / "out")
    with pytest.raises(ConfigError, match="out: another process is making it; expected one. Wait for it, or name"):
        begin(tmp_path / "out")
    export.close(discard=False)
    begin(tmp_path / "out")[0].close(discard=False)


def test_a_disk_without_room_is_not_filled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    export, _ = begin(tmp_path / "out")
    monkeypatch.setattr(partial_export.os, "statvfs", lambda _: SimpleNamespace(f_bavail=2, f_frsize=1000))
    with pytest.raises(OSError, match="it takes 5,000 bytes, and 2,000 are free"):
        export.write({"x": Parts().all})
    assert os.listdir(export.folder) == [JOURNAL]
    export.close(discard=False)
    assert os.listdir(tmp_path) == []


def test_progress_says_how_far_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter([0.0, 0.0, 0.1, 20.0])
    monkeypatch.setattr(partial_export.time, "monotonic", lambda: next(now))
    said = io.StringIO()
    progress = Progress(said)
    progress.begin()
    progress.show("writing x", 10_000_000, 100_000_000)
    progress.show("writing x", 50_000_000, 100_000_000, 10_000_000)
    assert said.getvalue() == "writing x: 50% of 100.0 MB, 2.0 MB/s, 25s left\n"


def test_the_journal_is_of_lines_that_name_files(tmp_path: Path) -> None:
    stop_after(tmp_path / "out", 2700)
    lines = [json.loads(line) for line in (tmp_path / ".out.partial" / JOURNAL).read_text().splitlines()]
    assert lines == [KEY, *({"file": "x", "sha256": hashlib.sha256(CONTENT[:end]).hexdigest()} for end in (1000, 2000))]
    shutil.rmtree(tmp_path / ".out.partial")
