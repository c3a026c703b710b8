"""Every kind of damage in the middle of a run: found, named, counted; the order stays; too much of it ends the run."""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pretrain.checkpoints.checkpoint_files import list_steps
from pretrain.data.damage import Damage, DamageLedger, TooMuchDamageError, describe
from pretrain.data.data_plan import open_plan
from pretrain.data.feed import Feed, StepInput
from pretrain.data.row_reader import IGNORED_TARGET
from pretrain.data.shards import Manifest, Shard, load_index
from pretrain.data.stream import TokenStream
from pretrain.errors import DataError
from pretrain.options.settings import load_config
from pretrain.preparing.verify_shards import Problem, verify
from pretrain.ranks.distributed import Ranks
from pretrain.storage import stores
from tests.helpers.data_helpers import (
    TOKENIZER,
    batch_plan,
    damage_last_needed,
    flip_bit,
    make_config,
    make_corpus,
    random_documents,
)
from tests.helpers.rank_helpers import losses, metric_lines, run_cases
from tests.helpers.store_reader import remote_config
from tests.helpers.store_server import StoreServer

BATCH, PAD = 12, 3
NAME = "train-000001"  # the shard that is damaged


class Exchange:
    """What threads that play ranks hand to each other."""

    def __init__(self, world_size: int) -> None:
        self.values: list[Any] = [None] * world_size
        self.barrier = threading.Barrier(world_size, timeout=30)


@dataclass(frozen=True)
class ThreadRanks(Ranks):
    """A rank that is a thread."""

    exchange: Exchange = field(default_factory=lambda: Exchange(1))

    def gather(self, value: Any) -> list[Any]:
        self.exchange.values[self.rank] = pickle.loads(pickle.dumps(value))  # as between processes
        self.exchange.barrier.wait()
        values = list(self.exchange.values)
        self.exchange.barrier.wait()
        return values

    def start_sum(self, values: Any) -> Any:
        sums = [float(sum(column)) for column in zip(*self.gather(list(values)), strict=True)]
        return type("Sum", (), {"result": lambda _: sums, "is_ready": lambda _: True})()


def ranks_of(world_size: int) -> list[ThreadRanks]:
    exchange = Exchange(world_size)
    return [ThreadRanks(rank, rank, world_size, torch.device("cpu"), exchange=exchange) for rank in range(world_size)]


ONE_RANK = ranks_of(1)[0]


@pytest.fixture(scope="module")
def origin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("origin") / "web"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pretrain.data.shards._MEMBER_BYTES", 2000)  # several members a shard
        make_corpus(folder, random_documents(400, 1), random_documents(20, 2))
    return folder


@pytest.fixture
def web(origin: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(origin, tmp_path / "web"))


def shard_of(folder: Path, name: str = NAME) -> Shard:
    return next(shard for shard in Manifest.load(folder).train if shard.name == name)


def index_of(folder: Path, name: str = NAME) -> np.ndarray:
    return np.array(load_index(folder, shard_of(folder, name)))


def open_stream(folder: Path, rank: int = 0, world_size: int = 1, is_new: bool = True, **data: Any) -> TokenStream:
    config = make_config({folder: 1.0}, **data)
    return TokenStream(config, batch_plan(BATCH, world_size, 1, 32), rank, TOKENIZER, is_new=is_new)


