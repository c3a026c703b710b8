"""Noise in training rows: none unless it is asked for, the same on any ranks, and never a token too early."""

from __future__ import annotations

from contextlib import closing

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pretrain.data.augment import augment_row
from pretrain.data.stream import TokenStream, ValRows
from pretrain.errors import DataError
from pretrain.options.config import AugmentSection, Config
from tests.helpers.data_helpers import TOKENIZER, batch_plan, make_config, make_corpus, random_documents

ROWS, BLANK = 12, 0


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("corpora")
    for name, seed in (("web", 1), ("code", 2)):
        make_corpus(root / name, random_documents(120, seed), random_documents(15, seed + 10))
    return {root / "web": 0.7, root / "code": 0.3}


def config_with(folders, seed: int = 1, **augment: float) -> Config:
    """The first source has the noise, the second none."""
    config = make_config(folders, seed=seed).model_dump()
    config["data"]["sources"][0]["augment"] = augment
    return Config.model_validate(config)


def read(config: Config, num_steps: int = 6, world_size: int = 1, state=None, plan=ROWS) -> dict[str, torch.Tensor]:
    sizes = batch_plan(plan, world_size, 1, seq_len=32)
    streams = [TokenStream(config, sizes, rank, TOKENIZER, blank_id=BLANK) for rank in range(world_size)]
    batches = []
    for one in streams:
        if state:
            one.load_state(state)
    for _ in range(num_steps):
        batches += [batch for one in streams for batch in one.next_step().micro_batches]
    states = [one.state() for one in streams]
    for one in streams:
        one.close()
    names = ("tokens_BT", "targets_BT", "doc_start_BT", "row_ids_B")
    return {name: torch.cat([getattr(batch, name) for batch in batches]) for name in names} | {"state": states[0]}


def test_off_changes_nothing_and_is_no_part_of_the_plan(folders) -> None:
    plain, off = read(make_config(folders)), read(config_with(folders, token_dropout=0.0, span_shuffle=0.0))
    assert all(torch.equal(plain[name], off[name]) for name in plain if name != "state")
    assert plain["state"] == off["state"]
    assert not any("augment" in name for name in off["state"]["plan"])


def test_dropped_tokens_are_inputs_alone(folders) -> None:
    plain, noisy = read(make_config(folders), 40), read(config_with(folders, token_dropout=0.2), 40)
    for name in ("targets_BT", "doc_start_BT", "row_ids_B"):
        assert torch.equal(plain[name], noisy[name])
    differs = plain["tokens_BT"] != noisy["tokens_BT"]
    assert (noisy["tokens_BT"][differs] == BLANK).all()
    assert not differs[plain["doc_start_BT"] == torch.arange(32)].any()  # the first token of each document stays
    of_rows = differs.any(1)
    assert 0.6 < of_rows.float().mean() < 0.8  # the source that has no noise has none
    candidates = (plain["doc_start_BT"] != torch.arange(32)) & of_rows[:, None] & (plain["targets_BT"] >= 0)
    assert float(differs[candidates].float().mean()) == pytest.approx(0.2, abs=0.02)


def test_noise_depends_on_the_row_and_the_seed_alone(folders) -> None:
    noise = {"token_dropout": 0.1, "span_shuffle": 0.3}
    one = read(config_with(folders, **noise))
    for world_size in (2, 4):
        several = read(config_with(folders, **noise), world_size=world_size)
        assert torch.equal(one["tokens_BT"], several["tokens_BT"])
    resumed = read(config_with(folders, **noise), 3, state=read(config_with(folders, **noise), 3)["state"])
    assert torch.equal(one["tokens_BT"][3 * ROWS :], resumed["tokens_BT"])
    other = read(config_with(folders, seed=2, **noise))
    assert not torch.equal(one["tokens_BT"] == BLANK, other["tokens_BT"] == BLANK)


def test_every_epoch_has_other_noise() -> None:
    rows = [np.arange(10, 74) for _ in range(2)]
    for number, row in enumerate(rows):
        augment_row(row, np.ones(64, bool), np.zeros(64, int), AugmentSection(token_dropout=0.3), BLANK, 1, number)
    assert (rows[0] == BLANK).any() and ((rows[0] == BLANK) != (rows[1] == BLANK)).any()


