"""Tar files that others made, such as webdataset's shards of text: their members in order, from a stream.

Other readers take a damaged header, or the end of a truncated file, for the end of the archive, and say nothing. Here
both are a `BrokenFile`, and so is anything behind the end.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import BinaryIO

from pretrain.data.source_files import BROKEN, READ_BYTES, BrokenFile

BLOCK_BYTES = 512
_MAX_RECORD_BYTES = 1 << 20  # of what stands before a header and holds a long name
_CHECKSUM_FIELD = slice(148, 156)
_LONG_NAME, _LONG_LINK, _EXTENDED, _GLOBAL, _SPARSE = b"L", b"K", b"x", b"g", b"S"
_REGULAR, _LINKS, _WITHOUT_DATA = (b"0", b"\0", b"7"), (b"1", b"2"), (b"1", b"2", b"3", b"4", b"5", b"6")
_EXTENSION = re.compile(r"[a-z][a-z0-9_]{0,7}")


@dataclass(frozen=True)
class Member:
    """One file in a tar.

    Attributes:
        name: its path there.
        offset: of its first byte in the tar.
        num_bytes: its size.
        is_link: it is a link to another file, and has no bytes of its own.
    """

    name: str
    offset: int
    num_bytes: int
    is_link: bool = False

    @property
    def is_json(self) -> bool:
        """Whether its name says that it holds JSON."""
        return self.name.lower().endswith(".json")

    @property
    def sample(self) -> str:
        """What the members of one sample have in common: the path up to the name's first dot, as webdataset has it."""
        folder, slash, name = self.name.rpartition("/")
        return folder + slash + name.partition(".")[0]


def read_members(
    file: BinaryIO, is_wanted: Callable[[str], bool], max_bytes: int
) -> Iterator[tuple[Member, bytes | None]]:
    """Read the files of a tar in order: of ustar, pax, GNU's format and the oldest one.

    Args:
        file: read from its beginning to its end, without seeking.
        is_wanted: by its name, whether a member's bytes are returned; others are passed over.
        max_bytes: larger members are passed over as well.

    Returns:
        Each regular file and link, with its bytes or None.

    Raises:
        BrokenFile: a header is damaged; the file ends inside of a member, or without the zeros that end a tar;
            something follows them; a member is stored as a sparse file.
    """
    stream = _Stream(file)
    name: str | None = None
    size: int | None = None  # both as records before the header say
    while (header := stream.read_header()) is not None:
        kind, num_bytes = header[156:157], stream.number(header[124:136])
        if kind in (_LONG_NAME, _LONG_LINK, _EXTENDED, _GLOBAL):
            record = stream.read_record(num_bytes)
            if kind == _LONG_NAME:
                name = _text(record.partition(b"\0")[0])
            elif kind == _EXTENDED:
                fields = stream.fields(record)
                name, size = fields.get("path", name), int(fields["size"]) if "size" in fields else size
            continue
        if kind == _SPARSE:
            raise stream.broken(f"{_name(header)!r} is stored as a sparse file, which is not read")
        size = 0 if kind in _WITHOUT_DATA else num_bytes if size is None else size
        member = Member(_name(header) if name is None else name, stream.position, size, kind in _LINKS)
        is_file = kind in _REGULAR and not (kind == b"\0" and member.name.endswith("/"))
        is_read = is_file and size <= max_bytes and is_wanted(member.name)
        data = stream.read_data(member, is_read)
        if is_file or member.is_link:
            yield member, data
        name = size = None


def read_texts(
    file: BinaryIO, max_bytes: int, ignore: Callable[[str, Member], object]
) -> Iterator[tuple[Member, bytes | None]]:
    """Read the members of a tar that are documents: `.txt`, and `.json` where its sample has no `.txt`.

    A sample is the members in a row that share a path up to the first dot of their names. Hidden files and those named
    `__…__`, which webdataset keeps for itself, are none.

    Args:
        file, max_bytes: as for `read_members`.
        ignore: is told of each other member, and what it is counted as.

    Returns:
        Each such member, with its bytes; None if they are too many.

    Raises:
        BrokenFile: as `read_members`; after what was whole.
    """
    sample = None
    waiting: list[tuple[Member, bytes | None]] = []  # JSON of the sample, while no .txt of it was met
    has_text = False
    try:
        for member, data in read_members(file, _is_text, max_bytes):
            if _is_hidden(member.name):
                ignore("hidden", member)
                continue
            if member.sample != sample:
                yield from waiting
                sample, waiting, has_text = member.sample, [], False
            if member.is_link or not _is_text(member.name):
                ignore("link" if member.is_link else _kind_of(member.name), member)
            elif not member.is_json:
                for other, _ in waiting:
                    ignore("json_beside_txt", other)
                waiting, has_text = [], True
                yield member, data
            elif has_text:
                ignore("json_beside_txt", member)
            else:
                waiting.append((member, data))
    except BROKEN:
        yield from waiting
        raise
    yield from waiting


def _is_text(name: str) -> bool:
    return name.lower().endswith((".txt", ".json"))


