"""Corpora from elsewhere: the batches of the local disk, downloaded once a node, whatever fails or is killed."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import closing, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest

from pretrain.data import data_plan, node_cache, remote_corpus, shard_reader
from pretrain.data.data_plan import open_plan
from pretrain.data.node_cache import CacheFile, CacheFullError, NodeCache
from pretrain.data.packing import PACKING_VERSIONS
from pretrain.data.remote_corpus import open_remote
from pretrain.data.row_table import table_folder
from pretrain.data.shard_reader import ShardReader
from pretrain.data.shards import Manifest, load_index
from pretrain.data.stream import TokenStream, ValRows
from pretrain.errors import ConfigError, DataError
from pretrain.options.config import Config
from pretrain.storage import stores
from tests.helpers.data_helpers import TOKENIZER, batch_plan, flip_bit, make_config, make_corpus, random_documents
from tests.helpers.rank_helpers import ROOT, metric_lines, prepare, start_ranks
from tests.helpers.store_reader import digests, remote_config
from tests.helpers.store_server import StoreServer

NUM_STEPS = 12


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stores, "FIRST_PAUSE_SECONDS", 0.02)
    monkeypatch.setattr(stores, "STALL_SECONDS", 0.5)


@pytest.fixture(scope="module")
def web(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("origin") / "web"
    make_corpus(folder, random_documents(900, 1), random_documents(40, 2))
    return folder


@pytest.fixture(scope="module")
def expected(web: Path) -> list[str]:
    return digests(make_config({web: 1.0}), NUM_STEPS)


@pytest.fixture
def server(web: Path) -> Iterator[StoreServer]:
    server = StoreServer(web.parent)
    yield server
    server.close()


def shards_of(web: Path) -> Manifest:
    return Manifest.load(web)


def size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file() and path.name != ".lock")


def size_while_nothing_is_evicted(folder: Path) -> int:
    """Size of a cache in use: what is renamed while it is looked at counts once."""
    sizes: dict[int, int] = {}
    with open(folder / ".lock", "a+b") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for path in folder.rglob("*"):
            with suppress(FileNotFoundError):
                state = path.stat()
                if path.is_file() and path.name != ".lock":
                    sizes[state.st_ino] = state.st_size
    return sum(sizes.values())


def start_reader(url: str, cache: Path, num_steps: int = NUM_STEPS, **data: object) -> subprocess.Popen[str]:
    options = json.dumps({"url": url, "cache": str(cache), "num_steps": num_steps, **data})
    return subprocess.Popen([sys.executable, "-m", "tests.helpers.store_reader", options], cwd=ROOT, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)  # fmt: skip


def test_batches_are_those_of_the_local_disk_and_files_come_once(
    server: StoreServer, web: Path, tmp_path: Path, expected: list[str]
) -> None:
    assert len(shards_of(web).train) >= 8
    config = remote_config(f"{server.url}/web", tmp_path)
    assert digests(config, NUM_STEPS) == expected
    local, remote = (open_plan(one, TOKENIZER)[0] for one in (make_config({web: 1.0}), config))
    assert remote.hash == local.hash and remote.pieces == local.pieces
    files = {name: number for name, number in server.requests.items() if name.endswith((".tar", ".npy"))}
    assert set(files.values()) == {1}
    assert digests(config, NUM_STEPS) == expected
    assert {name: server.requests[name] for name in files} == files  # the second run downloaded nothing


def test_pipes_and_other_stores_give_the_same(web: Path, tmp_path: Path, expected: list[str]) -> None:
    for name, url in (("pipe", f"pipe:cat {web}/{{}}"), ("file", f"file://{web}")):
        assert digests(remote_config(url, tmp_path / name, allow_pipe=True), 4) == expected[:4]


def test_nothing_but_tables_comes_before_the_first_batch(server: StoreServer, tmp_path: Path) -> None:
    config = remote_config(f"{server.url}/web", tmp_path)
    with closing(TokenStream(config, batch_plan(12, 1, 4, 32), 0, TOKENIZER)):
        assert sorted(name.removeprefix("web/") for name in server.requests) == [
            "manifest.json", "rows-32/identity.json", "rows-32/train.blocks.npy", "rows-32/train.offsets.npy",
            "rows-32/train.segments.npy",
        ]  # fmt: skip


def test_shards_are_downloaded_before_they_are_needed(server: StoreServer, web: Path, tmp_path: Path) -> None:
    config = remote_config(f"{server.url}/web", tmp_path, shuffle_window_shards=2)
    plan, corpora = open_plan(config, TOKENIZER)
    coming = {corpora[0].shards[block].name for _, block in plan.coming_blocks(0, 2)}
    assert len(coming) == 4
    with closing(TokenStream(config, batch_plan(1, 1, 1, 32), 0, TOKENIZER)) as stream:
        stream.next_step()  # one row, of one or two shards
        give_up_at = time.monotonic() + 10
        while {path.name.partition(".")[0] for path in tmp_path.rglob("*.tar") if path.name[0] != "."} != coming:
            assert time.monotonic() < give_up_at
            time.sleep(0.02)
    give_up_at = time.monotonic() + 5  # a download notices only after a moment that it was closed
    while any(thread.name.startswith("longhaul") for thread in threading.enumerate()):
        assert time.monotonic() < give_up_at
        time.sleep(0.02)


def test_the_plan_says_what_comes(web: Path, tmp_path: Path) -> None:
    plan, _ = open_plan(make_config({web: 1.0}, shuffle_window_shards=3), TOKENIZER)
    num_rows = plan.epoch_rows_at(0)["web"]
    for t in (0, 17, num_rows - 1, num_rows + 5):
        coming = [block for _, block in plan.coming_blocks(t, 3)]
        used: list[int] = []
        for row in range(t, t + num_rows):
            block = plan.locate(row)[2]
            if block not in used:
                used.append(block)
        assert set(coming) >= set(used[:3])


@pytest.mark.parametrize("packing", sorted(PACKING_VERSIONS))
def test_phases_rows_of_several_lengths_and_packings(tmp_path: Path, packing: str) -> None:
    folders = {tmp_path / "origin" / name: weight for name, weight in (("web", 1.0), ("code", 0.5), ("books", 0.0))}
    for seed, folder in enumerate(folders):
        make_corpus(folder, random_documents(300, seed), random_documents(9, seed), (16, 32, 64), [packing])
    phases = [{"from_step": 4, "weights": {"web": 1, "books": 1}, "seq_len": 64},
              {"from_step": 6, "epochs": {"code": 1, "books": 2}, "seq_len": 16}]  # fmt: skip

    def config_of(root: str, **data: object) -> Config:
        values = make_config(folders, packing=packing, phases=phases, shuffle_window_shards=2, **data).model_dump()
        values["train"]["global_batch_size"] = 12
        for source in values["data"]["sources"]:
            source["shards"] = f"{root}/{source['name']}"
        return Config.model_validate(values)

    local = config_of(str(tmp_path / "origin"))
    expected = digests(local, 9)
    with closing_server(tmp_path / "origin") as server:
        remote = config_of(server.url, cache_dir=str(tmp_path / "cache"), retry_seconds=20)
        plan, corpora = open_plan(remote, TOKENIZER)
        assert plan.hash == open_plan(local, TOKENIZER)[0].hash
        tables = {f"{one.name}/{table_folder('', seq_len, packing)}" for one in corpora for seq_len in one.rows}
        assert tables == {name.rpartition("/")[0] for name in server.requests if "/rows-" in name}
        assert len(tables) == 6 and not any(name.endswith(".tar") for name in server.requests)
        for corpus in corpora:
            corpus.close()
        assert digests(remote, 9) == expected
        assert {number for name, number in server.requests.items() if name.endswith(".tar")} == {1}
        assert digests(remote, 3, cursor=4 * 12) == expected[4:7]


def test_a_cache_needs_room_for_what_one_phase_reads(tmp_path: Path) -> None:
    folders = {tmp_path / name: 1.0 for name in ("web", "code")}
    for seed, folder in enumerate(folders):
        make_corpus(folder, random_documents(300, seed))
    data: dict[str, Any] = {"shuffle_window_shards": 2}
    remote = cast("remote_corpus.RemoteCorpus", object())
    corpora = [replace(one, remote=remote) for one in open_plan(make_config(folders, **data), TOKENIZER)[1]]
    sizes = [sorted((shard.num_bytes for shard in one.shards), reverse=True) for one in corpora]
    config = make_config(folders, **data, cache_bytes=sum(map(sum, (one[:2] for one in sizes))) - 1)
    data_plan._check_cache(config, [corpora[:1], corpora[1:]])
    with pytest.raises(ConfigError, match=r"data\.cache_bytes is \d+; expected at least"):
        data_plan._check_cache(config, [corpora[:1], corpora])


@pytest.mark.parametrize("fault", ["drop", "truncate", "short", "corrupt", "stall", "503"])
def test_every_file_that_fails_once_is_fetched_again(
    server: StoreServer, tmp_path: Path, expected: list[str], fault: str
) -> None:
    for end in ("manifest.json", "train.segments.npy", "train.blocks.npy", "000001.tar", "000003.index.npy"):
        if (fault, end) != ("corrupt", "manifest.json"):  # nothing says what it should be
            server.faults[end] = [fault]
    assert digests(remote_config(f"{server.url}/web", tmp_path), NUM_STEPS) == expected
    assert not any(server.faults.values())


def test_a_store_that_is_down_for_a_while_delays_and_no_more(
    server: StoreServer, tmp_path: Path, expected: list[str]
) -> None:
    config = remote_config(f"{server.url}/web", tmp_path, shuffle_window_shards=2)
    timer = threading.Timer(0.6, lambda: setattr(server, "always", None))
    server.always = "503"
    timer.start()
    assert digests(config, NUM_STEPS) == digests_of(server, config, tmp_path)
    timer.join()


def digests_of(server: StoreServer, config: object, tmp_path: Path) -> list[str]:
    return digests(remote_config(f"{server.url}/web", tmp_path / "again", shuffle_window_shards=2), NUM_STEPS)


def test_a_store_that_fails_for_ever_is_an_error_within_the_limit(server: StoreServer, tmp_path: Path) -> None:
    config = remote_config(f"{server.url}/web", tmp_path, retry_seconds=1)
    with closing(TokenStream(config, batch_plan(12, 1, 4, 32), 0, TOKENIZER)) as stream:
        server.always = "503"
        began = time.monotonic()
        with pytest.raises(
            DataError, match=r"web/train-\d+\.tar cannot be read: the server answered 503; tried \d+ times in"
        ):
            stream.next_step()
        assert time.monotonic() - began < 5


def test_a_shard_that_is_not_the_manifests_is_an_error(server: StoreServer, web: Path, tmp_path: Path) -> None:
    server.always = None
    config = remote_config(f"{server.url}/web", tmp_path)
    with closing(TokenStream(config, batch_plan(12, 1, 4, 32), 0, TOKENIZER)) as stream:
        server.always = "corrupt"
        with pytest.raises(
            DataError, match=r"its sha256 differs from that in manifest\.json; tried 3 times .*Upload the corpus again"
        ):
            stream.next_step()
    assert not list(tmp_path.rglob("*.tar*"))  # nothing of it stays


def test_a_missing_manifest_and_missing_rows_are_named(server: StoreServer, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"/nowhere/manifest\.json cannot be read: there is no such file; tried once\."):
        open_plan(remote_config(f"{server.url}/nowhere", tmp_path), TOKENIZER)
    with pytest.raises(
        DataError, match=r"rows-64/identity\.json cannot be read.* are made by `prepare`, in the folder rows-64"
    ):
        open_plan(remote_config(f"{server.url}/web", tmp_path, seq_len=64), TOKENIZER)
    with pytest.raises(DataError, match=r"/web: it was prepared with tokenizer aaaa"):
        open_plan(remote_config(f"{server.url}/web", tmp_path), "c" * 64)


def test_a_corpus_that_is_prepared_again_is_not_taken_for_the_old_one(tmp_path: Path) -> None:
    make_corpus(tmp_path / "web", random_documents(60, 1), random_documents(5, 2))
    with closing_server(tmp_path) as server:
        config = remote_config(f"{server.url}/web", tmp_path / "cache")
        first = digests(config, 3)
        for path in (tmp_path / "web").rglob("*.*"):
            if path.is_file():
                path.unlink()
        make_corpus(tmp_path / "web", random_documents(60, 7), random_documents(5, 2))
        second = digests(config, 3)
        assert second != first and second == digests(make_config({tmp_path / "web": 1.0}), 3)


def closing_server(folder: Path) -> closing[StoreServer]:
    return closing(StoreServer(folder))


def test_the_cache_stays_within_its_limit_and_what_was_evicted_comes_again(
    server: StoreServer, web: Path, tmp_path: Path, expected: list[str]
) -> None:
    manifest = shards_of(web)
    tables = (
        sum(path.stat().st_size for path in (web / "rows-32").glob("train.*")) + (web / "manifest.json").stat().st_size
    )
    num_steps = 170
    sources = make_config({web: 1.0}, shuffle_window_shards=2)
    assert num_steps * 12 > 1.5 * open_plan(sources, TOKENIZER)[0].epoch_rows_at(0)["web"]
    local = digests(sources, num_steps)
    limit = tables + int(4.5 * max(shard.num_bytes for shard in manifest.train))
    assert limit < size_of(web) / 1.5
    config = remote_config(f"{server.url}/web", tmp_path, shuffle_window_shards=2, cache_bytes=limit)
    largest, done = 0, threading.Event()

    def watch() -> None:
        nonlocal largest
        while not done.wait(0.002):
            largest = max(largest, size_while_nothing_is_evicted(tmp_path))

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        assert digests(config, num_steps) == local
    finally:
        done.set()
        watcher.join()
    assert limit / 2 < largest <= limit
    counts = [number for name, number in server.requests.items() if name.endswith(".tar")]
    assert max(counts) > 1  # a second epoch needs again what was evicted
    assert sum(counts) <= 4 * len(counts)  # but shards do not drive each other out


def test_a_cache_that_does_not_hold_a_window_is_refused(server: StoreServer, web: Path, tmp_path: Path) -> None:
    sizes = sorted((shard.num_bytes for shard in shards_of(web).train), reverse=True)
    config = remote_config(f"{server.url}/web", tmp_path, shuffle_window_shards=2, cache_bytes=sum(sizes[:2]) - 1)
    with pytest.raises((ConfigError, CacheFullError), match=r"data\.cache_bytes is \d+.*expected"):
        open_plan(config, TOKENIZER)


def test_a_bit_that_flips_in_the_cache_is_noticed_and_the_shard_fetched_again(
    server: StoreServer, web: Path, tmp_path: Path
) -> None:
    manifest = shards_of(web)
    shard = manifest.train[0]
    remote = open_remote(f"{server.url}/web", remote_config(f"{server.url}/web", tmp_path).data)
    assert remote is not None
    local = ShardReader(web, shard, manifest.dtype)
    reader = ShardReader(remote.folder, shard, manifest.dtype, remote=remote)
    tar, index = remote.files_of(shard)
    flip_bit(tar, int(load_index(web, shard)["offset"][5]) + 3)
    for document in (4, 5, 6):
        np.testing.assert_array_equal(reader.read(document), local.read(document))
    assert server.requests["web/train-000000.tar"] == 2
    reader.close()
    flip_bit(index, index.stat().st_size - 3)  # another process, later
    again = open_remote(f"{server.url}/web", remote_config(f"{server.url}/web", tmp_path).data)
    assert again is not None
    reader = ShardReader(again.folder, shard, manifest.dtype, remote=again)
    np.testing.assert_array_equal(reader.read(5), local.read(5))
    assert server.requests["web/train-000000.index.npy"] == 2
    for one in (reader, local, remote, again):
        one.close()


def test_a_document_that_is_damaged_in_the_store_is_masked_as_on_a_disk(
    web: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "web"
    manifest = make_corpus(folder, random_documents(60, 1), random_documents(5, 2))
    index = load_index(folder, manifest.train[0])
    flip_bit(folder / "train-000000.tar", int(index["offset"][5]))
    damaged = manifest.__class__(**{**vars(manifest), "train": (
        manifest.train[0].__class__(**{**vars(manifest.train[0]), "sha256": shard_reader.file_sha256(folder / "train-000000.tar")}),
        *manifest.train[1:],
    )})  # fmt: skip
    damaged.save(folder)
    with closing_server(tmp_path) as server:
        remote = open_remote(f"{server.url}/web", remote_config(f"{server.url}/web", tmp_path / "cache").data)
        assert remote is not None
        reader = ShardReader(remote.folder, damaged.train[0], damaged.dtype, remote=remote)
        for _ in range(3):
            with pytest.raises(shard_reader.DamagedDocumentError):
                reader.read(5)
        assert (
            server.requests["web/train-000000.tar"] == 1
        )  # it is what the manifest says: fetching it again is in vain
        reader.close()
        remote.close()


def test_held_out_rows(server: StoreServer, web: Path, tmp_path: Path) -> None:
    batches = []
    for config in (make_config({web: 1.0}), remote_config(f"{server.url}/web", tmp_path)):
        with closing(ValRows(config, TOKENIZER, 0)) as rows:
            batches.append(rows.batch(range(rows.num_rows)))
    assert batches[0].tokens_BT.equal(batches[1].tokens_BT) and batches[0].targets_BT.equal(batches[1].targets_BT)


@pytest.mark.launches
def test_two_processes_that_race_download_each_file_once(
    server: StoreServer, tmp_path: Path, expected: list[str]
) -> None:
    server.delay = 0.02
    readers = [start_reader(f"{server.url}/web", tmp_path) for _ in range(2)]
    for reader in readers:
        out, problems = reader.communicate(timeout=120)
        assert reader.returncode == 0, problems
        assert json.loads(out) == expected
    files = {name: number for name, number in server.requests.items() if name.endswith((".tar", ".npy"))}
    assert len(files) > 15 and set(files.values()) == {1}


@pytest.mark.launches
@pytest.mark.parametrize("suffix", [".tar", "segments.npy"])
def test_a_process_that_is_killed_while_it_downloads_leaves_a_cache_that_works(
    server: StoreServer, web: Path, tmp_path: Path, expected: list[str], suffix: str
) -> None:
    server.faults[suffix] = ["stall"] * 4
    reader = start_reader(f"{server.url}/web", tmp_path)
    try:
        give_up_at = time.monotonic() + 60
        while not any(path.name.endswith(f"{suffix}.tmp") for path in tmp_path.rglob(".*.tmp")):
            assert time.monotonic() < give_up_at and reader.poll() is None
            time.sleep(0.02)
    finally:
        os.kill(reader.pid, signal.SIGKILL)
        reader.communicate()
    assert any(path.name.endswith(".tmp") for path in tmp_path.rglob(".*.tmp"))
    server.faults.clear()
    assert digests(remote_config(f"{server.url}/web", tmp_path), NUM_STEPS) == expected
    assert not [path for path in tmp_path.rglob(".*.tmp") if path.name.endswith(f"{suffix}.tmp")]


@pytest.mark.slow
@pytest.mark.launches
def test_killed_at_any_time_a_reader_leaves_a_cache_that_works(server: StoreServer, web: Path, tmp_path: Path) -> None:
    largest = max(shard.num_bytes for shard in shards_of(web).train)
    limit = size_of(web / "rows-32") + 300_000 + 5 * largest
    local = digests(make_config({web: 1.0}, shuffle_window_shards=2), 40)
    options = {"shuffle_window_shards": 2, "cache_bytes": limit}
    server.delay = 0.01
    random = np.random.default_rng(0)
    for _ in range(8):
        readers = [start_reader(f"{server.url}/web", tmp_path, 40, **options) for _ in range(2)]
        give_up_at = time.monotonic() + 60
        while not any(tmp_path.rglob("*.tmp")) and time.monotonic() < give_up_at and readers[0].poll() is None:
            time.sleep(0.01)
        time.sleep(float(random.uniform(0, 0.5)))
        for reader in readers:
            reader.kill()
            reader.communicate()
    server.delay = 0.0
    assert digests(remote_config(f"{server.url}/web", tmp_path, **options), 40) == local
    assert size_of(tmp_path) <= limit


# The cache by itself.


def put(content: bytes):
    return lambda file: file.write(content)


def test_what_is_held_is_not_evicted_and_what_was_used_longest_ago_goes_first(tmp_path: Path) -> None:
    cache = NodeCache(tmp_path, 100, 5)
    for number in range(4):
        cache.add(tmp_path / f"c/{number}", 25, put(b"x" * 25))
        os.utime(tmp_path / f"c/{number}", ns=(number, number))
    held = cache.hold(tmp_path / "c/0")
    cache.needed = {tmp_path / "c/4": 0}
    assert held is not None
    os.utime(tmp_path / "c/0", ns=(0, 0))
    cache.add(tmp_path / "c/4", 40, put(b"y" * 40))
    assert sorted(path.name for path in (tmp_path / "c").iterdir()) == ["0", "3", "4"]
    with pytest.raises(
        CacheFullError, match=r"data\.cache_bytes is 100, and 65 of them are in use; expected room for 60 more"
    ):
        cache.add(tmp_path / "c/5", 60, put(b"z" * 60), ahead=True)
    assert sorted(path.name for path in (tmp_path / "c").iterdir()) == ["0", "4"]
    os.close(held)
    cache.add(tmp_path / "c/5", 60, put(b"z" * 60), ahead=True)
    assert sorted(path.name for path in (tmp_path / "c").iterdir()) == ["4", "5"]
    cache.needed = {tmp_path / "c/4": 1, tmp_path / "c/5": 0}
    cache.add(tmp_path / "c/7", 30, put(b"w" * 30))  # what is needed later goes before what is needed sooner
    assert sorted(path.name for path in (tmp_path / "c").iterdir()) == ["5", "7"]
    with pytest.raises(CacheFullError, match="expected room for 101 more"):
        cache.add(tmp_path / "c/6", 101, put(b""))


def test_a_file_of_unknown_size_makes_room_as_it_grows(tmp_path: Path) -> None:
    cache = NodeCache(tmp_path, 1000, 5)
    cache.add(tmp_path / "old", 600, put(b"x" * 600))

    def write(file: CacheFile) -> None:
        for _ in range(8):
            file.write(b"y" * 100)

    cache.add(tmp_path / "new", None, write)
    assert [path.name for path in tmp_path.iterdir() if path.name != ".lock"] == ["new"]
    assert (tmp_path / "new").read_bytes() == b"y" * 800
    with pytest.raises(CacheFullError):
        cache.add(tmp_path / "larger", None, lambda file: [file.write(b"z" * 100) for _ in range(11)])
    assert not (tmp_path / ".larger.tmp").exists()


def test_a_tar_takes_its_index_along(tmp_path: Path) -> None:
    cache = NodeCache(tmp_path, 100, 5)
    cache.add(tmp_path / "a.index.npy", 20, put(b"i" * 20))
    os.utime(tmp_path / "a.index.npy", ns=(1, 1))
    cache.add(tmp_path / "a.tar", 50, put(b"t" * 50))
    held = cache.hold(tmp_path / "a.tar")
    assert held is not None
    with pytest.raises(CacheFullError):
        cache.add(tmp_path / "b", 50, put(b"b" * 50))
    assert (tmp_path / "a.index.npy").exists()
    os.close(held)
    cache.add(tmp_path / "b", 90, put(b"b" * 90))
    assert sorted(path.name for path in tmp_path.iterdir() if path.name != ".lock") == ["b"]


def test_who_does_not_wait_is_told_and_who_waits_gives_up_on_a_frozen_process(tmp_path: Path) -> None:
    cache = NodeCache(tmp_path, 100, 0.2)
    with open(tmp_path / ".a.tmp", "wb") as frozen:
        fcntl.flock(frozen, fcntl.LOCK_EX)
        assert not cache.add(tmp_path / "a", 1, put(b"a"), ahead=True)
        with pytest.raises(
            DataError, match=r"another process is downloading it, and has written nothing for 0 s\. Look for"
        ):
            cache.add(tmp_path / "a", 1, put(b"a"))
    assert cache.add(tmp_path / "a", 1, put(b"a"))


def test_who_waits_for_a_download_does_not_wait_for_those_who_read_it(tmp_path: Path) -> None:
    cache = NodeCache(tmp_path, 100, 5)
    found: list[bool] = []
    with open(tmp_path / ".a.tmp", "wb") as download:
        fcntl.flock(download, fcntl.LOCK_EX)
        waiter = threading.Thread(target=lambda: found.append(cache.add(tmp_path / "a", 1, put(b"a"))))
        waiter.start()
        time.sleep(0.2)  # it has opened the temporary name, and is refused the lock
        os.replace(tmp_path / ".a.tmp", tmp_path / "a")
        fcntl.flock(download, fcntl.LOCK_SH)  # as a rank that keeps a row table does at once
        waiter.join(2)
        assert found == [True]


def test_a_full_disk_and_a_folder_of_others_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = NodeCache(tmp_path, 100, 5)

    def full(_: CacheFile) -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(
        DataError, match=r"its disk is full, and data\.cache_bytes is 100; expected that much room\. Lower it"
    ):
        cache.add(tmp_path / "a", 1, full)
    assert not list(tmp_path.glob(".a*"))
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"file: .*set data\.cache_dir to another folder"):
        NodeCache(tmp_path / "file", 100, 5)
    monkeypatch.setattr(node_cache.os, "access", lambda *_: False)
    with pytest.raises(DataError, match="it belongs to another user"):
        NodeCache(tmp_path, 100, 5)


def test_tables_without_a_sha256_are_read_and_compared_with_the_manifest(tmp_path: Path) -> None:
    web = tmp_path / "web"
    make_corpus(web, random_documents(200, 1), random_documents(9, 2))
    expected = digests(make_config({web: 1.0}), 3)
    identity = web / "rows-32/identity.json"
    content = json.loads(identity.read_bytes())
    assert set(content.pop("files")) == {path.name for path in (web / "rows-32").glob("*.npy")}
    identity.write_text(json.dumps(content))  # as it was before these were listed
    with closing_server(tmp_path) as server:
        for config in (make_config({web: 1.0}), remote_config(f"{server.url}/web", tmp_path / "cache")):
            assert digests(config, 3) == expected
        path = web / "rows-32/train.segments.npy"
        array = np.load(path)
        array["length"][3] ^= 1
        np.save(path, array)
        with pytest.raises(
            DataError, match=r"its rows hold \d+ tokens; expected \d+, as in the manifest; tried 3 times"
        ):
            open_plan(remote_config(f"{server.url}/web", tmp_path / "again"), TOKENIZER)


def test_a_table_that_is_damaged_in_the_store_is_refused(tmp_path: Path) -> None:
    web = tmp_path / "web"
    make_corpus(web, random_documents(200, 1), random_documents(9, 2))
    path = web / "rows-32/train.segments.npy"
    flip_bit(path, path.stat().st_size - 12)  # another document, whose length fits
    with closing_server(tmp_path) as server, pytest.raises(
        DataError, match=r"train\.segments\.npy cannot be read: its sha256 differs from that in identity\.json; tried 3"
    ):  # fmt: skip
        open_plan(remote_config(f"{server.url}/web", tmp_path / "cache"), TOKENIZER)


def test_a_corpus_that_grew_keeps_its_shards_and_old_and_new_share_a_cache(tmp_path: Path) -> None:
    documents, web, cache = random_documents(400, 1), tmp_path / "web", tmp_path / "cache"
    make_corpus(web, documents[:300])
    before = [(shard.name, shard.sha256) for shard in shards_of(web).train]
    old = make_config({Path(shutil.copytree(web, tmp_path / "old/web")): 1.0})
    with closing_server(tmp_path) as server:
        config = remote_config(f"{server.url}/web", cache)
        with closing(TokenStream(config, batch_plan(12, 1, 4, 32), 0, TOKENIZER)) as running:
            local = TokenStream(old, batch_plan(12, 1, 4, 32), 0, TOKENIZER)
            assert running.next_step().micro_batches[0].tokens_BT.equal(local.next_step().micro_batches[0].tokens_BT)
            digests(config, 40)  # all shards
            tars = Counter({name: number for name, number in server.requests.items() if name.endswith(".tar")})
            assert len(tars) == len(before) and set(tars.values()) == {1}
            shutil.rmtree(web)
            make_corpus(web, documents)
            after = [(shard.name, shard.sha256) for shard in shards_of(web).train]
            assert digests(config, 40) == digests(make_config({web: 1.0}), 40)
            changed = {f"web/{name}.tar" for name, sha256 in after if (name, sha256) not in before}
            assert 0 < len(changed) < len(before)
            for name, number in server.requests.items():
                if name.endswith(".tar"):
                    assert number == tars[name] + (name in changed), name
            for _ in range(8):  # who has the old manifest goes on with the old shards, from the cache
                ours, theirs = running.next_step(), local.next_step()
                assert ours.micro_batches[0].tokens_BT.equal(theirs.micro_batches[0].tokens_BT) and not ours.damaged
            local.close()


def test_a_run_that_began_with_local_shards_goes_on_with_the_same_ones_elsewhere(
    server: StoreServer, web: Path, tmp_path: Path
) -> None:
    sizes = batch_plan(12, 1, 4, 32)
    with closing(TokenStream(make_config({web: 1.0}), sizes, 0, TOKENIZER)) as local:
        local.next_step()
        state = local.state()
        expected = local.next_step()
    with closing(TokenStream(remote_config(f"{server.url}/web", tmp_path), sizes, 0, TOKENIZER)) as remote:
        remote.load_state(state)
        rows = remote.next_step()
    assert all(a.tokens_BT.equal(b.tokens_BT) for a, b in zip(rows.micro_batches, expected.micro_batches, strict=True))


@pytest.mark.slow
@pytest.mark.launches
def test_two_ranks_train_through_phases_as_from_the_local_disk(tiny_config: Path, tmp_path: Path) -> None:
    found = {}
    shutil.copytree(tiny_config.parent / "shards", tmp_path / "shards")

    def sources_at(root: str) -> str:
        weights = (("code", 3), ("prose", 1))
        return ", ".join(f"{{name: {name}, shards: '{root}/{name}', weight: {weight}}}" for name, weight in weights)

    phases = "data.phases=[{from_step: 2, weights: {prose: 1, code: 1}, seq_len: 64}]"
    here = [f"data.sources=[{sources_at(str(tmp_path / 'shards'))}]", phases, "data.packing=concat"]
    prepare(tiny_config, *here)
    with closing(StoreServer(tmp_path / "shards")) as server:
        elsewhere = [f"data.sources=[{sources_at(server.url)}]", *here[1:], f"data.cache_dir={tmp_path}/cache",
                     "data.retry_seconds=60"]  # fmt: skip
        for name, overrides in (("local", here), ("elsewhere", elsewhere)):
            run = tmp_path / name
            arguments = [str(tiny_config), f"run.dir={run}", "train.num_steps=4", "train.micro_batch_size=8",
                         "schedule.warmup_steps=1", "eval.every_steps=2", *overrides]  # fmt: skip
            server.faults["train-000000.tar"] = ["drop", "503"]
            processes = start_ranks("launch/pretrain.py", arguments, 2, tmp_path / f"{name}-output")
            statuses = [process.wait(200) for process in processes]
            assert statuses == [0, 0], (tmp_path / f"{name}-output-0").read_text()[-2000:]
            found[name] = [line for line in metric_lines(run) if "loss" in line or "eval/loss" in line]
        files = {name: number for name, number in server.requests.items() if name.endswith((".tar", ".npy"))}
    assert [line.get("loss", line.get("eval/loss")) for line in found["local"]] == [
        line.get("loss", line.get("eval/loss")) for line in found["elsewhere"]
    ]
    assert len(found["local"]) == 6
    assert {number for name, number in files.items() if not name.endswith("train-000000.tar")} == {1}
