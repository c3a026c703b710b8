"""The stream of tokens: the same batches however a run is cut up, each token scored once, damage contained."""

import json
import subprocess
import sys
import threading
import time
from collections import Counter
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pretrain.data import row_reader
from pretrain.data.row_reader import IGNORED_TARGET
from pretrain.data.shards import load_index
from pretrain.data.stream import TokenStream, ValRows
from pretrain.errors import DataError
from pretrain.storage import read_ahead
from tests.helpers.data_helpers import (
    BOS,
    EOS,
    PAD,
    TOKENIZER,
    batch_plan,
    document,
    flip_bit,
    make_config,
    make_corpus,
    random_documents,
)

GLOBAL_BATCH = 12
NUM_STEPS = 10
FIELDS = ("tokens_BT", "targets_BT", "doc_start_BT", "row_ids_B")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("corpora")
    for name, seed in (("web", 1), ("code", 2)):
        make_corpus(root / name, random_documents(120, seed), random_documents(15, seed + 10))
    return {root / "web": 0.8, root / "code": 0.2}


def make_stream(folders, rank=0, world_size=1, micro_batch_size=1, prefetch_steps=2, cursor=0, **config):
    sizes = batch_plan(GLOBAL_BATCH, world_size, micro_batch_size, seq_len=32)
    config = make_config(folders, prefetch_steps=prefetch_steps, **config)
    return TokenStream(config, sizes, rank, TOKENIZER, cursor)


def concatenate(batches):
    return tuple(torch.cat([getattr(batch, field) for batch in batches]) for field in FIELDS)


def global_steps(folders, num_steps, state=None, world_size=1, num_read_ahead=0, **options):
    """Runs all ranks; returns each step's rows over the ranks in order, and the state of the last one's end."""
    streams = [make_stream(folders, rank, world_size, **options) for rank in range(world_size)]
    for one in streams:
        if state is not None:
            one.load_state(json.loads(json.dumps(state)))
    steps = []
    for _ in range(num_steps):
        ranks = [one.next_step() for one in streams]
        steps.append(concatenate([batch for rows in ranks for batch in rows.micro_batches]))
        scored = sum(int((batch.targets_BT != IGNORED_TARGET).sum()) for rows in ranks for batch in rows.micro_batches)
        assert sum(rows.num_targets for rows in ranks) == scored
    state = streams[0].state()
    for one in streams:
        for _ in range(num_read_ahead):  # taken, trained on, and lost in a crash before a checkpoint
            one.next_step()
        one.close()
    return steps, state


@pytest.fixture(scope="module")
def reference(folders):
    return global_steps(folders, NUM_STEPS)[0]


def assert_same_steps(steps, expected):
    assert len(steps) == len(expected)
    for step, other in zip(steps, expected, strict=True):
        for tensor, expected_tensor in zip(step, other, strict=True):
            assert tensor.dtype == expected_tensor.dtype and torch.equal(tensor, expected_tensor)


@dataclass(frozen=True)
class Part:
    """One process group's share of a run."""

    num_steps: int
    world_size: int
    micro_batch_size: int
    prefetch_steps: int
    num_read_ahead: int


