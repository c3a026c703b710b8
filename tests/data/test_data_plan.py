"""The order of rows: exact, complete, evenly mixed, and as cheap far out as at the start."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain.data import row_order
from pretrain.data.data_plan import DataPlan, open_plan
from pretrain.data.mixture import Mixture
from pretrain.data.row_order import MIXTURE_PERIOD, CorpusOrder, mixture_slots, permutation, spread_slots
from pretrain.data.row_table import build_row_tables
from pretrain.data.shards import Manifest
from pretrain.errors import ConfigError, DataError
from tests.helpers.data_helpers import make_config, make_corpus, random_documents

SIZES = {"web": [13, 40, 7, 22, 31, 18], "code": [9, 11], "books": [25, 4, 60]}
WEIGHTS = {"web": 0.7, "code": 0.2, "books": 0.1}


def make_plan(names=("web", "code", "books"), seed=7, window_shards=2, weights=WEIGHTS, identity=None):
    corpora = [(name, np.array(SIZES[name]), weights[name]) for name in names]
    return DataPlan([Mixture(0, 32, corpora, identity=identity or {"data.seq_len": 32})], seed, window_shards)


def test_the_order_is_the_one_of_the_first_release():
    # Other values mean that runs which exist would go on with another order.
    assert permutation(12, 1, "web", 0).tolist() == [6, 8, 1, 2, 3, 10, 0, 7, 4, 11, 5, 9]
    assert [make_plan().locate(t) for t in (0, 1, 2, 1000, 10**8)] == [
        (0, 0, 3, 21),
        (0, 0, 3, 2),
        (1, 0, 1, 10),
        (0, 5, 3, 9),
        (0, 534313, 1, 30),
    ]
    assert make_plan().hash == "9e2063039e0140cc5fb2e7bbf1e065b209763854e92e6e10e4aae9170def19ff"


def test_what_a_later_phase_needs_comes_when_it_is_near_and_what_no_phase_needs_does_not():
    rows = {"web": np.full(8, 100), "books": np.full(6, 50)}
    mixtures = [Mixture(0, 32, [("web", rows["web"], 1.0)]), Mixture(350, 32, [("books", rows["books"], 1.0)])]
    plan = DataPlan(mixtures, 7, 2)
    order = {name: permutation(len(sizes), 7, name, 0).tolist() for name, sizes in rows.items()}
    web = [[(0, block) for block in order["web"][begin : begin + 2]] for begin in (0, 2)]
    books = [[(1, block) for block in order["books"][begin : begin + 2]] for begin in (0, 2)]
    assert plan.coming_blocks(0, 1) == web[0] and plan.coming_blocks(0, 2) == web[0] + web[1]
    assert plan.coming_blocks(149, 2) == web[0] + web[1]  # books take 200 rows for two windows
    assert plan.coming_blocks(150, 2) == web[0] + web[1] + books[0] + books[1]
    assert plan.coming_blocks(200, 2) == web[1] + books[0] + books[1]  # the phase ends within web's second window
    assert plan.coming_blocks(250, 1) == web[1] + books[0]
    assert plan.coming_blocks(350, 2) == books[0] + books[1]


def test_what_is_needed_soonest_is_said_first():
    corpora = [("web", np.full(4, 10), 0.9), ("code", np.full(4, 10), 0.1)]
    plan = DataPlan([Mixture(0, 32, corpora)], 7, 1)
    order = {name: permutation(4, 7, name, 0).tolist() for name in ("web", "code")}
    numbers = [number for number, _ in plan.coming_blocks(0, 3)]
    assert numbers == [0, 1, 0, 0, 1, 1]
    assert [block for number, block in plan.coming_blocks(0, 3) if number] == order["code"][:3]


@given(st.integers(0, 300), st.integers(0, 2**32 - 1))
@settings(max_examples=40, deadline=None)
def test_a_permutation_has_every_item_once(size, seed):
    assert sorted(permutation(size, seed, "web").tolist()) == list(range(size))


def test_permutations_look_uniform():
    places = np.array([permutation(4, seed, "web") for seed in range(4000)])
    counts = np.array([np.bincount(places[:, i], minlength=4) for i in range(4)])
    assert np.abs(counts - 1000).max() < 150  # five standard deviations of 27


@given(st.lists(st.floats(0.01, 1.0), min_size=1, max_size=14))
@settings(max_examples=30, deadline=None)
def test_every_prefix_of_the_mixture_has_each_share_to_within_one_row(weights):
    slots = mixture_slots(weights, period=512)
    shares = np.array(weights) / sum(weights)
    assert slots.sum() == 512 and np.abs(slots - shares * 512).max() < 1
    if not slots.all():
        return
    pattern = spread_slots(slots)
    counts = np.cumsum(pattern[:, None] == np.arange(len(slots)), axis=0)
    expected = np.arange(1, 513)[:, None] * slots / 512
    assert np.abs(counts - expected).max() <= 1 - 1 / max(2 * len(slots) - 2, 2) + 1e-9
    assert counts[-1].tolist() == slots.tolist()


def test_counts_follow_the_weights_over_the_whole_run():
    plan = make_plan()
    total = 3 * MIXTURE_PERIOD
    counts = np.zeros(3)
    shares = np.array([round(w * 4096) / 4096 for w in WEIGHTS.values()])
    for t in range(total):
        assert list(plan.rows_per_corpus(t).values()) == counts.tolist()
        counts[plan.locate(t)[0]] += 1
        assert np.abs(counts - (t + 1) * shares).max() < 1


def test_each_row_comes_once_an_epoch_and_epochs_differ():
    order = CorpusOrder("web", np.array(SIZES["web"]), seed=1, window_shards=2)
    n = order.num_rows
    epochs = [[order.locate(e * n + k) for k in range(n)] for e in range(3)]
    every_row = [(block, row) for block, size in enumerate(SIZES["web"]) for row in range(size)]
    for number, rows in enumerate(epochs):
        assert {epoch for epoch, _, _ in rows} == {number}
        assert sorted((block, row) for _, block, row in rows) == every_row
    without_epoch = [[row[1:] for row in rows] for rows in epochs]
    assert without_epoch[0] != without_epoch[1] != without_epoch[2] != without_epoch[0]


def test_windows_mix_their_shards_and_no_others():
    order = CorpusOrder("web", np.full(8, 50), seed=3, window_shards=2)
    for window in range(4):
        blocks = [order.locate(window * 100 + i)[1] for i in range(100)]
        assert len(set(blocks)) == 2
        assert 5 < sum(a != b for a, b in zip(blocks, blocks[1:], strict=False))


@given(st.integers(0, 10**9))
@settings(max_examples=30, deadline=None)
def test_a_fresh_plan_gives_what_iterating_gives(t):
    walked = make_plan()
    rows = [walked.locate(t + i) for i in range(20)]
    assert [make_plan().locate(t + i) for i in (19, 0, 7)] == [rows[19], rows[0], rows[7]]


def test_seeking_far_makes_no_more_permutations_than_seeking_to_the_start(monkeypatch):
    made = []
    real = row_order.permutation
    monkeypatch.setattr(row_order, "permutation", lambda size, *key: made.append(size) or real(size, *key))
    for t in (0, 10**8, 10**12):
        made.clear()
        make_plan().locate(t)
        assert len(made) == 2 and sum(made) < 100  # the blocks of one epoch and the rows of one window


def test_other_corpora_do_not_change_a_corpus_order():
    alone, mixed = make_plan(names=("web",)), make_plan(names=("books", "web", "code"))
    rows = [row[1:] for t in range(3000) if (row := mixed.locate(t))[0] == 1]
    assert rows == [alone.locate(k)[1:] for k in range(len(rows))]


def test_hash_covers_everything_that_fixes_the_order_and_differences_are_named():
    plan = make_plan()
    assert make_plan().hash == plan.hash and make_plan().pieces == json.loads(json.dumps(plan.pieces))
    halves = {**WEIGHTS, "code": 0.4}
    for other, clause in (
        (make_plan(seed=8), "run.seed was 8 and is 7"),
        (make_plan(window_shards=3), "data.shuffle_window_shards was 3 and is 2"),
        (make_plan(weights=halves), "share of code was"),
        (make_plan(identity={"data.seq_len": 64}), "data.seq_len was 64 and is 32"),
        (
            make_plan(identity={"data.seq_len": 32, "manifest of web": "f" * 64}),
            "manifest of web was ffffffffffff… and",
        ),
        (make_plan(names=("web", "code")), "rows of books was absent and is 89"),
    ):
        assert other.hash != plan.hash
        assert clause in plan.explain_difference(other.pieces)
    assert plan.explain_difference(plan.pieces) == ""


def test_rows_and_epochs_are_reported_by_name():
    plan = make_plan()
    assert plan.rows_per_corpus(10**8).keys() == SIZES.keys()
    assert sum(plan.rows_per_corpus(10**8).values()) == 10**8
    k = plan.rows_per_corpus(5000)["web"]
    assert plan.epochs(5000)["web"] == pytest.approx(k / sum(SIZES["web"]), abs=1e-4)


def test_two_corpora_of_one_name_are_refused():
    with pytest.raises(ConfigError, match="name is web twice; expected distinct names"):
        make_plan(names=("web", "code", "web"))


def test_weights_without_a_row_and_corpora_without_rows_are_refused():
    with pytest.raises(ConfigError, match=r"data\.sources\[code\]\.weight is 1e-05, .*at least 1/4096\. Raise it"):
        make_plan(weights={**WEIGHTS, "code": 1e-5})
    with pytest.raises(DataError, match=r"data\.sources\[web\]: training rows are 0; expected at least one"):
        DataPlan([Mixture(0, 32, [("web", np.array([0]), 1.0)])], 1, 2)


@pytest.fixture
def folders(tmp_path):
    for name, seed in (("web", 1), ("code", 2)):
        make_corpus(tmp_path / name, random_documents(150, seed), random_documents(5, seed + 10))
    return {tmp_path / "web": 0.75, tmp_path / "code": 0.25}


def test_open_plan_reads_row_counts_and_fingerprints(folders):
    plan, corpora = open_plan(make_config(folders), "a" * 64)
    assert [corpus.name for corpus in corpora] == plan.names == ["web", "code"]
    for corpus in corpora:
        assert plan.pieces[f"manifest of {corpus.name}"] == corpus.manifest.fingerprint()
        assert plan.pieces[f"rows of {corpus.name}"] == corpus.rows[32].num_rows
    assert plan.pieces["share of web"] == "3072/4096" and plan.pieces["tokenizer"] == "a" * 64
    assert plan.hash != open_plan(make_config(folders, seed=2), "a" * 64)[0].hash


def test_corpora_prepared_before_there_were_other_packings_keep_their_plan(folders):
    # Computed by the version before: another value would refuse the checkpoints of runs that exist.
    assert open_plan(make_config(folders), "a" * 64)[0].hash == (
        "8249188f6804f7c04ac11192b1334a79ea25d6245e681f0b3fb5659489486129"
    )


def test_another_packing_is_another_plan(folders):
    plan = open_plan(make_config(folders), "a" * 64)[0]
    with pytest.raises(DataError, match=r"rows-32-concat is missing; .*data\.packing concat\. Run:"):
        open_plan(make_config(folders, packing="concat"), "a" * 64)
    for folder in folders:
        build_row_tables(folder, Manifest.load(folder), 32, "concat")
    other = open_plan(make_config(folders, packing="concat"), "a" * 64)[0]
    assert "packing was concatenated-1 and is best-fit-decreasing-1" in plan.explain_difference(other.pieces)


def test_unprepared_corpora_are_refused_with_the_command_to_run(folders):
    web = next(iter(folders))
    with pytest.raises(DataError, match=r"rows-64 is missing; .*data\.seq_len 64\. Run: python launch/prepare\.py"):
        open_plan(make_config(folders, seq_len=64), "a" * 64)
    (web / "manifest.json").unlink()
    with pytest.raises(DataError, match=r"manifest\.json is missing; .*Run: python launch/prepare\.py CONFIG"):
        open_plan(make_config(folders), "a" * 64)
    nowhere = {Path("nowhere/web"): 1.0}
    with pytest.raises(DataError, match=r"\[web\]\.shards is nowhere/web, which does not exist; .*launch/prepare\.py"):
        open_plan(make_config(nowhere), "a" * 64)


def test_another_tokenizer_is_refused_with_both_named(folders):
    with pytest.raises(DataError, match="prepared with tokenizer aaaaaaaaaaaa…; expected that of tokenizer.model, ccc"):
        open_plan(make_config(folders), "c" * 64)


def test_truncated_shard_is_refused_when_the_plan_is_opened(folders):
    tar = list(folders)[1] / "train-000000.tar"
    tar.write_bytes(tar.read_bytes()[:-512])
    with pytest.raises(DataError, match=r"code/train-000000\.tar: size is .*it was truncated"):
        open_plan(make_config(folders), "a" * 64)


def test_changed_data_changes_the_plan(folders):
    web = next(iter(folders))
    before = open_plan(make_config(folders), "a" * 64)[0]
    for path in web.glob("*.json"):
        path.unlink()
    manifest = make_corpus(web, random_documents(150, 3))
    assert replace(manifest, corpus="x").fingerprint() == manifest.fingerprint()
    after = open_plan(make_config(folders), "a" * 64)[0]
    assert after.hash != before.hash and "manifest of web was" in after.explain_difference(before.pieces)
