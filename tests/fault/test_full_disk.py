"""Disks without space or inodes, or read-only: saves fail on all ranks, training goes on, and nothing is lost."""

from __future__ import annotations

import json

import pytest

from pretrain.checkpoints.checkpoint_files import list_steps
from tests.fault.test_saving import KILLED, at_call, check_goes_on, wait_for
from tests.helpers.rank_helpers import good_steps, losses, metric_lines, newest, state_hash
from tests.helpers.small_disk import remount, small_disk

pytestmark = [pytest.mark.slow, pytest.mark.launches]
SPACE = "Free space or inodes there, or keep fewer checkpoints (checkpoint.keep_last, keep_every)."


def failed_saves(run) -> dict[int, str]:
    return {line["saved_step"]: line["message"] for line in metric_lines(run) if line.get("event") == "save_failed"}


def check_failed_at_the_end(ranks, run) -> None:
    """It trained to the end, and the last save's failure is the run's; on all ranks, and said once."""
    assert ranks.wait() == [1, 1], ranks.log()
    assert len(losses(run)) == 12 and "Traceback" not in ranks.log()
    assert ranks.log().count(f"error: {run}/checkpoints/step-00000012: could not be written: ") == 1
    status = json.loads((run / "status.json").read_text())
    assert (status["status"], status["step"]) == ("failed", 12)


@pytest.mark.parametrize("kibibytes, inodes, reason", [(900, None, "bytes, and "), (9000, 9, "inodes, and ")])
def test_a_disk_for_one_checkpoint(start, tmp_path, undisturbed, kibibytes, inodes, reason):
    run = tmp_path / "run"
    with small_disk(run / "checkpoints", kibibytes, inodes) as disk:
        check_failed_at_the_end(start(run), run)
        assert good_steps(run) == [3] and [path.name for path in disk.iterdir()] == ["step-00000003"]
        failed = failed_saves(run)
        assert list(failed) == [6, 9] and all(reason in text and SPACE in text for text in failed.values()), failed
        remount(disk, "size=9m,nr_inodes=100")
        check_goes_on(start, undisturbed, run)


def test_a_disk_that_fills_while_a_checkpoint_is_written(start, tmp_path, undisturbed):
    """Which no check before foresees; what was written is removed at once."""
    run = tmp_path / "run"
    with small_disk(run / "checkpoints", 9000) as disk:
        hook = at_call("fill", call="write_tensors", number=2, at_rank=1, path=str(disk / "others"))
        check_failed_at_the_end(start(run, hooks=hook), run)
        assert good_steps(run) == [3]
        assert sorted(path.name for path in disk.iterdir()) == ["others", "step-00000003"]
        assert "No space left on device" in failed_saves(run)[6] and SPACE in failed_saves(run)[6]
        (disk / "others").unlink()
        check_goes_on(start, undisturbed, run)


def test_one_ranks_disk_is_full(start, tmp_path, undisturbed):
    run = tmp_path / "run"
    ranks = start(run, hooks=at_call("no_space", call="write_tensors", number=2, at_rank=1))
    assert ranks.wait() == [0, 0], ranks.log()
    assert list(failed_saves(run)) == [6] and good_steps(run) == [3, 9, 12]
    assert (state_hash(newest(run)), losses(run)) == undisturbed()


def test_a_disk_that_becomes_read_only(start, tmp_path, undisturbed):
    """One try a save, no more."""
    run, marks = tmp_path / "run", [tmp_path / "mark-0", tmp_path / "mark-1"]
    hooks = [
        at_call("hold", call="write_tensors", number=2, at_rank=n, path=str(mark))[0] for n, mark in enumerate(marks)
    ]
    with small_disk(run / "checkpoints", 9000) as disk:
        ranks = start(run, hooks=hooks)
        for mark in marks:  # where no file is open, as a remount wants it
            wait_for(mark)
        remount(disk, "ro")
        for mark in marks:
            mark.unlink()
        check_failed_at_the_end(ranks, run)
        failed = failed_saves(run)
        assert list(failed) == [6, 9], failed
        for text in failed.values():
            assert "Read-only file system" in text and "Have the file system mounted writable again" in text
        remount(disk, "rw")
        assert good_steps(run) == [3]
        check_goes_on(start, undisturbed, run)


