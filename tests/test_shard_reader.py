"""Reading documents: every kind of damage is named, one flipped bit harms one document."""

import os
from pathlib import Path

import numpy as np
import pytest

from pretrain import shard_reader
from pretrain.errors import DataError
from pretrain.shard_reader import DamagedDocumentError, ShardCache, ShardReader, check_shards
from pretrain.shards import load_index
from tests.data_helpers import flip_bit, random_documents, write_shards


@pytest.fixture
def documents():
    return random_documents(400, seed=1)


@pytest.fixture
def shards(tmp_path, documents):
    return write_shards(tmp_path, "train", documents)


def num_open_files(folder):
    links = [os.readlink(path) for path in Path("/proc/self/fd").iterdir() if path.is_symlink()]
    return sum(link.startswith(str(folder)) for link in links)


def test_reads_every_document_in_any_order(tmp_path, documents, shards):
    readers = [ShardReader(tmp_path, shard, "uint16") for shard in shards]
    begins = np.cumsum([0] + [shard.num_documents for shard in shards])
    for i in np.random.default_rng(0).permutation(len(documents)):
        s = int(np.searchsorted(begins, i, side="right")) - 1
        np.testing.assert_array_equal(readers[s].read(i - begins[s]), documents[i])


def test_a_flipped_bit_damages_its_document_only(tmp_path, documents, shards):
    flip_bit(tmp_path / "train-000000.tar", int(load_index(tmp_path, shards[0])["offset"][5]) + 3)
    reader = ShardReader(tmp_path, shards[0], "uint16")
    with pytest.raises(DamagedDocumentError, match=r"train-000000\.tar: document 5 \(bytes \d+ to \d+\) is damaged"):
        reader.read(5)
    for i in (4, 6):
        np.testing.assert_array_equal(reader.read(i), documents[i])


@pytest.mark.parametrize("failure", ["wrong bytes", "short", "error"])
def test_a_transient_fault_is_read_again_from_a_new_descriptor(tmp_path, documents, shards, monkeypatch, failure):
    reader = ShardReader(tmp_path, shards[0], "uint16")
    opened, pread, calls = [], os.pread, []
    real_open = os.open

    def faulty(descriptor, num_bytes, offset):
        calls.append(descriptor)
        if len(calls) > 1:
            return pread(descriptor, num_bytes, offset)
        if failure == "error":
            raise OSError(5, "Input/output error")
        return bytes(num_bytes) if failure == "wrong bytes" else b"short"

    monkeypatch.setattr(shard_reader.os, "pread", faulty)
    monkeypatch.setattr(shard_reader.os, "open", lambda *a: opened.append(a) or real_open(*a))
    np.testing.assert_array_equal(reader.read(3), documents[3])
    assert len(calls) == 2 and len(opened) == 1


def test_a_shard_of_other_content_is_refused_and_not_masked_document_by_document(tmp_path, shards):
    path = tmp_path / "train-000000.tar"
    path.write_bytes(bytes(path.stat().st_size))
    reader = ShardReader(tmp_path, shards[0], "uint16")
    for i in [0] * 20 + list(range(7)):  # one long document is read for many rows
        with pytest.raises(DamagedDocumentError):
            reader.read(i)
    with pytest.raises(DataError, match="8 documents are damaged and 0 are not, so far; expected the file") as caught:
        reader.read(7)
    assert not isinstance(caught.value, DamagedDocumentError)


def test_truncated_replaced_and_missing_shards_are_refused_at_open(tmp_path, shards):
    path = tmp_path / "train-000001.tar"
    content = path.read_bytes()
    for changed, state in ((content[:-1], "truncated"), (content + b"x", "replaced or appended to")):
        path.write_bytes(changed)
        for attempt in (lambda: check_shards(tmp_path, shards), lambda: ShardReader(tmp_path, shards[1], "uint16")):
            with pytest.raises(
                DataError, match=rf"train-000001\.tar: size is {len(changed)} .*it was {state}.*Restore"
            ):
                attempt()
    path.unlink()
    with pytest.raises(DataError, match=r"train-000001\.tar is missing; expected \d+ bytes\. Restore the file"):
        check_shards(tmp_path, shards)
    with pytest.raises(DataError, match=r"train-000001\.tar cannot be opened: No such file"):
        ShardReader(tmp_path, shards[1], "uint16")


def test_damaged_indexes_are_refused(tmp_path, shards):
    path = tmp_path / "train-000000.index.npy"
    content = path.read_bytes()
    flip_bit(path, len(content) - 5)
    with pytest.raises(DataError, match=r"train-000000\.index\.npy: its sha256 differs"):
        ShardReader(tmp_path, shards[0], "uint16")
    np.save(path, np.load(tmp_path / "train-000000.index.npy")[:-1])
    with pytest.raises(DataError, match=rf"documents are {shards[0].num_documents - 1}; expected"):
        ShardReader(tmp_path, shards[0], "uint16")
    np.save(path, np.zeros(3))
    with pytest.raises(DataError, match=r"dtype is float64; expected"):
        ShardReader(tmp_path, shards[0], "uint16")
    for broken in (b"", content[:200]):
        path.write_bytes(broken)
        with pytest.raises(DataError, match=r"index\.npy cannot be read"):
            ShardReader(tmp_path, shards[0], "uint16")
    path.unlink()
    with pytest.raises(DataError, match=r"index\.npy is missing; expected the shard's index"):
        check_shards(tmp_path, shards)


def test_cache_bounds_open_files_and_keeps_the_shards_in_use(tmp_path, shards):
    assert len(shards) >= 4
    cache = ShardCache(capacity=2)
    first = cache.reader(tmp_path, shards[0], "uint16")
    for shard in shards[1:]:
        cache.reader(tmp_path, shard, "uint16").read(0)
        assert cache.reader(tmp_path, shards[0], "uint16") is first
        assert num_open_files(tmp_path) == 4  # a tar and its index each
    first.read(0)
    cache.close()
    del first
    assert num_open_files(tmp_path) == 0


def test_cache_verifies_an_index_once(tmp_path, shards, monkeypatch):
    hashed = []
    real = shard_reader.file_sha256
    monkeypatch.setattr(shard_reader, "file_sha256", lambda path: hashed.append(path) or real(path))
    cache = ShardCache(capacity=1)
    for _ in range(2):
        for shard in shards[:2]:
            cache.reader(tmp_path, shard, "uint16")
    assert len(hashed) == 2
