"""What counts as a bad step, and for which of them a run goes back."""

from __future__ import annotations

import json
import math
import random

import pytest

from pretrain.options.run_options import GuardSection
from pretrain.training.spikes import WINDOW, Observation, SpikeGuard, describe_ranges

ROWS = 8  # of a step


def observe(guard, step, loss, grad_norm=1.0, starts_phase=False):
    guard.record(Observation(step, (step - 1) * ROWS, step * ROWS, loss, grad_norm, starts_phase))
    return guard.judge(step)


def calm(guard, num_steps=WINDOW, first=1, level=3.0, norm=1.0, seed=0):
    """Steps as training has them: noise, and a slow fall."""
    rng = random.Random(seed)
    events = []
    for step in range(first, first + num_steps):
        loss = level - 0.001 * (step - first) + rng.gauss(0, 0.02)
        events += observe(guard, step, loss, norm * math.exp(rng.gauss(0, 0.1)))
    return events


def make(**options):
    return SpikeGuard(GuardSection(**options))


def test_noise_and_a_slow_change_are_no_spikes():
    guard = make(spike_sigmas=6.0)
    assert calm(guard, 2000) == []
    assert guard.spike() is None


def test_nothing_is_judged_before_the_window_is_full():
    guard = make()
    calm(guard, WINDOW - 1)
    assert observe(guard, WINDOW, 50.0) == []  # enters the window as any other
    assert observe(guard, WINDOW + 1, 50.0)


@pytest.mark.parametrize(
    ("loss", "norm", "named"), [(4.0, 1.0, "the loss is 4, "), (2.9, 30.0, "the gradient norm is 30, ")]
)
def test_what_stands_out_is_named_with_what_is_usual(loss, norm, named):
    guard = make()
    calm(guard)
    [(event, message)] = observe(guard, WINDOW + 1, loss, norm)
    assert event == "spike"
    assert message.startswith(f"step {WINDOW + 1}: {named}")
    assert message.endswith("the median of the last 128 good steps")


def test_a_fall_is_no_spike():
    guard = make()
    calm(guard)
    assert observe(guard, WINDOW + 1, 0.1, 0.001) == []


def test_ripples_of_a_smooth_curve_are_no_spikes():
    guard = make()
    for step in range(1, WINDOW + 1):
        observe(guard, step, 2.0)
    assert observe(guard, WINDOW + 1, 2.1, 1.2) == []
    assert observe(guard, WINDOW + 2, 2.2, 1.0)


def test_bad_steps_never_enter_the_window():
    guard = make(spike_steps=128)
    calm(guard)
    before = guard.state()
    for step in range(WINDOW + 1, WINDOW + 101):
        assert observe(guard, step, 9.0)
    assert guard.state()["losses"] == before["losses"]


@pytest.mark.parametrize(("loss", "norm"), [(math.nan, math.nan), (3.0, math.nan), (math.inf, 1.0)])
def test_steps_that_are_not_finite_are_left_to_the_other_guard(loss, norm):
    guard = make(spike_steps=2)
    calm(guard)
    before = guard.state()
    observe(guard, WINDOW + 1, 9.0)
    assert observe(guard, WINDOW + 2, loss, norm) == []
    assert guard.state()["losses"] == before["losses"]
    assert guard.spike() is None
    observe(guard, WINDOW + 3, 9.0)
    assert guard.spike() is not None
    json.dumps(guard.state(), allow_nan=False)


def test_the_run_goes_back_for_bad_steps_in_a_row_only():
    guard = make(spike_steps=3, rollback_steps=10)
    calm(guard)
    for step, loss in enumerate([9.0, 9.0, 3.0, 9.0, 9.0], WINDOW + 1):
        observe(guard, step, loss)
        assert guard.spike() is None
    observe(guard, WINDOW + 6, 9.5)
    spike = guard.spike()
    first = WINDOW + 4
    assert (spike.first_step, spike.last_step, spike.go_back_to) == (first, WINDOW + 6, first - 11)
    assert (spike.begin, spike.end) == ((first - 11) * ROWS, (WINDOW + 6) * ROWS)
    assert spike.losses == (9.0, 9.0, 9.5)


def test_what_is_left_out_does_not_depend_on_when_it_is_asked():
    guard = make(spike_steps=3, rollback_steps=10)
    calm(guard)
    for step in range(WINDOW + 1, WINDOW + 4):
        observe(guard, step, 9.0)
    early = guard.spike()
    observe(guard, WINDOW + 4, 9.0)
    assert guard.spike() == early


