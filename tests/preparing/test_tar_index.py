"""`prepare --index`: tars of others trained on as they are; the same documents and guarantees as of shards of ids."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import torch

from launch.prepare import main
from pretrain.data import text_shards
from pretrain.data.data_plan import open_plan
from pretrain.data.shard_reader import DamagedDocumentError, ShardReader
from pretrain.data.shards import Manifest, load_index
from pretrain.data.stream import TokenStream, ValRows
from pretrain.data.text_index import TextContent
from pretrain.data.text_shards import TextShardReader, tokenize_pieces
from pretrain.errors import ConfigError, DataError
from pretrain.options.config import Config
from pretrain.preparing import tar_documents
from pretrain.preparing.inspect_shards import inspect, render
from pretrain.preparing.prepare import prepare
from pretrain.preparing.sources import document_digest, is_validation
from pretrain.preparing.tar_documents import first_of_equals
from pretrain.preparing.verify_shards import Problem, verify
from pretrain.tokenizers.sentencepiece_tokenizer import SentencePieceTokenizer
from pretrain.tokenizers.tokenizer_files import open_tokenizer
from tests.helpers.data_helpers import batch_plan, flip_bit
from tests.helpers.rank_helpers import metric_lines, run_command
from tests.helpers.store_server import StoreServer
from tests.helpers.tokenizer_helpers import train_json
from tests.preparing.tar_helpers import text_samples, write_tar
from tests.preparing.test_prepare import VOCAB_SIZE, config_of, hashes, text_of

ROOT = Path(__file__).resolve().parents[2]
NUM_STEPS, BATCH, SEQ_LEN = 60, 12, 64
TEXTS = [text_of(number, 700 if number % 9 == 0 else 40) for number in range(150)]


def write_tars(folder: Path) -> None:
    """Tars of every kind: with and without PAX headers, of .txt, .json and both beside images, of no documents."""
    parts = [TEXTS[begin : begin + 30] for begin in range(0, 150, 30)]
    write_tar(folder / "web-000000.tar", text_samples(parts[0], "txt"), mtime=0)
    write_tar(folder / "web-000001.tar", text_samples(parts[1], "json", "part/of/" + "name" * 30 + "/"))
    write_tar(folder / "web-000002.tar", [{"__key__": "a", "jpg": b"x" * 2000}], mtime=0)
    write_tar(folder / "web-000003.tar", text_samples([*parts[2], *parts[1][:5]], "mixed"))
    write_tar(folder / "web-000004.tar", [], mtime=0)
    write_tar(folder / "web-000005.tar", text_samples([*parts[3], *parts[4], TEXTS[0], ""], "mixed"), mtime=0)


def config_in(folder: Path, shards: str = "index", **data: object) -> Config:
    source = {"paths": [str(folder / "raw/*.tar")], "shards": str(folder / shards), **data.pop("source", {})}
    return config_of(folder, source=source, **data)


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with tars, a tokenizer, their index (`index`), and the same tokenized ahead (`shards`)."""
    folder = tmp_path_factory.mktemp("tars") / "done"
    write_tars(folder / "raw")
    prepare(config_in(folder), makes_index=True)
    prepare(config_in(folder, "shards"))
    return folder


@pytest.fixture
def fresh(done: Path, tmp_path: Path) -> Path:
    """A folder with the same tars and tokenizer, and no index."""
    return copy_of(done, tmp_path / "fresh")


@pytest.fixture
def copied(done: Path, tmp_path: Path) -> Path:
    """A folder with the same tars, an index of them beside them, and nothing shared."""
    folder = copy_of(done, tmp_path / "copied")
    prepare(config_in(folder, "raw"), makes_index=True)
    return folder


def copy_of(done: Path, folder: Path) -> Path:
    shutil.copytree(done / "raw", folder / "raw")
    shutil.copy(done / "t.model", folder)
    return folder


def tokenizer_of(folder: Path) -> SentencePieceTokenizer:
    return SentencePieceTokenizer(folder / "t.model")


def reader_of(folder: Path, number: int = 0) -> TextShardReader:
    manifest = Manifest.load(folder)
    return text_shards.text_opener(manifest, tokenizer_of(folder.parent))(folder, manifest.train[number], "uint16")


def documents_of(folder: Path, split: str) -> list[bytes]:
    """The ids of every document, as bytes, sorted."""
    manifest = Manifest.load(folder)
    open_shard = text_shards.text_opener(manifest, tokenizer_of(folder.parent)) if split == "train" else ShardReader
    found = []
    for shard in manifest.shards(split):
        with closing(open_shard(folder, shard, manifest.dtype)) as reader:
            found += [reader.read(document).tobytes() for document in range(shard.num_documents)]
    return sorted(found)


