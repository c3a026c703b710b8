"""Tars of others as the shards of a corpus: which they are, what they are called, and how they come into its folder."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path

from pretrain.data.shards import JOURNAL_NAME, MANIFEST_NAME, PREPARE_COMMAND, Manifest
from pretrain.data.source_files import STDLIB, is_compressed, kind_of, list_files
from pretrain.errors import ConfigError
from pretrain.options.config import SourceSection
from pretrain.storage.whole_file import sync_folder

VAL_NAME = "held-out"  # of the shards of held-out documents, which lie beside the tars
VAL_FILE = re.compile(rf"\.?{VAL_NAME}-\d{{6,}}\.(tar|index\.npy)(\.tmp)?")
_WRITTEN = MANIFEST_NAME, JOURNAL_NAME, "train-000000.tar", "train-000000.index.npy", "share-1-of-1/spill-000001"
_UNSAFE = re.compile(r"[^A-Za-z0-9._-]+")  # in a URL


def list_originals(source: SourceSection) -> list[Path]:
    """List the files that a source names, as `list_files`, without those that an index has put among them."""
    folder = Path(source.shards)
    is_begun = (folder / JOURNAL_NAME).exists() or (folder / MANIFEST_NAME).exists()
    return [
        file
        for file in list_files(source)
        if not (is_begun and VAL_FILE.fullmatch(file.name) and file.parent.samefile(folder))
    ]


def tars_of(source: SourceSection) -> list[Path]:
    """The tars of a source that can be indexed; none if it is not one of tars.

    Raises:
        ConfigError: it has tars, and other files or compressed ones too.
        DataError: a path names nothing.
    """
    files = list_originals(source)
    tars = [file for file in files if kind_of(file, source.format) == "tar"]
    if not tars:
        return []
    where = f"data.sources[{source.name}]"
    other = [file for file in files if is_compressed(file) or not file.name.endswith(".tar")]
    if other:
        raise ConfigError(
            f"{where}.paths: {other[0]} cannot be indexed; expected files whose names end in .tar only, which can be "
            "read from any place. Decompress or rename it, give it a source of its own, or run without --index, which "
            "writes shards of ids."
        )
    return tars


def refuse_own_folder(source: SourceSection) -> None:
    """Check that shards of ids are not written where the source's paths find them, or among the tars that they name.

    Raises:
        ConfigError: they would be.
        DataError: a path names nothing.
    """
    folder = Path(source.shards)
    if (folder / MANIFEST_NAME).exists():
        return
    where = f"data.sources[{source.name}].shards is {folder}"
    tars = [file for file in list_files(source) if kind_of(file, source.format) == "tar"] if folder.is_dir() else []
    if any(file.parent.samefile(folder) for file in tars):
        raise ConfigError(
            f"{where}, where tars of its paths lie; expected another folder for shards of ids. Set another one, or use "
            f"the tars as they are: {PREPARE_COMMAND} --index"
        )
    if source.format != "auto":  # a folder's files of that format only
        return
    for pattern in source.paths:
        if pattern != STDLIB and any(_finds(pattern, folder / name) for name in _WRITTEN):
            raise ConfigError(
                f"{where}, which lies within its paths ({pattern!r}); expected a folder that they do not name, since "
                "`prepare` would read what it writes. Set another `shards` folder, or name the files of the source "
                "alone, such as 'folder/*.txt'."
            )


def _finds(pattern: str, file: Path) -> bool:
    """Whether one of a source's paths, a glob or not, names a file or a folder above it."""

    def is_match(parts: Sequence[str], patterns: Sequence[str]) -> bool:
        if not patterns:
            return not any(part.startswith(".") for part in parts)  # what is hidden in a folder is not read
        if patterns[0] == "**":
            return any(is_match(parts[number:], patterns[1:]) for number in range(len(parts) + 1))
        if not parts or (parts[0].startswith(".") and not patterns[0].startswith(".")):
            return False
        return fnmatchcase(parts[0], patterns[0]) and is_match(parts[1:], patterns[1:])

    absolute = Path(os.path.realpath(os.path.expanduser(pattern)))
    return is_match(Path(os.path.realpath(file)).parts, absolute.parts)


def is_index(folder: str | Path) -> bool:
    """Whether a folder holds a complete index of tars."""
    return Path(folder, MANIFEST_NAME).exists() and Manifest.load(folder).text is not None


def name_tars(source: SourceSection, tars: Sequence[Path]) -> list[str]:
    """What the corpus calls tars, without `.tar`: as they are called if all lie in its folder, else so that it is safe.

    Raises:
        ConfigError: two would be called the same, or one as a shard of held-out documents is.
    """
    names = [tar.name.removesuffix(".tar") for tar in tars]
    if not all(tar.parent.samefile(source.shards) for tar in tars):
        names = [_UNSAFE.sub("-", name) for name in names]
        if len(set(names)) < len(names):
            common = os.path.commonpath([tar.parent for tar in tars])
            names = [_UNSAFE.sub("-", os.path.relpath(tar, common)).removesuffix(".tar") for tar in tars]
    counts = Counter(names)
    for name, tar in zip(names, tars, strict=True):
        if counts[name] > 1 or VAL_FILE.fullmatch(f"{name}.tar"):
            reason = "another one is, too" if counts[name] > 1 else "so the index calls shards of its own"
            raise ConfigError(
                f"data.sources[{source.name}].paths: {tar} would be called {name}.tar in the index; expected a name of "
                f"its own, and {reason}. Rename it."
            )
    return names


def link_tars(source: SourceSection, names: Sequence[str], tars: list[Path]) -> None:
    """Make every tar a file of the corpus's folder: by a symbolic link, unless it lies there.

    Args:
        source: its `shards` is the folder.
        names: what the corpus calls the tars.
        tars: all that `tars_of` gives.

    Raises:
        ConfigError: another file has such a name; or the source's paths find what is in the folder beside the tars.
    """
    made = []
    for name, tar in zip(names, tars, strict=True):
        link = Path(source.shards, f"{name}.tar")
        if link.exists() and link.samefile(tar):
            continue
        if link.exists() and not link.is_symlink():
            raise ConfigError(
                f"{link} is there, and is not {tar}; expected a folder without tars of that name. Set another `shards` "
                "folder for this source."
            )
        link.unlink(missing_ok=True)
        link.symlink_to(tar.absolute())
        made.append(link)
    if list_originals(source) != tars:
        for link in made:
            link.unlink()
        raise ConfigError(
            f"data.sources[{source.name}].shards is {source.shards}, where its paths find files of the index beside "
            "the tars; expected paths that name the tars alone. Write them as 'folder/*.tar', or set another folder."
        )
    if made:
        sync_folder(source.shards)
