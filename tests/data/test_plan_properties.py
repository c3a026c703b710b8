"""What holds for every plan of a run's rows, whatever its corpora, shares and phases."""

from collections import defaultdict
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pretrain.data import mixture, row_order
from pretrain.data.row_order import CorpusOrder
from tests.data.plan_helpers import NAMES, Part, Recipe, recipes, spread_quickly

few = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(autouse=True)
def quick_tables(monkeypatch):
    monkeypatch.setattr(mixture, "spread_slots", spread_quickly)


@given(recipes())
@few
def test_each_row_comes_once_an_epoch_through_all_phases_of_one_length(recipe):
    recipe = recipe.of_one_length()
    plan = recipe.build()
    seen = defaultdict(list)
    for t in range(recipe.num_rows):
        number, epoch, block, row = plan.locate(t)
        seen[plan.names[number], epoch].append((block, row))
    for (name, epoch), rows in seen.items():
        every = [(block, row) for block, n in enumerate(recipe.rows_per_block(name, 32)) for row in range(n)]
        assert len(set(rows)) == len(rows) and set(rows) <= set(every)
        if (name, epoch + 1) in seen:
            assert sorted(rows) == every
    counts = plan.rows_per_corpus(recipe.num_rows)
    assert counts == {name: sum(len(rows) for (other, _), rows in seen.items() if other == name) for name in plan.names}
    assert plan.tokens_per_corpus(recipe.num_rows) == {name: 32 * count for name, count in counts.items()}


@given(recipes(), st.data())
@few
def test_a_fresh_plan_gives_what_iterating_gives(recipe, data):
    walked = recipe.build()
    rows = [walked.locate(t) for t in range(recipe.num_rows)]
    for t in data.draw(st.lists(st.integers(0, recipe.num_rows - 1), min_size=1, max_size=4)):
        assert recipe.build().locate(t) == rows[t]


@given(recipes(), st.integers(0, 10**12))
@few
def test_seeking_makes_at_most_the_blocks_of_an_epoch_and_the_rows_of_a_window(recipe, t):
    plan = recipe.build()
    made = []
    with pytest.MonkeyPatch.context() as patch:
        real = row_order.permutation
        patch.setattr(row_order, "permutation", lambda size, *key: made.append(size) or real(size, *key))
        number, *_ = plan.locate(t)
    name, seq_len = plan.names[number], plan.seq_len_at(t)
    rows = np.sort(recipe.rows_per_block(name, seq_len))
    assert len(made) <= 2 and sum(made) <= len(rows) + rows[-recipe.window_shards :].sum()


def window_of(recipe, name, epoch, block):
    blocks = row_order.permutation(len(recipe.slots[NAMES.index(name)]), recipe.seed, name, epoch).tolist()
    return epoch, blocks.index(block) // recipe.window_shards


@given(recipes(), st.integers(1, 3), st.data())
@few
def test_what_is_read_next_is_said_in_every_phase(recipe, num_windows, data):
    plan, bounds = recipe.build(), [*recipe.first_rows, recipe.num_rows]
    part = data.draw(st.integers(0, len(recipe.parts) - 1))
    t = data.draw(st.integers(bounds[part], bounds[part + 1] - 1))
    coming = plan.coming_blocks(t, num_windows)
    assert len(set(coming)) == len(coming) <= num_windows * recipe.window_shards * len(plan.names)
    windows = defaultdict(set)
    for row in range(t, bounds[part + 1]):
        number, epoch, block, _ = plan.locate(row)
        windows[number].add(window_of(recipe, plan.names[number], epoch, block))
        assert (number, block) in coming or len(windows[number]) > num_windows
    number, _, block, _ = plan.locate(bounds[part + 1])
    if num_windows > 1:  # the first row of the next phase, on the last one of this
        assert (number, block) in plan.coming_blocks(bounds[part + 1] - 1, num_windows)


@given(recipes(min_parts=2), st.integers(1, 2))
@few
def test_what_is_added_later_leaves_the_rows_before_as_they_are(recipe, num_parts):
    whole, shorter = recipe.build(), recipe.build(num_parts)
    boundary = [*recipe.first_rows, recipe.num_rows][num_parts]
    for t in range(min(boundary, recipe.num_rows)):
        one, other = whole.locate(t), shorter.locate(t)
        assert (whole.names[one[0]], *one[1:]) == (shorter.names[other[0]], *other[1:])
        assert whole.seq_len_at(t) == shorter.seq_len_at(t)
    # A checkpoint at the boundary, or before, of either one can go on with the other; one past it cannot.
    for one, other in ((whole, shorter), (shorter, whole)):
        assert one.explain_difference(other.pieces, boundary) == ""
    if num_parts < len(recipe.parts):
        assert "data.phases" in shorter.explain_difference(whole.pieces, boundary + 1)
        assert whole.hash != shorter.hash