@pytest.mark.parametrize("stderr", ["elsewhere", "on the same disk"])
def test_metrics_log_and_status_wait_for_a_full_disk(start, tmp_path, undisturbed, stderr):
    run = tmp_path / "run"
    with small_disk(run, 9000) as disk:
        filler = {"at_rank": 0, "path": str(disk / "others")}
        hooks = [("tests.fault.moments:at_step", {"action": "fill", "step": 4} | filler),
                 ("tests.fault.moments:at_step", {"action": "free", "step": 11} | filler)]  # fmt: skip
        log = (tmp_path if stderr == "elsewhere" else disk) / "stderr"
        overrides = ["log={tensorboard: true, every_steps: 1}", "checkpoint.asynchronous=false"]
        ranks = start(run, *overrides, hooks=hooks, log=log)
        assert ranks.wait() == [0, 0], ranks.log()
        lines = metric_lines(run)
        assert [line["step"] for line in lines] == sorted(line["step"] for line in lines)  # none lost, none torn
        assert list(failed_saves(run)) == [6, 9] and list_steps(run / "checkpoints") == [3, 12]
        assert (state_hash(newest(run)), losses(run)) == undisturbed()
        text = (run / "log.txt").read_text()
        assert all(f"step {step}/12  loss" in text for step in range(1, 13)) and "save_failed" in text
        assert json.loads((run / "status.json").read_text())["status"] == "done"
        assert curve(run) == pytest.approx(losses(run), rel=1e-6)
        if stderr == "elsewhere":
            warning = f"warning: {run}/metrics.jsonl: "
            assert ranks.log().count(f"{warning}cannot be written (No space left on device)") == 1
            assert ranks.log().count(f"{warning}is written again\n") == 1
            assert "Traceback" not in ranks.log()


def curve(run) -> list[float]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "tensorboard"))
    return [event.value for event in events.Reload().Scalars("train/loss")]


def test_a_start_on_a_full_disk_says_so(start, tmp_path):
    with small_disk(tmp_path / "run", 100) as disk:
        (disk / "others").write_bytes(bytes(100 * 1024))
        ranks = start(tmp_path / "run")
        assert ranks.wait() == [2, 2]
        assert ranks.log() == (
            f"error: run.dir is {disk}; expected a folder that can be written ([Errno 28] No space left on device). "
            "Free space there, or use another run.dir.\n"
        )


def test_a_rank_that_outlives_its_job_does_not_write_into_the_next_ones_save(start, tmp_path, undisturbed):
    """As on a node that was slow to be cleaned up: rank 0 and its lock are gone, and rank 1 is still saving step 6."""
    run, old_mark, mark = tmp_path / "run", tmp_path / "old-mark", tmp_path / "mark"
    kill = at_call("kill", call="rename", number=2, at_rank=0)  # when rank 1 is done or held up: rank 0 waits for it
    hold = at_call("hold", call="replace", number=2, at_rank=1, path=str(old_mark))
    old = start(run, hooks=[*hold, *kill], log=tmp_path / "old")
    wait_for(old_mark)
    old.send(9, rank=0)
    new = start(run, hooks=at_call("hold", call="rename", number=1, at_rank=0, path=str(mark)))
    wait_for(mark)  # all of step 6 is written but its name
    old_mark.unlink()
    assert old.wait(60)[0] == KILLED
    mark.unlink()
    assert new.wait() == [0, 0], new.log()
    assert (state_hash(newest(run)), losses(run)) == undisturbed() and good_steps(run) == [3, 6, 9, 12]
    names = {"manifest.json", "rank-00000.safetensors", "rank-00001.safetensors"}
    assert {path.name for path in (run / "checkpoints/step-00000006").iterdir()} == names
