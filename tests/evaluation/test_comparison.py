"""Differences of scores and their standard errors."""

from __future__ import annotations

import math

import numpy as np
import pytest

from pretrain.evaluation.comparison import Row, Score, difference, differences, ratio_stderr, table, task_table

DRAW = np.random.default_rng(3)


def test_the_error_of_a_mean_is_the_usual_one():
    values = DRAW.normal(size=50).tolist()
    assert ratio_stderr(values, [1.0] * 50) == pytest.approx(np.std(values, ddof=1) / math.sqrt(50))
    assert ratio_stderr([1.0], [1.0]) is None and ratio_stderr([0.0, 0.0], [0.0, 0.0]) is None


def test_the_error_of_a_loss_is_what_repeated_draws_show():
    """Rows of different lengths, as of held-out documents: the error of sum / sum, over 2000 draws."""
    ratios, errors = [], []
    for _ in range(2000):
        tokens = DRAW.integers(5, 60, 80)
        losses = tokens * (2 + DRAW.normal(size=80)) + DRAW.normal(size=80)
        ratios.append(losses.sum() / tokens.sum())
        errors.append(ratio_stderr(losses.tolist(), tokens.tolist()))
    assert np.mean(errors) == pytest.approx(np.std(ratios), rel=0.06)


def test_the_same_samples_are_compared_one_by_one():
    base = (DRAW.random(200) < 0.5).astype(float)
    better = base.copy()
    better[:10] = 1.0
    ours, other = (
        Score(one.mean(), one.std(ddof=1) / math.sqrt(200), one.tolist(), samples_are="arc") for one in (better, base)
    )
    found = difference(ours, other)
    assert found.is_paired and found.value == pytest.approx((better - base).mean())
    assert found.stderr == pytest.approx((better - base).std(ddof=1) / math.sqrt(200))
    apart = difference(ours, Score(other.value, other.stderr, other.samples, samples_are="arc of another version"))
    assert not apart.is_paired and apart.stderr == pytest.approx(math.hypot(ours.stderr, other.stderr))
    assert apart.stderr > 3 * found.stderr


def test_metrics_that_are_no_means_are_not_paired_and_may_have_no_error():
    f1 = Score(0.7, None, [0.0, 1.0], samples_are="f1")  # of the samples, but not their mean
    found = difference(f1, Score(0.6, None, [1.0, 1.0], samples_are="f1"))
    assert (found.stderr, found.is_paired) == (None, False) and found.value == pytest.approx(0.1)


def test_the_table_has_a_row_for_each_and_marks_what_is_clear():
    rows = [
        Row("a@1", {"loss": Score(2.5, 0.1), "acc": Score(0.25, 0.01)}),
        Row("b@2", {"loss": Score(2.6, 0.1), "acc": Score(0.5, 0.01), "f1": Score(123456.0)}),
    ]
    assert table(rows).splitlines() == [
        "               loss             acc         f1",
        "a@1  2.5000 ±0.1000  0.2500 ±0.0100          -",
        "b@2  2.6000 ±0.1000  0.5000 ±0.0100  1.235e+05",
        "",
        "minus a@1             loss                acc  f1",
        "b@2        +0.1000 ±0.1414  +0.2500 ±0.0141 *   -",
        "* more than 1.96 standard errors from 0",
    ]
    assert [(one["name"], one["of"], one["from"]) for one in differences(rows)] == [
        ("loss", "b@2", "a@1"),
        ("acc", "b@2", "a@1"),
    ]
    assert "minus" not in table(rows[:1])


def test_what_was_asked_otherwise_is_marked():
    rows = [
        Row("a@1", {"loss": Score(2.5, 0.1, samples_are="rows of a"), "acc": Score(0.25, 0.01, samples_are="t 1")}),
        Row("b@2", {"loss": Score(3.5, 0.1, samples_are="rows of b"), "acc": Score(0.25, 0.01, samples_are="t 1")}),
    ]
    assert table(rows).splitlines()[-3:] == [
        "b@2        +1.0000 ±0.1414 * ~  +0.0000 ±0.0141",
        "* more than 1.96 standard errors from 0",
        "~ not of the same rows or samples: what was asked differs too, not the models alone",
    ]


def test_the_results_of_tasks_as_a_table():
    metrics = {
        "acc": {"value": 0.5, "stderr": 0.25, "higher_is_better": True},
        "ppl": {"value": 3e6, "stderr": None, "higher_is_better": False},
    }
    results = {"group": {"samples": 0, "num_fewshot": None, "metrics": {"acc": metrics["acc"]}},
               "arc": {"samples": 4, "num_fewshot": 2, "metrics": metrics}}  # fmt: skip
    assert task_table(results).splitlines() == [
        "task   shots  samples  metric   value  stderr",
        "group      -        -     acc  0.5000  0.2500",
        "arc        2        4     acc  0.5000  0.2500",
        "arc        2        4     ppl   3e+06       -",
    ]
