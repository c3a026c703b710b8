"""Shards: any webdataset reader gets the documents, bytes are reproducible, a failure leaves nothing half."""

import gc
import hashlib
import json
import tarfile
import warnings
from dataclasses import replace

import numpy as np
import pytest
import webdataset

from pretrain.data.shards import Manifest, ShardWriter, load_index
from pretrain.errors import DataError
from tests.helpers.data_helpers import document, file_size_limit, make_corpus, random_documents, write_shards


def names_of(shards):
    """The files that make up complete shards."""
    return sorted(name for shard in shards for name in (f"{shard.name}.tar", f"{shard.name}.index.npy"))


def check_described_as_written(folder, shards):
    for shard in shards:
        tar, index = (folder / f"{shard.name}{suffix}" for suffix in (".tar", ".index.npy"))
        assert hashlib.sha256(tar.read_bytes()).hexdigest() == shard.sha256
        assert hashlib.sha256(index.read_bytes()).hexdigest() == shard.index_sha256
        assert tar.stat().st_size == shard.num_bytes
        assert np.load(index)["num_tokens"].sum() == shard.num_tokens


def files_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize(("dtype", "num_documents", "length"), [("uint16", 700, 3000), ("uint32", 3, 400_000)])
def test_webdatasets_own_reader_gives_the_documents(tmp_path, dtype, num_documents, length):
    random = np.random.default_rng(0)
    documents = [document(random.integers(4, 60_000, length), dtype) for _ in range(num_documents)]
    (shard,) = write_shards(tmp_path, "train", documents, shard_bytes=1 << 30)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # webdataset leaves its files to the garbage collector
        samples = list(webdataset.WebDataset(str(tmp_path / "train-000000.tar"), shardshuffle=False))
        gc.collect()
    assert [s["__key__"] for s in samples] == [f"train-000000/{i:06d}" for i in range(len(samples))]
    assert len(samples) == 3 if num_documents == 3 else 3 < len(samples) < 10
    ids = np.frombuffer(b"".join(s["bin"] for s in samples), dtype=np.dtype(dtype).newbyteorder("<"))
    ends = np.cumsum(load_index(tmp_path, shard)["num_tokens"])
    for got, expected in zip(np.split(ids, ends[:-1]), documents, strict=True):
        np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("length", [None, 510, 524_286])  # members of exactly 1 MiB need no filling up
