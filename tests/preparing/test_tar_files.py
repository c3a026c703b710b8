"""Tars of others: the same members as Python's tarfile finds, every damage named, and what is a document in them."""

from __future__ import annotations

import gzip
import io
import json
import re
import subprocess
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
import zstandard

from pretrain.data.source_files import BrokenFile, list_files
from pretrain.errors import DataError
from pretrain.options.config import SourceSection
from pretrain.preparing.sources import ReadLog, read_documents
from pretrain.preparing.tar_files import BLOCK_BYTES, Member, read_members
from tests.helpers.data_helpers import flip_bit
from tests.preparing.tar_helpers import text_samples, write_tar

NAMES = ["a.txt", "folder/b.txt", "x" * 96 + ".txt", "p" * 80 + "/" + "n" * 60 + ".txt", "é/日本.txt",
         "long/" + "deep/" * 60 + "c.txt", "q" * 300 + ".txt"]  # fmt: skip
FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}


def members_of(content: bytes, is_wanted: Callable[[str], bool] = lambda name: True, max_bytes: int = 10**6):
    return list(read_members(io.BytesIO(content), is_wanted, max_bytes))


def tar_of(names: list[str], tar_format: int = tarfile.PAX_FORMAT, **fields: object) -> bytes:
    """A tar of files of 0, 100, 200 … bytes."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tar_format) as tar:
        for number, name in enumerate(names):
            entry = tarfile.TarInfo(name)
            entry.size = 100 * number
            for field, value in fields.items():
                setattr(entry, field, value)
            tar.addfile(entry, io.BytesIO(bytes([65 + number]) * entry.size))
    return buffer.getvalue()


@pytest.mark.parametrize("tar_format", FORMATS)
@pytest.mark.parametrize("fields", [{}, {"mtime": 1.5, "uname": "jürgen"}, {"uid": 2**40, "mtime": -5}], ids=str)
def test_every_format_gives_the_members_that_tarfile_finds(tar_format: str, fields: dict) -> None:
    names = NAMES[:4] if tar_format == "ustar" else NAMES
    if tar_format == "ustar":
        fields = {key: value for key, value in fields.items() if key == "uname"}
    content = tar_of(names, FORMATS[tar_format], **fields)
    found = members_of(content)
    with tarfile.open(fileobj=io.BytesIO(content)) as tar:
        expected = [(entry.name, entry.offset_data, entry.size) for entry in tar]
    assert [(member.name, member.offset, member.num_bytes) for member, _ in found] == expected
    assert [data for _, data in found] == [content[begin : begin + size] for _, begin, size in expected]


@pytest.mark.parametrize("tar_format", ["gnu", "oldgnu", "posix", "ustar", "v7"])
def test_what_the_tar_command_writes_is_read(tmp_path: Path, tar_format: str) -> None:
    names = ["a.txt", "folder/b.txt"] if tar_format == "v7" else ["a.txt", "folder/b.txt", "p" * 80 + "/" + "n" * 60]
    if tar_format in ("gnu", "oldgnu", "posix"):
        names.append("q" * 200 + ".txt")
    for number, name in enumerate(names):
        (tmp_path / "files" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "files" / name).write_bytes(bytes([65 + number]) * 700 * number)
    (tmp_path / "files/link.txt").hardlink_to(tmp_path / "files/a.txt")
    command = [
        "tar",
        f"--format={tar_format}",
        "--sort=name",
        "-C",
        tmp_path / "files",
        "-cf",
        tmp_path / "web.tar",
        ".",
    ]
    subprocess.run(command, check=True)
    found = {member.name: (member.is_link, data) for member, data in members_of((tmp_path / "web.tar").read_bytes())}
    expected = {f"./{name}": (False, bytes([65 + number]) * 700 * number) for number, name in enumerate(names)}
    assert found == expected | {"./link.txt": (True, None)}


def test_folders_and_links_hold_no_bytes_and_what_is_not_wanted_is_passed_over() -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, kind, size in (("folder", tarfile.DIRTYPE, 0), ("folder/a.txt", tarfile.REGTYPE, 700),
                                 ("hard.txt", tarfile.LNKTYPE, 700), ("soft.txt", tarfile.SYMTYPE, 0),
                                 ("fifo", tarfile.FIFOTYPE, 0), ("b.jpg", tarfile.REGTYPE, 513),
                                 ("c.txt", tarfile.REGTYPE, 1)):  # fmt: skip
            entry = tarfile.TarInfo(name)
            entry.type, entry.size, entry.linkname = kind, size, "folder/a.txt"
            tar.addfile(entry, io.BytesIO(b"x" * size) if kind == tarfile.REGTYPE else None)
    found = members_of(buffer.getvalue(), lambda name: name.endswith(".txt"), max_bytes=600)
    assert [(member.name, member.num_bytes, member.is_link, data) for member, data in found] == [
        ("folder/a.txt", 700, False, None), ("hard.txt", 0, True, None), ("soft.txt", 0, True, None),
        ("b.jpg", 513, False, None), ("c.txt", 1, False, b"x"),
    ]  # fmt: skip


def test_a_tar_of_nothing_has_no_members_and_an_empty_file_is_no_tar() -> None:
    assert members_of(tar_of([])) == []
    assert members_of(bytes(BLOCK_BYTES)) == []
    with pytest.raises(BrokenFile, match="it is empty, which no tar is"):
        members_of(b"")


@pytest.mark.parametrize("place", [0, 100, 124, 135, 148, 156, 257, 345, 511])
@pytest.mark.parametrize("number", [0, 1, 3])
def test_a_flipped_bit_of_any_header_is_an_error_that_names_it(place: int, number: int) -> None:
    content = bytearray(tar_of(NAMES[:4], tarfile.USTAR_FORMAT))
    header = members_of(bytes(content))[number][0].offset - BLOCK_BYTES
    content[header + place] ^= 1
    with pytest.raises(BrokenFile, match=f"the header at byte {header:,} is damaged|a header is damaged"):
        members_of(bytes(content))


@pytest.mark.parametrize("num_bytes", [1, 511, 512, 1024, 1025, 1500, 1536, 2100, 2560, 2600])
def test_a_tar_that_is_cut_anywhere_is_an_error(num_bytes: int) -> None:
    content = tar_of(NAMES[:4], tarfile.USTAR_FORMAT)
    ends = [member.offset + -(-member.num_bytes // 512) * 512 for member, _ in members_of(content)]
    assert 512 in ends and 1536 in ends
    kind = (
        "behind a member, without the zeros that end a tar" if num_bytes in ends else "inside of .*: it was cut short"
    )
    with pytest.raises(BrokenFile, match=f"it ends at byte {num_bytes:,}, {kind}"):
        members_of(content[:num_bytes])


def test_what_follows_the_end_is_an_error() -> None:
    content = tar_of(NAMES[:1], tarfile.USTAR_FORMAT)
    for rest in (content, b"x"):
        with pytest.raises(BrokenFile, match="it goes on behind the zeros that end a tar"):
            members_of(content + rest)
    with tarfile.open(fileobj=io.BytesIO(content + content)) as tar:
        assert len(tar.getnames()) == 1  # where others see nothing


def test_records_that_make_no_sense_are_errors() -> None:
    for field in ({"pax_headers": {"GNU.sparse.size": "5"}}, {"type": tarfile.GNUTYPE_SPARSE}):
        with pytest.raises(BrokenFile, match="stored as a sparse file"):
            members_of(tar_of(["a.txt"], **field))
    content = tar_of(["a.txt"], pax_headers={"comment": "c"})
    with pytest.raises(BrokenFile, match="a pax record is damaged"):
        members_of(content.replace(b"13 comment=c", b"99 comment=c"))
    header = bytearray(tar_of(["a.txt"], tarfile.USTAR_FORMAT)[:BLOCK_BYTES])
    header[156:157], header[124:135] = b"x", b"77777777777"
    header[148:156] = b"%06o\0 " % (sum(header) - sum(header[148:156]) + 256)
    with pytest.raises(BrokenFile, match="a record about the next member has 8,589,934,591 bytes"):
        members_of(bytes(header))


def read(path: Path, on_bad_document: str = "error", on_bad_file: str = "error", **fields: str):
    source, log = SourceSection(name="web", paths=[str(path)], shards="unused", **fields), ReadLog()
    documents = list(read_documents(list_files(source), source, on_bad_document, on_bad_file, log))
    return [(document.text, document.origin) for document in documents], log


@pytest.mark.parametrize("kind", ["txt", "json", "mixed"])
@pytest.mark.parametrize("options", [{}, {"mtime": 0}], ids=str)
def test_texts_of_webdatasets_shards_are_documents(tmp_path: Path, kind: str, options: dict) -> None:
    texts = [f"Text {number}\r\n\té 日本\n" * (number + 1) for number in range(20)]
    path = write_tar(tmp_path / "web-000000.tar", text_samples(texts, kind, "part/" + "n" * 120 + "/"), **options)
    documents, log = read(path)
    assert [text for text, _ in documents] == texts
    ending = {"txt": r"\.txt", "json": r"\.json", "mixed": r"\.(txt|json)"}[kind]
    assert all(re.fullmatch(rf"{path}:part/n+/\d{{6}}{ending}", origin) for _, origin in documents)
    images = {"ignored_jpg": 20} if kind == "mixed" else {}
    assert log.counts == {"documents_read": 20, "files_read": 1, **images}


@pytest.mark.parametrize("suffix", ["gz", "zst", "bz2"])
def test_compressed_tars_are_read(tmp_path: Path, suffix: str) -> None:
    import bz2

    compress = {"gz": gzip.compress, "zst": zstandard.compress, "bz2": bz2.compress}[suffix]
    content = write_tar(tmp_path / "a.tar", text_samples(["one", "two"])).read_bytes()
    (tmp_path / f"web.tar.{suffix}").write_bytes(compress(content))
    assert [text for text, _ in read(tmp_path / f"web.tar.{suffix}")[0]] == ["one", "two"]


def test_json_beside_txt_is_not_a_document_and_nothing_is_left_out_without_a_count(tmp_path: Path) -> None:
    path = write_tar(
        tmp_path / "web.tar",
        [
            {"__key__": "a", "txt": "text of a", "json": json.dumps({"text": "not this"}).encode(), "cls": "3"},
            {"__key__": "b", "en.txt": "English", "de.txt": "Deutsch", "seg.png": b"x"},
            {"__key__": "c", "caption": "x", "json": json.dumps({"caption": "no text"}).encode()},
            {"__key__": "d", "TXT": "capital", "0123": b"x", "z.json": b"{}"},
            {"__key__": "__index__/v1", "npy": b"x"},
            {"__key__": "e", "txt": "", "pyd": b"x"},
        ],
    )
    documents, log = read(path, on_bad_document="skip")
    assert documents == [(text, f"{path}:{name}") for text, name in
                         (("text of a", "a.txt"), ("Deutsch", "b.de.txt"), ("English", "b.en.txt"),
                          ("capital", "d.TXT"))]  # fmt: skip
    assert log.counts == {
        "files_read": 1, "documents_read": 6, "skipped_no_text": 1, "skipped_empty": 1, "ignored_json_beside_txt": 2,
        "ignored_cls": 1, "ignored_png": 1, "ignored_caption": 1, "ignored_other": 1, "ignored_hidden": 1,
        "ignored_pyd": 1,
    }  # fmt: skip
    assert log.examples["skipped_no_text"] == f"{path}:c.json: its field 'text' is missing (it has: caption)"
    assert log.examples["ignored_json_beside_txt"] == f"{path}:a.json"
    assert read(path, on_bad_document="skip", text_field="caption")[0][3][0] == "no text"


def test_a_member_that_is_too_long_is_a_bad_document(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pretrain.preparing.sources.MAX_DOCUMENT_BYTES", 100)
    path = write_tar(tmp_path / "web.tar", text_samples(["a" * 101, "b" * 100]))
    documents, log = read(path, on_bad_document="skip")
    assert [text for text, _ in documents] == ["b" * 100] and log.counts["skipped_too_long"] == 1


@pytest.mark.parametrize("kind", ["txt", "json"])
def test_documents_before_the_break_are_kept_if_the_config_says_so(tmp_path: Path, kind: str) -> None:
    path = write_tar(tmp_path / "web.tar", text_samples(["one", "two", "three"], kind), mtime=0)
    flip_bit(path, 2 * 1024 + 10)  # of the third header
    message = rf"{path}: the file cannot be read to its end \(the header at byte 2,048 is damaged"
    with pytest.raises(DataError, match=message):
        read(path)
    documents, log = read(path, on_bad_file="skip")
    assert [text for text, _ in documents] == ["one", "two"] and log.counts["files_unreadable"] == 1


def test_members_know_their_samples() -> None:
    samples = {"a/b.c.txt": "a/b", "b.json": "b", "a.b/c": "a.b/c", ".hidden": ""}
    assert {name: Member(name, 0, 0).sample for name in samples} == samples