def _is_hidden(name: str) -> bool:
    folder, _, base = name.rpartition("/")
    return base.startswith(".") or any(part.startswith("__") and part.endswith("__") for part in name.split("/"))


def _kind_of(name: str) -> str:
    """What a member that is no text is counted as: its extension, if it looks like one."""
    extension = name.rpartition("/")[2].lower().rpartition(".")[2]
    return extension if _EXTENSION.fullmatch(extension) and extension != name.lower() else "other"


def _name(header: bytes) -> str:
    """The path that a header itself holds."""
    name = _text(header[:100].partition(b"\0")[0])
    prefix = _text(header[345:500].partition(b"\0")[0]) if header[257:263] == b"ustar\0" else ""
    return f"{prefix}/{name}" if prefix else name


def _text(data: bytes) -> str:
    return data.decode("utf-8", "backslashreplace")


class _Stream:
    """The bytes of a tar, one block after the other.

    Attributes:
        position: how many of them were read.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file, self.position = file, 0

    def broken(self, reason: str) -> BrokenFile:
        return BrokenFile(f"{reason}, before byte {self.position:,}")

    def read_header(self) -> bytes | None:
        """The next header, or None at the end of the archive."""
        header = self._file.read(BLOCK_BYTES)
        if not header:
            if not self.position:
                raise BrokenFile("it is empty, which no tar is")
            raise BrokenFile(
                f"it ends at byte {self.position:,}, behind a member, without the zeros that end a tar: it was cut "
                "short, most likely"
            )
        begin, self.position = self.position, self.position + len(header)
        if len(header) < BLOCK_BYTES:
            raise BrokenFile(f"it ends at byte {self.position:,}, inside of a header: it was cut short")
        if not header.strip(b"\0"):
            self._check_end()
            return None
        # The sum of all bytes, with its own field as spaces; some writers took them for signed ones.
        said, own = self.number(header[_CHECKSUM_FIELD]), 8 * ord(" ") - sum(header[_CHECKSUM_FIELD])
        if said != sum(header) + own:
            signed = sum(byte - 256 if byte > 127 else byte for byte in header)
            own = 8 * ord(" ") - sum(byte - 256 if byte > 127 else byte for byte in header[_CHECKSUM_FIELD])
            if said != signed + own:
                raise BrokenFile(f"the header at byte {begin:,} is damaged: its checksum is wrong")
        return header

    def read_record(self, num_bytes: int) -> bytes:
        """What stands before a header and says more of its member than that has room for."""
        if num_bytes > _MAX_RECORD_BYTES:
            raise self.broken(f"a record about the next member has {num_bytes:,} bytes")
        data = self._read(num_bytes, "a record about the next member")
        self._pass(-num_bytes % BLOCK_BYTES, "a record about the next member")
        return data

    def read_data(self, member: Member, is_read: bool) -> bytes | None:
        """The bytes of a member, or None if they are passed over."""
        data = None
        if is_read:
            data = self._read(member.num_bytes, repr(member.name))
        else:
            self._pass(member.num_bytes, repr(member.name))
        self._pass(-member.num_bytes % BLOCK_BYTES, repr(member.name))
        return data

    def number(self, field: bytes) -> int:
        """A number of a header: octal digits, or binary after a set bit."""
        if field[0] == 0x80:
            return int.from_bytes(field[1:], "big")
        try:
            return int(field.partition(b"\0")[0].strip() or b"0", 8)
        except ValueError:
            raise self.broken("a header is damaged: a number of it is none") from None

    def fields(self, record: bytes) -> dict[str, str]:
        """What a pax record says: lines of `<length> <key>=<value>`."""
        found = {}
        while record.strip(b"\0"):
            length, _, _ = record.partition(b" ")
            if not length.isdigit() or not len(length) < int(length) <= len(record):
                raise self.broken("a pax record is damaged")
            key, _, value = record[len(length) + 1 : int(length) - 1].partition(b"=")
            found[_text(key)] = _text(value)
            record = record[int(length) :]
        if any(key.startswith("GNU.sparse") for key in found):
            raise self.broken("a member is stored as a sparse file, which is not read")
        if not found.get("size", "0").isdigit():
            raise self.broken("a pax record is damaged")
        return found

    def _read(self, num_bytes: int, what: str) -> bytes:
        data = self._file.read(num_bytes)
        self.position += len(data)
        if len(data) < num_bytes:
            raise BrokenFile(f"it ends at byte {self.position:,}, inside of {what}: it was cut short")
        return data

    def _pass(self, num_bytes: int, what: str) -> None:
        while num_bytes:
            num_bytes -= len(self._read(min(num_bytes, READ_BYTES), what))

    def _check_end(self) -> None:
        """Check that only zeros follow: other readers do not see what stands behind them."""
        while data := self._file.read(READ_BYTES):
            if data.strip(b"\0"):
                raise self.broken("it goes on behind the zeros that end a tar (two tars in one file, or damage)")
            self.position += len(data)