# What an index holds


@pytest.mark.parametrize("split", ["train", "val"])
def test_an_index_gives_the_documents_that_tokenizing_ahead_gives(done: Path, split: str) -> None:
    expected = [text for text in TEXTS if is_validation(document_digest(text.encode()), 0.1) == (split == "val")]
    ids = sorted(document.tobytes() for document in tokenizer_of(done).encode_documents(expected))
    assert documents_of(done / "index", split) == documents_of(done / "shards", split) == ids
    index, ahead = (Manifest.load(done / name) for name in ("index", "shards"))
    assert index.text_bytes == ahead.text_bytes == index.text_bytes | {split: len("".join(expected).encode())}
    assert index.counts == ahead.counts
    assert index.counts == {
        "documents_read": 157, "duplicates": 6, "files_read": 6, "ignored_jpg": 98, "skipped_empty": 1,
    }  # fmt: skip


def test_tars_stay_as_they_are_and_the_index_says_where_each_text_lies(done: Path, copied: Path) -> None:
    manifest = Manifest.load(copied / "raw")
    assert [shard.name for shard in manifest.train] == ["web-000000", "web-000001", "web-000003", "web-000005"]
    for shard in manifest.train:
        content = (done / f"raw/{shard.name}.tar").read_bytes()
        assert (copied / f"raw/{shard.name}.tar").read_bytes() == content  # the very folder: nothing was touched
        assert (done / f"index/{shard.name}.tar").readlink() == done / f"raw/{shard.name}.tar"
        assert (shard.num_bytes, shard.sha256) == (len(content), hashlib.sha256(content).hexdigest())
        for record in load_index(copied / "raw", shard):
            data = content[int(record["offset"]) : int(record["offset"]) + int(record["num_bytes"])]
            assert (json.loads(data)["text"] if record["is_json"] else data.decode()) in TEXTS
    assert manifest.fingerprint() == Manifest.load(done / "index").fingerprint()
    assert manifest.text is not None and manifest.text.text_field == "text"


def test_manifests_of_ids_are_what_they_were(done: Path) -> None:
    content = json.loads((done / "shards/manifest.json").read_bytes())
    assert set(content) == {"version", "corpus", "dtype", "tokenizer_fingerprint", "vocab_size", "train", "val",
                            "text_bytes", "counts", "source_fingerprint"}  # fmt: skip
    assert set(content["train"][0]) == {"name", "num_bytes", "num_documents", "num_tokens", "sha256", "index_sha256"}
    fixed = Manifest(1, "web", "uint16", "a" * 64, 1000, (), (), {"train": 1, "val": 0}, {}, "b" * 64)
    assert fixed.fingerprint() == "cda5e01c560e0118d7ef9697d3ccba3c8508ecb3aabed6d3bab5c97962d0df3c"


def test_nothing_depends_on_the_number_of_processes(done: Path, fresh: Path) -> None:
    folders = []
    for processes in (1, 2):
        filters = {"min_characters": 100, "near_duplicates": 0.8}  # in processes of their own
        config = config_in(fresh, f"index-{processes}", prepare_processes=processes, filters=filters)
        prepare(config, makes_index=True)
        folders.append(hashes(fresh / f"index-{processes}"))
    assert folders[0] == folders[1] and folders[0] != hashes(done / "index")


def test_filters_that_drop_are_heard(fresh: Path) -> None:
    near = TEXTS[0].replace(TEXTS[0][:10], "other words", 1)
    write_tar(fresh / "raw/web-000006.tar", text_samples([near, "short", "a secret AKIA" + "Q3X7" * 4, TEXTS[1] + "."]))
    filters = {"min_characters": 20, "near_duplicates": 0.8, "secrets": "drop"}
    for name, makes_index in (("index", True), ("shards", False)):
        prepare(config_in(fresh, name, filters=filters), makes_index=makes_index)
    index, ahead = (Manifest.load(fresh / name) for name in ("index", "shards"))
    assert index.counts == ahead.counts
    assert {name: index.counts[name] for name in ("skipped_short", "skipped_secrets", "near_duplicates")} == {
        "skipped_short": 1, "skipped_secrets": 1, "near_duplicates": 2,
    }  # fmt: skip
    # Of two that are nearly equal, the one that stays is the first of the tars here, and of the hashes there.
    ours, theirs = (
        documents_of(fresh / name, "train") + documents_of(fresh / name, "val") for name in ("index", "shards")
    )
    assert len(ours) == len(theirs) and len(set(ours) - set(theirs)) <= 2


