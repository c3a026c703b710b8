"""Weights & Biases: what a run writes offline, one run a folder, and trouble that costs no training."""

from __future__ import annotations

import importlib.util
import json
import re
import struct
from pathlib import Path

import pytest

from pretrain.errors import ConfigError
from pretrain.options.run_options import LogSection
from pretrain.training.metrics import MetricLog
from pretrain.training.tracking import Tracker, check_tracking
from tests.helpers.rank_helpers import losses, metric_lines, run_cases, run_command
from tests.training.test_metrics import step_metrics

BLOCK_BYTES = 32768


def records(path: Path):
    """Read a `.wandb` file: LevelDB's log format after a header of 7 bytes, each record a protobuf message."""
    from wandb.proto.wandb_internal_pb2 import Record

    content, at, parts = path.read_bytes(), 7, []
    while at + 7 <= len(content):
        if BLOCK_BYTES - at % BLOCK_BYTES < 7:  # the rest of a block that holds no header is padding
            at += BLOCK_BYTES - at % BLOCK_BYTES
            continue
        length, kind = struct.unpack_from("<HB", content, at + 4)
        parts.append(content[at + 7 : at + 7 + length])
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            record = Record()
            record.ParseFromString(b"".join(parts))
            yield record
            parts = []


def history(folder: Path):
    """All values that the starts of a run wrote: {step: {key: value}}, and the run's id, project, name and config."""
    values: dict[int, dict] = {}
    about = []
    for path in sorted((folder / "wandb").glob("offline-run-*/*.wandb")):
        for record in records(path):
            if record.WhichOneof("record_type") == "run":
                config = {item.key: json.loads(item.value_json) for item in record.run.config.update}
                about.append((record.run.run_id, record.run.project, record.run.display_name, config))
            if record.WhichOneof("record_type") == "history":
                line = {
                    item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in record.history.item
                }
                values.setdefault(line["_step"], {}).update(line)
    return values, about


@pytest.mark.launches
@pytest.mark.timeout(600)
def test_a_run_offline_has_the_scalars_of_tensorboard_under_one_id(tiny_config, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    common = [f"run.dir={tmp_path}/run", "log={tensorboard: true, wandb: my-project}", "train.num_steps=6",
              "eval={every_steps: 3, max_rows: 4, sample_every_steps: 3, sample_tokens: 4}", "train.micro_batch_size=8"]  # fmt: skip
    cases = [{"overrides": common, "signal_at": 4}, {"overrides": common}]
    assert run_cases(tiny_config, cases, 2, tmp_path / "ranks") == ["stopped", "done"]
    run = tmp_path / "run"
    values, about = history(run)
    assert len(list((run / "wandb").glob("offline-run-*"))) == 2  # rank 0 of each start
    identity = (run / "wandb-id.txt").read_text().strip()
    assert {(one[0], one[1], one[2]) for one in about} == {(identity, "my-project", "run")}
    assert about[0][3]["optim"]["lr"] == 3e-3 and about[0][3]["train"]["num_steps"] == 6
    assert sorted(step for step in values if "train/loss" in values[step]) == [1, 2, 3, 4, 5, 6]
    assert [values[step]["train/loss"] for step in range(1, 7)] == losses(run)

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "tensorboard")).Reload()
    scalars = set(events.Tags()["scalars"])
    ours = {key for line in values.values() for key in line if not key.startswith(("_", "event/", "samples"))}
    assert ours == scalars and {"train/loss", "train/lr", "eval/loss", "eval/bits_per_byte"} <= ours
    assert [event.step for event in events.Tensors("samples/text_summary")] == [3, 6]
    assert (
        values[3]["samples._type"] == "html-file"
        if "samples._type" in values[3]
        else values[3]["samples"]["_type"] == "html-file"
    )
    assert values[6]["event/done"] == "trained 6 steps"