def test_held_out_rows_have_none(folders) -> None:
    batches = []
    for config in (make_config(folders), config_with(folders, token_dropout=0.5)):
        with closing(ValRows(config, TOKENIZER, 0)) as rows:
            batches.append(rows.batch(range(rows.num_rows)).tokens_BT)
    assert torch.equal(*batches)


def test_a_run_cannot_go_on_with_other_noise(folders) -> None:
    state = read(config_with(folders, token_dropout=0.1))["state"]
    with closing(
        TokenStream(config_with(folders, token_dropout=0.2), batch_plan(ROWS, 1, 1, seq_len=32), 0, TOKENIZER)
    ) as stream:
        with pytest.raises(
            DataError, match=r"augment of web was philox-1, token_dropout 0\.1, span_shuffle 0\.0 and is .*0\.2"
        ):
            stream.load_state(state)


@st.composite
def rows(draw):
    """Rows of documents, each a few turns of prompts, not scored, and answers; and padding."""
    scored, starts = [], []
    for _ in range(draw(st.integers(1, 3))):
        begin = len(scored)
        for _ in range(draw(st.integers(1, 3))):
            scored += [False] * draw(st.integers(0, 25)) + [True] * draw(st.integers(0, 6))
        starts += [begin] * (len(scored) - begin)
    starts += [len(scored)] * 4
    return np.array([*scored, *[False] * 4]), np.array(starts)


@given(rows(), st.integers(0, 2**31), st.sampled_from([0.1, 0.5, 0.99]))
def test_shuffled_spans_stay_in_their_prompt(row, number, share) -> None:
    is_scored, starts = row
    tokens = np.arange(100, 100 + len(starts))
    before = tokens.copy()
    augment_row(tokens, is_scored, starts, AugmentSection(span_shuffle=share), BLANK, 1, number)
    assert sorted(tokens) == sorted(before)
    for place in np.flatnonzero(is_scored):  # what is predicted has the same tokens before it, and none from behind it
        begin = starts[place]
        assert set(tokens[begin : place + 1]) == set(before[begin : place + 1])
        assert tokens[place] == before[place]
    first = np.flatnonzero(starts == np.arange(len(starts)))
    assert (tokens[first] == before[first]).all()
    assert (np.abs(tokens - before) <= 5).all()  # a span moves by the length of its neighbour


def test_spans_move_as_whole_and_as_often_as_asked() -> None:
    moved = []
    for number in range(200):
        tokens = np.arange(1000, 1064)
        augment_row(
            tokens,
            np.array([False] * 63 + [True]),
            np.zeros(64, int),
            AugmentSection(span_shuffle=0.2),
            BLANK,
            1,
            number,
        )
        assert tokens[0] == 1000 and tokens[-1] == 1063
        moved.append(np.count_nonzero(tokens != np.arange(1000, 1064)))
        breaks = np.count_nonzero(np.diff(tokens) != 1)
        assert breaks <= 3 * np.count_nonzero(np.diff(tokens) < 0) + 1  # three where a pair changed places
    assert 12 < np.mean(moved) < 30  # of 62: two spans for each of a fifth, but none twice
    tokens = np.arange(64)
    augment_row(tokens, np.ones(64, bool), np.zeros(64, int), AugmentSection(span_shuffle=0.9), BLANK, 1, 1)
    assert (tokens == np.arange(64)).all()  # where all is scored nothing may move


def test_what_noise_costs(folders) -> None:
    """About 0.1 ms a row of 2,048 on the machine that this was written on; the limit is for busy ones."""
    import time

    tokens, scored = np.arange(2048), np.arange(2048) % 128 > 100
    begin = time.process_time()
    for number in range(50):
        augment_row(
            tokens, scored, np.zeros(2048, int), AugmentSection(token_dropout=0.1, span_shuffle=0.1), 0, 1, number
        )
    assert (time.process_time() - begin) / 50 < 0.02