@given(recipes(), st.data())
@few
def test_a_change_of_what_has_been_is_named(recipe, data):
    plan = recipe.build()
    number = data.draw(st.integers(0, len(recipe.parts) - 1))
    t = recipe.first_rows[number] + data.draw(st.integers(1, recipe.parts[number].num_rows))
    pieces = {name: value for name, value in plan.pieces.items() if name != "data.phases"}
    changed = {**plan.pieces}
    if number:
        pieces = plan.pieces["data.phases"][number - 1]
        changed["data.phases"] = [dict(phase) for phase in plan.pieces["data.phases"]]
    name = data.draw(st.sampled_from(sorted(pieces)))
    target = changed["data.phases"][number - 1] if number else changed
    target[name] = -1 if name == "its first row" else "another"
    clause = plan.explain_difference(changed, t)
    was = -1 if name == "its first row" else "another"
    assert f"{name} was {was} and is {str(pieces[name])[:12]}" in clause and ";" not in clause
    assert clause.startswith(f"data.phases.{number - 1}: " if number else name)


@given(recipes())
@few
def test_every_stretch_of_a_phase_has_each_share_to_within_one_row(recipe):
    plan = recipe.build()
    for part, first in zip(recipe.parts, recipe.first_rows, strict=True):
        shares, counts = plan.shares_at(first), dict.fromkeys(plan.names, 0)
        weights = {
            name: amount * (recipe.rows_per_block(name, part.seq_len).sum() if part.by_epochs else 1)
            for name, amount in part.amounts
        }
        for name, weight in weights.items():
            assert abs(shares[name] - weight / sum(weights.values())) < 1 / 4096
        for t in range(first, first + part.num_rows):
            counts[plan.names[plan.locate(t)[0]]] += 1
            for name in plan.names:
                assert abs(counts[name] - shares.get(name, 0) * (t + 1 - first)) < 1


@given(recipes())
@few
def test_epochs_by_amount_are_seen_that_often(recipe):
    part = replace(recipe.parts[0], by_epochs=True)
    rows = {name: int(recipe.rows_per_block(name, part.seq_len).sum()) for name, _ in part.amounts}
    plan = replace(recipe, parts=(part,)).build()
    total = sum(int(amount) * rows[name] for name, amount in part.amounts)
    for name, amount in part.amounts:
        # To a row, and to what rounding to 1/4096 of all rows makes of the share.
        assert abs(plan.epochs(total)[name] - amount) * rows[name] <= 1 + total / 4096 + 1e-3 * rows[name]


@given(
    st.lists(st.integers(1, 600), min_size=1, max_size=8), st.integers(1, 4), st.sampled_from([(64, 16), (16, 64)]),
    st.integers(0, 10**6),
)  # fmt: skip
@few
def test_rows_of_another_length_go_on_in_the_same_window(slots, window_shards, seq_lens, k):
    old, new = (
        CorpusOrder("web", np.array([-(-n // seq_len) for n in slots]), 3, window_shards) for seq_len in seq_lens
    )
    k %= 5 * old.num_rows
    there = new.continue_from(old, k)
    epoch, block, _ = old.locate(k)
    new_epoch, new_block, _ = new.locate(there)
    blocks = row_order.permutation(len(slots), 3, "web", epoch).tolist()
    assert epoch == new_epoch == there // new.num_rows
    assert blocks.index(block) // window_shards == blocks.index(new_block) // window_shards
    assert (
        new.continue_from(old, k + 1) >= there and new.continue_from(old, epoch * old.num_rows) == epoch * new.num_rows
    )
    assert old.continue_from(old, k) == k


def test_a_corpus_that_pauses_goes_on_where_it_was():
    slots = ((32 * 50, 32 * 70), (32 * 40,))
    parts = [Part(60, 32, (("web", 1.0), ("code", 1.0)), False), Part(40, 32, (("code", 1.0),), False)]
    recipe = Recipe(slots, (*parts, Part(90, 32, (("web", 1.0),), False)), 5, 1)
    plan = recipe.build()
    alone = CorpusOrder("web", recipe.rows_per_block("web", 32), 5, 1)
    rows = [plan.locate(t) for t in range(190)]
    assert [row[1:] for row in rows if plan.names[row[0]] == "web"] == [alone.locate(k) for k in range(30 + 90)]
    assert plan.rows_per_corpus(80) == {"web": 30, "code": 50} and plan.epochs(100) == {"web": 0.25, "code": 1.75}
    assert plan.first_rows == [0, 60, 100] and plan.shares_at(100) == {"web": 1.0}


def test_a_corpus_may_begin_in_a_later_phase():
    parts = (Part(10, 64, (("web", 1.0),), False), Part(10, 32, (("web", 1.0), ("code", 3.0)), False))
    plan = Recipe(((3000,), (2000,)), parts, 5, 1).build()
    assert plan.names == list(NAMES[:2]) and plan.epochs(10)["code"] == 0.0
    assert plan.rows_per_corpus(20) == {"web": 12, "code": 8} or plan.rows_per_corpus(20) == {"web": 13, "code": 7}
    assert plan.tokens_per_corpus(10) == {"web": 640, "code": 0}
    assert plan.tokens_per_corpus(20)["web"] == 640 + 32 * (plan.rows_per_corpus(20)["web"] - 10)
    assert "rows of code" not in plan.pieces and plan.pieces["data.phases"][0]["rows of code"] == 63
    assert [plan.seq_len_at(t) for t in (0, 9, 10, 10**9)] == [64, 64, 32, 32]
