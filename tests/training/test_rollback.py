"""Runs that go back from a spike: two ranks, rows whose targets are nonsense."""

from __future__ import annotations

import pytest

from tests.helpers.rank_helpers import losses, metric_lines, newest, run_cases

pytestmark = pytest.mark.launches
NUM_STEPS, WINDOW = 60, 16
BAD = (36, 37)  # steps whose rows are bad, of an undisturbed run


@pytest.fixture(scope="module")
def runs(tiny_config, tmp_path_factory):
    """Run all cases of this module in one start of two ranks; return (outcomes by name, folder, rows of a step)."""
    folder = tmp_path_factory.mktemp("rollback")
    size = 8
    bad_rows = [(BAD[0] - 1) * size, BAD[1] * size]
    always, once = {"bad_rows": [*bad_rows, 99]}, {"bad_rows": [*bad_rows, 1]}
    guard = "guard={spike_steps: 2, rollback_steps: 3, max_rollbacks: 1}"
    rerun = "guard={spike_steps: 2, rollback_steps: 3, max_rollbacks: 2, rerun: true}"
    cases = {
        "calm": [{}, []],
        "spiked": [always, [guard]],
        "stopped": [always | {"signal_at": 34}, [guard]],  # both before the spike
        "stopped again": [always | {"signal_at": 37}, [guard]],  # within it
        "stopped, third time": [always | {"signal_at": 34}, [guard]],  # and after the rollback
        "stopped, last": [always, [guard]],
        "given up": [always, [guard.replace("max_rollbacks: 1", "max_rollbacks: 0")]],
        "without checkpoint": [always, [guard, "checkpoint.every_steps=50"]],
        "off": [always, ["guard.spike_sigmas=0"]],
        "machine": [once, [rerun]],
        "data": [always, [rerun]],
        "not finite": [{"poison": [20], "poison_once": True}, ["guard.rerun=true"]],
        "not finite twice": [{"poison": [20]}, ["guard.rerun=true"]],
    }
    listed = [
        extra | {"window": WINDOW, "overrides": [f"run.dir={folder}/{name.split(',')[0].replace(' again', '')}",
                                                 f"train.num_steps={NUM_STEPS}", "train.micro_batch_size=4",
                                                 f"train.global_batch_size={size}", "checkpoint.every_steps=10", *rest]}
        for name, (extra, rest) in cases.items()
    ]  # fmt: skip
    outcomes = run_cases(tiny_config, listed, 2, folder / "ranks")
    return dict(zip(cases, outcomes, strict=True)), folder, size


def events(run, name):
    return [line for line in metric_lines(run) if line.get("event") == name]


def steps(run):
    return [line["step"] for line in metric_lines(run) if "loss" in line]


def test_the_run_goes_back_and_leaves_out_the_rows_around_the_spike(runs):
    outcomes, folder, size = runs
    run = folder / "spiked"
    assert outcomes["spiked"] == "done"
    [rollback] = events(run, "rollback")
    rows = [[(BAD[0] - 4) * size, BAD[1] * size]]  # from three steps before the first bad one
    assert (rollback["step"], rollback["rows"], rollback["bad_steps"]) == (31, rows, list(BAD))
    assert rollback["message"].endswith(f"back to step 30, rows {rows[0][0]} to {rows[0][1] - 1} are left out")
    assert newest(run).training["data"]["skipped_rows"] == rows
    assert newest(run).training["data"]["cursor"] == (NUM_STEPS + 5) * size
    assert steps(run) == list(range(1, NUM_STEPS + 1))
    assert losses(run)[:32] == losses(folder / "calm")[:32]
    assert losses(run)[32] != losses(folder / "calm")[32]
    assert max(losses(run)[30:]) < losses(run)[20]
    assert newest(run).training["num_tokens"] == newest(folder / "calm").training["num_tokens"]


def test_the_spike_is_recorded_where_nothing_is_done_about_it(runs):
    outcomes, folder, _ = runs
    run = folder / "without checkpoint"
    assert outcomes["without checkpoint"] == "done"
    assert [line["message"].partition(":")[0] for line in events(run, "spike")] == [f"step {step}" for step in BAD]
    assert len(events(run, "no_rollback")) == 1 and not events(run, "rollback")
    assert not events(folder / "off", "spike") and losses(folder / "off") == losses(run)
    assert losses(run)[BAD[0] - 1] > losses(run)[BAD[0] - 2] + 1


def test_stops_and_restarts_change_nothing(runs):
    outcomes, folder, _ = runs
    assert [text for name, text in outcomes.items() if name.startswith("stopped")] == ["stopped"] * 3 + ["done"]
    assert losses(folder / "stopped") == losses(folder / "spiked")
    one, other = newest(folder / "stopped").training, newest(folder / "spiked").training
    assert one == other


def test_it_gives_up_with_the_rows_and_a_way_on(runs):
    outcomes, _, _ = runs
    text = outcomes["given up"]
    assert text.startswith(
        "TrainingError: steps 36 to 37: the loss or the gradient norm spikes after 0 of guard.max_rollbacks=0 "
    )
    assert "The newest checkpoint from before is of step 30." in text and "optim.lr" in text


def test_computing_again_tells_a_machine_from_the_data(runs):
    outcomes, folder, size = runs
    assert (outcomes["machine"], outcomes["data"]) == ("done", "done")
    assert len(events(folder / "machine", "transient_fault")) == 1
    assert losses(folder / "machine") == losses(folder / "calm")
    assert newest(folder / "machine").training["data"]["skipped_rows"] == []
    assert not events(folder / "data", "transient_fault")
    assert losses(folder / "data") == losses(folder / "spiked")


def test_a_step_that_is_not_finite_is_computed_again(runs):
    outcomes, folder, _ = runs
    assert (outcomes["not finite"], outcomes["not finite twice"]) == ("done", "done")
    [fault] = events(folder / "not finite", "transient_fault")
    assert fault["message"].startswith("step 20 was not finite on rank 1, and is when computed again")
    assert losses(folder / "not finite") == losses(folder / "calm")
    assert not events(folder / "not finite", "skipped_step")
    assert [line["step"] for line in events(folder / "not finite twice", "skipped_step")] == [20]


def test_clipped_steps_are_counted(runs):
    _, folder, _ = runs
    lines = [line for line in metric_lines(folder / "calm") if "loss" in line]
    expected = 0
    for line in lines:
        expected += line["grad_norm"] > 1.0
        assert line["clipped_steps"] == expected
    assert expected > 0
