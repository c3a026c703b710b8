"""Spills: what goes in comes out in the order of the hashes, whatever was in which; and every damage is noticed."""

from __future__ import annotations

import os
import random
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from pretrain.errors import DataError
from pretrain.preparing.spills import RECORD, Spill, SpillWriter, read_buckets, spill_size
from tests.helpers.data_helpers import file_size_limit

DTYPE = np.dtype("uint16")
Document = tuple[bytes, int, bytes, str, tuple[int, ...]]


def make_documents(num_documents: int, seed: int = 1, num_copies: int = 0) -> list[Document]:
    """Documents with bands and origins of many lengths, also without; the last ones are copies of the first."""
    rng = random.Random(seed)
    documents = [
        (rng.randbytes(16), rng.randrange(2**40), rng.randbytes(8 * rng.randrange(3)), "ö" * rng.randrange(9) + f"{n}",
         tuple(rng.randrange(2**16) for _ in range(rng.choice((0, 1, 7, 90)))))
        for n in range(num_documents)
    ]  # fmt: skip
    return documents + documents[:num_copies]


def write(folder: Path, documents: list[Document], max_bytes: int) -> list[tuple[Path, Spill]]:
    folder.mkdir(exist_ok=True)
    writer, spills = SpillWriter(folder, max_bytes), []
    for digest, text_bytes, bands, origin, ids in documents:
        if writer.add(digest, text_bytes, bands, origin, np.array(ids, DTYPE)):
            spills.append(writer.write())
    if writer.num_documents:
        spills.append(writer.write())
    assert sorted(path.name for path in folder.iterdir()) == [spill.name for spill in spills]
    return [(folder, spill) for spill in spills]


def read(spills: list[tuple[Path, Spill]], max_bytes: int, drop_duplicates: bool = True) -> list[Document]:
    found = []
    for bucket in read_buckets(spills, DTYPE, max_bytes):
        for place in bucket.in_order(drop_duplicates)[0].tolist():
            ids, record = bucket.ids(place), bucket.table[place]
            digest = int(record["head"]).to_bytes(8, "big") + int(record["order"]).to_bytes(8, "big")
            found.append(
                (digest, int(record["text_bytes"]), bucket.bands(place), bucket.origin(place), tuple(ids.tolist()))
            )
    return found


@pytest.mark.parametrize("written, read_at_once", [(10**9, 10**9), (2000, 10**9), (10**9, 2000), (3000, 500), (1, 50)])
def test_documents_come_back_in_the_order_of_their_hashes(tmp_path: Path, written: int, read_at_once: int) -> None:
    documents = make_documents(200)
    spills = write(tmp_path / "a", documents[:120], written) + write(tmp_path / "b", documents[120:], written)
    assert (len(spills) == 2) == (written == 10**9)
    assert read(spills, read_at_once) == sorted(documents, key=lambda one: one[0][8:])
    assert all(spill.is_whole(folder) for folder, spill in spills)


def test_equal_documents_are_dropped_wherever_they_are(tmp_path: Path) -> None:
    documents = make_documents(100, num_copies=60)
    random.Random(3).shuffle(documents)
    spills = write(tmp_path / "a", documents, 1500)
    assert len(spills) > 5
    assert read(spills, 800) == sorted(set(documents), key=lambda one: one[0][8:])
    dropped = sum(len(bucket.in_order(True)[1]) for bucket in read_buckets(spills, DTYPE, 800))
    assert dropped == 60


def test_copies_that_stay_lie_apart_and_do_not_depend_on_the_spills(tmp_path: Path) -> None:
    documents = make_documents(400)
    documents += documents[:40] * 3
    found = read(write(tmp_path / "a", documents, 10**9), 10**9, drop_duplicates=False)
    assert sorted(found) == sorted(documents)
    assert sum(one == other for one, other in zip(found, found[1:], strict=False)) < 5  # by chance 1; 120 without it
    others = documents[:]
    random.Random(5).shuffle(others)
    for read_at_once in (5000, 10**9):
        results = [
            read(write(tmp_path / f"{read_at_once}-{number}", order, size), read_at_once, drop_duplicates=False)
            for number, (order, size) in enumerate(((documents, 10**9), (others, 3000)))
        ]
        assert results[0] == results[1]


def test_nothing_is_nothing(tmp_path: Path) -> None:
    assert [len(bucket.table) for bucket in read_buckets([], DTYPE, 1000)] == [0]


@pytest.mark.parametrize("damage", ["gone", "short", "header", "table", "content"])
def test_damage_is_noticed(tmp_path: Path, damage: str) -> None:
    spills = write(tmp_path / "share-2-of-3", make_documents(50), 10**9)
    path = tmp_path / "share-2-of-3/spill-000000"
    content = bytearray(path.read_bytes())
    if damage == "gone":
        path.unlink()
    elif damage == "short":
        os.truncate(path, len(content) - 1)
    else:
        content[{"header": 9, "table": 32 + 3 * RECORD.itemsize, "content": -1}[damage]] ^= 4
        path.write_bytes(content)
    messages = {
        "gone": "No such file or directory",
        "short": "it ends too early",
        "header": "its header is not the one that was written",
        "table": "its table has another crc32 than when it was written",
        "content": "a document has another crc32 than its table says",
    }
    with pytest.raises(DataError, match=f"spill-000000 cannot be used: {messages[damage]}; expected .*Delete it and run: "
                       "python launch/prepare.py CONFIG --share 2/3: the spills before it are kept"):  # fmt: skip
        read(spills, 10**9)


def test_a_full_disk_leaves_no_half_of_a_spill(tmp_path: Path) -> None:
    writer = SpillWriter(tmp_path, 10**9, 7)
    for digest, text_bytes, bands, origin, ids in make_documents(100):
        writer.add(digest, text_bytes, bands, origin, np.array(ids, DTYPE))
    with (
        file_size_limit(1000),
        pytest.raises(DataError, match=r"spill-000007 cannot be written: .*Spills before it are"),
    ):
        writer.write()
    assert list(tmp_path.iterdir()) == []
    assert writer.write().num_documents == 100


def test_memory_does_not_grow_with_the_corpus(tmp_path: Path) -> None:
    peaks = []
    for num_documents in (2000, 8000):
        ids = np.arange(300, dtype=DTYPE)
        tracemalloc.start()
        folder, rng = tmp_path / str(num_documents), random.Random(1)
        folder.mkdir()
        writer, spills = SpillWriter(folder, 200_000), []
        for _ in range(num_documents):
            if writer.add(rng.randbytes(16), 1000, b"", "a.txt", ids):
                spills.append((folder, writer.write()))
        for bucket in read_buckets(spills, DTYPE, 200_000):
            for place in bucket.in_order(True)[0].tolist():
                bucket.ids(place)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.2 * peaks[0] and peaks[0] < 2_000_000  # 5 MB are written


def test_sizes_grow_with_the_source_only_beyond_what_fits() -> None:
    assert spill_size(16_384, 10**6) == 16_384
    assert spill_size(2**27, 10**8) == spill_size(2**27, 3 * 10**10) == spill_size(2**34, 10**9) == 2**25
    assert 2**25 < spill_size(2**27, 10**12) < 2**30 == spill_size(2**27, 10**13)