@pytest.mark.launches
@pytest.mark.timeout(600)
def test_a_site_that_cannot_be_reached_costs_half_a_minute_at_most(tiny_config, tmp_path, monkeypatch):
    import wandb

    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")  # nobody listens there
    monkeypatch.setenv("WANDB_API_KEY", "a" * 40)
    monkeypatch.setattr("pretrain.training.tracking.START_SECONDS", 3)
    told = []
    tracker = Tracker("p", tmp_path, {"a": 1}, lambda *event: told.append(event))
    assert told[0][0] == "wandb_unreachable" and "`wandb sync` sends it" in told[0][1]
    assert tracker.log({"train/loss": 2.0}, 1) is None
    assert tracker.log_text("samples", "a < b", 1) is None
    tracker.close(failed=False)
    wandb.teardown()  # the library's own process
    values, about = history(tmp_path)
    assert values[1]["train/loss"] == 2.0 and about[0][0] == (tmp_path / "wandb-id.txt").read_text().strip()
    [page] = (tmp_path / "wandb").glob("offline-run-*/files/media/html/*.html")
    assert "<pre>a &lt; b</pre>" in page.read_text()


def test_without_the_library_nothing_starts(monkeypatch):
    check_tracking(None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    check_tracking(None)
    with pytest.raises(
        ConfigError,
        match=r"log.wandb is mine; expected the library wandb, which is not installed. Install it by pip install 'longhaul\[wandb\]'",
    ):
        check_tracking("mine")


@pytest.mark.launches
def test_without_a_login_nothing_starts(tmp_path):
    script = "import sys; from pathlib import Path; from pretrain.training.tracking import Tracker; Tracker('mine', Path(sys.argv[1]), {}, print)"
    empty = {"HOME": str(tmp_path), "NETRC": str(tmp_path / "netrc"), "WANDB_API_KEY": "", "WANDB_MODE": "online"}
    done = run_command("-c", script, tmp_path, **empty)
    assert re.search(
        r"ConfigError: log.wandb is mine; expected a login .* Run `wandb login` or set WANDB_API_KEY; WANDB_MODE=offline",
        done.stderr,
    )


class FakeRun:
    """A run of the library, resumed where step 5 is the next."""

    url, step = None, 5

    def __init__(self):
        self.lines, self.broken, self.finished = [], False, None

    def log(self, values, step):
        if self.broken:
            raise ConnectionResetError("Connection lost")
        self.lines.append((step, values))

    def finish(self, exit_code):
        self.finished = exit_code


@pytest.fixture
def fake(monkeypatch):
    import wandb

    run = FakeRun()
    run.asked = []
    monkeypatch.setattr(wandb, "init", lambda **about: run.asked.append(about) or run)
    return run


def make_log(folder, tracker):
    return MetricLog(folder, LogSection(tensorboard=False), num_steps=10, tokens_per_step=1000, world_size=1,
                     flops_per_token={32: (1.0, 1.0)}, peak_flops=None, first_step=0, attempt=1, tracker=tracker)  # fmt: skip


def test_steps_that_the_site_has_are_not_sent_again(tmp_path, fake):
    (tmp_path / "runs").mkdir()
    log = make_log(tmp_path, Tracker("p", tmp_path / "runs", {}, print))
    for step in (3, 4, 5, 6):
        log.step(step_metrics(step))
    log.close()
    assert [step for step, _ in fake.lines] == [5, 6] and fake.finished == 0
    assert (fake.asked[0]["resume"], fake.asked[0]["name"]) == ("allow", "runs")
    again = Tracker("p", tmp_path / "runs", {}, print)
    again.close(failed=True)
    assert fake.asked[0]["id"] == fake.asked[1]["id"] and fake.finished == 1


def test_a_library_that_breaks_costs_its_record_only(tmp_path, fake, capsys):
    log = make_log(tmp_path, Tracker("p", tmp_path, {}, print))
    log.step(step_metrics(5))
    fake.broken = True
    for step in (6, 7):
        log.step(step_metrics(step))
    log.close(failed=True)
    lines = metric_lines(tmp_path)
    assert [line["step"] for line in lines if "loss" in line] == [5, 6, 7]
    assert [line["message"] for line in lines if line.get("event") == "wandb_failed"] == [
        "ConnectionResetError: Connection lost. Weights & Biases gets nothing more from this start."
    ]
    assert fake.finished is None and len(fake.lines) == 1
