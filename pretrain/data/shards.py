"""Shards of token ids: plain tar files, an index beside each, and the manifest of a prepared corpus.

A shard is an ustar file that any webdataset reader opens; its members hold about 1 MiB of documents' ids,
back to back, so that the tar's headers cost nothing (one document a member nearly doubles the size). The
index holds where each document lies, so that one `pread` fetches it. webdataset writes the tars; it does
not read them here, because its readers cannot seek and pass damaged data on without an exception.

Everything is written under a temporary name, synced and renamed: what has its final name is complete.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import zlib
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from pretrain.data.text_index import INDEX_DTYPE, TEXT_INDEX_DTYPE, TextContent, is_begun_index
from pretrain.errors import DataError
from pretrain.storage.hashed_file import HashedFile
from pretrain.storage.whole_file import sync_folder, write_atomically

MANIFEST_VERSION, EXAMPLES_VERSION = 1, 2  # a corpus of documents; one whose ids say what is context
MANIFEST_NAME = "manifest.json"
JOURNAL_NAME = "prepare.jsonl"  # of what `prepare` has done
PREPARE_COMMAND = "python launch/prepare.py CONFIG"
_MEMBER_BYTES = 1 << 20
_TAR_BLOCK_BYTES = 512


@dataclass(frozen=True)
class Shard:
    """One tar and its index as they were written.

    Attributes:
        name: File name without `.tar`, such as `train-000000`.
        num_bytes: Size of the tar.
        num_documents: Documents in it.
        num_tokens: Token ids in it, bos and eos included.
        sha256: Hash of the tar, hexadecimal.
        index_sha256: Hash of the index file, hexadecimal.
    """

    name: str
    num_bytes: int
    num_documents: int
    num_tokens: int
    sha256: str
    index_sha256: str


@dataclass(frozen=True)
class Manifest:
    """What a prepared corpus consists of; written last, so that its presence means complete.

    Attributes:
        version: Format of the folder, `MANIFEST_VERSION` or `EXAMPLES_VERSION`.
        corpus: Name of the corpus.
        dtype: `uint16` or `uint32`, little-endian in the shards.
        tokenizer_fingerprint: sha256 of the tokenizer's model file.
        vocab_size: Number of token ids; every id is below it.
        train: Shards of the training split, in order.
        val: Shards of the held-out split, in order.
        text_bytes: UTF-8 bytes of text per split.
        counts: Documents read, kept and skipped, by reason.
        source_fingerprint: Identifies the raw text that was read.
        context_bit: Bit that is set in the ids of tokens that are not scored; None if all are.
        text: How the training shards' text becomes ids, if they are tars of others; None if they hold ids.
    """

    version: int
    corpus: str
    dtype: str
    tokenizer_fingerprint: str
    vocab_size: int
    train: tuple[Shard, ...]
    val: tuple[Shard, ...]
    text_bytes: dict[str, int]
    counts: dict[str, int]
    source_fingerprint: str
    context_bit: int | None = None
    text: TextContent | None = None

    def shards(self, split: str) -> tuple[Shard, ...]:
        """The shards of `train` or `val`."""
        return {"train": self.train, "val": self.val}[split]

    def fingerprint(self) -> str:
        """sha256 of what fixes the data that training sees: the shards' content and the tokenizer."""
        content = {
            "version": self.version,
            "dtype": self.dtype,
            "tokenizer": self.tokenizer_fingerprint,
            "train": [[shard.sha256, shard.index_sha256] for shard in self.train],
            "val": [[shard.sha256, shard.index_sha256] for shard in self.val],
        }
        if self.text is not None:
            content["text_field"] = self.text.text_field
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def save(self, folder: str | Path) -> None:
        """Write `manifest.json` into `folder`, complete or not at all.

        Raises:
            DataError: The file cannot be written, for example because the disk is full.
        """
        path = Path(folder) / MANIFEST_NAME
        content = {key: value for key, value in asdict(self).items() if value is not None}
        try:
            write_atomically(path, (json.dumps(content, indent=1, sort_keys=True) + "\n").encode())
        except OSError as error:
            raise DataError(f"{path}: cannot be written: {error.strerror or error}. Shards are kept.") from error

    @staticmethod
    def load(folder: str | Path) -> Manifest:
        """Read the manifest of a prepared corpus.

        Raises:
            DataError: The corpus is not prepared, or the manifest is damaged or of another version.
        """
        path = Path(folder) / MANIFEST_NAME
        try:
            content = json.loads(path.read_bytes())
        except FileNotFoundError as error:
            how = " --index" if is_begun_index(path.with_name(JOURNAL_NAME)) else ""
            raise DataError(f"{path} is missing; expected a prepared corpus. Run: {PREPARE_COMMAND}{how}") from error
        except (OSError, ValueError) as error:
            raise DataError(f"{path} cannot be read: {error}. Delete it and run: {PREPARE_COMMAND}") from error
        version = content.get("version") if isinstance(content, dict) else None
        if version not in (MANIFEST_VERSION, EXAMPLES_VERSION):
            raise DataError(
                f"{path}: version is {version}; expected {MANIFEST_VERSION} or {EXAMPLES_VERSION}. "
                f"Prepare the corpus into a new folder with this version: {PREPARE_COMMAND}"
            )
        try:
            parts: dict[str, Any] = {
                split: tuple(Shard(**shard) for shard in content[split]) for split in ("train", "val")
            }
            parts["context_bit"] = content["context_bit"] if version == EXAMPLES_VERSION else None
            parts["text"] = TextContent(**content["text"]) if "text" in content else None
            return Manifest(
                **{field.name: content[field.name] for field in fields(Manifest) if field.name not in parts}, **parts
            )
        except (KeyError, TypeError) as error:
            raise DataError(
                f"{path}: a field is wrong or missing ({error}). Delete the file and run: {PREPARE_COMMAND}"
            ) from error


