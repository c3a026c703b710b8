"""Token ids that other trainers prepared: what goes in comes out, document by document, and every refusal."""

from __future__ import annotations

import random
import re
import struct
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from pretrain.data.shard_reader import ShardReader
from pretrain.data.shards import Manifest
from pretrain.data.source_files import list_files, token_format
from pretrain.errors import ConfigError, DataError
from pretrain.options.config import Config, SourceSection, TokenizerSection
from pretrain.preparing import sources, token_files
from pretrain.preparing.prepare import prepare
from pretrain.preparing.sources import ReadLog, document_digest, is_validation, read_token_documents
from pretrain.tokenizers.sentencepiece_tokenizer import SentencePieceTokenizer, train_tokenizer
from tests.helpers.token_writers import write_llmc, write_megatron, write_nanogpt

VOCAB_SIZE = 420


def text_of(number: int) -> str:
    rng = random.Random(number)
    return " ".join(rng.randbytes(rng.randint(1, 4)).hex() for _ in range(rng.randint(1, 80)))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tokenizer."""
    folder = tmp_path_factory.mktemp("tokens")
    section = TokenizerSection(model=str(folder / "t.model"), vocab_size=VOCAB_SIZE, sample_bytes=50_000)
    train_tokenizer(map(text_of, range(500)), section, 1)
    return folder


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> SentencePieceTokenizer:
    return SentencePieceTokenizer(folder / "t.model")


@pytest.fixture(scope="module")
def documents(tokenizer: SentencePieceTokenizer) -> list[list[int]]:
    return [tokenizer.encode(text_of(number)) for number in range(200)]


def source_of(*paths: str | Path, **options: str) -> SourceSection:
    return SourceSection(name="ids", paths=[str(path) for path in paths], shards="unused", **options)


def read(
    source: SourceSection, tokenizer: SentencePieceTokenizer, on_bad_document: str = "error", on_bad_file: str = "error"
):
    log, files = ReadLog(), list_files(source)
    held = token_format(files)
    assert held is not None
    return list(read_token_documents(files, held, tokenizer, on_bad_document, on_bad_file, log)), log


def ids_of(source: SourceSection, tokenizer: SentencePieceTokenizer) -> list[list[int]]:
    return [document.ids.tolist() for document in read(source, tokenizer)[0]]


def config_of(folder: Path, tokenizer: str, paths: list, **source: object) -> Config:
    return Config.model_validate(
        {
            "tokenizer": {"model": tokenizer, "vocab_size": VOCAB_SIZE},
            "data": {
                "sources": [
                    {"name": "ids", "paths": [str(p) for p in paths], "shards": str(folder / "shards")} | source
                ],
                "seq_len": 64,
                "val_fraction": 0.1,
                "shard_bytes": 8192,
                "prepare_processes": 2,
            },
            "model": {"dim": 16, "num_layers": 1, "num_heads": 1},
            "optim": {"lr": 0.001},
            "train": {"num_steps": 1, "global_batch_size": 1, "micro_batch_size": 1},
        }
    )


def read_back(folder: Path, split: str) -> list[list[int]]:
    manifest = Manifest.load(folder / "shards")
    documents = []
    for shard in manifest.shards(split):
        reader = ShardReader(folder / "shards", shard, manifest.dtype)
        documents += [reader.read(number).tolist() for number in range(shard.num_documents)]
        reader.close()
    return documents


@pytest.mark.parametrize("dtype", ["uint16", "int16", "int32", "int64"])
@pytest.mark.parametrize("sequences_each", [1, 3])
@pytest.mark.parametrize("ends", ["bare", "eod", "bos and eod"])
def test_megatron_documents_come_back(
    tmp_path: Path, tokenizer: SentencePieceTokenizer, documents: list, dtype: str, sequences_each: int, ends: str
) -> None:
    bos, eos = ([tokenizer.bos_id] if "bos" in ends else []), ([tokenizer.eos_id] if "eod" in ends else [])
    stored = [[*bos, *ids, *eos] for ids in documents]
    path = write_megatron(tmp_path / "mine_text_document", stored, dtype, sequences_each)
    found, log = read(source_of(path), tokenizer)
    assert [document.ids.tolist() for document in found] == documents
    assert [document.origin for document in found[:2]] == [f"{path}:1", f"{path}:2"]
    assert log.counts == {"documents_read": 200, "files_read": 2}
    assert log.position_bytes() == sum(file.stat().st_size for file in tmp_path.iterdir())


@pytest.mark.parametrize("chunk", [1 << 22, 7])
@pytest.mark.parametrize("kind", ["nanogpt", "llm.c", "llm.c uint32", "without a last eos", "with bos"])
def test_nanogpt_documents_come_back(
    tmp_path: Path,
    tokenizer: SentencePieceTokenizer,
    documents: list,
    kind: str,
    chunk: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(token_files, "_CHUNK_IDS", chunk)
    path = tmp_path / "train.bin"
    if kind.startswith("llm.c"):
        write_llmc(path, documents, tokenizer.eos_id, "uint32" if "32" in kind else "uint16")
    else:
        bos = [tokenizer.bos_id] if kind == "with bos" else []
        write_nanogpt(path, [[*bos, *ids] for ids in documents], tokenizer.eos_id)
    if kind == "without a last eos":
        path.write_bytes(path.read_bytes()[:-2])
    found, log = read(source_of(path, format="nanogpt"), tokenizer)
    assert [document.ids.tolist() for document in found] == documents
    assert log.counts == {"documents_read": 200, "files_read": 1}
    assert log.position_bytes() == path.stat().st_size
    if kind == "nanogpt":
        assert found[1].origin == f"{path}:{len(documents[0]) + 1}"


def test_empty_documents_are_counted(tmp_path: Path, tokenizer: SentencePieceTokenizer) -> None:
    write_megatron(tmp_path / "a", [[7, 8], [], [tokenizer.eos_id], [9]])
    found, log = read(source_of(tmp_path), tokenizer)
    assert [document.ids.tolist() for document in found] == [[7, 8], [9]] and log.counts["skipped_empty"] == 2
    write_nanogpt(tmp_path / "b.bin", [[7, 8], [], [9]], tokenizer.eos_id)
    found, log = read(source_of(tmp_path / "b.bin", format="nanogpt"), tokenizer)
    assert [document.ids.tolist() for document in found] == [[7, 8], [9]] and log.counts["skipped_empty"] == 1


def test_a_pair_is_found_by_its_stem_its_files_or_its_folder(tmp_path: Path, tokenizer: SentencePieceTokenizer) -> None:
    write_megatron(tmp_path / "b_text_document", [[7]])
    write_megatron(tmp_path / "a_text_document", [[8]])
    both = [tmp_path / f"{name}_text_document.{suffix}" for name in "ab" for suffix in ("bin", "idx")]
    assert list_files(source_of(tmp_path)) == both
    assert list_files(source_of(tmp_path / "*.bin")) == both == list_files(source_of(tmp_path / "*.idx"))
    for name in ("b_text_document", "b_text_document.bin", "b_text_document.idx"):
        assert list_files(source_of(tmp_path / name)) == both[2:]
    assert ids_of(source_of(tmp_path), tokenizer) == [[8], [7]]
    (tmp_path / "notes.txt").write_text("x")
    assert list_files(source_of(tmp_path, format="megatron")) == both
    with pytest.raises(
        DataError, match=r"_text_document.bin is one of 4 files that are not text; .* a source of their own"
    ):
        list_files(source_of(tmp_path))


def test_files_that_do_not_fit_the_format_are_refused(tmp_path: Path) -> None:
    write_nanogpt(tmp_path / "train.bin", [[7]], 2)
    (tmp_path / "prepare.py").write_text("x")
    assert list_files(source_of(tmp_path, format="nanogpt")) == [tmp_path / "train.bin"]
    with pytest.raises(DataError, match=r"paths: .*train.bin has no .*train.idx beside it; expected Megatron's pair of files, "
                       r"or .* nanoGPT writes it. Fetch the index, or set data.sources\[ids\].format: nanogpt\."):  # fmt: skip
        list_files(source_of(tmp_path / "train.bin"))
    with pytest.raises(
        DataError, match=r"prepare.py is not a file of token ids; expected .bin files, because .*format is nanogpt"
    ):
        list_files(source_of(tmp_path / "prepare.py", format="nanogpt"))
    write_megatron(tmp_path / "a", [[7]]).unlink()
    with pytest.raises(DataError, match=r"a.idx has no .*a.bin beside it; expected both. Fetch it\."):
        list_files(source_of(tmp_path / "a"))


@pytest.mark.parametrize("bad", [VOCAB_SIZE, 65_535, -3])
def test_an_id_that_is_not_the_tokenizers_is_an_error(
    tmp_path: Path, tokenizer: SentencePieceTokenizer, bad: int
) -> None:
    write_megatron(tmp_path / "a", [[7, 8], [9, 10, bad, 11]], "int32")
    message = rf"a.bin:2: id number 2 of the document is {bad}; expected 0 to 419, the ids of the tokenizer"
    with pytest.raises(DataError, match=message):  # whatever the config says of bad documents and files
        read(source_of(tmp_path / "a"), tokenizer, "skip", "skip")
    if bad > 0:
        write_nanogpt(tmp_path / "b.bin", [[7, 8], [9, bad]], tokenizer.eos_id)
        with pytest.raises(DataError, match=rf"b.bin:3: id number 1 of the document is {bad}; expected 0 to 419"):
            read(source_of(tmp_path / "b.bin", format="nanogpt"), tokenizer, "skip", "skip")


def damaged(index: bytes, what: str) -> bytes:
    sizes_at, num_sequences = 34, 3
    offsets_at = sizes_at + 4 * num_sequences
    bounds_at = offsets_at + 8 * num_sequences
    put = {
        "magic": (0, b"TNTIDX"),
        "version": (9, struct.pack("<Q", 2)),
        "dtype": (17, b"\x09"),
        "floats": (17, b"\x06"),
        "count": (18, struct.pack("<Q", 4)),
        "size": (sizes_at, struct.pack("<i", -1)),
        "offset": (offsets_at + 16, struct.pack("<q", 1 << 40)),
        "bounds": (bounds_at + 8, struct.pack("<q", 3)),
        "last bound": (bounds_at + 24, struct.pack("<q", 2)),
    }
    if what in put:
        place, value = put[what]
        return index[:place] + value + index[place + len(value) :]
    return {"header": index[:20], "cut": index[:-1], "longer": index + b"\0", "empty": b""}[what]


DAMAGES = {
    "magic": r"its index a.idx begins with b'TNTIDX",
    "version": "its index a.idx is of version 2, not 1",
    "dtype": "its index a.idx has the dtype code 9: ids of an unknown type",
    "floats": "its index a.idx has the dtype code 6: floats, not token ids",
    "count": r"its index a.idx has 102 bytes, not the 114 of 4 sequences and 4 document bounds",
    "size": "its index a.idx holds a negative size or offset",
    "offset": r"it has 14 bytes, not the 1,099,511,627,\d+ that its index a.idx lists",
    "bounds": "the documents of its index a.idx are not in order",
    "last bound": "the documents of its index a.idx cover the sequences 0 to 2, not 0 to 3",
    "header": "its index a.idx has 20 bytes, less than its header",
    "cut": "its index a.idx has 101 bytes, not the 102 of 3 sequences and 4 document bounds",
    "longer": "its index a.idx has 103 bytes, not the 102",
    "empty": "its index a.idx begins with b''",
}


@pytest.mark.parametrize("what", DAMAGES)
def test_a_damaged_index_is_an_error_or_counted(tmp_path: Path, tokenizer: SentencePieceTokenizer, what: str) -> None:
    write_megatron(tmp_path / "a", [[7, 8], [9], [10, 11, 12, 13]])
    (tmp_path / "a.idx").write_bytes(damaged((tmp_path / "a.idx").read_bytes(), what))
    write_megatron(tmp_path / "b", [[5]])
    with pytest.raises(
        DataError, match=rf"a.bin: the file cannot be read to its end \(.*{DAMAGES[what]}.*\); expected a whole"
    ):
        read(source_of(tmp_path), tokenizer)
    found, log = read(source_of(tmp_path), tokenizer, "error", "skip")
    assert [document.ids.tolist() for document in found] == [[5]] and log.counts["files_unreadable"] == 1


@pytest.mark.parametrize("change", [-2, -1, 2])
def test_ids_of_another_length_than_the_index_says_are_an_error(
    tmp_path: Path, tokenizer: SentencePieceTokenizer, change: int
) -> None:
    path = write_megatron(tmp_path / "a", [[7, 8], [9]])
    data = path.read_bytes()
    path.write_bytes(data[:change] if change < 0 else data + b"\0" * change)
    with pytest.raises(DataError, match=rf"it has {6 + change} bytes, not the 6 that its index a.idx lists"):
        read(source_of(tmp_path / "a"), tokenizer)


def test_damaged_bare_ids_are_an_error(tmp_path: Path, tokenizer: SentencePieceTokenizer) -> None:
    path = tmp_path / "a.bin"
    source = source_of(path, format="nanogpt")
    path.write_bytes(b"")
    with pytest.raises(DataError, match=r"\(it is empty\)"):
        read(source, tokenizer)
    path.write_bytes(b"\1\0\2")
    with pytest.raises(DataError, match=r"\(it has 3 bytes, which is no whole number of uint16 ids\)"):
        read(source, tokenizer)
    write_llmc(path, [[7, 8]], tokenizer.eos_id)
    path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(DataError, match=r"\(it has 1,028 bytes, not the 1,030 of the ids that its header says\)"):
        read(source, tokenizer)


def test_a_file_without_the_tokenizers_eos_says_so(
    tmp_path: Path, tokenizer: SentencePieceTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "MAX_DOCUMENT_TOKENS", 50)
    write_nanogpt(tmp_path / "a.bin", [[7] * 60, [8]], 5)
    source = source_of(tmp_path / "a.bin", format="nanogpt")
    with pytest.raises(
        DataError, match=r"a.bin:0: the document cannot be used: it has .* is the tokenizer's eos in the file"
    ):
        read(source, tokenizer)
    assert read(source, tokenizer, "skip")[1].counts["skipped_too_long"] == 1


@pytest.mark.parametrize("kind", ["megatron", "nanogpt"])
def test_prepare_imports_every_document_once(
    tmp_path: Path, folder: Path, tokenizer: SentencePieceTokenizer, documents: list, kind: str
) -> None:
    stored = [*documents, documents[3], documents[5]]
    if kind == "megatron":
        path = write_megatron(tmp_path / "raw/a", [[*ids, tokenizer.eos_id] for ids in stored], "int32")
    else:
        path = write_nanogpt(tmp_path / "raw/a.bin", stored, tokenizer.eos_id)
    options = {"format": kind} if kind == "nanogpt" else {}
    prepare(config_of(tmp_path, str(folder / "t.model"), [path], **options))
    manifest = Manifest.load(tmp_path / "shards")
    expected: dict[str, list] = {"train": [], "val": []}
    num_bytes = Counter[str]()
    digests = [document_digest(np.array(ids, "<u4").tobytes()) for ids in documents]
    for number in sorted(range(len(documents)), key=lambda number: digests[number][8:]):
        ids, split = documents[number], "val" if is_validation(digests[number], 0.1) else "train"
        expected[split].append([tokenizer.bos_id, *ids, tokenizer.eos_id])
        num_bytes[split] += len(text_of(number))
    assert {split: read_back(tmp_path, split) for split in expected} == expected
    assert len(expected["val"]) > 5 and len(manifest.train) > 1
    assert manifest.text_bytes == num_bytes  # so that bits per byte are those of the text
    assert manifest.counts == {"documents_read": 202, "duplicates": 2, "files_read": 1 + (kind == "megatron")}
    assert (manifest.dtype, manifest.tokenizer_fingerprint) == ("uint16", tokenizer.fingerprint)
    prepare(config_of(tmp_path, str(folder / "t.model"), [path], **options))  # nothing to do
    if kind == "nanogpt":
        with pytest.raises(
            ConfigError, match=r"changed since then: .*data.sources\[\].format from nanogpt to megatron"
        ):
            write_megatron(tmp_path / "raw/a", stored)
            prepare(config_of(tmp_path, str(folder / "t.model"), [path]))


def test_ids_need_their_tokenizer(tmp_path: Path, documents: list) -> None:
    path = write_megatron(tmp_path / "a", documents)
    with pytest.raises(ConfigError, match=rf"tokenizer.model is {re.escape(str(tmp_path))}/none.model, which does not exist; "
                       r"expected the tokenizer that the ids of data.sources\[ids\] \(megatron\) were made with"):  # fmt: skip
        prepare(config_of(tmp_path, str(tmp_path / "none.model"), [path]))
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.bin", "a.idx"]
