"""The learning rate at the edges and between them."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pretrain.options.config import ScheduleSection
from pretrain.options.schedule import lr_at, num_decay_steps

PEAK = 6e-4


def rates(num_steps: int, **options: Any) -> list[float]:
    schedule = ScheduleSection(**options)
    return [lr_at(step, num_steps, PEAK, schedule) / PEAK for step in range(num_steps)]


def test_warmup_rises_to_the_peak_at_its_last_update() -> None:
    assert rates(10, name="constant", warmup_steps=4) == pytest.approx([0.25, 0.5, 0.75, 1, 1, 1, 1, 1, 1, 1])


def test_cosine() -> None:
    values = rates(11, name="cosine", final_lr_ratio=0.2)
    assert values[0] == 1
    assert values[5] == pytest.approx(0.6)  # half way between 1 and 0.2
    assert values[2] == pytest.approx(0.2 + 0.8 * 0.5 * (1 + math.cos(math.pi * 0.2)))
    assert values[10] == pytest.approx(0.2)


def test_linear() -> None:
    assert rates(5, name="linear", final_lr_ratio=0.0) == pytest.approx([1, 0.75, 0.5, 0.25, 0])
    assert rates(6, name="linear", warmup_steps=2, final_lr_ratio=0.0) == pytest.approx([0.5, 1, 0.75, 0.5, 0.25, 0])


def test_wsd_holds_the_peak_and_then_falls() -> None:
    expected = [0.5, 1, 1, 1, 1, 1, 1, 0.7, 0.4, 0.1]
    assert rates(10, name="wsd", warmup_steps=2, decay_steps=3) == pytest.approx(expected)
    assert rates(10, name="wsd", decay_steps=10, final_lr_ratio=0) == pytest.approx([i / 10 for i in range(9, -1, -1)])


def test_wsd_decays_in_the_last_tenth_by_default() -> None:
    assert num_decay_steps(ScheduleSection(name="wsd"), 1000) == 100
    assert num_decay_steps(ScheduleSection(name="wsd"), 5) == 1
    assert rates(20, name="wsd") == pytest.approx([1.0] * 18 + [0.55, 0.1])


def test_runs_of_one_update_and_runs_that_only_warm_up() -> None:
    assert rates(1, name="cosine") == [1]
    assert rates(4, name="cosine", warmup_steps=4) == pytest.approx([0.25, 0.5, 0.75, 1])


@given(st.sampled_from(["cosine", "linear", "wsd"]), st.integers(2, 300), st.floats(0, 0.9), st.floats(0, 1), st.data())
def test_any_shape_rises_falls_and_ends_at_its_floor(
    name: str, num_steps: int, share: float, ratio: float, data: st.DataObject
) -> None:
    warmup = min(int(share * num_steps), num_steps - max(1, num_steps // 10))
    schedule = ScheduleSection.model_validate({"name": name, "warmup_steps": warmup, "final_lr_ratio": ratio})
    values = [lr_at(step, num_steps, PEAK, schedule) for step in range(num_steps)]
    peak = max(warmup - 1, 0)
    assert values[:peak] == sorted(values[:peak])
    slack = PEAK * 1e-12  # of rounding
    assert values[peak] == PEAK
    assert all(later <= earlier + slack for earlier, later in pairwise(values[peak:]))
    if peak < num_steps - 1:
        assert values[-1] == pytest.approx(ratio * PEAK)
    beyond = data.draw(st.integers(num_steps, num_steps * 3))
    assert lr_at(beyond, num_steps, PEAK, schedule) == values[-1]
