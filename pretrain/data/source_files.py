"""The files that a source names, by their kinds, and their bytes, decompressed.

What a file is follows from its name, unless the source says it, and a folder that `Dataset.save_to_disk` wrote from
what is in it.
"""

from __future__ import annotations

import bz2
import glob
import gzip
import hashlib
import io
import json
import os
import re
import sysconfig
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal, cast
from xml.etree.ElementTree import ParseError

import zstandard

from pretrain.errors import DataError
from pretrain.options.config import SourceSection

Kind = Literal["text", "jsonl", "csv", "parquet", "arrow", "tar", "wikipedia", "squad", "imdb"]
TokenFormat = Literal["megatron", "nanogpt"]

STDLIB = "python-stdlib:"
STATE_NAME, SPLITS_NAME = "state.json", "dataset_dict.json"  # of folders that the `datasets` library writes
READ_BYTES = 1 << 18
_KINDS: dict[str, Kind] = {
    ".jsonl": "jsonl",
    ".csv": "csv",
    ".tsv": "csv",
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".tar": "tar",
}
_NOT_TEXT = (".tgz", ".zip", ".7z", ".xz", ".rar", ".pdf", ".npy", ".bin", ".idx", "-multistream-index.txt")
_OF_EXAMPLES = ("jsonl", "csv", "squad", "imdb")
_TOKENS, _TOKEN_FORMATS = (".bin", ".idx"), ("megatron", "nanogpt")
_COMPRESSED = (".gz", ".zst", ".bz2")
# Data sets in the files in which they are published: those of a folder that belong to one, and what is one without
# being told so. Wikipedia's large dumps are in parts, `…-pages-articles1.xml-p1p41242.bz2`.
_PUBLISHED = {
    "wikipedia": re.compile(r"\.xml(-p\d+p\d+)?$"),
    "squad": re.compile(r"\.json$"),
    "imdb": re.compile(r"(^|/)(pos|neg|unsup)/\d+_\d+\.txt$"),
}
_KNOWN = {
    "wikipedia": re.compile(r"(^|/)[^/]*-pages-(articles|meta-current)[^/]*\.xml(-p\d+p\d+)?$"),
    "squad": re.compile(r"(^|/)(train|dev)-v\d+\.\d+\.json$"),
    "imdb": re.compile(r"(^|/)aclimdb/(train|test)/(pos|neg|unsup)/\d+_\d+\.txt$"),
}
_IMDB_FOLDER = "aclImdb"


class BrokenFile(Exception):
    """A file that cannot be read to its end; the text says why."""


BROKEN = (BrokenFile, OSError, EOFError, zlib.error, zstandard.ZstdError, ParseError)


@dataclass(frozen=True)
class Bad:
    """Why there is no document.

    Attributes:
        reason: what it is counted as.
        message: what is said of it.
        is_fault: whether it is malformed; else it was not wanted, which is no error whatever the config says.
    """

    reason: str
    message: str
    is_fault: bool = True


def kind_of(path: str | Path, source_format: str = "auto") -> Kind:
    """What the source's format or a file's name says that it holds; text if nothing else."""
    if source_format in _PUBLISHED:
        return cast(Kind, source_format)
    name = _bare_path(path)
    for kind, pattern in _KNOWN.items():
        if pattern.search(name):
            return cast(Kind, kind)
    return _KINDS.get(os.path.splitext(name)[1], "text")


def published_formats(files: Sequence[Path], source_format: str) -> str | None:
    """The published data sets that some of these files are of, joined by +; None if none are."""
    kinds = {kind_of(file, source_format) for file in files}
    return "+".join(sorted(kinds & set(_PUBLISHED))) or None


def _bare_path(path: str | Path) -> str:
    """The path in lower case, with slashes, without the suffix of its compression."""
    text = str(path).replace(os.sep, "/").lower()
    return text[: text.rindex(".")] if text.endswith(_COMPRESSED) else text


def _belongs(path: str, source_format: str) -> bool:
    """Whether a file of a folder is one that the source means."""
    if source_format in _TOKEN_FORMATS:
        return path.endswith(_TOKENS)
    if source_format in _PUBLISHED:
        return _PUBLISHED[source_format].search(_bare_path(path)) is not None
    # Beside its reviews, IMDB's folder holds lists of words, of addresses and of features.
    return _IMDB_FOLDER not in path.split(os.sep) or kind_of(path) == "imdb"


def bare_name(path: str | Path) -> str:
    """The file's name in lower case, without the suffix of its compression."""
    name = os.path.basename(path).lower()
    return name[: name.rindex(".")] if name.endswith(_COMPRESSED) else name


def is_compressed(path: str | Path) -> bool:
    """Whether a file's name says that it is compressed as a whole."""
    return str(path).lower().endswith(_COMPRESSED)


