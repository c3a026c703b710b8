"""Runs that are killed at any moment, started again and again, or started twice."""

from __future__ import annotations

import json
import shutil
import signal
import time
from pathlib import Path

import pytest

from tests.fault.test_saving import KILLED, check_goes_on, wait_for
from tests.helpers.rank_helpers import good_steps, losses, metric_lines, newest, state_hash

pytestmark = [pytest.mark.slow, pytest.mark.launches, pytest.mark.timeout(1200)]
MOMENTS = "tests.fault.moments"
LEAK_BYTES = 8 << 20  # of a process that trained and saved 30 steps more


def test_killed_at_random_moments_of_a_run(start, tmp_path, undisturbed, repeat):
    """At every ZeRO stage in turn: all ranks or one, in a random step or at a random time of the start."""
    runs: dict[int, Path] = {}
    for number in repeat(5, 20):
        stage = number % 4
        run = runs.setdefault(stage, tmp_path / f"stage-{stage}-{number}")
        begin, done = time.monotonic(), max(good_steps(run), default=0)
        step, after = repeat.random.randint(done + 1, 12), repeat.random.uniform(0, 0.05)
        if repeat.random.random() < 0.25:  # in the start, where nobody but a launcher ends the rank that is left
            moment = repeat.random.uniform(0, 1.5)
            ranks = start(run, f"parallel.zero_stage={stage}")
            time.sleep(moment)
            ranks.send(signal.SIGKILL)
            where = f"all, {moment:.2f} s after the start"
        else:
            action, rank = repeat.random.choice(["kill", "kill_all"]), repeat.random.randrange(2)
            details = {"action": action, "step": step, "at_rank": rank, "after": after}
            ranks = start(run, f"parallel.zero_stage={stage}", hooks=[(f"{MOMENTS}:at_step", details)])
            where = f"{f'rank {rank}' if action == 'kill' else 'all'}, step {step} + {1000 * after:.0f} ms"
        statuses = ranks.wait(30)
        repeat.done(f"ZeRO {stage}, {where}: {statuses}, {time.monotonic() - begin:.1f} s")
        assert statuses == [0, 0] or KILLED in statuses, ranks.log()
        if max(good_steps(run), default=0) == 12:  # all is saved: the next one begins another run
            check_goes_on(start, undisturbed, runs.pop(stage), f"parallel.zero_stage={stage}")
    for stage, run in runs.items():
        check_goes_on(start, undisturbed, run, f"parallel.zero_stage={stage}")


def test_restarts_leave_nothing_behind(start, tmp_path, repeat):
    """Every start does one step, is asked to stop, and saves."""
    run, path = tmp_path / "run", tmp_path / "held"
    found = []
    for number in (numbers := repeat(5, 50)):
        begin = time.monotonic()
        hooks = [(f"{MOMENTS}:at_step", {"action": "stop", "step": number + 1, "at_rank": number % 2}),
                 (f"{MOMENTS}:measure", {"path": str(path), "steps": [number + 1]})]  # fmt: skip
        overrides = [f"train.num_steps={len(numbers) + 2}", "checkpoint={every_steps: 0, keep_last: 2}"]
        ranks = start(run, *overrides, hooks=hooks)
        assert ranks.wait(30) == [75, 75], ranks.log()
        files = sorted(file.name for file in run.rglob("*"))
        held = [json.loads((tmp_path / f"held-{rank}").read_text().splitlines()[-1]) for rank in (0, 1)]
        found.append({"files": len(files), "descriptors": held[0]["descriptors"],
                      "descriptors of rank 1": held[1]["descriptors"], "threads": held[0]["threads"]})  # fmt: skip
        mib = held[0]["resident_bytes"] / 2**20
        repeat.done(f"{found[-1]}, {mib:.0f} MiB resident, {time.monotonic() - begin:.1f} s")
        assert start.processes() == []
    assert good_steps(run)[-1] == len(losses(run)) == len(numbers)
    assert found[2:] == found[2:3] * len(found[2:])  # from the third on two checkpoints are there
    resident = [json.loads(line)["resident_bytes"] for line in (tmp_path / "held-0").read_text().splitlines()]
    assert resident[-1] < resident[2] + LEAK_BYTES


