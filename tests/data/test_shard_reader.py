"""Reading documents: every kind of damage is named, one flipped bit harms one document."""

import os
from pathlib import Path

import numpy as np
import pytest

from pretrain.data import shard_reader
from pretrain.data.shard_reader import DamagedDocumentError, ShardCache, ShardReader, check_shards
from pretrain.data.shards import load_index
from pretrain.errors import DataError
from tests.helpers.data_helpers import flip_bit, random_documents, write_shards


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
    with pytest.raises(DamagedDocumentError, match=r"train-000000\.tar: document 5 is damaged: bytes \d+ to"):
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


def failure_of(reader, document):
    with pytest.raises(DamagedDocumentError) as caught:
        reader.read(document)
    return caught.value


def test_a_shard_of_other_content_counts_as_lost_once_most_of_what_is_read_is_damaged(tmp_path, shards):
    path = tmp_path / "train-000000.tar"
    path.write_bytes(bytes(path.stat().st_size))
    reader = ShardReader(tmp_path, shards[0], "uint16")
    for i in [0] * 20 + list(range(7)):  # one long document is read for many rows
        error = failure_of(reader, i)
        assert not error.is_shard_lost and error.num_tokens == load_index(tmp_path, shards[0])["num_tokens"][i]
    error = failure_of(reader, 7)
    assert error.is_shard_lost and error.num_tokens == shards[0].num_tokens


@pytest.mark.parametrize("change", ["truncated", "replaced or appended to"])
def test_a_file_of_another_size_is_refused_at_the_start_and_read_as_far_as_it_goes(tmp_path, documents, shards, change):
    path, begins = tmp_path / "train-000001.tar", np.cumsum([0] + [shard.num_documents for shard in shards])
    offsets = load_index(tmp_path, shards[1])["offset"]
    content = path.read_bytes()
    path.write_bytes(content[: int(offsets[-2])] if change == "truncated" else content + b"x")
    with pytest.raises(DataError, match=rf"train-000001\.tar: size is \d+ .*it was {change}.*Restore"):
        check_shards(tmp_path, shards)
    reader = ShardReader(tmp_path, shards[1], "uint16")
    num_whole = shards[1].num_documents - (2 if change == "truncated" else 0)
    for i in range(num_whole):
        np.testing.assert_array_equal(reader.read(i), documents[begins[1] + i])
    for i in range(num_whole, shards[1].num_documents):
        error = failure_of(reader, i)
        assert "it was truncated" in error.reason and not error.is_shard_lost


def test_a_missing_tar_is_refused_at_the_start_and_lost_later(tmp_path, documents, shards):
    (tmp_path / "manifest.json").touch()
    path, index = tmp_path / "train-000001.tar", tmp_path / "train-000001.index.npy"
    content = path.read_bytes()
    path.unlink()
    with pytest.raises(DataError, match=r"train-000001\.tar is missing; expected \d+ bytes\. Restore the file"):
        check_shards(tmp_path, shards)
    reader = ShardReader(tmp_path, shards[1], "uint16")
    error = failure_of(reader, 3)
    assert error.is_shard_lost and error.reason == "it cannot be opened: No such file or directory"
    path.write_bytes(content)  # somebody mends it meanwhile
    np.testing.assert_array_equal(reader.read(3), documents[shards[0].num_documents + 3])
    index.unlink()
    error = failure_of(ShardReader(tmp_path, shards[1], "uint16"), 3)
    assert error.is_shard_lost and "No such file" in error.reason
    (tmp_path / "manifest.json").unlink()
    with pytest.raises(DataError, match=r"manifest\.json is gone; expected the corpus to stay") as caught:
        ShardReader(tmp_path, shards[1], "uint16")
    assert not isinstance(caught.value, DamagedDocumentError)


def test_of_a_link_the_file_that_is_gone_is_named(tmp_path, shards):
    (tmp_path / "manifest.json").touch()
    path, target = tmp_path / "train-000001.tar", tmp_path / "elsewhere.tar"
    path.rename(target)
    path.symlink_to("elsewhere.tar")
    check_shards(tmp_path, shards)
    target.unlink()
    message = rf"{path} \(a link to {target}\) is missing; expected \d+ bytes\. Restore the file"
    with pytest.raises(DataError, match=message):
        check_shards(tmp_path, shards)
    error = failure_of(ShardReader(tmp_path, shards[1], "uint16"), 3)
    assert error.reason == f"it cannot be opened: No such file or directory (a link to {target})"


def test_with_a_damaged_index_the_shard_is_lost(tmp_path, shards):
    (tmp_path / "manifest.json").touch()
    path = tmp_path / "train-000000.index.npy"
    content = path.read_bytes()

    def reason():
        error = failure_of(ShardReader(tmp_path, shards[0], "uint16"), 5)
        assert error.is_shard_lost and error.num_tokens == shards[0].num_tokens
        return error.reason

    flip_bit(path, len(content) - 5)
    assert reason() == f"{path}: its sha256 differs from the manifest's"
    np.save(path, np.load(tmp_path / "train-000000.index.npy")[:-1])
    assert f"documents are {shards[0].num_documents - 1}; expected" in reason()
    np.save(path, np.zeros(3))
    assert "dtype is float64; expected" in reason()
    for broken in (b"", content[:200]):
        path.write_bytes(broken)
        assert "index.npy cannot be read" in reason()
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
