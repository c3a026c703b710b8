"""The arithmetic of a step."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pretrain.errors import ConfigError
from pretrain.options.batch_plan import BatchPlan, num_steps_of
from pretrain.options.config import Config


def config_of(
    global_batch_size: int,
    micro_batch_size: int,
    num_steps: int | None = 10,
    num_tokens: int | None = None,
    **parallel: int,
) -> Config:
    train = {"global_batch_size": global_batch_size, "micro_batch_size": micro_batch_size}
    return Config.model_validate(
        {
            "model": {"dim": 64, "num_layers": 2, "num_heads": 4},
            "data": {"sources": [{"name": "web", "shards": "data/web"}], "seq_len": 128},
            "tokenizer": {"model": "t.model", "vocab_size": 512},
            "optim": {"lr": 1e-3},
            "train": {**train, "num_steps": num_steps, "num_tokens": num_tokens},
            "parallel": parallel,
        }
    )


def test_a_plan() -> None:
    plan = BatchPlan.of(config_of(256, 8), world_size=4)
    assert plan == BatchPlan(
        global_batch_size=256,
        micro_batch_size=8,
        num_micro_steps=8,
        rows_per_rank=64,
        seq_len=128,
        tokens_per_step=32768,
        num_steps=10,
        world_size=4,
    )


def test_rows_of_another_length_leave_the_tokens_of_a_step() -> None:
    plan = BatchPlan.of(config_of(256, 8), world_size=4)
    assert plan.for_seq_len(128) is plan
    for seq_len, rows, micro, per_rank in ((512, 64, 2, 16), (32, 1024, 32, 256), (1024, 32, 1, 8)):
        other = plan.for_seq_len(seq_len)
        assert (other.global_batch_size, other.micro_batch_size, other.rows_per_rank) == (rows, micro, per_rank)
        assert (other.seq_len, other.tokens_per_step, other.num_micro_steps) == (seq_len, 32768, 8)
        assert other.for_seq_len(128) == plan


def test_ranks_that_share_rows_count_once() -> None:
    plan = BatchPlan.of(config_of(256, 8, sequence_parallel_size=2), world_size=8)
    alone = BatchPlan.of(config_of(256, 8), world_size=4)
    assert plan == replace(alone, world_size=8, sequence_parallel_size=2)
    assert [plan.reader_of(rank) for rank in range(8)] == [0, 0, 1, 1, 2, 2, 3, 3]
    with pytest.raises(ConfigError) as caught:
        BatchPlan.of(config_of(256, 8, sequence_parallel_size=4), world_size=6)
    assert str(caught.value) == (
        "on 6 ranks: parallel.sequence_parallel_size is 4; expected a divisor of the number of ranks. Use 3 or 6, or a "
        "multiple of 4 ranks."
    )
    with pytest.raises(ConfigError) as caught:
        BatchPlan.of(config_of(24, 8, sequence_parallel_size=2), world_size=4)
    assert str(caught.value) == (
        "on 4 ranks in 2 groups: train.global_batch_size is 24; expected a multiple of train.micro_batch_size x groups "
        "of 2 ranks (8 x 2 = 16). Use 16 or 32, or train.micro_batch_size 4 or 6 or 12."
    )


def test_tokens_are_rounded_up_to_whole_steps() -> None:
    assert num_steps_of(config_of(8, 2, None, 8 * 128 * 5)) == 5
    assert num_steps_of(config_of(8, 2, None, 8 * 128 * 5 + 1)) == 6
    assert num_steps_of(config_of(8, 2, None, 1)) == 1


@given(st.integers(1, 16), st.integers(1, 16), st.integers(1, 16))
def test_ranks_and_micro_steps_cover_the_batch(micro: int, num_micro_steps: int, world_size: int) -> None:
    plan = BatchPlan.of(config_of(micro * num_micro_steps * world_size, micro), world_size)
    assert plan.num_micro_steps == num_micro_steps
    assert plan.rows_per_rank * world_size == plan.global_batch_size
    assert plan.micro_batch_size * plan.num_micro_steps == plan.rows_per_rank


@pytest.mark.parametrize(
    ("global_batch_size", "micro_batch_size", "world_size", "message"),
    [
        (
            256,
            8,
            12,
            "on 12 ranks: train.global_batch_size is 256; expected a multiple of train.micro_batch_size x ranks (8 x 12 = "
            "96). Use 192 or 288; no micro-batch size divides 256 rows on 12 ranks.",
        ),
        (
            24,
            8,
            2,
            "on 2 ranks: train.global_batch_size is 24; expected a multiple of train.micro_batch_size x ranks (8 x 2 = 16). "
            "Use 16 or 32, or train.micro_batch_size 4 or 6 or 12.",
        ),
        (
            6,
            4,
            1,
            "on 1 rank: train.global_batch_size is 6; expected a multiple of train.micro_batch_size x ranks (4 x 1 = 4). "
            "Use 4 or 8, or train.micro_batch_size 2 or 3 or 6.",
        ),
        (
            4,
            4,
            2,
            "on 2 ranks: train.global_batch_size is 4; expected a multiple of train.micro_batch_size x ranks (4 x 2 = 8). "
            "Use 8, or train.micro_batch_size 1 or 2.",
        ),
    ],
)
def test_a_batch_that_does_not_divide(
    global_batch_size: int, micro_batch_size: int, world_size: int, message: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        BatchPlan.of(config_of(global_batch_size, micro_batch_size), world_size)
    assert str(caught.value) == message