def test_saving_every_step_holds_nothing_more(start, tmp_path):
    hooks = [(f"{MOMENTS}:measure", {"path": str(tmp_path / "held"), "steps": [10, 40]})]
    overrides = ["train.num_steps=41", "checkpoint={every_steps: 1, keep_last: 2}", "log.tensorboard=true"]
    ranks = start(tmp_path / "run", *overrides, hooks=hooks)
    assert ranks.wait() == [0, 0], ranks.log()
    for rank in (0, 1):
        early, late = map(json.loads, (tmp_path / f"held-{rank}").read_text().splitlines())
        assert late["descriptors"] == early["descriptors"]
        assert late["threads"] <= early["threads"] + 2  # a library may start one late; a leak is one a save: 30
        assert late["resident_bytes"] < early["resident_bytes"] + LEAK_BYTES


def test_one_job_a_run_folder(start, tmp_path, undisturbed):
    """The second is refused and the first does not notice; the lock of a job that was killed is free at once."""
    run, mark = tmp_path / "run", tmp_path / "mark"
    first = start(run, hooks=[(f"{MOMENTS}:at_step", {"action": "hold", "step": 5, "at_rank": 0, "path": str(mark)})])
    wait_for(mark)
    before = (run / "status.json").read_bytes(), (run / "config.yaml").read_bytes()
    second = start(run, "optim.lr=1", log=tmp_path / "second")
    assert second.wait() == [2, 2]
    assert second.log() == (
        f"error: run.dir is {run}; expected a folder that no other job is training in (see its status.json). Wait for "
        "that job, or use another run.dir.\n"
    )
    assert ((run / "status.json").read_bytes(), (run / "config.yaml").read_bytes()) == before
    assert first.kill() == [KILLED, KILLED]
    mark.unlink()
    assert (run / ".lock").exists()
    start.finish(run)
    assert (state_hash(newest(run)), losses(run)) == undisturbed()


def test_another_config_is_refused_and_shown(start, tmp_path, tiny_config):
    run = tmp_path / "run"
    start.finish(run, "train.num_steps=3")
    config, before = (run / "config.yaml").read_bytes(), losses(run)
    shutil.copy(tiny_config.parent / "tokenizer.model", tmp_path / "other.model")
    for number, (override, shown) in enumerate({
        "optim.lr=0.001": "optim.lr: 0.003 in the run folder, 0.001 now",
        "run.seed=8": "run.seed: 7 in the run folder, 8 now",
        "data.shuffle_window_shards=3": "data.shuffle_window_shards: 16 in the run folder, 3 now",
        f"tokenizer.model={tmp_path}/other.model": "tokenizer.model: ",
        "model.dim=64": "model.dim: 32 in the run folder, 64 now",
    }.items()):  # fmt: skip
        ranks = start(run, override, log=tmp_path / f"log-{number}")
        assert ranks.wait() == [2, 2] and shown in ranks.log(), ranks.log()
        assert ranks.log().startswith(f"error: {run}: belongs to another config; expected the same one:\n")
        assert ("run.allow_changes" in ranks.log()) == (not override.startswith(("run.", "data.", "model.")))
        assert (run / "config.yaml").read_bytes() == config and losses(run) == before
    start.finish(run, "optim.lr=0.001", "run.allow_changes=[optim.lr]")
    assert [line["lr"] for line in metric_lines(run) if "loss" in line][2:4] == pytest.approx([0.003, 0.001], rel=0.1)


def test_shards_that_changed_between_runs_are_named_at_the_start(start, tmp_path, tiny_config):
    shards = tmp_path / "shards"
    shutil.copytree(tiny_config.parent / "shards", shards)
    overrides = [f"data.sources=[{{name: code, shards: {shards}/code, weight: 3}}, {{name: prose, shards: {shards}/prose}}]",
                 "train.num_steps=3"]  # fmt: skip
    start.finish(tmp_path / "old", *overrides)
    first = shards / "code/train-000000.tar"
    content = first.read_bytes()

    def refused(run: str) -> str:
        ranks = start(tmp_path / run, *overrides, log=tmp_path / f"log-{len(list(tmp_path.iterdir()))}")
        assert ranks.wait() in ([1, 1], [2, 2]) and "Traceback" not in ranks.log(), ranks.log()
        assert ranks.log().startswith("error: ") and ranks.log().count("\n") == 1
        return ranks.log()

    first.write_bytes(content[:-1024])  # at the end of its last member, where a tar reader misses nothing
    assert f"train-000000.tar: size is {len(content) - 1024} bytes; expected {len(content)}, as" in refused("cut")
    first.unlink()
    assert "train-000000.tar is missing" in refused("missing")
    shutil.rmtree(shards / "code")  # another corpus, whole, in its place
    shutil.copytree(shards / "prose", shards / "code")
    overrides[-1] = "train.num_steps=6"
    assert "manifest of code was " in refused("old")