def list_files(source: SourceSection) -> list[Path]:
    """List the files that a source names, sorted by path, each once.

    Folders are searched to any depth, without hidden names; `python-stdlib:` gives the `.py` files of this Python's
    standard library. Of a `datasets` folder these are the files that its state lists, in that order. The files of a
    source are all documents, or all token ids (`token_format`).

    Raises:
        DataError: a path names nothing, a file of a kind that is not read, or a dataset without its split.
    """
    places: dict[str, tuple[str, int]] = {}  # what each file is sorted by
    for pattern in source.paths:
        found = dict(_expand(pattern, source))
        if not found:
            where = f" (from {os.getcwd()})" if not os.path.isabs(os.path.expanduser(pattern)) else ""
            raise DataError(
                f"data.sources[{source.name}].paths: {pattern!r} names no file{where}; expected files, folders or "
                "globs of what docs/data.md lists, or `python-stdlib:`. Correct the path."
            )
        places |= found
    if source.format in _TOKEN_FORMATS or (source.format == "auto" and all(name.endswith(_TOKENS) for name in places)):
        places = _token_files(source, places)
    else:
        _refuse_unfit(source, places)
    by_real_path: dict[str, str] = {}  # links may lead to one file in several ways, or in circles
    for name in sorted(places, key=lambda name: places[name]):
        by_real_path.setdefault(os.path.realpath(name), name)
    return [Path(name) for name in by_real_path.values()]


def token_format(files: Sequence[Path]) -> TokenFormat | None:
    """The format of a source's files, as `list_files` gives them, if they hold token ids; None if documents."""
    if not files or files[0].suffix not in _TOKENS:
        return None
    return "megatron" if any(file.suffix == ".idx" for file in files) else "nanogpt"


def files_identity(files: Sequence[Path]) -> dict[str, int | str]:
    """Number, total size and fingerprint of files (names below their common folder, and sizes), as errors call them.

    A corpus that is moved or copied as a whole keeps its identity.
    """
    common = os.path.commonpath([file.parent for file in files])
    sizes = [os.path.getsize(file) for file in files]
    names = [os.path.relpath(file, common) for file in files]
    digest = hashlib.sha256(json.dumps(list(zip(names, sizes, strict=True))).encode()).hexdigest()
    return {
        "the number of source files": len(files),
        "their bytes": sum(sizes),
        "the hash of their names and sizes": digest,
    }


def _refuse_unfit(source: SourceSection, names: dict[str, tuple[str, int]]) -> None:
    unfit = sorted(
        name
        for name in names
        if bare_name(name).endswith(_NOT_TEXT) or (is_compressed(name) and kind_of(name) in ("parquet", "arrow"))
    )
    other = [name for name in sorted(names) if kind_of(name, source.format) not in _OF_EXAMPLES]
    if source.examples is not None and other:
        raise DataError(
            f"data.sources[{source.name}].paths: {other[0]} is a file of {kind_of(other[0], source.format)}; expected "
            f".jsonl, .csv, .tsv, SQuAD or IMDB, because the source has `examples`. Convert it, or name other files."
        )
    if unfit:
        raise DataError(
            f"data.sources[{source.name}].paths: {unfit[0]} is one of {len(unfit)} files that are not text; expected "
            "text, .jsonl, .csv, .tsv or .tar, each .gz, .zst or .bz2 too, or .parquet. Unpack or convert them, name "
            "the text files with a glob such as 'corpus/**/*.txt', or give files of token ids a source of their own."
        )


def _token_files(source: SourceSection, names: dict[str, tuple[str, int]]) -> dict[str, tuple[str, int]]:
    """Files of token ids only, each `.bin` of Megatron's with its `.idx`."""
    where = f"data.sources[{source.name}]"
    other = sorted(name for name in names if not name.endswith(_TOKENS))
    if other:
        raise DataError(
            f"{where}.paths: {other[0]} is not a file of token ids; expected .bin files, because {where}.format is "
            f"{source.format}. Name those, or leave the format out."
        )
    if source.format == "nanogpt":
        return {name: place for name, place in names.items() if name.endswith(".bin")}
    pairs = {os.path.splitext(name)[0] for name in names}
    for stem in sorted(pairs):
        if not os.path.isfile(stem + ".bin"):
            raise DataError(f"{where}.paths: {stem}.idx has no {stem}.bin beside it; expected both. Fetch it.")
        if not os.path.isfile(stem + ".idx"):
            raise DataError(
                f"{where}.paths: {stem}.bin has no {stem}.idx beside it; expected Megatron's pair of files, or a file "
                f"of bare ids as nanoGPT writes it. Fetch the index, or set {where}.format: nanogpt."
            )
    return {stem + suffix: (stem + suffix, 0) for stem in pairs for suffix in _TOKENS}


def _expand(pattern: str, source: SourceSection) -> Iterator[tuple[str, tuple[str, int]]]:
    """The files that one path names, each with what it is sorted by."""
    if pattern == STDLIB:
        for name, place in _walk(sysconfig.get_paths()["stdlib"], source):
            if name.endswith(".py"):
                yield name, place
        return
    pattern = os.path.expanduser(pattern)
    names = [pattern] if os.path.lexists(pattern) else glob.glob(pattern, recursive=True)
    if not names and source.format != "nanogpt" and os.path.isfile(pattern + ".idx"):
        names = [pattern + ".idx"]  # Megatron names a pair by what its two files share
    for name in names:
        if os.path.isdir(name):
            yield from _walk(name, source)
        elif os.path.isfile(name):
            name = os.path.normpath(name)
            yield name, (name, 0)