def _import_webdataset() -> Any:
    """Import webdataset, without torch if nobody has imported that yet.

    It imports torch if it can, for its data loaders, and does without it if it cannot: 0.4 s and 36 MB instead of 3 s
    and 226 MB, at every start of `prepare`. It is not imported at the top of the file, since readers need neither.
    """
    hides_torch = "torch" not in sys.modules
    if hides_torch:
        sys.modules["torch"] = None  # type: ignore[assignment]  # what Python takes for "not installed"
    try:
        import webdataset
    finally:
        if hides_torch:
            del sys.modules["torch"]
    return webdataset


class ShardWriter:
    """Writes documents into shards of about `shard_bytes`, with bytes that depend on the documents alone."""

    def __init__(self, folder: str | Path, split: str, dtype: str, shard_bytes: int, first_shard: int = 0) -> None:
        """Prepare the folder; files appear with the first document.

        Args:
            folder: Where the shards go; made if missing.
            split: `train` or `val`.
            dtype: `uint16` or `uint32`.
            shard_bytes: A shard ends with the document that brings its tar to this size.
            first_shard: Number of the first shard, to go on after complete ones.
        """
        self._folder = Path(folder)
        self._split = split
        self._dtype = np.dtype(dtype).newbyteorder("<")
        self._shard_bytes = shard_bytes
        self._next_shard = first_shard
        self._file: HashedFile | None = None
        self._tar: Any = None
        self._member = bytearray()
        self._member_offset = 0  # of the current member's first id in the tar
        self._num_members = 0
        self._records: list[tuple[int, int, int]] = []

    @property
    def _name(self) -> str:
        return f"{self._split}-{self._next_shard:06d}"

    def add(self, ids: np.ndarray) -> Shard | None:
        """Append one document.

        Args:
            ids: Token ids, bos and eos included, of the shards' dtype or one that fits into it.

        Returns:
            The shard that this document completed, now under its final name, or None.

        Raises:
            DataError: The shard cannot be written, for example because the disk is full.
        """
        data = ids.astype(self._dtype, casting="safe").tobytes()
        try:
            if self._file is None:
                self._begin_shard()
            self._records.append((self._member_offset + len(self._member), len(ids), zlib.crc32(data)))
            self._member += data
            if len(self._member) >= _MEMBER_BYTES:
                self._write_member()
            if self._member_offset + len(self._member) >= self._shard_bytes:
                return self._finish_shard()
        except OSError as error:
            raise self._failure(error) from error
        return None

    def close(self) -> Shard | None:
        """Finish the shard that is not full yet, if there is one, and return it."""
        try:
            return self._finish_shard() if self._file is not None else None
        except OSError as error:
            raise self._failure(error) from error

    def abort(self) -> None:
        """Delete the shard that is not complete; complete ones stay."""
        if self._file is not None:
            self._file.discard()
        self._file = self._tar = None
        self._member.clear()
        self._records = []

    def _begin_shard(self) -> None:
        webdataset = _import_webdataset()
        self._folder.mkdir(parents=True, exist_ok=True)
        self._file = HashedFile(self._folder / f".{self._name}.tar.tmp")
        # Fixed owner, mode and time: the same documents give the same bytes. mtime must be the integer 0: a
        # float writes PAX headers, which cost 1 KiB a member.
        self._tar = webdataset.TarWriter(
            self._file, user="root", group="root", mode=0o444, compress=False, encoder=False, mtime=0
        )
        self._num_members = 0
        self._member_offset = _TAR_BLOCK_BYTES

    def _write_member(self) -> None:
        self._tar.write({"__key__": f"{self._name}/{self._num_members:06d}", "bin": bytes(self._member)})
        self._num_members += 1
        num_blocks = -(-len(self._member) // _TAR_BLOCK_BYTES) + 1  # data, and the next member's header
        self._member_offset += num_blocks * _TAR_BLOCK_BYTES
        self._member.clear()

    def _finish_shard(self) -> Shard:
        assert self._file is not None
        if self._member:
            self._write_member()
        self._tar.close()
        index = np.array(self._records, dtype=INDEX_DTYPE)
        index_target = index_path(self._folder, self._name)
        index_file = HashedFile(index_target.with_name(f".{index_target.name}.tmp"))
        try:
            np.lib.format.write_array(index_file, index, allow_pickle=False)
            index_sha256 = index_file.sync()
            sha256 = self._file.sync()
            os.replace(index_file.path, index_target)
            os.replace(self._file.path, self._folder / f"{self._name}.tar")
            sync_folder(self._folder)
        except OSError:
            index_file.discard()
            raise
        num_tokens = int(index["num_tokens"].sum(dtype=np.uint64))
        shard = Shard(self._name, self._file.num_bytes, len(index), num_tokens, sha256, index_sha256)
        self._file = self._tar = None
        self._records = []
        self._next_shard += 1
        return shard

    def _failure(self, error: OSError) -> DataError:
        name = self._name
        self.abort()
        return DataError(
            f"{self._folder}: {name}.tar cannot be written: {error.strerror or error}. "
            f"Complete shards before it are kept. Mend this (free some space) and run again: {PREPARE_COMMAND}"
        )


def index_path(folder: Path, name: str) -> Path:
    """Where the index of a shard lies."""
    return folder / f"{name}.index.npy"


def file_sha256(path: Path) -> str:
    """sha256 of a file, hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def load_index(folder: str | Path, shard: Shard) -> np.ndarray:
    """Memory-maps a shard's index.

    Returns:
        Array of `INDEX_DTYPE`, one record a document; of a tar of text `TEXT_INDEX_DTYPE`.

    Raises:
        DataError: The index is missing, damaged or of another shard.
    """
    index = _load_index(Path(folder), shard.name)
    if len(index) != shard.num_documents:
        raise DataError(
            f"{index_path(Path(folder), shard.name)}: documents are {len(index)}; expected "
            f"{shard.num_documents}, as in the manifest. {repair_advice(Path(folder))}"
        )
    return index


def _load_index(folder: Path, name: str) -> np.ndarray:
    path = index_path(folder, name)
    try:
        index = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise DataError(f"{path} cannot be read: {error}. {repair_advice(folder)}") from error
    if index.dtype not in (INDEX_DTYPE, TEXT_INDEX_DTYPE) or index.ndim != 1:
        raise DataError(f"{path}: dtype is {index.dtype}; expected {INDEX_DTYPE}. {repair_advice(folder)}")
    return index


def repair_advice(folder: Path) -> str:
    """The sentence that says how a damaged file of a corpus is mended; others' tars are not to be deleted."""
    try:
        holds_tars = Manifest.load(folder).text is not None
    except DataError:
        holds_tars = False
    if holds_tars:
        return f"Restore the file from a copy, or index the tars into another folder: {PREPARE_COMMAND} --index"
    return f"Restore the file from a copy, or delete {folder} and run: {PREPARE_COMMAND}"
