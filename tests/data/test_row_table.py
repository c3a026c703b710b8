"""Row tables: what they hold, what they refuse, and that building them is safe to repeat."""

import hashlib
import json
from dataclasses import replace

import numpy as np
import pytest

from pretrain.data import row_table
from pretrain.data.row_table import RowTable, build_row_tables
from pretrain.errors import DataError
from tests.helpers.data_helpers import document, file_size_limit, make_corpus, random_documents


@pytest.fixture
def documents():
    return random_documents(300, seed=1)


@pytest.fixture
def manifest(tmp_path, documents):
    return make_corpus(tmp_path, documents, random_documents(20, seed=2), seq_lens=(32, 64))


@pytest.mark.parametrize("seq_len", [32, 64])
def test_rows_of_each_block_hold_each_slot_of_its_shard_once(tmp_path, documents, manifest, seq_len):
    table = RowTable.open(tmp_path, manifest, "train", seq_len)
    assert len(table.rows_per_block) == len(manifest.train) > 2
    assert table.num_rows == table.rows_per_block.sum() > 0
    first = 0
    for block, shard in enumerate(manifest.train):
        slots = [
            (d, s + i)
            for row in range(table.rows_per_block[block])
            for d, s, length in table.row(block, row)
            for i in range(length)
        ]
        lengths = [len(one) for one in documents[first : first + shard.num_documents]]
        assert sorted(slots) == [(d, i) for d, n in enumerate(lengths) for i in range(n - 1)]
        first += shard.num_documents


def test_locate_counts_rows_over_all_blocks(tmp_path, manifest):
    table = RowTable.open(tmp_path, manifest, "train", 32)
    places = [(block, row) for block, n in enumerate(table.rows_per_block) for row in range(n)]
    assert [table.locate(i) for i in range(table.num_rows)] == places


@pytest.mark.parametrize("packing", ["concat", "document"])
def test_another_packing_has_tables_of_its_own(tmp_path, documents, manifest, packing):
    with pytest.raises(
        DataError, match=rf"rows-32-{packing} is missing; .*seq_len 32 and data\.packing {packing}\. Run:"
    ):
        RowTable.open(tmp_path, manifest, "train", 32, packing)
    build_row_tables(tmp_path, manifest, 32, packing)
    table, best = (RowTable.open(tmp_path, manifest, "train", 32, how) for how in (packing, "best_fit"))
    assert table.path.name == f"rows-32-{packing}" and best.path.name == "rows-32"
    slots = [
        (block, d, s + i)
        for block, n in enumerate(table.rows_per_block)
        for row in range(n)
        for d, s, length in table.row(block, row)
        for i in range(length)
    ]
    assert len(set(slots)) == len(slots) == sum(len(one) - 1 for one in documents)
    assert table.num_rows >= best.num_rows if packing == "document" else table.num_rows <= best.num_rows
    with pytest.raises(DataError, match="its packing differs"):
        (tmp_path / "rows-32").rename(tmp_path / "old")
        (tmp_path / f"rows-32-{packing}").rename(tmp_path / "rows-32")
        RowTable.open(tmp_path, manifest, "train", 32)


def test_building_again_does_nothing(tmp_path, manifest, monkeypatch):
    monkeypatch.setattr(row_table, "pack", None)
    build_row_tables(tmp_path, manifest, 32)
    identity = tmp_path / "rows-32" / "identity.json"
    listed = json.loads(identity.read_text())
    del listed["files"]  # as in folders that were written before
    identity.write_text(json.dumps(listed))
    build_row_tables(tmp_path, manifest, 32)
    with pytest.raises(TypeError):
        build_row_tables(tmp_path, manifest, 16)


def test_tables_of_other_shards_are_refused_and_built_anew(tmp_path, manifest):
    shorter = replace(manifest, train=manifest.train[:1])
    with pytest.raises(DataError, match=r"rows-32: its manifest differs; .*Run: python launch/prepare\.py CONFIG"):
        RowTable.open(tmp_path, shorter, "train", 32)
    build_row_tables(tmp_path, shorter, 32)
    assert len(RowTable.open(tmp_path, shorter, "train", 32).rows_per_block) == 1


def test_missing_and_damaged_tables_are_data_errors(tmp_path, manifest):
    with pytest.raises(DataError, match=r"rows-128 is missing; .*data\.seq_len 128\. Run: python launch/prepare\.py"):
        RowTable.open(tmp_path, manifest, "train", 128)
    path = tmp_path / "rows-32" / "train.offsets.npy"
    content = path.read_bytes()
    for broken in (content[:-8], content + b"x", b""):
        path.write_bytes(broken)
        with pytest.raises(
            DataError,
            match=rf"rows-32 is damaged: train\.offsets\.npy has {len(broken)} bytes; expected {len(content)}\.",
        ):
            RowTable.open(tmp_path, manifest, "train", 32)
    identity = tmp_path / "rows-32" / "identity.json"
    listed = json.loads(identity.read_text())
    assert listed.pop("files")["train.offsets.npy"] == {
        "bytes": len(content),
        "sha256": hashlib.sha256(content).hexdigest(),
    }
    identity.write_text(json.dumps(listed))  # as in folders that were written before
    for broken in (content[:-8], b""):
        path.write_bytes(broken)
        with pytest.raises(DataError, match="rows-32 is damaged: .*Delete this folder and run"):
            RowTable.open(tmp_path, manifest, "train", 32)
    np.save(path, np.load(tmp_path / "rows-64" / "train.offsets.npy"))
    with pytest.raises(DataError, match="do not fit each other"):
        RowTable.open(tmp_path, manifest, "train", 32)
    path.write_bytes(content)
    np.save(path, np.load(path)[::-1])
    with pytest.raises(DataError, match="row 0 of block 0 has segments"):
        RowTable.open(tmp_path, manifest, "train", 32).row(0, 0)


def test_documents_without_slots_and_empty_splits_give_no_rows(tmp_path):
    manifest = make_corpus(tmp_path, [document([])[:1]] * 3)
    table = RowTable.open(tmp_path, manifest, "train", 32)
    assert table.num_rows == 0 and table.rows_per_block.tolist() == [0]
    assert RowTable.open(tmp_path, manifest, "val", 32).num_rows == 0


def test_full_disk_leaves_no_table(tmp_path, manifest):
    with file_size_limit(1024), pytest.raises(DataError, match=r"rows-16 cannot be written: .*shards are complete"):
        build_row_tables(tmp_path, manifest, 16)
    assert not [path for path in tmp_path.iterdir() if "rows-16" in path.name]
    (tmp_path / ".rows-16.tmp").mkdir()  # as a killed process leaves it
    (tmp_path / ".rows-16.tmp" / "train.blocks.npy").write_bytes(b"half")
    build_row_tables(tmp_path, manifest, 16)
    assert RowTable.open(tmp_path, manifest, "train", 16).num_rows > 0
    assert not (tmp_path / ".rows-16.tmp").exists()
