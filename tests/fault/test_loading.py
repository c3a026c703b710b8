"""Checkpoints and run folders that were damaged, changed or are in use: the newest good one, or one sentence and no step."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.helpers.data_helpers import flip_bit
from tests.helpers.rank_helpers import good_steps, losses, metric_lines, newest, state_hash

pytestmark = [pytest.mark.slow, pytest.mark.launches]
FILES = ("manifest.json", "rank-00000.safetensors", "rank-00001.safetensors")


def flip(path: Path) -> None:
    flip_bit(path, path.stat().st_size * 2 // 3)


def halve(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


DAMAGES: dict[str, tuple[Callable[[Path], None], tuple[str, ...]]] = {
    "one bit": (flip, FILES),
    "cut short": (halve, FILES[1:]),
    "empty": (lambda path: path.write_bytes(b""), FILES),
    "deleted": (Path.unlink, FILES),
    "garbage": (lambda path: path.write_text('{"sha256": 1}'), FILES[:1]),
}
CASES = [(damage, name) for damage, (_, names) in DAMAGES.items() for name in names]


@pytest.fixture(scope="module")
def finished(fork_server, tiny_config, tmp_path_factory) -> Path:
    """A run that is over, with checkpoints of steps 3, 6, 9 and 12; tests copy it."""
    from tests.fault.conftest import Starter

    folder = tmp_path_factory.mktemp("finished")
    Starter(fork_server, tiny_config, folder).finish(folder / "run")
    return folder / "run"


@pytest.fixture
def run(finished, tmp_path) -> Path:
    shutil.copytree(finished, tmp_path / "run")
    return tmp_path / "run"


def checkpoint(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"step-{step:08d}"


@pytest.mark.parametrize("damage, name", CASES, ids=[f"{name}-{damage}" for damage, name in CASES])
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_taken(start, run, undisturbed, damage, name):
    DAMAGES[damage][0](checkpoint(run, 12) / name)
    start.finish(run)
    (event,) = (line for line in metric_lines(run) if line.get("event") == "checkpoint_damaged")
    assert event["step"] == 9 and str(checkpoint(run, 12)) in event["message"]
    assert good_steps(run) == [3, 6, 9, 12]
    assert checkpoint(run, 12).with_name("step-00000012.damaged").is_dir()
    assert (state_hash(newest(run)), losses(run)) == undisturbed()


def test_the_newest_two_are_damaged(start, run, undisturbed):
    flip(checkpoint(run, 12) / FILES[1])
    halve(checkpoint(run, 9) / FILES[2])
    start.finish(run)
    events = [line["message"] for line in metric_lines(run) if line.get("event") == "checkpoint_damaged"]
    assert len(events) == 2 and "step-00000012" in events[0] and "step-00000009" in events[1]
    assert good_steps(run) == [3, 6, 9, 12]
    assert (state_hash(newest(run)), losses(run)) == undisturbed()


def test_where_none_is_good_it_never_begins_anew(start, run, tmp_path):
    """However often it is started: a batch system does it again and again."""
    before = losses(run)
    for step, name in ((3, FILES[1]), (6, FILES[0]), (9, FILES[2])):
        flip(checkpoint(run, step) / name)
    (checkpoint(run, 12) / "manifest.json").unlink()
    names = sorted(path.name for path in (run / "checkpoints").iterdir())
    for number in range(2):
        ranks = start(run, log=tmp_path / f"log-{number}")
        assert ranks.wait() == [1, 1]
        assert ranks.log().startswith(f"error: {run}/checkpoints: none of its 4 checkpoints is intact ("), ranks.log()
        assert f"{checkpoint(run, 12)}/manifest.json: is not readable" in ranks.log() and ranks.log().count("\n") == 1
    for step in (3, 6, 9, 12):  # an operator who put them away has not asked for a new beginning
        checkpoint(run, step).rename(run / f"checkpoints/step-{step:08d}.damaged")
    ranks = start(run, "optim.lr=0.001", log=tmp_path / "log-set-aside")
    assert ranks.wait() == [2, 2] and "optim.lr: 0.003 in the run folder, 0.001 now" in ranks.log()
    ranks = start(run, log=tmp_path / "log-set-aside-again")
    assert ranks.wait() == [1, 1] and "has only checkpoints that are called step-….damaged" in ranks.log()
    assert losses(run) == before and names == ["step-00000003", "step-00000006", "step-00000009", "step-00000012"]


def test_what_is_no_checkpoint_is_left_alone(start, run, undisturbed):
    folder = run / "checkpoints"
    (folder / "step-99").mkdir()
    (folder / "step-00000099.damaged").mkdir()
    (folder / "notes.txt").write_text("mine")
    (folder / "step-00000050").write_text("a file of that name")
    (folder / ".tmp-step-00000015").mkdir()
    (folder / ".tmp-step-00000015/rank-00000.safetensors").write_bytes(b"half")
    (run / "environment.json").write_text("{")
    (run / ".status.json.tmp-77").write_text("{")  # by a start that was killed while it wrote this
    with open(run / "metrics.jsonl", "ab") as file:
        file.write(b"\xff\xfe\n{")
    shutil.rmtree(checkpoint(run, 12))
    start.finish(run)
    assert (state_hash(newest(run)), losses(run)) == undisturbed()
    assert sorted(path.name for path in folder.iterdir() if path.name not in map("step-{:08d}".format, (3, 6, 9, 12))) == [
        "notes.txt", "step-00000050", "step-00000099.damaged", "step-99",
    ]  # fmt: skip
    assert (run / "environment.damaged.json").read_text() == "{"