def num_steps_of(folder: Path) -> int:
    """Steps that show every row once and some again."""
    return -(-open_plan(make_config({folder: 1.0}), TOKENIZER)[0].epoch_rows_at(0)["web"] // BATCH)


def take(feed: Feed, num_steps: int) -> list[StepInput]:
    return [feed.take() for _ in range(num_steps)]


def rows_of(step: StepInput) -> list[torch.Tensor]:
    return [torch.cat(tensors) for tensors in zip(*step.micro_batches, strict=True)]


@pytest.fixture(scope="module")
def whole(origin: Path) -> list[StepInput]:
    with closing(open_stream(origin)) as stream:
        return take(Feed(stream, ONE_RANK), num_steps_of(origin))


# What happens to a shard; each returns the documents that it costs.
Kind = Callable[[Path], list[int]]


def flip_payload(folder: Path) -> list[int]:
    flip_bit(folder / f"{NAME}.tar", int(index_of(folder)["offset"][4]) + 1)
    return [4]


def flip_header(folder: Path) -> list[int]:
    flip_bit(folder / f"{NAME}.tar", 100)
    return []


def cut_at(folder: Path, end: int) -> list[int]:
    index = index_of(folder)
    os.truncate(folder / f"{NAME}.tar", end)
    ends = index["offset"] + 2 * index["num_tokens"]
    return np.flatnonzero(ends > end).tolist()


def truncate_inside(folder: Path) -> list[int]:
    return cut_at(folder, int(index_of(folder)["offset"][-5]) + 3)


def truncate_between_members(folder: Path) -> list[int]:
    index = index_of(folder)
    ends = index["offset"] + 2 * index["num_tokens"]
    last = int(np.flatnonzero(index["offset"][1:] != ends[:-1])[-1])  # of the last member but one
    return cut_at(folder, -(-int(ends[last]) // 512) * 512)


def every_document(folder: Path) -> list[int]:
    return list(range(shard_of(folder).num_documents))


def remove(folder: Path) -> list[int]:
    (folder / f"{NAME}.tar").unlink()
    return every_document(folder)


def empty(folder: Path) -> list[int]:
    (folder / f"{NAME}.tar").write_bytes(b"")
    return every_document(folder)


def put_another(folder: Path) -> list[int]:
    content = (folder / "train-000002.tar").read_bytes()
    (folder / f"{NAME}.tar").write_bytes(content + bytes(10240))  # a longer one
    return every_document(folder)


def put_another_of_its_size(folder: Path) -> list[int]:
    content = (folder / "train-000002.tar").read_bytes()
    size = shard_of(folder).num_bytes
    (folder / f"{NAME}.tar").write_bytes(content[:size].ljust(size, b"\0"))
    return every_document(folder)


def remove_index(folder: Path) -> list[int]:
    (folder / f"{NAME}.index.npy").unlink()
    return every_document(folder)


def flip_index(folder: Path) -> list[int]:
    path = folder / f"{NAME}.index.npy"
    flip_bit(path, path.stat().st_size - 3)
    return every_document(folder)


# kind: what --verify says; what a new run says at its start, if anything; what a run that is under way says
KINDS: dict[Kind, tuple[str, str | None, str]] = {
    flip_payload: (rf"{NAME}\.tar: document 4 \(bytes .*another crc32", None, "have another crc32 than in the index"),
    flip_header: (rf"{NAME}\.tar: bytes 0 to 512: a header of the tar is damaged", None, ""),
    truncate_inside: (rf"{NAME}\.tar: document \d+ .*it is cut off", "it was truncated", "it was truncated"),
    truncate_between_members: (r"cut short.*missing", "it was truncated", "it was truncated"),
    remove: (rf"{NAME}\.tar: it is missing", rf"{NAME}\.tar is missing", "cannot be opened: No such file"),
    empty: (rf"{NAME}\.tar: .*it is empty", r"size is 0 bytes", "size is 0 bytes"),
    put_another: (r"another crc32", r"size is \d+ bytes; expected \d+", r"size is \d+ bytes; expected \d+"),
    put_another_of_its_size: (r"it is another shard's file, most likely", None, "have another crc32"),
    remove_index: (rf"{NAME}\.index\.npy: it is missing", rf"{NAME}\.index\.npy is missing", "No such file"),
    flip_index: (rf"{NAME}\.index\.npy: its sha256 is not", None, "its sha256 differs from the manifest's"),
}


@pytest.fixture(params=KINDS, ids=lambda kind: kind.__name__)
def kind(request: pytest.FixtureRequest) -> Kind:
    return request.param


def test_verify_names_it(web: Path, kind: Kind) -> None:
    kind(web)
    text = " ".join(str(Problem(**one)) for one in verify(web, 1)["problems"])
    assert re.search(KINDS[kind][0], text), text


def test_a_new_run_is_refused_if_a_size_is_wrong_and_one_that_goes_on_is_not(web: Path, kind: Kind) -> None:
    kind(web)
    if (message := KINDS[kind][1]) is not None:
        with pytest.raises(DataError, match=rf"{message}.*Restore the file from a copy"):
            open_stream(web)
    else:
        open_stream(web).close()
    open_stream(web, is_new=False).close()


def test_its_documents_are_masked_named_once_and_counted_and_nothing_else_changes(
    web: Path, kind: Kind, whole: list[StepInput], caplog: pytest.LogCaptureFixture
) -> None:
    index = index_of(web)
    stream = open_stream(web, max_damaged_fraction=1)
    lost = kind(web)  # after the start
    caplog.set_level("WARNING", logger="longhaul")
    with closing(stream):
        feed = Feed(stream, ONE_RANK)
        steps = take(feed, len(whole))
        again = take(feed, 8)  # of another epoch
    num_rows, num_masked = stream.plan.epoch_rows_at(0)["web"], 0
    for step, expected in zip(steps, whole, strict=True):
        (tokens, targets, starts, numbers), before = rows_of(step), rows_of(expected)
        assert starts.equal(before[2]) and numbers.equal(before[3])
        masked = (targets != before[1]) | (tokens != before[0])
        assert (targets[masked] == IGNORED_TARGET).all() and (tokens[masked] == PAD).all()
        assert step.num_targets == expected.num_targets - int(masked.sum())
        assert bool(masked.any()) == (step.num_damaged > 0)
        num_masked += int(masked[numbers < num_rows].sum())  # the last step begins another epoch
    assert num_masked == int((index["num_tokens"][lost].astype(int) - 1).sum())
    ledger = stream.damage
    assert (ledger.num_documents, ledger.num_tokens) == (len(lost), int(index["num_tokens"][lost].sum()))
    lines = [line for step in steps for line in step.damage]
    assert [record.getMessage() for record in caplog.records] == lines
    assert (f"{web}/{NAME}.tar" in " ".join(lines)) == bool(lost)
    if lost:
        assert re.search(KINDS[kind][2], lines[0])
    assert not any(step.damage for step in again)  # named before


@pytest.mark.parametrize("is_beyond", [False, True])
def test_the_run_ends_beyond_the_fraction_and_not_at_it(web: Path, tmp_path: Path, kind: Kind, is_beyond: bool) -> None:
    index, num_tokens = index_of(web), sum(shard.num_tokens for shard in Manifest.load(web).train)
    lost = kind(Path(shutil.copytree(web, tmp_path / "trial" / "web")))
    damaged, num_steps = int(index["num_tokens"][lost].sum()), num_steps_of(web)
    with closing(open_stream(web, max_damaged_fraction=max(damaged - is_beyond, 0) / num_tokens)) as stream:
        kind(web)
        feed = Feed(stream, ONE_RANK)
        if not is_beyond or not lost:
            take(feed, num_steps)
            return
        with pytest.raises(TooMuchDamageError, match=_message(web, len(lost), index)) as caught:
            take(feed, num_steps)
        assert caught.value.agreed and caught.value.exit_status == 1
        (state,) = stream.state()["damaged"]["web"].values()
        assert stream.cursor < num_steps * BATCH and (state is None or len(state) == len(lost))


def _message(folder: Path, num_lost: int, index: np.ndarray) -> str:
    return (
        r"data\.sources\[web\]: [\d.]+% of its training tokens cannot be read; expected at most "
        rf"data\.max_damaged_fraction \(0\.\d+\)\. The worst are {NAME}\.tar: {num_lost} of {len(index)} documents "
        rf"\(.*\)\. Restore these files from a copy \(python launch/prepare\.py --verify {folder} names all damage\) "
        r"and run the same command again; or go on without them by a higher data\.max_damaged_fraction\."
    )


@pytest.mark.parametrize("world_size", [2, 4])
def test_all_ranks_count_the_same_and_end_at_the_same_step(web: Path, world_size: int) -> None:
    ends: dict[int, tuple[int, str, Any]] = {}

    def play(ranks: ThreadRanks, stream: TokenStream) -> None:
        feed = Feed(stream, ranks)
        try:
            while True:
                feed.take()
        except TooMuchDamageError as error:
            ends[ranks.rank] = stream.cursor, str(error), stream.damage.state()

    streams = [open_stream(web, rank, world_size, max_damaged_fraction=0.003) for rank in range(world_size)]
    index = index_of(web)
    for document in (4, 7, 12, 20, 30):
        flip_bit(web / f"{NAME}.tar", int(index["offset"][document]))
    threads = [
        threading.Thread(target=play, args=one, daemon=True) for one in zip(ranks_of(world_size), streams, strict=True)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    for stream in streams:
        stream.close()
    assert len(ends) == world_size and all(end == ends[0] for end in ends.values())
    assert ends[0][0] > 0 and 1 <= len(ends[0][2]["web"][NAME]) <= 5


def test_a_step_without_a_document_that_can_be_read_ends_the_run(web: Path) -> None:
    for option, is_refused in ((0.99999, True), (1.0, False)):
        with closing(open_stream(web, is_new=False, max_damaged_fraction=option)) as stream:
            for shard in Manifest.load(web).train[:-1]:
                (web / f"{shard.name}.tar").unlink(missing_ok=True)
            last = Manifest.load(web).train[-1].name
            os.truncate(web / f"{last}.tar", int(index_of(web, last)["offset"][-1]) + 1)
            feed = Feed(stream, ONE_RANK)
            if is_refused:
                with pytest.raises(TooMuchDamageError, match=r"no document of this step's rows can be read|cannot be"):
                    take(feed, 60)
            else:
                assert any(step.num_targets == 0 for step in take(feed, 60))


# What survives a restart.


def test_a_restart_knows_what_was_damaged_and_forgets_what_is_mended(web: Path) -> None:
    index, content = index_of(web), (web / f"{NAME}.tar").read_bytes()
    num_steps = num_steps_of(web)
    other = Manifest.load(web).train[2].name
    with closing(open_stream(web, max_damaged_fraction=1)) as stream:
        for document in (4, 7):
            flip_bit(web / f"{NAME}.tar", int(index["offset"][document]))
        moved = (web / f"{other}.tar").rename(web / "moved")
        take(Feed(stream, ONE_RANK), num_steps)
        state = json.loads(json.dumps(stream.state()))
        counts = stream.damage.num_documents, stream.damage.num_tokens
    assert state["damaged"] == {"web": {NAME: [[n, int(index["num_tokens"][n])] for n in (4, 7)], other: None}}
    with closing(open_stream(web, is_new=False, max_damaged_fraction=1)) as stream:
        stream.load_state(state)
        assert stream.damage.forget_mended(ONE_RANK) == 0
        assert (stream.damage.num_documents, stream.damage.num_tokens) == counts
        assert not any(step.damage for step in take(Feed(stream, ONE_RANK), num_steps))  # all named before
    flip_bit(web / f"{NAME}.tar", int(index["offset"][4]))  # mended
    with closing(open_stream(web, is_new=False, max_damaged_fraction=0.001)) as stream:
        stream.load_state(state)
        assert stream.damage.forget_mended(ONE_RANK) == 1
        with pytest.raises(
            TooMuchDamageError, match=rf"The worst are {other}\.tar: .*No such file.*; {NAME}\.tar: 1 of"
        ):
            stream.damage.check()
    moved.rename(web / f"{other}.tar")
    (web / f"{NAME}.tar").write_bytes(content)
    with closing(open_stream(web, max_damaged_fraction=0)) as stream:
        stream.load_state(state)
        assert stream.damage.forget_mended(ONE_RANK) == counts[0]
        stream.damage.check()
        assert stream.state()["damaged"] == {} and stream.damage.num_tokens == 0
        del state["damaged"]  # of a checkpoint that was made before there was a count
        stream.load_state(state)


def test_several_ranks_divide_what_is_read_again(web: Path) -> None:
    config = make_config({web: 1.0})
    corpora = open_plan(config, TOKENIZER)[1]
    shards = corpora[0].shards
    flip_bit(web / f"{shards[3].name}.tar", int(index_of(web, shards[3].name)["offset"][1]))
    state = {"web": {shard.name: [[1, 5]] for shard in shards} | {"train-999999": None}, "gone": {NAME: None}}
    ledgers = [DamageLedger(corpora, 0.5) for _ in range(2)]
    mended = []

    def play(ranks: ThreadRanks, ledger: DamageLedger) -> None:
        ledger.load_state(state)
        mended.append(ledger.forget_mended(ranks))

    pairs = zip(ranks_of(2), ledgers, strict=True)
    threads = [threading.Thread(target=play, args=one, daemon=True) for one in pairs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert mended == [len(shards) - 1] * 2
    assert [ledger.state() for ledger in ledgers] == [{"web": {shards[3].name: [[1, 5]]}}] * 2


def test_a_lost_shard_counts_whole_and_its_documents_once(web: Path) -> None:
    corpora = open_plan(make_config({web: 1.0}), TOKENIZER)[1]
    ledger = DamageLedger(corpora, 1.0)
    shard = shard_of(web)

    def damage(document: int, is_shard_lost: bool, row: int = 0) -> Damage:
        num_tokens = shard.num_tokens if is_shard_lost else 10
        return Damage("web", NAME, f"{web}/{NAME}.tar", document, num_tokens, row, "it is gone", is_shard_lost)

    first, second = damage(1, False, 5), damage(2, False, 3)
    assert ledger.add([first, second, damage(1, False, 6)]) == [second, first]
    assert (ledger.num_documents, ledger.num_tokens) == (2, 20)
    assert ledger.add([damage(3, True), damage(4, True)]) == [damage(3, True)]
    assert (ledger.num_documents, ledger.num_tokens) == (shard.num_documents, shard.num_tokens)
    assert ledger.is_known(damage(9, False)) and ledger.add([damage(9, False)]) == []
    lines = list(describe([damage(3, True)], ledger))
    assert lines[0] == (
        f"{web}/{NAME}.tar, first asked for in row 0: the shard counts as lost: it is gone; it is masked"
    )
    assert lines[1].startswith(
        f"in all {shard.num_documents} documents are damaged, {100 * ledger.fraction('web'):.3g}%"
    )


# From a store.


@pytest.fixture
def server(web: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[StoreServer]:
    monkeypatch.setattr(stores, "FIRST_PAUSE_SECONDS", 0.02)
    monkeypatch.setattr(stores, "STALL_SECONDS", 0.5)
    server = StoreServer(web.parent)
    yield server
    server.close()


def open_remote_stream(server: StoreServer, cache: Path, **data: Any) -> TokenStream:
    config = remote_config(f"{server.url}/web", cache, retry_seconds=2, **data)
    return TokenStream(config, batch_plan(BATCH, 1, 1, 32), 0, TOKENIZER)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (remove, "there is no such file"),
        (empty, r"it has only 0 bytes; expected \d+"),
        (put_another_of_its_size, "its sha256 differs from that in manifest.json"),
        (flip_payload, "its sha256 differs from that in manifest.json"),
        (remove_index, rf"{NAME}\.index\.npy: there is no such file"),
        (flip_index, rf"{NAME}\.index\.npy: its sha256 differs from that in manifest.json"),
    ],
)
def test_a_shard_that_a_store_has_lost_is_masked_and_not_asked_for_again(
    server: StoreServer, web: Path, tmp_path: Path, whole: list[StepInput], change: Kind, reason: str,
) -> None:  # fmt: skip
    shard = shard_of(web)
    with closing(open_remote_stream(server, tmp_path / "cache", max_damaged_fraction=1)) as stream:
        change(web)
        steps = take(Feed(stream, ONE_RANK), len(whole))
        for step, expected in zip(steps, whole, strict=True):
            (tokens, targets, starts, numbers), before = rows_of(step), rows_of(expected)
            masked = targets != before[1]
            assert starts.equal(before[2]) and numbers.equal(before[3]) and (targets[masked] == IGNORED_TARGET).all()
            assert tokens[~masked].equal(before[0][~masked])
        assert (stream.damage.num_documents, stream.damage.num_tokens) == (shard.num_documents, shard.num_tokens)
        (named,) = [line for step in steps for line in step.damage[:-1]]
        assert re.search(rf"{NAME}\.tar, first asked for in row \d+: the shard counts as lost: {reason}; it is", named)
        stream.damage.max_fraction = 0
        with pytest.raises(TooMuchDamageError, match=rf"{NAME}\.tar: \d+ of \d+ documents \({reason}\)\. Upload"):
            stream.damage.check()
    assert max(server.requests[f"web/{NAME}{end}"] for end in (".tar", ".index.npy")) <= 8  # 3 tries, and those ahead


def test_a_shard_that_breaks_differently_on_each_way_is_not_lost(
    server: StoreServer, web: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content, sizes = (web / f"{NAME}.tar").read_bytes(), iter(range(1000, 9000, 10))
    answer = server._answer

    def cut_somewhere(request: Any, path: Path, fault: str | None) -> None:
        if path.name == f"{NAME}.tar":
            path = path.with_name("cut")
            path.write_bytes(content[: next(sizes)])
        answer(request, path, fault)

    with closing(open_remote_stream(server, tmp_path / "cache", max_damaged_fraction=1)) as stream:
        monkeypatch.setattr(server, "_answer", cut_somewhere)
        with pytest.raises(DataError, match=rf"{NAME}\.tar cannot be read: it has only \d+ bytes; .*; tried 3 times"):
            take(Feed(stream, ONE_RANK), 8)
        assert stream.damage.num_documents == 0


def test_what_is_uploaded_again_counts_no_more(server: StoreServer, web: Path, tmp_path: Path) -> None:
    content = (web / f"{NAME}.tar").read_bytes()
    with closing(open_remote_stream(server, tmp_path / "cache", max_damaged_fraction=1)) as stream:
        remove(web)
        take(Feed(stream, ONE_RANK), 4)
        state = json.loads(json.dumps(stream.state()))
        assert state["damaged"] == {"web": {NAME: None}}
    for upload, num_mended in ((lambda: 0, 0), (lambda: (web / f"{NAME}.tar").write_bytes(content), 1)):
        upload()
        with closing(open_remote_stream(server, tmp_path / "cache", max_damaged_fraction=1)) as stream:
            stream.load_state(state)
            assert stream.damage.forget_mended(ONE_RANK) == num_mended * shard_of(web).num_documents


def test_a_store_that_fails_is_no_damage_and_neither_is_another_corpus_in_its_place(
    server: StoreServer, web: Path, tmp_path: Path
) -> None:
    def fails(change: Callable[[], object], message: str) -> None:
        with closing(open_remote_stream(server, tmp_path / message[:4], max_damaged_fraction=1)) as stream:
            change()
            with pytest.raises(DataError, match=message) as caught:
                Feed(stream, ONE_RANK).take()
            assert not isinstance(caught.value, TooMuchDamageError)

    def replace_corpus() -> None:
        shutil.rmtree(web)
        make_corpus(web, random_documents(400, 9), random_documents(20, 2))

    fails(replace_corpus, r"The manifest there is another one than at the start: the corpus was replaced while")
    fails(lambda: shutil.rmtree(web), r"there is no such file; .*The manifest is gone too")
    server.always = None
    make_corpus(web, random_documents(400, 9))
    fails(lambda: setattr(server, "always", "503"), r"cannot be read: the server answered 503; tried \d+ times in")


# Whole runs.


@pytest.mark.slow
@pytest.mark.launches
def test_two_ranks_stop_and_go_on_once_it_is_mended(tiny_config: Path, tmp_path: Path) -> None:
    shards = Path(shutil.copytree(tiny_config.parent / "shards", tmp_path / "shards"))
    sources = (
        f"data.sources=[{{name: code, shards: {shards}/code, weight: 3}}, {{name: prose, shards: {shards}/prose}}]"
    )
    common = ["train.micro_batch_size=8", "checkpoint.every_steps=50", "data.prefetch_steps=1", sources]
    undisturbed = {"overrides": [f"run.dir={tmp_path}/undisturbed", *common]}
    assert run_cases(tiny_config, [undisturbed], 2, tmp_path / "first") == ["done"]
    tar = damage_last_needed(load_config(tiny_config, [sources]), "code", shards / "code")
    run = tmp_path / "run"
    lenient = {"overrides": [f"run.dir={tmp_path}/lenient", *common, "data.max_damaged_fraction=0.9"]}
    strict = {"overrides": [f"run.dir={run}", *common, "data.max_damaged_fraction=0"]}
    outcomes = run_cases(tiny_config, [strict, strict, lenient], 2, tmp_path / "second")
    assert outcomes[2] == "done"
    for outcome in outcomes[:2]:
        assert outcome.startswith("TooMuchDamageError: data.sources[code]: ") and f"{tar.name}: 1 of " in outcome
    lines = [line for line in metric_lines(tmp_path / "lenient") if "loss" in line]
    first = next(line["step"] for line in lines if line["damaged_documents"])
    assert 1 < first <= 20 and [line["damaged_documents"] for line in lines[first - 1 :]] == [1] * (21 - first)
    assert lines[-1]["damaged_tokens"] > 2
    named = [line for line in metric_lines(tmp_path / "lenient") if line.get("event") == "damaged_documents"]
    assert len(named) == 1 and named[0]["step"] == first and "of code; the run ends at more" in named[0]["message"]
    assert len(named[0]["documents"]) == 1 and f"{tar.name} document" in named[0]["documents"][0]
    logs = "".join(path.read_text() for path in (tmp_path / "lenient").glob("log*.txt"))
    assert logs.count("; it is masked") == 1  # by rank 0 alone
    assert json.loads((run / "status.json").read_text())["exit_status"] == 1
    assert list_steps(run / "checkpoints") == [first - 1]  # saved, though none was due
    shutil.copy(tiny_config.parent / "shards" / "code" / tar.name, tar)
    assert run_cases(tiny_config, [strict], 2, tmp_path / "third") == ["done"]
    assert losses(run) == losses(tmp_path / "undisturbed")