def test_copies_are_found_in_parts_of_any_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    random = np.random.default_rng(1)
    tables, seen = [], set()
    expected = []
    for size in (40, 0, 100, 7):
        table = np.zeros(size, tar_documents.DOCUMENT_DTYPE)
        table["head"], table["tail"] = random.integers(0, 40, size), random.integers(0, 2, size)
        tables.append(tmp_path / str(len(tables)))
        with open(tables[-1], "wb") as file:
            np.save(file, table)
        keys = list(zip(table["head"].tolist(), table["tail"].tolist(), strict=True))
        expected.append([key not in seen and not seen.add(key) for key in keys])  # type: ignore[func-returns-value]
    for at_once in (1, 10, 1 << 20):
        monkeypatch.setattr(tar_documents, "_DIGESTS_AT_ONCE", at_once)
        assert [part.tolist() for part in first_of_equals(tables)] == expected


def test_long_documents_are_tokenized_in_part(done: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer, text = tokenizer_of(done), TEXTS[0]
    ids, pieces = tokenize_pieces(tokenizer, text)
    assert np.array_equal(ids, tokenizer.encode_document(text)) and len(pieces) > 3
    index = load_index(done / "index", Manifest.load(done / "index").train[0])
    long = int(np.argmax(index["num_tokens"]))
    reader = reader_of(done / "index")
    whole = reader.read(long)
    encoded: list[str] = []
    encode = SentencePieceTokenizer.encode
    monkeypatch.setattr(SentencePieceTokenizer, "encode", lambda self, part: encoded.append(part) or encode(self, part))
    random = np.random.default_rng(1)
    for begin in [0, 1, len(whole) - 65, len(whole) - 1, *random.integers(0, len(whole), 40).tolist()]:
        encoded.clear()
        assert np.array_equal(reader.read(long, begin, begin + 65), whole[begin : begin + 65])
        assert sum(map(len, encoded)) < 3 * (text_shards.PIECE_CHARACTERS + 300)
    assert len(reader.read(long, 5, 5)) == 0 and len(reader.read(long, len(whole), len(whole) + 9)) == 0
    reader.close()


def test_a_tokenizer_without_places_to_cut_gives_the_same_and_a_warning(
    fresh: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = train_json("gpt2", fresh / "json")
    tokenizer = {"model": str(path), "vocab_size": 600}
    for name, makes_index in (("index", True), ("shards", False)):
        source = {"paths": [str(fresh / "raw/*.tar")], "shards": str(fresh / name)}
        config = config_of(fresh, source=source, tokenizer=tokenizer)
        prepare(config, makes_index=makes_index)
    assert "warning: web: training will tokenize" in capsys.readouterr().err
    index, ahead = (Manifest.load(fresh / name) for name in ("index", "shards"))
    own = open_tokenizer(config.tokenizer)
    found = []
    for manifest, folder in ((index, fresh / "index"), (ahead, fresh / "shards")):
        ids = []
        for shard in manifest.train:
            with closing(text_shards.text_opener(manifest, own)(folder, shard, "uint16")) as reader:
                ids += [reader.read(document).tobytes() for document in range(shard.num_documents)]
        found.append(sorted(ids))
    assert found[0] == found[1] and index.text is not None and list(index.text.libraries) == ["tokenizers"]


# In training


def steps_of(config: Config, num_steps: int, world_size: int, micro: int, state: dict | None = None):
    """Global batches, and the state after them."""
    fingerprint = open_tokenizer(config.tokenizer).fingerprint
    sizes = batch_plan(BATCH, world_size, micro, SEQ_LEN)
    streams = [TokenStream(config, sizes, rank, fingerprint) for rank in range(world_size)]
    steps = []
    for stream in streams:
        if state is not None:
            stream.load_state(json.loads(json.dumps(state)))
    for _ in range(num_steps):
        batches = [batch for stream in streams for batch in stream.next_step().micro_batches]
        steps.append([torch.cat([getattr(batch, name) for batch in batches])
                      for name in ("tokens_BT", "targets_BT", "doc_start_BT", "row_ids_B")])  # fmt: skip
    state = streams[0].state()
    for stream in streams:
        stream.close()
    return steps, state


def mixed(folder: Path, **data: object) -> Config:
    """A config of an index and of shards of ids."""
    values = config_in(folder, **data).model_dump()
    values["data"]["sources"] = [
        {"name": "web", "shards": str(folder / "index"), "weight": 2},
        {"name": "ids", "shards": str(folder / "shards"), "weight": 1},
    ]
    return Config.model_validate(values)


@pytest.mark.parametrize("parts", [[(20, 2, 3), (25, 4, 1), (15, 3, 4)], [(1, 12, 1), (59, 1, 12)]], ids=str)
def test_batches_are_the_same_for_any_ranks_and_restarts(done: Path, parts: list[tuple[int, int, int]]) -> None:
    config = mixed(done)
    expected, _ = steps_of(config, NUM_STEPS, 1, 6)
    found, state = [], None
    for num_steps, world_size, micro in parts:
        steps, state = steps_of(config, num_steps, world_size, micro, state)
        found += steps
    assert len(found) == NUM_STEPS
    for step, other in zip(found, expected, strict=True):
        assert all(torch.equal(tensor, wanted) for tensor, wanted in zip(step, other, strict=True))


def test_an_epoch_scores_every_token_of_every_document_once(done: Path) -> None:
    config = config_in(done)
    num_rows = open_plan(config, tokenizer_of(done).fingerprint)[0].epoch_rows_at(0)["web"]
    with closing(TokenStream(config, batch_plan(num_rows, 1, 1, SEQ_LEN), 0, tokenizer_of(done).fingerprint)) as stream:
        rows = stream.next_step()
    assert not rows.damaged
    targets = np.concatenate([batch.targets_BT.numpy().ravel() for batch in rows.micro_batches])
    ids = [np.frombuffer(document, "<u2") for document in documents_of(done / "index", "train")]
    expected = np.bincount(np.concatenate([document[1:] for document in ids]), minlength=VOCAB_SIZE)
    assert np.array_equal(np.bincount(targets[targets >= 0], minlength=VOCAB_SIZE), expected)


def test_held_out_documents_are_read_without_the_tars_and_the_tokenizer(copied: Path) -> None:
    config, fingerprint = config_in(copied, "raw"), tokenizer_of(copied).fingerprint
    for tar in (copied / "raw").glob("web-*.tar"):
        tar.unlink()
    (copied / "t.model").unlink()
    with closing(ValRows(config, fingerprint, 0)) as rows:
        assert rows.num_rows > 3
        assert all(len(rows.batch([number]).tokens_BT) for number in range(rows.num_rows))
        assert not rows.take_damaged()


def test_another_tokenizer_is_refused(done: Path, fresh: Path) -> None:
    train_json("gpt2", fresh / "json")
    config = config_in(done)
    values = config.model_dump()
    values["tokenizer"] = {"model": str(fresh / "json/tokenizer.json"), "vocab_size": 600}
    other = Config.model_validate(values)
    with pytest.raises(DataError, match="was prepared with tokenizer"):
        TokenStream(other, batch_plan(1, 1, 1, SEQ_LEN), 0, open_tokenizer(other.tokenizer).fingerprint)
    with pytest.raises(DataError, match=r"tokenizer.model: its fingerprint is .*; expected .* indexed with"):
        TokenStream(other, batch_plan(1, 1, 1, SEQ_LEN), 0, tokenizer_of(done).fingerprint)
    with pytest.raises(ConfigError, match="the tokenizer from .* Set another `shards` folder for this source.$"):
        prepare(other, makes_index=True)


def test_a_library_that_gives_other_ids_is_noticed(done: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encode, changed = SentencePieceTokenizer.encode, [""]

    def change(self: SentencePieceTokenizer, text: str) -> list[int]:
        ids = encode(self, text)
        return [*ids[:-1], 7] if text.startswith(changed[0]) else ids

    reader = reader_of(done / "index")
    first = tokenizer_of(done).decode(reader.read(0))
    monkeypatch.setattr(SentencePieceTokenizer, "encode", change)
    changed[0] = first[:20]
    ending = "Index the tars into another folder: python launch/prepare.py CONFIG --index"
    with pytest.raises(
        DamagedDocumentError, match=rf"document 0: its ids are not those .* in another build.* {ending}"
    ):
        reader.read(0)
    reader._content = TextContent("text", {"sentencepiece": "0.1.9"})
    assert len(reader.read(1)) > 3
    changed[0] = ""
    for document in range(1, 7):
        with pytest.raises(DamagedDocumentError, match=r"It was indexed with sentencepiece 0.1.9, and sentencepiece 0"):
            reader.read(document)
    with pytest.raises(DataError, match=r"8 documents have other ids than in the index and 2 have .* Install that ver"):
        reader.read(7)
    reader.close()


def test_batches_come_from_a_server_that_fails(done: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pretrain.storage.stores.FIRST_PAUSE_SECONDS", 0.02)
    monkeypatch.setattr("pretrain.storage.stores.STALL_SECONDS", 0.5)
    expected, _ = steps_of(config_in(done), 12, 1, 12)
    server = StoreServer(done)
    try:
        server.faults["web-000000.tar"] = ["drop", "corrupt"]
        server.faults["web-000003.index.npy"] = ["corrupt", "503"]
        values = config_in(done).model_dump()
        values["data"] |= {"sources": [{"name": "web", "shards": f"{server.url}/index"}],
                           "cache_dir": str(tmp_path / "cache"), "retry_seconds": 20}  # fmt: skip
        found, _ = steps_of(Config.model_validate(values), 12, 1, 12)
        assert server.requests["index/web-000000.tar"] == 3 and server.requests["index/web-000003.index.npy"] == 3
    finally:
        server.close()
    assert all(torch.equal(one, other) for step, steps in zip(found, expected, strict=True)
               for one, other in zip(step, steps, strict=True))  # fmt: skip


# Damage


def shard_place(folder: Path, number: int, document: int) -> tuple[Path, int]:
    """The tar of a shard, and the first byte of a document in it."""
    shard = Manifest.load(folder).train[number]
    return folder / f"{shard.name}.tar", int(load_index(folder, shard)["offset"][document])


def problems_of(folder: Path) -> list[str]:
    return [str(Problem(**problem)) for problem in verify(folder, 1)["problems"]]


def test_a_flipped_bit_of_a_text_masks_its_document_and_shifts_nothing(copied: Path) -> None:
    config = config_in(copied, "raw")
    num_rows = open_plan(config, tokenizer_of(copied).fingerprint)[0].epoch_rows_at(0)["web"]
    assert problems_of(copied / "raw") == []

    def read():
        sizes = batch_plan(num_rows, 1, num_rows, SEQ_LEN)
        with closing(TokenStream(config, sizes, 0, tokenizer_of(copied).fingerprint)) as stream:
            step = stream.next_step()
            return step.micro_batches[0], step.damaged

    before, _ = read()
    tar, offset = shard_place(copied / "raw", 1, 4)
    flip_bit(tar, offset + 5)
    after, damaged = read()
    assert damaged and all("web-000001.tar document 4 in row" in str(one) for one in damaged)
    num_tokens = int(load_index(copied / "raw", Manifest.load(copied / "raw").train[1])["num_tokens"][4])
    assert {one.num_tokens for one in damaged} == {num_tokens}
    masked = after.targets_BT != before.targets_BT
    index = load_index(copied / "raw", Manifest.load(copied / "raw").train[1])
    assert int(masked.sum()) == int(index["num_tokens"][4]) - 1 and (after.targets_BT[masked] == -100).all()
    assert torch.equal(after.row_ids_B, before.row_ids_B) and torch.equal(after.doc_start_BT, before.doc_start_BT)
    found = problems_of(copied / "raw")
    assert len(found) == 1
    assert (
        f"web-000001.tar: document 4 (bytes {offset} to {offset + int(index['num_bytes'][4])}): its bytes" in found[0]
    )


def test_a_flipped_bit_of_a_header_is_named_and_training_does_not_mind(copied: Path, fresh: Path) -> None:
    expected = documents_of(copied / "raw", "train")
    tar, offset = shard_place(copied / "raw", 0, 7)
    flip_bit(tar, offset - 512 + 20)
    assert documents_of(copied / "raw", "train") == expected
    assert problems_of(copied / "raw") == [f"web-000000.tar: the header at byte {offset - 512:,} is damaged: its "
                                           "checksum is wrong"]  # fmt: skip
    flip_bit(fresh / "raw/web-000000.tar", offset - 512 + 20)
    with pytest.raises(DataError, match=rf"web-000000.tar: .* \(the header at byte {offset - 512:,} is damaged"):
        prepare(config_in(fresh), makes_index=True)
    prepare(config_in(fresh, on_bad_file="skip"), makes_index=True)
    assert Manifest.load(fresh / "index").counts["files_unreadable"] == 1
    assert 0 < Manifest.load(fresh / "index").train[0].num_documents < 30
    assert problems_of(fresh / "index") == []  # it is what was indexed


@pytest.mark.parametrize("place", ["inside of a document", "between members"])
def test_a_truncated_tar_is_named_everywhere(copied: Path, fresh: Path, place: str) -> None:
    tar, offset = shard_place(copied / "raw", 0, 20)
    size = offset + 3 if place == "inside of a document" else offset - 512
    os.truncate(tar, size)
    with pytest.raises(DataError, match=rf"web-000000.tar: size is {size} bytes; .* truncated. Restore the file from"):
        TokenStream(config_in(copied, "raw"), batch_plan(1, 1, 1, SEQ_LEN), 0, tokenizer_of(copied).fingerprint)
    found = problems_of(copied / "raw")
    assert f"it is cut short: it has {size:,} bytes" in found[0] and any("missing" in text for text in found)
    assert any(f"it ends at byte {size:,}" in text for text in found)
    os.truncate(fresh / "raw/web-000000.tar", size)
    reason = "inside of '000" if place == "inside of a document" else "behind a member, without the zeros"
    with pytest.raises(DataError, match=rf"web-000000.tar: .* \(it ends at byte {size:,}, {reason}"):
        prepare(config_in(fresh), makes_index=True)


# Going on


def test_an_interrupted_index_goes_on_after_the_tars_that_are_noted(
    done: Path, fresh: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, encoded = config_in(fresh), []
    tokenize = tar_documents.tokenize_pieces

    def stop_in_the_last(tokenizer: object, text: str):
        encoded.append(text)
        if text == TEXTS[140]:
            raise KeyboardInterrupt
        return tokenize(tokenizer, text)

    monkeypatch.setattr(tar_documents, "tokenize_pieces", stop_in_the_last)
    with pytest.raises(KeyboardInterrupt):
        prepare(config, makes_index=True)
    folder = fresh / "index"
    assert not (folder / "manifest.json").exists() and len(list(folder.glob(".*.documents"))) == 5
    lines = (folder / "prepare.jsonl").read_text().splitlines()
    assert [json.loads(line)["tar"]["name"][-1] for line in lines[1:]] == list("01234")
    (folder / "prepare.jsonl").write_text("\n".join(lines) + '\n{"tar": {"name": "web-0')  # cut short by a crash
    (folder / ".web-000003.documents").unlink()  # so this tar, and what follows, is read again
    encoded.clear()
    monkeypatch.setattr(tar_documents, "tokenize_pieces", lambda *one: encoded.append(one[1]) or tokenize(*one))
    prepare(config, makes_index=True)
    assert set(encoded) == {*TEXTS[60:], *TEXTS[30:35], TEXTS[0]} and len(encoded) == 90 + 5 + 1
    expected, found = hashes(done / "index"), hashes(folder)
    assert {name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name)} == {
        "prepare.jsonl"
    }


KILLER = """
import os, sys
from pathlib import Path
sys.path.insert(0, {root!r})
from tests.preparing.test_prepare import hashes
from tests.preparing.test_tar_index import config_in
from pretrain.preparing.prepare import prepare
import webdataset  # imported once, before the forks

work, step = Path(sys.argv[1]), int(sys.argv[2])

def run(name, kill_at):
    pid = os.fork()
    if pid == 0:
        count = 0
        def dying(function):
            def call(*arguments, **named):
                nonlocal count
                count += 1
                if count == kill_at:
                    os.kill(os.getpid(), 9)
                return function(*arguments, **named)
            return call
        os.fsync, os.replace, os.unlink, os.symlink = map(dying, (os.fsync, os.replace, os.unlink, os.symlink))
        try:
            prepare(config_in(work, name), makes_index=True)
        except BaseException as error:
            print(repr(error), flush=True)
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

assert run("expected", 0) == 0
expected = hashes(work / "expected")
kill_at, statuses = 1, []
while not statuses or statuses[-1] == -9:
    name = "killed-%d" % kill_at
    first, _ = run(name, kill_at), run(name, 7)  # a second time while it goes on, then to the end
    statuses.append(first)
    assert run(name, 0) == 0, kill_at
    found = hashes(work / name)
    found.pop(".prepare.lock", None)  # all there was left to do was to delete it
    assert found == expected, (kill_at, sorted(set(found.items()) ^ set(expected.items())))
    kill_at += step
print("killed", statuses.count(-9))
"""


@pytest.mark.slow
@pytest.mark.launches
def test_killed_at_any_write_it_goes_on_to_the_same_bytes(fresh: Path) -> None:
    command = [sys.executable, "-c", KILLER.format(root=str(ROOT)), str(fresh), "3"]
    killed = subprocess.run(command, capture_output=True, text=True, timeout=200, cwd=ROOT)
    assert killed.returncode == 0, killed.stdout[-2000:] + killed.stderr[-2000:]
    assert int(killed.stdout.split()[-1]) > 10  # it really was killed, at many places


def test_a_complete_index_gets_new_rows_and_refuses_other_settings(
    copied: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = config_in(copied, "raw")
    before = hashes(copied / "raw")
    for makes_index in (True, False):  # what is complete stays what it is
        prepare(config, makes_index=makes_index)
        assert "the index in" in capsys.readouterr().err and hashes(copied / "raw") == before
    (copied / "raw/.web-000000.documents").write_bytes(b"")  # left by a run that was killed after its last line
    prepare(config_in(copied, "raw", seq_len=128))
    assert (copied / "raw/rows-128").is_dir() and not list((copied / "raw").glob(".*.documents"))
    for changes in ({"val_fraction": 0.2}, {"source": {"text_field": "body"}}, {"drop_duplicates": False}):
        with pytest.raises(
            ConfigError, match=r"changed since then: data.* Set another `shards` folder for this source.$"
        ):
            prepare(config_in(copied, "raw", **changes))
    (copied / "raw/prepare.jsonl").unlink()
    prepare(config)
    with pytest.raises(ConfigError, match="the hash of all settings"):
        prepare(config_in(copied, "raw", val_fraction=0.2))
    shutil.move(copied / "raw/web-000003.tar", copied / "elsewhere")
    with pytest.raises(DataError, match=r"web-000003.tar is missing; .* or index the tars into another folder"):
        prepare(config)


def test_an_index_and_shards_of_ids_are_not_taken_for_each_other(done: Path, fresh: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"shards holds shards of ids and not an index of tars; .* Set another `shards`"
    ):
        prepare(config_in(done, "shards"), makes_index=True)
    assert Manifest.load(done / "shards").text is None
    folder = fresh / "begun"
    folder.mkdir()
    recipe = json.loads((done / "index/prepare.jsonl").read_text().splitlines()[0])["recipe"]
    for name in ("the number of source files", "their bytes", "the hash of their names and sizes"):
        recipe.pop(name)
    lines = [{"recipe": recipe}, json.loads((done / "index/prepare.jsonl").read_text().splitlines()[1])]
    (folder / "prepare.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(
        ConfigError, match=r"begun holds an index of tars that is not complete; .*CONFIG --index, or set"
    ):
        prepare(config_in(fresh, "begun"))
    with pytest.raises(
        DataError, match=r"begun/manifest.json is missing; .* Run: python launch/prepare.py CONFIG --index$"
    ):
        Manifest.load(folder)
    (folder / "prepare.jsonl").write_bytes((done / "shards/prepare.jsonl").read_bytes())
    with pytest.raises(ConfigError, match=r"begun holds shards of ids and not an index of tars"):
        prepare(config_in(fresh, "begun"), makes_index=True)
    with pytest.raises(DataError, match=r"begun/manifest.json is missing; .* Run: python launch/prepare.py CONFIG$"):
        Manifest.load(folder)


def test_a_finished_corpus_of_other_files_is_no_reason_to_index_nothing(fresh: Path) -> None:
    (fresh / "text").mkdir()
    (fresh / "text/a.txt").write_text(" ".join(TEXTS[:20]))
    config = config_in(fresh, "ids", source={"paths": [str(fresh / "text")]}, val_fraction=0)
    prepare(config)
    with pytest.raises(ConfigError, match="--index: no source names tars"):
        prepare(config, makes_index=True)


CONFIG = """
tokenizer: {{model: {folder}/t.model, vocab_size: {vocab_size}}}
data:
  sources: [{{name: web, paths: ["{folder}/raw/*.tar"], shards: {folder}/index}}]
  seq_len: 64
  val_fraction: 0.1
  shard_bytes: 16384
  prepare_processes: 1
model: {{dim: 16, num_layers: 1, num_heads: 1}}
optim: {{lr: 0.001}}
train: {{num_steps: 2, global_batch_size: 4, micro_batch_size: 4}}
"""

# Refusals


def test_what_cannot_be_indexed_says_what_to_do(fresh: Path, tmp_path: Path) -> None:
    raw = fresh / "raw"

    def refused(message: str, shards: str = "index", **changes: object) -> None:
        with pytest.raises(ConfigError, match=message):
            prepare(config_in(fresh, shards, **changes), makes_index=True)
        assert not (fresh / shards / "manifest.json").exists()

    refused("data.filters.personal_data is mask; expected keep or drop", filters={"personal_data": "mask"})
    refused(r"data.sources\[web\].paths: \S+t.model cannot be indexed; expected files whose names end in .tar only",
            source={"paths": [str(raw / "*.tar"), str(fresh / "t.model")]})  # fmt: skip
    refused("--index: no source names tars; expected one of", source={"paths": [str(fresh / "t.model")]})
    refused("--index: no source names tars", source={"paths": []})
    refused("where its paths find files of the index beside the tars", "raw", source={"paths": [str(raw)]})
    assert not (raw / "prepare.jsonl").exists()
    (raw / "a").mkdir()
    shutil.copy(raw / "web-000000.tar", raw / "a/web-000000.tar")
    links = {"paths": [str(fresh / "**/*.tar")]}
    refused("where its paths find files of the index beside the tars", "raw/0", source=links)
    assert sorted(path.name for path in (raw / "0").iterdir()) == []
    shutil.copy(raw / "web-000000.tar", raw / "a-web-000000.tar")
    refused("web-000000.tar would be called a-web-000000.tar in the index; .* another one is, too", source=links)
    (raw / "a-web-000000.tar").rename(raw / "held-out-000000.tar")
    refused("would be called held-out-000000.tar in the index; .* calls shards of its own. Rename it.")
    (raw / "held-out-000000.tar").unlink()
    (fresh / "index/web-000000.tar").write_bytes(b"mine")
    refused(r"index/web-000000.tar is there, and is not \S+raw/web-000000.tar; expected a folder without")
    (raw / "web-000000.tar").rename(raw / "web-000000.TAR")
    refused(r"web-000000.TAR cannot be indexed", source={"paths": [str(raw / "*.[tT]*")]})
    with pytest.raises(ConfigError, match=r"where tars of its paths lie; .* use the tars as they are: .* --index"):
        prepare(config_in(fresh, "raw"))
    (tmp_path / "none.tar").write_bytes((raw / "web-000004.tar").read_bytes())
    with pytest.raises(DataError, match=r"they give no document to train on \(1 files read\)"):
        prepare(config_in(fresh, "none", source={"paths": [str(tmp_path / "none.tar")]}), makes_index=True)


def test_tars_of_one_name_and_links_to_tars(done: Path, fresh: Path) -> None:
    raw = fresh / "raw"
    (raw / "part one").mkdir()
    (raw / "web-000003.tar").rename(raw / "part one/web-000000.tar")
    (fresh / "cache").mkdir()
    blob = (raw / "web-000005.tar").rename(fresh / "cache/4f2a")  # as Hugging Face's cache keeps files
    (raw / "web-000005.tar").symlink_to(blob)
    config = config_in(fresh, source={"paths": [str(raw / "**/*.tar")]})
    prepare(config, makes_index=True)
    names = [shard.name for shard in Manifest.load(fresh / "index").train]
    assert names == ["part-one-web-000000", "web-000000", "web-000001", "web-000005"]
    assert documents_of(fresh / "index", "train") == documents_of(done / "index", "train")
    prepare(config, makes_index=True)


def test_the_command_and_what_inspect_says(fresh: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = fresh / "web.yaml"
    path.write_text(CONFIG.format(folder=fresh, vocab_size=VOCAB_SIZE), encoding="utf-8")
    assert main([str(path), "--index"]) == 0
    assert "shards of ids" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main([str(path), "--index", "--share", "1/2"])
    content = inspect(fresh / "index", config_in(fresh))
    assert content["text_field"] == "text" and {sample["text"][:10] for sample in content["samples"]} <= {
        text[:10] for text in TEXTS
    }
    text = render(content)
    assert "train: tars of text, tokenized when read; field of .json: text" in text and "beside the ids" not in text
    flip_bit(fresh / "raw/web-000000.tar", shard_place(fresh / "index", 0, 3)[1])
    assert main(["--verify", str(fresh / "index")]) == 1
    assert "Restore these files from a copy, or index the tars into another folder." in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.launches
def test_a_run_trains_on_tars_and_evaluates(done: Path, fresh: Path) -> None:
    path = fresh / "web.yaml"
    text = CONFIG.format(folder=fresh, vocab_size=VOCAB_SIZE)
    path.write_text(f"run: {{dir: {fresh}/run}}\neval: {{every_steps: 2}}\n{text}", encoding="utf-8")
    (fresh / "index").symlink_to(done / "index")  # and neither the paths nor `prepare` matter any more
    shutil.rmtree(fresh / "raw")
    ran = run_command("launch/pretrain.py", path)
    assert ran.returncode == 0, ran.stderr[-2000:]
    training, evaluation = (
        [line for line in metric_lines(fresh / "run") if key in line] for key in ("loss", "eval/loss")
    )
    assert [line["step"] for line in training] == [1, 2] and evaluation[0]["eval/loss"] > 0