@pytest.mark.parametrize("starts_phase", [False, True])
def test_what_is_left_out_does_not_depend_on_a_save_behind_it(starts_phase):
    """A save judges the newest step too, which a run that goes on has not judged when it sees the spike."""
    saved, other = (make(spike_steps=3, rollback_steps=10) for _ in range(2))
    for guard in (saved, other):
        calm(guard)
        for step, loss in enumerate([9.0, 9.0, 9.0, 3.0], WINDOW + 1):
            guard.record(Observation(step, (step - 1) * ROWS, step * ROWS, loss, 1.0, starts_phase and loss < 9))
        guard.judge(WINDOW + 3)
    events = saved.judge(WINDOW + 4)
    resumed = make(spike_steps=3, rollback_steps=10)
    resumed.load_state(json.loads(json.dumps(saved.state(), allow_nan=False)))
    assert events == [] and saved.spike() == other.spike() == resumed.spike() is not None
    for guard in (saved, other, resumed):  # there is nothing to go back to
        guard.forgive()
        guard.judge(WINDOW + 4)
    assert saved.state() == other.state() == resumed.state()


def test_steps_are_judged_up_to_the_one_that_all_ranks_know():
    guard = make(spike_steps=1)
    calm(guard)
    guard.record(Observation(WINDOW + 1, 0, 8, 9.0, 1.0, False))
    assert guard.judge(WINDOW) == []
    assert guard.spike() is None
    assert guard.judge(WINDOW + 1)
    assert guard.spike()


def test_other_data_begins_a_new_window():
    guard = make(spike_steps=1)
    calm(guard)
    assert observe(guard, WINDOW + 1, 9.0, starts_phase=True) == []
    assert calm(guard, WINDOW, WINDOW + 2, level=9.0) == []
    assert observe(guard, 2 * WINDOW + 2, 12.0)


def test_zero_judges_nothing():
    guard = make(spike_sigmas=0)
    calm(guard)
    assert observe(guard, WINDOW + 1, 99.0) == []


def test_a_guard_that_was_saved_judges_as_the_one_that_went_on():
    one = make(spike_steps=3)
    calm(one)
    observe(one, WINDOW + 1, 9.0)
    other = make(spike_steps=3)
    other.load_state(json.loads(json.dumps(one.state())))
    for guard in (one, other):
        observe(guard, WINDOW + 2, 9.0)
        observe(guard, WINDOW + 3, 8.0)
    assert one.spike() == other.spike() is not None
    assert one.state() == other.state()


def test_rollbacks_are_counted_until_a_window_of_good_steps():
    guard = make(spike_steps=1)
    calm(guard)
    state = guard.state()
    observe(guard, WINDOW + 1, 9.0)
    guard.went_back(state, guard.spike())
    assert guard.num_rollbacks == 1
    calm(guard, WINDOW - 1, WINDOW + 2)
    assert guard.num_rollbacks == 1
    calm(guard, 1, 2 * WINDOW + 1)
    assert guard.num_rollbacks == 0


def test_a_spike_that_does_not_come_again_was_a_machines():
    guard = make(spike_steps=2, rerun=True)
    calm(guard)
    state = guard.state()
    for step in (WINDOW + 1, WINDOW + 2):
        observe(guard, step, 9.0)
    spike = guard.spike()
    assert guard.must_repeat(spike)
    guard.went_back(state, spike)
    assert observe(guard, WINDOW + 1, 2.9) == []
    [(event, message)] = observe(guard, WINDOW + 2, 2.9)
    assert event == "transient_fault"
    assert message.startswith(f"steps {WINDOW + 1} to {WINDOW + 2}, computed again")


def test_a_spike_that_comes_again_is_the_datas():
    guard = make(spike_steps=2, rerun=True)
    calm(guard)
    state = guard.state()
    for attempt in range(2):
        for step in (WINDOW + 1, WINDOW + 2):
            assert [event for event, _ in observe(guard, step, 9.0)] == ["spike"]
        spike = guard.spike()
        assert guard.must_repeat(spike) == (attempt == 0)
        guard.went_back(state, spike)


def test_ranges_are_written_for_people():
    assert describe_ranges([(4096, 8192), (12288, 16384)]) == "4,096 to 8,191 and 12,288 to 16,383"