def test_index_offsets_point_at_the_documents(tmp_path, length):
    documents = random_documents(3000, seed=1, mean=400)
    if length:
        documents = [document(np.arange(length) % 999 + i) for i in range((3 << 20) // (2 * length))]
    (shard,) = write_shards(tmp_path, "val", documents, shard_bytes=1 << 30)
    content = (tmp_path / "val-000000.tar").read_bytes()
    assert len(content) == shard.num_bytes and len(content) > 2 << 20
    for record, expected in zip(load_index(tmp_path, shard), documents, strict=True):
        begin = int(record["offset"])
        assert content[begin : begin + expected.nbytes] == expected.tobytes()


def test_bytes_depend_on_the_documents_alone(tmp_path):
    documents = random_documents(400, seed=2)
    for name in ("a", "b"):
        shards = write_shards(tmp_path / name, "train", documents)
    assert len(shards) > 2
    assert files_of(tmp_path / "a") == files_of(tmp_path / "b")
    with tarfile.open(tmp_path / "a" / "train-000000.tar") as tar:
        for member in tar.getmembers():
            assert (member.mtime, member.uname, member.gname, member.uid, member.mode) == (0, "root", "root", 0, 0o444)
            assert not member.pax_headers and member.isreg()


def test_shards_are_described_as_written_and_end_at_shard_bytes(tmp_path):
    documents = random_documents(500, seed=3)
    shards = write_shards(tmp_path, "train", documents, shard_bytes=8192)
    assert [shard.name for shard in shards] == [f"train-{i:06d}" for i in range(len(shards))]
    check_described_as_written(tmp_path, shards)
    assert sum(shard.num_documents for shard in shards) == len(documents)
    assert sum(shard.num_tokens for shard in shards) == sum(map(len, documents))
    assert all(shard.num_bytes < 8192 + 10240 + 2 * max(map(len, documents)) for shard in shards)


def test_an_interrupted_writer_goes_on_with_the_same_bytes(tmp_path):
    documents = random_documents(400, seed=4)
    write_shards(tmp_path / "whole", "train", documents)
    writer = ShardWriter(tmp_path / "cut", "train", "uint16", 8192)
    kept = [shard for one in documents[:250] if (shard := writer.add(one))]
    writer._file._file.close()  # as if the process were killed here: temporary files stay
    num_kept = sum(shard.num_documents for shard in kept)
    assert 0 < num_kept < 250
    again = ShardWriter(tmp_path / "cut", "train", "uint16", 8192, first_shard=len(kept))
    for one in documents[num_kept:]:
        again.add(one)
    again.close()
    assert files_of(tmp_path / "cut") == files_of(tmp_path / "whole")


def test_abort_leaves_complete_shards_only(tmp_path):
    writer = ShardWriter(tmp_path, "train", "uint16", 8192)
    shards = [shard for one in random_documents(200, seed=5) if (shard := writer.add(one))]
    writer.abort()
    assert shards and sorted(files_of(tmp_path)) == names_of(shards)
    assert writer.close() is None


def test_full_disk_is_a_data_error_that_says_what_is_kept(tmp_path):
    writer = ShardWriter(tmp_path, "train", "uint16", 1 << 18)
    shards = []
    with (
        file_size_limit(1 << 20),
        pytest.raises(DataError, match=r"train-000002\.tar cannot be written: .*before it are kept.*prepare\.py"),
    ):
        for _ in range(2):
            for one in random_documents(300, seed=6, mean=2000):
                shard = writer.add(one)
                shards += [shard] if shard else []
                if len(shards) == 2:
                    writer._shard_bytes = 1 << 30
    assert len(shards) == 2 and sorted(files_of(tmp_path)) == names_of(shards)
    check_described_as_written(tmp_path, shards)


def test_ids_that_do_not_fit_the_dtype_are_refused(tmp_path):
    with pytest.raises(TypeError, match="uint32.*u2"):
        ShardWriter(tmp_path, "train", "uint16", 8192).add(np.array([70_000], dtype=np.uint32))


def test_no_documents_make_no_shard(tmp_path):
    assert ShardWriter(tmp_path / "none", "val", "uint16", 8192).close() is None
    assert not (tmp_path / "none").exists()


def test_manifest_round_trip_and_fingerprint(tmp_path):
    manifest = make_corpus(tmp_path / "web", random_documents(300, seed=7), random_documents(9, seed=8))
    assert Manifest.load(tmp_path / "web") == manifest
    assert manifest.shards("val") == manifest.val and manifest.shards("train") == manifest.train
    assert replace(manifest, counts={}, corpus="other").fingerprint() == manifest.fingerprint()
    for change in (
        {"tokenizer_fingerprint": "c" * 64},
        {"train": manifest.train[:-1]},
        {"val": ()},
        {"dtype": "uint32"},
        {"train": manifest.train[::-1]},
    ):
        assert replace(manifest, **change).fingerprint() != manifest.fingerprint()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"manifest\.json is missing; expected a prepared corpus\. Run: python launch/prepare\.py CONFIG"),
        ("{", r"manifest\.json cannot be read: .*Delete it and run: python launch/prepare\.py"),
        ("[]", r"version is None; expected 1 or 2\."),
        ('{"version": 99}', r"version is 99; expected 1 or 2\. Prepare the corpus into a new folder"),
        ('{"version": 1}', r"a field is wrong or missing \('train'\)"),
        ('{"version": 1, "train": [{"nam": 1}], "val": []}', r"a field is wrong or missing"),
    ],
)
def test_bad_manifests_are_data_errors(tmp_path, content, message):
    if content is not None:
        (tmp_path / "manifest.json").write_text(content)
    with pytest.raises(DataError, match=message):
        Manifest.load(tmp_path)


def test_manifest_that_cannot_be_written_leaves_the_old_one(tmp_path):
    manifest = make_corpus(tmp_path / "web", random_documents(20, seed=7))
    huge = replace(manifest, counts={str(i): i for i in range(100_000)})
    with (
        file_size_limit(1 << 16),
        pytest.raises(DataError, match=r"manifest\.json: cannot be written.*Shards are kept"),
    ):
        huge.save(tmp_path / "web")
    assert Manifest.load(tmp_path / "web") == manifest
    assert json.loads((tmp_path / "web" / "manifest.json").read_text())["corpus"] == "web"
    assert not (tmp_path / "web" / ".manifest.json.tmp").exists()
