"""Sources: every kind of file, every kind of fault."""

from __future__ import annotations

import bz2
import errno
import gzip
import json
import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import zstandard

from pretrain.data.source_files import files_identity, list_files
from pretrain.errors import DataError
from pretrain.options.config import SourceSection
from pretrain.preparing import json_lines, sources
from pretrain.preparing.sources import ReadLog, document_digest, is_validation, read_documents, read_files

TEXT = "tab\there\r\n  two  spaces\nümlaut e\u0301 日本語 🎉\x00\n"


def source_of(*paths: str | Path, **options: str) -> SourceSection:
    return SourceSection(name="web", paths=[str(path) for path in paths], shards="unused", **options)


def read(source: SourceSection, on_bad_document: str = "error", on_bad_file: str = "error"):
    log = ReadLog()
    documents = list(read_documents(list_files(source), source, on_bad_document, on_bad_file, log))
    return documents, log


def lines_of(*texts: str) -> bytes:
    return "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()


def compress(data: bytes, suffix: str) -> bytes:
    how = {"": bytes, ".gz": gzip.compress, ".zst": zstandard.compress, ".bz2": bz2.compress}
    return how[suffix](data)


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst", ".bz2"])
@pytest.mark.parametrize("kind", [".txt", ".py", ""])
def test_a_text_file_is_one_document_with_its_exact_bytes(tmp_path: Path, kind: str, suffix: str) -> None:
    path = tmp_path / f"file{kind}{suffix}"
    path.write_bytes(compress(TEXT.encode(), suffix))
    documents, log = read(source_of(path))
    assert [(document.text, document.origin) for document in documents] == [(TEXT, str(path))]
    assert log.counts == {"documents_read": 1, "files_read": 1}
    assert log.position_bytes() == path.stat().st_size


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst", ".GZ"])
def test_a_json_line_is_a_document(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"web.jsonl{suffix}"
    path.write_bytes(compress(b"\xef\xbb\xbf" + lines_of("first\nline", TEXT) + b'{"text": "last"}', suffix.lower()))
    documents, _ = read(source_of(path))
    assert [document.text for document in documents] == ["first\nline", TEXT, "last"]
    assert [document.origin for document in documents] == [f"{path}:1", f"{path}:2", f"{path}:3"]


def test_text_field_names_the_field(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"content": "yes", "text": "no"}\n')
    assert read(source_of(tmp_path, text_field="content"))[0][0].text == "yes"


def test_a_byte_order_mark_is_not_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfword")
    assert read(source_of(tmp_path))[0][0].text == "word"


def test_folders_globs_and_overlaps_give_each_file_once_and_sorted(tmp_path: Path) -> None:
    for name in ("b/2.txt", "b/deep/1.md", "a.txt", ".hidden.txt", ".git/x.txt", "b/__pycache__/x.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    (tmp_path / "b/loop").symlink_to(tmp_path / "b")
    names = [str(file.relative_to(tmp_path)) for file in list_files(source_of(tmp_path))]
    assert names == ["a.txt", "b/2.txt", "b/deep/1.md"]
    assert [file.name for file in list_files(source_of(tmp_path / "*.txt", tmp_path / "a.txt"))] == ["a.txt"]
    assert [file.name for file in list_files(source_of(tmp_path / "**/*.txt", tmp_path / "b"))] == [
        "a.txt", "2.txt", "1.md",
    ]  # fmt: skip


def test_a_file_whose_name_looks_like_a_glob_is_found(tmp_path: Path) -> None:
    (tmp_path / "a[1].txt").write_text("x")
    assert len(list_files(source_of(tmp_path / "a[1].txt"))) == 1


def test_the_standard_library_is_a_source() -> None:
    files = list_files(source_of("python-stdlib:"))
    names = {file.name for file in files}
    assert {"ast.py", "textwrap.py"} <= names and len(files) > 150
    assert all(file.suffix == ".py" and "site-packages" not in file.parts for file in files)
    assert files == sorted(files)
    texts, log = read(source_of("python-stdlib:"), on_bad_document="skip")
    assert len(texts) + sum(log.counts[key] for key in log.counts if key.startswith("skipped_")) == len(files)


def test_a_path_that_names_nothing_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"data.sources\[web\].paths: .*missing\*.txt' names no file; expected files"):
        list_files(source_of(tmp_path / "missing*.txt"))
    with pytest.raises(DataError, match=rf"'nowhere' names no file \(from {os.getcwd()}\)"):
        list_files(source_of("nowhere"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="empty' names no file"):
        list_files(source_of(tmp_path / "empty"))


@pytest.mark.parametrize("name", ["a.parquet.gz", "a.tgz", "a.zip", "a.arrow.zst", "a.txt.xz", "a.tar.xz"])
def test_a_file_that_is_not_text_is_an_error(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"x")
    with pytest.raises(DataError, match=rf"{name} is one of 1 files that are not text; .* Unpack or convert them"):
        list_files(source_of(tmp_path))


BAD_LINES = {
    "not_utf8": (b'{"text": "\xff"}\n', r"it is not UTF-8 \(invalid start byte at byte 10\)"),
    "bad_json": (b'{"text": "cut sho', r"it is not JSON \(Unterminated string"),
    "no_text": (b'{"content": 1, "body": 2}\n', r"its field 'text' is missing \(it has: body, content\)"),
}


@pytest.mark.parametrize(
    ("reason", "line", "message"),
    [
        *((reason, line, message) for reason, (line, message) in BAD_LINES.items()),
        ("no_text", b'{"text": null}\n', "its field 'text' is NoneType, not a string"),
        ("no_text", b'["text"]\n', "it is a JSON list, not an object"),
        ("bad_json", b"[" * 100_000 + b"\n", "it is not JSON"),
        ("not_utf8", b'{"text": "\\ud800"}\n', "half of a surrogate pair"),
        ("u2581", '{"text": "a\u2581b"}\n'.encode(), r"the character U\+2581"),
    ],
)
def test_a_bad_line_is_counted_or_an_error(tmp_path: Path, reason: str, line: bytes, message: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(lines_of("good") + line)
    documents, log = read(source_of(path), on_bad_document="skip")
    assert [document.text for document in documents] == ["good"]
    assert log.counts == {"documents_read": 2, "files_read": 1, f"skipped_{reason}": 1}
    assert log.examples[f"skipped_{reason}"].startswith(f"{path}:2: it")
    with pytest.raises(DataError, match=rf"a.jsonl:2: the document cannot be used: .*{message}.* Mend it, or set data"):
        read(source_of(path))


def test_good_lines_after_bad_ones_are_read(tmp_path: Path) -> None:
    bad = b"".join(line.removesuffix(b"\n") + b"\n" for line, _ in BAD_LINES.values())
    (tmp_path / "a.jsonl").write_bytes(bad + lines_of("good"))
    documents, log = read(source_of(tmp_path), on_bad_document="skip")
    assert [document.text for document in documents] == ["good"]
    assert log.counts["documents_read"] == 4


def test_a_text_file_that_is_not_utf8_is_counted_or_an_error(tmp_path: Path) -> None:
    (tmp_path / "latin.txt").write_bytes("ä".encode("latin-1"))
    assert read(source_of(tmp_path), on_bad_document="skip")[1].counts["skipped_not_utf8"] == 1
    with pytest.raises(DataError, match=r"latin.txt: the document cannot be used: it is not UTF-8 \(unexpected end"):
        read(source_of(tmp_path))


def test_empty_documents_are_always_counted_skips(tmp_path: Path) -> None:
    (tmp_path / "empty.py").write_text("")
    (tmp_path / "a.jsonl").write_text('\n{"text": ""}\n{"text": " "}\n')
    documents, log = read(source_of(tmp_path))
    assert [document.text for document in documents] == [" "]
    assert log.counts["skipped_empty"] == 3


def test_documents_that_are_too_long_are_bad(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "MAX_DOCUMENT_BYTES", 100)
    monkeypatch.setattr(json_lines, "MAX_DOCUMENT_BYTES", 100)
    monkeypatch.setattr(json_lines, "READ_BYTES", 64)
    (tmp_path / "a.jsonl").write_bytes(lines_of("x" * 1000, "short", "x" * 300))
    (tmp_path / "b.txt").write_text("y" * 101)
    (tmp_path / "c.txt").write_text("y" * 100)
    documents, log = read(source_of(tmp_path), on_bad_document="skip")
    assert [document.origin.rpartition("/")[2] for document in documents] == ["a.jsonl:2", "c.txt"]
    assert log.counts["skipped_too_long"] == 3
    with pytest.raises(DataError, match=r"a.jsonl:1: the document cannot be used: it is longer than"):
        read(source_of(tmp_path))


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
@pytest.mark.parametrize("num_bytes", [0, 3, -1, -9, "half"])
def test_a_file_that_is_cut_short_is_an_error_or_counted(tmp_path: Path, suffix: str, num_bytes: int | str) -> None:
    texts = [random.Random(number).randbytes(3000).hex() for number in range(200)]
    data = compress(lines_of(*texts), suffix)
    path = tmp_path / f"a.jsonl{suffix}"
    path.write_bytes(data[: len(data) // 2 if num_bytes == "half" else num_bytes])
    with pytest.raises(
        DataError, match=r"a.jsonl.*: the file cannot be read to its end \(.+\); expected a whole file."
    ):
        read(source_of(path), on_bad_document="skip")
    documents, log = read(source_of(path), on_bad_document="skip", on_bad_file="skip")
    assert [document.text for document in documents] == texts[: len(documents)]
    assert log.counts["files_unreadable"] == 1 and log.counts["files_read"] == 0
    assert "cannot be read to its end" in log.examples["files_unreadable"]
    if num_bytes == "half":
        assert len(documents) > 50  # what came before the break is kept


def test_the_last_unzipped_bytes_of_a_cut_file_are_not_a_document(tmp_path: Path) -> None:
    (tmp_path / "a.txt.zst").write_bytes(zstandard.compress(os.urandom(500).hex().encode())[:-20])
    (tmp_path / "b.txt").write_text("good")
    documents, log = read(source_of(tmp_path), on_bad_file="skip")
    assert [document.text for document in documents] == ["good"]
    assert log.counts == {"documents_read": 1, "files_read": 1, "files_unreadable": 1}


def test_a_file_with_the_wrong_suffix_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "a.txt.gz").write_text("not compressed")
    with pytest.raises(DataError, match=r"cannot be read to its end \(Not a gzipped file"):
        read(source_of(tmp_path))
    (tmp_path / "a.txt.gz").rename(tmp_path / "a.txt.zst")
    with pytest.raises(DataError, match=r"cannot be read to its end \(zstd .*Unknown frame descriptor"):
        read(source_of(tmp_path))


def test_a_file_that_vanished_is_an_error(tmp_path: Path) -> None:
    source = source_of(tmp_path)
    with pytest.raises(DataError, match=r"gone.txt: the file cannot be read to its end \(No such file or directory\)"):
        list(read_documents([tmp_path / "gone.txt"], source, "skip", "error", ReadLog()))


def test_several_frames_long_windows_and_skippable_frames_are_read(tmp_path: Path) -> None:
    skippable = (0x184D2A50).to_bytes(4, "little") + (5).to_bytes(4, "little") + b"notes"
    parameters = zstandard.ZstdCompressionParameters(window_log=28, enable_ldm=True)
    long_window = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    data = long_window.compress(b"first ") + long_window.flush() + skippable + zstandard.compress(b"second")
    (tmp_path / "a.txt.zst").write_bytes(data)
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress(b"third ") + gzip.compress(b"fourth"))
    assert [document.text for document in read(source_of(tmp_path))[0]] == ["first second", "third fourth"]


def test_identity_follows_names_and_sizes_but_not_the_place(tmp_path: Path) -> None:
    for folder in ("one", "two"):
        (tmp_path / folder / "sub").mkdir(parents=True)
        (tmp_path / folder / "a.txt").write_text("aaa")
        (tmp_path / folder / "sub/b.txt").write_text("bb")
    one, two = (files_identity(list_files(source_of(tmp_path / folder))) for folder in ("one", "two"))
    assert one == two and (one["the number of source files"], one["their bytes"]) == (2, 5)
    (tmp_path / "two/sub/b.txt").write_text("bbb")
    assert files_identity(list_files(source_of(tmp_path / "two"))) != one
    (tmp_path / "two/sub/b.txt").write_text("bb")
    (tmp_path / "two/sub/b.txt").rename(tmp_path / "two/sub/c.txt")
    assert files_identity(list_files(source_of(tmp_path / "two"))) != one


def test_the_split_is_by_hash_and_near_the_fraction() -> None:
    digests = [document_digest(f"document {number}".encode()) for number in range(20_000)]
    share = sum(is_validation(digest, 0.1) for digest in digests) / len(digests)
    assert abs(share - 0.1) < 0.01
    assert not any(is_validation(digest, 0.0) for digest in digests)
    held_out = {digest for digest in digests if is_validation(digest, 0.05)}
    assert held_out <= {digest for digest in digests if is_validation(digest, 0.1)}  # raising it only adds
    assert document_digest("ä".encode()).hex() == "cb4d3892d2cb5e6b1bd63f7e4247a02e"  # the format does not change


def test_a_file_that_may_not_be_read_says_so(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text")

    def denied(path: Path) -> Iterator[str]:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))
        yield

    message = (
        r"\(Permission denied\); expected one that you may read. Set its permissions, or set data.on_bad_file=skip"
    )
    with pytest.raises(DataError, match=message):
        list(read_files([tmp_path / "a.txt"], "error", ReadLog(), denied))
