"""The page of tables."""

from __future__ import annotations

from pathlib import Path

import pytest

from pretrain.planning.plan_table import MODELS, NUM_GPUS, PUBLISHED, plan_of, tables
from pretrain.ranks.gpus import GPUS

PAGE = Path(__file__).resolve().parents[2] / "docs/planning-tables.md"


@pytest.mark.slow
def test_the_page_is_current() -> None:
    assert PAGE.read_text(encoding="utf-8") == tables(), (
        "run: python -m pretrain.planning.plan_table > docs/planning-tables.md"
    )


def test_the_page_has_every_gpu_model_and_number() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert all(f"\n| {name} | " in page for name in GPUS)
    assert all(f"### {name} on {gpu}\n" in page for name, gpu in MODELS)
    assert all(page.count(f"\n| {number:,} | ") == len(MODELS) for number in NUM_GPUS)


@pytest.mark.parametrize("one", PUBLISHED, ids=lambda one: f"{one.config} {one.num_gpus} {one.gpu}")
def test_what_is_foreseen_is_of_the_size_of_what_others_measured(one) -> None:
    plan = plan_of(one)
    if one.tokens_per_second:
        ratio = plan.tokens_per_second / one.num_gpus / one.tokens_per_second
    else:
        ratio = 100 * plan.mfu[0] / one.mfu
    assert 0.8 < ratio < 1.4  # other code, other versions: not a prediction of ours