PARTS = st.builds(
    Part, st.integers(0, 4), st.sampled_from([1, 2, 3, 4, 6, 12]), st.sampled_from([1, 2, 3]), st.integers(1, 3),
    st.integers(0, 2),
).filter(lambda part: (GLOBAL_BATCH // part.world_size) % part.micro_batch_size == 0)  # fmt: skip


@given(st.lists(PARTS, min_size=1, max_size=4))
@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_split_of_a_run_gives_the_same_global_batches(folders, reference, parts):
    steps, state = [], None
    for part in parts:
        num_steps = min(part.num_steps, NUM_STEPS - len(steps))
        more, state = global_steps(
            folders, num_steps, state, part.world_size, part.num_read_ahead,
            micro_batch_size=part.micro_batch_size, prefetch_steps=part.prefetch_steps,
        )  # fmt: skip
        steps += more
        assert state["cursor"] == len(steps) * GLOBAL_BATCH
    assert_same_steps(steps, reference[: len(steps)])


def test_rows_that_are_left_out_are_so_ever_after_and_count_as_never_consumed(folders, reference):
    stream = make_stream(folders)
    steps = [concatenate(stream.next_step().micro_batches) for _ in range(2)]
    before, start = stream.tokens_per_corpus(), stream.state()
    stream.skip([(3 * GLOBAL_BATCH, 4 * GLOBAL_BATCH)])
    stream.skip([(4 * GLOBAL_BATCH, 5 * GLOBAL_BATCH), (2 * GLOBAL_BATCH, 3 * GLOBAL_BATCH)])
    assert stream.skipped == [(2 * GLOBAL_BATCH, 5 * GLOBAL_BATCH)]
    assert stream.tokens_per_corpus() == before and start["skipped_rows"] == []
    steps += [concatenate(stream.next_step().micro_batches) for _ in range(2)]
    assert stream.step_rows == (6 * GLOBAL_BATCH, 7 * GLOBAL_BATCH)
    assert sum(stream.tokens_per_corpus().values()) == 4 * GLOBAL_BATCH * 32
    assert_same_steps(steps, [*reference[:2], *reference[5:7]])
    state = stream.state()
    stream.close()
    assert state["skipped_rows"] == [[2 * GLOBAL_BATCH, 5 * GLOBAL_BATCH]]
    assert_same_steps(global_steps(folders, 2, state, world_size=2)[0], reference[7:9])
    again = {**start, "skipped_rows": state["skipped_rows"]}
    assert_same_steps(global_steps(folders, 2, again)[0], reference[5:7])


def test_seeking_equals_iterating_and_a_state_is_small(folders, reference):
    stream = make_stream(folders, cursor=7 * GLOBAL_BATCH)
    assert_same_steps([concatenate(stream.next_step().micro_batches)], reference[7:8])
    far = make_stream(folders, cursor=10**8)
    rows = far.next_step()
    assert rows.micro_batches[0].row_ids_B.tolist() == [10**8]
    assert abs(len(json.dumps(far.state())) - len(json.dumps(stream.state()))) < 60
    assert len(json.dumps(far.state())) < 2048
    stream.close()
    far.close()


def test_state_counts_what_was_consumed_and_not_what_was_read_ahead(folders):
    stream = make_stream(folders, prefetch_steps=3)
    assert stream.state()["cursor"] == 0
    for _ in range(5):
        stream.next_step()
    state = stream.state()
    assert state["cursor"] == stream.cursor == 5 * GLOBAL_BATCH
    assert sum(state["rows_per_corpus"].values()) == 5 * GLOBAL_BATCH
    assert state["rows_per_corpus"]["web"] == pytest.approx(0.8 * 5 * GLOBAL_BATCH, abs=1)
    assert set(state["epochs"]) == {"web", "code"} and state["plan_hash"] == stream.plan.hash
    stream.close()


def test_load_state_goes_back_while_reading_ahead(folders, reference):
    stream = make_stream(folders)
    start = stream.state()
    first = [concatenate(stream.next_step().micro_batches) for _ in range(3)]
    stream.load_state(start)
    again = [concatenate(stream.next_step().micro_batches) for _ in range(3)]
    stream.close()
    assert_same_steps(again, first)
    assert_same_steps(again, reference[:3])


def test_nothing_is_read_anew_beside_a_read_that_hangs(folders, monkeypatch):
    monkeypatch.setattr(read_ahead, "_STOP_SECONDS", 0.05)
    stream = make_stream(folders)
    state, release, hangs = stream.state(), threading.Event(), threading.Event()
    locate = stream._read_step._locate

    def hang(*arguments):
        hangs.set()
        release.wait()
        return locate(*arguments)

    monkeypatch.setattr(stream._read_step, "_locate", hang)
    reader = threading.Thread(target=lambda: pytest.raises(RuntimeError, stream.next_step))
    reader.start()
    hangs.wait()
    back = threading.Thread(target=stream.load_state, args=(state,))
    back.start()
    back.join(0.5)
    assert back.is_alive()
    release.set()
    back.join()
    reader.join()
    assert stream.next_step().micro_batches
    stream.close()


def unique_documents(num_documents, seed=0):
    """Documents in which no id but bos and eos comes twice: a token's successor is known from the token."""
    random = np.random.default_rng(seed)
    ids = iter(range(4, 10**7))
    lengths = np.append(random.lognormal(3, 1, num_documents).astype(int), [0, 31, 32, 33, 63, 64, 65, 500])
    return [document([next(ids) for _ in range(n)], "uint32") for n in lengths]


def split_row(tokens_T, targets_T, doc_start_T):
    """Cuts a row at its documents: (tokens, targets) of each that is not padding."""
    starts = np.unique(doc_start_T)
    assert all(doc_start_T[start] == start for start in starts) and (np.diff(doc_start_T) >= 0).all()
    for begin, end in zip(starts, [*starts[1:], len(tokens_T)], strict=True):
        if (targets_T[begin:end] != IGNORED_TARGET).any():
            assert (targets_T[begin:end] != IGNORED_TARGET).all()
            yield tokens_T[begin:end].tolist(), targets_T[begin:end].tolist()
        else:
            assert (tokens_T[begin:end] == PAD).all() and end == len(tokens_T)


@pytest.mark.parametrize("seed", [0, 1])
def test_an_epoch_scores_each_token_but_bos_once_and_gives_the_documents_back(tmp_path, seed):
    documents = unique_documents(100, seed)
    manifest = make_corpus(tmp_path / "web", documents, vocab_size=10**7)
    assert manifest.dtype == "uint32"
    stream = make_stream({tmp_path / "web": 1.0})
    num_rows = stream.plan.epoch_rows_at(0)["web"]
    tokens_BT, targets_BT, doc_start_BT, row_ids_B = (
        tensor[:num_rows].numpy()
        for tensor in concatenate(
            [b for _ in range(-(-num_rows // GLOBAL_BATCH)) for b in stream.next_step().micro_batches]
        )
    )
    stream.close()
    assert row_ids_B.tolist() == list(range(num_rows))
    pieces = [piece for row in zip(tokens_BT, targets_BT, doc_start_BT, strict=True) for piece in split_row(*row)]
    scored = Counter(target for _, targets in pieces for target in targets)
    assert scored == Counter(int(token) for one in documents for token in one[1:])
    assert sum(scored.values()) + len(documents) == sum(shard.num_tokens for shard in manifest.train)
    for tokens, targets in pieces:
        assert tokens[1:] == targets[:-1]
    following = {tokens[0]: targets for tokens, targets in pieces if tokens[0] != BOS}
    rebuilt = []
    for tokens, targets in pieces:
        if tokens[0] == BOS:
            whole = [BOS, *targets]
            while whole[-1] != EOS:
                whole += following.pop(whole[-1])
            rebuilt.append(tuple(whole))
    assert not following and sorted(rebuilt) == sorted(tuple(one.tolist()) for one in documents)


def test_rows_have_the_shapes_and_types_of_the_model(folders):
    stream = make_stream(folders, rank=1, world_size=2, micro_batch_size=3)
    rows = stream.next_step()
    stream.close()
    assert len(rows.micro_batches) == 2 and rows.damaged == []
    for i, batch in enumerate(rows.micro_batches):
        assert batch.tokens_BT.shape == batch.targets_BT.shape == batch.doc_start_BT.shape == (3, 32)
        assert batch.tokens_BT.dtype == batch.targets_BT.dtype == batch.row_ids_B.dtype == torch.int64
        assert batch.doc_start_BT.dtype == torch.int32
        assert batch.row_ids_B.tolist() == [6 + 3 * i, 7 + 3 * i, 8 + 3 * i]


def test_memory_is_used_again_only_when_nothing_refers_to_it(folders):
    kept = {}
    stream = make_stream(folders, micro_batch_size=GLOBAL_BATCH)
    reader = stream._read_step._rows
    for number in range(40):  # every third batch is kept, by one of its tensors or a part of one
        batch = stream.next_step().micro_batches[0]
        if number % 3 == 0:
            tensor = (batch.tokens_BT, batch.targets_BT[1:], batch.doc_start_BT.view(-1))[number // 3 % 3]
            kept[number] = tensor, tensor.clone()
        del batch
    stream.close()
    assert all(torch.equal(tensor, copy) for tensor, copy in kept.values())
    num_held = len(reader._buffers._blocks)
    assert len(kept) <= num_held < len(kept) + 12  # what was let go of was used again


def test_a_flipped_bit_masks_its_document_and_shifts_nothing(tmp_path):
    folder = tmp_path / "web"
    manifest = make_corpus(folder, random_documents(120, 1))
    whole = global_steps({folder: 1.0}, NUM_STEPS)[0]
    record = load_index(folder, manifest.train[1])[4]
    flip_bit(folder / "train-000001.tar", int(record["offset"]) + 1)
    stream = make_stream({folder: 1.0})
    damaged, num_changed = [], 0
    for expected in whole:
        rows = stream.next_step()
        named = {one.row for one in rows.damaged}
        damaged += rows.damaged
        tokens_BT, targets_BT, doc_start_BT, row_ids_B = concatenate(rows.micro_batches)
        assert torch.equal(doc_start_BT, expected[2]) and torch.equal(row_ids_B, expected[3])
        changed = (targets_BT != expected[1]) | (tokens_BT != expected[0])
        assert set(row_ids_B[changed.any(dim=1)].tolist()) == named
        assert (targets_BT[changed] == IGNORED_TARGET).all() and (tokens_BT[changed] == PAD).all()
        assert rows.num_targets == int((expected[1] != IGNORED_TARGET).sum()) - int(changed.sum())
        num_changed += int(changed.sum())
    stream.close()
    assert damaged and all("web/train-000001.tar document 4 in row " in str(one) for one in damaged)
    assert {one.num_tokens for one in damaged} == {int(record["num_tokens"])}
    num_slots = int(record["num_tokens"]) - 1
    assert num_changed > 0 and num_changed % num_slots == 0


def test_what_fixes_the_order_cannot_change_under_a_checkpoint(folders, tmp_path):
    state = make_stream(folders).state()
    web, code = folders
    other = tmp_path / "web"
    make_corpus(other, random_documents(120, 5))
    elsewhere = make_stream({other: 0.8, code: 0.2})
    make_corpus(other, random_documents(120, 1), seq_lens=(), tokenizer="c" * 64)
    for stream, clause in (
        (make_stream(folders, seed=2), "run.seed was 1 and is 2"),
        (make_stream({web: 0.5, code: 0.5}), "share of web was 3277/4096 and is 2048/4096"),
        (make_stream({code: 0.2, web: 0.8}), "data.sources was web, code and is code, web"),
        (make_stream(folders, shuffle_window_shards=3), "data.shuffle_window_shards was 16 and is 3"),
        (elsewhere, "manifest of web was [0-9a-f]{12}… and is"),
    ):
        with pytest.raises(DataError, match=rf"differs from the checkpoint's: .*{clause}.*run\.dir"):
            stream.load_state(state)
    with pytest.raises(DataError, match="prepared with tokenizer cccccccccccc…; expected that of"):
        make_stream({other: 0.8, code: 0.2})
    longer = json.loads(json.dumps(state))
    longer["plan"]["data.seq_len"], longer["plan_hash"] = 64, "0" * 64
    with pytest.raises(DataError, match="data.seq_len was 64 and is 32"):
        make_stream(folders).load_state(longer)


def test_more_epochs_of_a_small_corpus_are_other_orders(tmp_path):
    make_corpus(tmp_path / "web", random_documents(40, 1))
    steps, state = global_steps({tmp_path / "web": 1.0}, 12)
    assert state["epochs"]["web"] > 2
    rows = torch.cat([step[0] for step in steps]).tolist()
    n = round(state["rows_per_corpus"]["web"] / state["epochs"]["web"])
    assert sorted(rows[:n]) == sorted(rows[n : 2 * n]) and rows[:n] != rows[n : 2 * n]


def test_errors_of_the_thread_surface_in_order_and_stay(tmp_path):
    folder = tmp_path / "web"
    make_corpus(folder, random_documents(120, 1))
    stream = make_stream({folder: 1.0})
    stream.next_step()
    stream.load_state({**stream.state(), "cursor": 24})
    folder.rename(tmp_path / "unmounted")
    stream._read_step.close()  # forgets the descriptors that keep the files readable
    for _ in range(2):
        with pytest.raises(DataError, match=r"web/manifest\.json is gone; .*is its disk mounted\?"):
            stream.next_step()
    assert stream.cursor == 24
    stream.close()


def test_steps_read_before_an_error_are_delivered_first(folders, monkeypatch):
    stream = make_stream(folders, prefetch_steps=3)
    read, call = stream._read_step, type(stream._read_step).__call__

    def fail_at_the_third(_reader, cursor):
        if cursor == 2 * GLOBAL_BATCH:
            raise OSError("the disk is gone")
        return call(read, cursor)

    monkeypatch.setattr(type(read), "__call__", fail_at_the_third)
    stream.next_step()
    time.sleep(0.1)
    stream.next_step()
    with pytest.raises(OSError, match="the disk is gone"):
        stream.next_step()
    monkeypatch.undo()
    stream.close()


def test_reading_ahead_is_bounded(folders, monkeypatch):
    stream = make_stream(folders, prefetch_steps=2)
    cursors = []
    reader = type(stream._read_step)
    read = reader.__call__
    monkeypatch.setattr(reader, "__call__", lambda self, cursor: cursors.append(cursor) or read(self, cursor))
    stream.next_step()
    time.sleep(0.2)
    assert cursors == [0, GLOBAL_BATCH, 2 * GLOBAL_BATCH]
    monkeypatch.undo()
    stream.close()


def data_threads():
    return [thread for thread in threading.enumerate() if thread.name == "longhaul-data"]


def test_threads_end_with_their_streams(folders):
    assert not data_threads()
    stream = make_stream(folders)
    stream.next_step()
    assert len(data_threads()) == 1
    stream.load_state(stream.state())
    assert not data_threads()
    stream.next_step()
    stream.close()
    stream.close()
    assert not data_threads()
    with pytest.raises(RuntimeError, match="closed"):
        stream.next_step()
    forgotten = make_stream(folders)
    forgotten.next_step()
    del forgotten
    assert not data_threads()


def test_the_interpreter_exits_while_a_stream_reads_ahead(folders):
    program = (
        "import sys; sys.path.insert(0, '.')\n"
        "from pathlib import Path; from tests.data.test_stream import make_stream\n"
        f"stream = make_stream({{Path({str(next(iter(folders)))!r}): 1.0}}, prefetch_steps=50)\n"
        "stream.next_step(); print(stream.cursor)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "12\n", "")


def test_a_row_table_that_does_not_fit_is_an_error(tmp_path):
    make_corpus(tmp_path / "web", random_documents(50, 1))
    path = tmp_path / "web" / "rows-32" / "train.segments.npy"
    segments = np.load(path)
    for field, value in (("document", 10**6), ("length", 33), ("start", 10**5)):
        changed = segments.copy()
        changed[field] = value
        np.save(path, changed)
        with pytest.raises(DataError, match=r"rows-32 is damaged: row \d+ of block \d+ does not fit its documents"):
            make_stream({tmp_path / "web": 1.0}).next_step()


def test_held_out_rows_are_all_sources_in_order(folders):
    rows = ValRows(make_config(folders), TOKENIZER, 0)
    batch = rows.batch(list(range(rows.num_rows)))
    documents = random_documents(15, 11) + random_documents(15, 12)
    assert int((batch.targets_BT != IGNORED_TARGET).sum()) == sum(len(one) - 1 for one in documents)
    scored = Counter(batch.targets_BT[batch.targets_BT != IGNORED_TARGET].tolist())
    assert scored == Counter(int(token) for one in documents for token in one[1:])
    assert batch.row_ids_B.tolist() == list(range(rows.num_rows))
    one_by_one = [rows.batch([i]) for i in range(rows.num_rows)]
    assert torch.equal(torch.cat([one.tokens_BT for one in one_by_one]), batch.tokens_BT)
    assert rows.batch([]).tokens_BT.shape == (0, 32)
    with pytest.raises(IndexError):
        rows.batch([rows.num_rows])
    rows.close()


def test_a_limit_spreads_held_out_rows_evenly(folders):
    every = ValRows(make_config(folders), TOKENIZER, 0)
    some = ValRows(make_config(folders), TOKENIZER, 7)
    assert some.num_rows == 7 < every.num_rows
    expected = every.batch([i * every.num_rows // 7 for i in range(7)])
    assert torch.equal(some.batch(list(range(7))).tokens_BT, expected.tokens_BT)
    assert ValRows(make_config(folders), TOKENIZER, 10**6).num_rows == every.num_rows


def test_an_empty_validation_set_says_so(tmp_path):
    make_corpus(tmp_path / "web", random_documents(20, 1))
    make_corpus(tmp_path / "code", random_documents(10, 1))
    config = make_config({tmp_path / "web": 1.0, tmp_path / "code": 1.0})
    message = (
        r"held-out rows are 0 \(web has 0 held-out documents of 20, code has 0 held-out documents of 10\); expected at "
        r"least one\. Raise data\.val_fraction .*eval\.every_steps=0"
    )
    with pytest.raises(DataError, match=message):
        ValRows(config, TOKENIZER, 0)


def test_damaged_held_out_documents_are_named_once_and_not_scored(tmp_path, monkeypatch):
    manifest = make_corpus(tmp_path / "web", random_documents(20, 1), random_documents(20, 2))
    flip_bit(tmp_path / "web" / "val-000000.tar", int(load_index(tmp_path / "web", manifest.val[0])["offset"][3]))
    rows = ValRows(make_config({tmp_path / "web": 1.0}), TOKENIZER, 0)
    for _ in range(2):
        batch = rows.batch(list(range(rows.num_rows)))
    lost = int(load_index(tmp_path / "web", manifest.val[0])["num_tokens"][3]) - 1
    scored = int((batch.targets_BT != IGNORED_TARGET).sum())
    assert scored + lost == sum(len(one) - 1 for one in random_documents(20, 2))
    new = rows.damage.add(rows.take_damaged())
    assert [(one.shard, one.document) for one in new] == [("val-000000", 3)]
    assert rows.damage.num_tokens == lost + 1 and rows.take_damaged() == []


def test_pad_id_is_the_tokenizers():
    tokenizer = pytest.importorskip("pretrain.tokenizers.sentencepiece_tokenizer")
    assert row_reader._PAD_ID == tokenizer.PAD_ID == PAD and tokenizer.BOS_ID == BOS and tokenizer.EOS_ID == EOS