def _walk(folder: str, source: SourceSection) -> Iterator[tuple[str, tuple[str, int]]]:
    """All files below a folder but hidden ones, installed packages and compiled Python; links are followed once.

    Where the source has a format, its files alone.
    """
    visited: set[str] = set()
    for parent, folders, names in os.walk(folder, followlinks=True):
        folders[:] = [
            name
            for name in folders
            if not name.startswith(".") and name not in ("__pycache__", "site-packages", "dist-packages")
        ]
        real = os.path.realpath(parent)
        if real in visited:
            folders.clear()
            continue
        visited.add(real)
        listed = _dataset_files(parent, names, source)
        if listed is not None:
            folders.clear()
            state = os.path.normpath(os.path.join(parent, STATE_NAME))
            yield from ((name, (state, number)) for number, name in enumerate(listed))
            continue
        for name in names:
            path = os.path.normpath(os.path.join(parent, name))
            if name.startswith(".") or not os.path.isfile(path):
                continue
            if not _belongs(path, source.format):
                continue
            if name.endswith(".arrow"):
                raise DataError(
                    f"data.sources[{source.name}].paths: {path} is in no folder that `Dataset.save_to_disk` wrote; "
                    "expected one, whose state lists its files. Save the dataset so, or name the file itself."
                )
            yield path, (path, 0)


def _dataset_files(folder: str, names: Sequence[str], source: SourceSection) -> list[str] | None:
    """The files of a folder that `Dataset.save_to_disk` wrote, in order; None if it is not one.

    Source: datasets.arrow_dataset.Dataset.save_to_disk and datasets.dataset_dict.DatasetDict.save_to_disk.
    """
    if SPLITS_NAME in names:
        splits = _read_json(os.path.join(folder, SPLITS_NAME)).get("splits")
        found = [split for split in splits if isinstance(split, str)] if isinstance(splits, list) else []
        example = os.path.join(folder, found[0] if found else "train")
        raise DataError(
            f"data.sources[{source.name}].paths: {folder} holds a dataset's splits ({', '.join(found) or 'none'}); "
            f"expected one of them. Name it by its path, such as {example}."
        )
    if STATE_NAME not in names:
        return None
    entries = _read_json(os.path.join(folder, STATE_NAME)).get("_data_files")
    if not isinstance(entries, list):
        return None
    listed = [entry.get("filename") if isinstance(entry, dict) else None for entry in entries]
    paths = [os.path.normpath(os.path.join(folder, name)) for name in listed if isinstance(name, str)]
    missing = [path for path in paths if not os.path.isfile(path)]
    if missing or len(paths) < len(listed):
        raise DataError(
            f"data.sources[{source.name}].paths: {missing[0] if missing else 'a file'} is missing; expected every file "
            f"that {os.path.join(folder, STATE_NAME)} lists. Fetch or save the dataset again."
        )
    return paths


def _read_json(path: str) -> dict:
    """A JSON object, empty if the file holds something else."""
    try:
        content = json.loads(Path(path).read_bytes())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def decompressed(raw: BinaryIO, path: Path, size: int) -> BinaryIO:
    """The file's content as a stream that raises where the compressed data ends too early."""
    name = path.name.lower()
    if not name.endswith(_COMPRESSED):
        return raw
    if size == 0:
        raise EOFError("it is empty, which no compressed file is")
    if name.endswith(".bz2"):
        return cast(BinaryIO, io.BufferedReader(bz2.BZ2File(raw), READ_BYTES))
    if name.endswith(".gz"):
        return cast(BinaryIO, io.BufferedReader(gzip.GzipFile(fileobj=raw), READ_BYTES))
    return cast(BinaryIO, io.BufferedReader(_ZstdStream(raw), READ_BYTES))


class _ZstdStream(io.RawIOBase):
    """Zstandard frames one after another; zstandard's own reader takes a cut frame for the end of the file."""

    def __init__(self, raw: BinaryIO) -> None:
        self._raw = raw
        self._frame: zstandard.ZstdDecompressionObj | None = None
        self._input = b""
        self._output = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        while not self._output:
            self._input = self._input or self._raw.read(1 << 16)
            if not self._input:
                if self._frame is not None:
                    raise EOFError("its last Zstandard frame is cut short")
                return 0
            if self._frame is None:
                # `zstd --long` writes windows of up to 2 GiB, which the library refuses unless told.
                self._frame = zstandard.ZstdDecompressor(max_window_size=2**31).decompressobj()
            self._output = memoryview(self._frame.decompress(self._input))
            self._input = b""
            if self._frame.eof:
                self._input, self._frame = self._frame.unused_data, None
        length = min(len(buffer), len(self._output))
        buffer[:length] = self._output[:length]
        self._output = self._output[length:]
        return length
