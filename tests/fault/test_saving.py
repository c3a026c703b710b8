"""Kills and signals in the middle of saving: a checkpoint is complete or absent, never half."""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path

import pytest

from tests.helpers.rank_helpers import good_steps, losses, newest, state_hash

pytestmark = [pytest.mark.slow, pytest.mark.launches, pytest.mark.timeout(1200)]
KILLED = -signal.SIGKILL


def at_call(action: str, **details: object) -> list[tuple[str, dict]]:
    return [("tests.fault.moments:at_call", {"action": action, **details})]


def wait_for(path: Path, seconds: float = 30) -> None:
    give_up = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < give_up, f"no {path} within {seconds} s"
        time.sleep(0.005)


def check_goes_on(start, undisturbed, run: Path, *overrides: str) -> None:
    """The run goes on to the end of an undisturbed one, bit for bit, and every checkpoint of it is good."""
    start.finish(run, *overrides)
    assert (state_hash(newest(run)), losses(run)) == undisturbed(*overrides)
    assert good_steps(run)[-1] == 12
    assert not list((run / "checkpoints").glob(".tmp-*"))


def test_a_rank_killed_before_it_writes_its_share(start, tmp_path, undisturbed):
    run = tmp_path / "run"
    ranks = start(run, hooks=at_call("kill", call="write_tensors", number=2, at_rank=1))
    while ranks.statuses()[1] is None:
        time.sleep(0.005)
    begin = time.monotonic()
    statuses = ranks.wait(30)
    print(f"the other ended in {time.monotonic() - begin:.1f} s")
    assert statuses[1] == KILLED and statuses[0] > 0, ranks.log()
    assert good_steps(run) == [3]
    check_goes_on(start, undisturbed, run)


def test_rank_0_killed_between_the_manifest_and_the_name(start, tmp_path, undisturbed):
    run = tmp_path / "run"
    ranks = start(run, hooks=at_call("kill", call="rename", number=2, at_rank=0))
    statuses = ranks.wait(30)
    assert statuses[0] == KILLED and statuses[1] > 0, ranks.log()
    assert list((run / "checkpoints").glob(".tmp-*/manifest.json"))
    assert good_steps(run) == [3]
    check_goes_on(start, undisturbed, run)


def test_killed_while_an_old_checkpoint_is_removed(start, tmp_path, undisturbed):
    """The newest two are good at that moment, and a folder that is half gone is no checkpoint."""
    run = tmp_path / "run"
    ranks = start(run, "checkpoint.keep_last=2", hooks=at_call("kill_all", call="rmdir", at_rank=0))
    assert ranks.wait(30) == [KILLED, KILLED], ranks.log()
    assert good_steps(run) == [6, 9] and (run / "checkpoints/.tmp-removed-step-00000003").is_dir()
    check_goes_on(start, undisturbed, run)


def test_killed_at_random_moments_of_saving(start, tmp_path, undisturbed, repeat):
    """All ranks at once, at or after a random call that a random rank's saves make, over and over in the same folder."""
    run, before = tmp_path / "run-0", 0
    for number in repeat(5, 30):
        rank = repeat.random.choice([0, 0, 1])  # rank 0 also completes the checkpoint
        call = repeat.random.randint(1, (15, 7)[rank] * (12 - before) // 3)  # calls of a save x saves that are to come
        after = repeat.random.uniform(0, 0.005)
        begin = time.monotonic()
        ranks = start(run, hooks=at_call("kill_all", number=call, at_rank=rank, after=after))
        statuses = ranks.wait()
        steps = good_steps(run)
        repeat.done(
            f"call {call} of rank {rank} + {1000 * after:.1f} ms: {statuses}, checkpoints {steps} are good, "
            f"{time.monotonic() - begin:.1f} s"
        )
        assert max(steps, default=0) >= before, "a checkpoint was lost"
        before = max(steps, default=0)
        assert statuses in ([0, 0], [KILLED, KILLED]), ranks.log()
        if before == 12:  # all is saved: begin another one
            check_goes_on(start, undisturbed, run)
            run, before = tmp_path / f"run-{number + 1}", 0
    check_goes_on(start, undisturbed, run)


@pytest.mark.parametrize("rank", [None, 1])
def test_sigterm_saves_once_and_all_ranks_say_resumable(start, tmp_path, undisturbed, rank):
    run, mark = tmp_path / "run", tmp_path / "mark"
    ranks = start(run, hooks=at_call("hold", call="write_tensors", number=1, at_rank=0, path=str(mark)))
    wait_for(mark)  # in the middle of training, beside which it saves
    ranks.send(signal.SIGTERM, rank)
    mark.unlink()
    begin = time.monotonic()
    assert ranks.wait(30) == [75, 75], ranks.log()
    print(f"ended in {time.monotonic() - begin:.1f} s")
    status = json.loads((run / "status.json").read_text())
    assert (status["status"], status["exit_status"]) == ("stopped", 75)
    assert good_steps(run) == sorted({*range(3, status["step"], 3), status["step"]})
    check_goes_on(start, undisturbed, run)


def test_signals_in_the_middle_of_a_save_do_no_harm(start, tmp_path, undisturbed):
    run, mark = tmp_path / "run", tmp_path / "mark"
    ranks = start(run, hooks=at_call("hold", call="rename", number=2, at_rank=0, path=str(mark)))
    wait_for(mark)
    assert good_steps(run) == [3] and list((run / "checkpoints").glob(".tmp-*"))
    for rank in (0, 1, 1, 0):
        ranks.send(signal.SIGUSR1, rank)
        time.sleep(0.05)
    mark.unlink()
    assert ranks.wait(30) == [75, 75], ranks.log()
    step = json.loads((run / "status.json").read_text())["step"]
    assert good_steps(run) == sorted({*range(3, step, 3), step})  # those of the period, and the one asked for
    check_goes_on(start, undisturbed, run)


def test_a_save_that_takes_longer_than_the_grace_time(start, tmp_path, undisturbed):
    run, mark = tmp_path / "run", tmp_path / "mark"
    ranks = start(run, hooks=at_call("hold", call="fsync", number=10, at_rank=0, path=str(mark)))
    wait_for(mark)
    ranks.send(signal.SIGTERM)
    time.sleep(1)
    assert ranks.is_running()
    assert ranks.kill() == [KILLED, KILLED]
    mark.unlink()
    assert good_steps(run) == [3]
    check_goes_on(start, undisturbed, run)
