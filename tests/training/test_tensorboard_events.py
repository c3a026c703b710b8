"""What TensorBoard makes of a run: its own plugin's table of hyper-parameters, and its page in a browser."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import time
import urllib.request
from contextlib import suppress
from pathlib import Path

import pytest

from pretrain.training.tensorboard_events import hyper_parameters
from tests.helpers.rank_helpers import free_port
from tests.training.test_metrics import make_log, step_metrics

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def test_short_steps_are_written_together_and_at_the_latest_before_a_save(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    def steps_seen() -> list[int]:
        events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
        return [one.step for one in events.Scalars("train/loss")] if "train/loss" in events.Tags()["scalars"] else []

    log = make_log(tmp_path)
    log.step(step_metrics(1))
    log.step(step_metrics(2))
    assert steps_seen() == []
    log.flush()  # as `saving.save` does
    assert steps_seen() == [1, 2]
    log.step(step_metrics(3))
    log._events._written_at -= 1.0
    log.step(step_metrics(4))
    assert steps_seen() == [1, 2, 3, 4]
    log.close()


HYPER = {"optim.lr": 3e-4, "optim.name": "adamw", "train.deterministic": True, "model.dim": 64}


def sessions_of(folder):
    """What TensorBoard's own plugin shows of the runs below a folder, by run."""
    from tensorboard.backend.event_processing.data_provider import MultiplexerDataProvider
    from tensorboard.backend.event_processing.plugin_event_multiplexer import EventMultiplexer
    from tensorboard.context import RequestContext
    from tensorboard.plugins.base_plugin import TBContext
    from tensorboard.plugins.hparams import api_pb2, backend_context, list_session_groups

    multiplexer = EventMultiplexer().AddRunsFromDirectory(str(folder)).Reload()
    provider = MultiplexerDataProvider(multiplexer, str(folder))
    context = backend_context.Context(TBContext(data_provider=provider, multiplexer=multiplexer))
    empty = RequestContext()
    tags = context.hparams_metadata(empty, "")
    experiment = context.experiment_from_metadata(
        empty, "", True, tags, context.hparams_from_data_provider(empty, "", None)
    )
    request = api_pb2.ListSessionGroupsRequest(
        start_index=0, slice_size=10, include_metrics=True, allowed_statuses=api_pb2.Status.values(),
        col_params=[
            *(api_pb2.ColParams(hparam=info.name) for info in experiment.hparam_infos),
            *(api_pb2.ColParams(metric=info.name) for info in experiment.metric_infos),
        ],
    )  # fmt: skip
    groups = list_session_groups.Handler(empty, context, "", request).run().session_groups
    found = {}
    for group in groups:
        assert len(group.sessions) == 1
        values = {name: getattr(value, value.WhichOneof("kind")) for name, value in group.hparams.items()}
        figures = {metric.name.tag: metric.value for metric in group.metric_values}
        found[group.sessions[0].name] = api_pb2.Status.Name(group.sessions[0].status), values, figures
    return found


def test_the_hparams_tab_compares_runs_and_a_resumed_one_is_one_session(tmp_path):
    for name, lr in (("slow", 1e-4), ("quick", 3e-4)):
        log = make_log(tmp_path / name, hyper_parameters=HYPER | {"optim.lr": lr})
        log.step(step_metrics(1, loss=9.0))
        if name == "quick":
            log.event(1, "stopped", "a signal")
            log.close()
            assert sessions_of(tmp_path)["quick/tensorboard"][0] == "STATUS_UNKNOWN"  # it goes on
            log = make_log(tmp_path / name, first_step=1, attempt=2, hyper_parameters=HYPER | {"optim.lr": lr})
        log.step(step_metrics(2, loss=4.0))
        log.evaluation(2, 2000, 3.5, 33.0, 1.7)
        if name == "quick":
            log.event(2, "done", "trained 2 steps")
        log.close(failed=name == "slow")
    found = sessions_of(tmp_path)
    assert set(found) == {"slow/tensorboard", "quick/tensorboard"}
    status, values, figures = found["quick/tensorboard"]
    assert status == "STATUS_SUCCESS" and found["slow/tensorboard"][0] == "STATUS_FAILURE"
    assert values == HYPER and found["slow/tensorboard"][1] == HYPER | {"optim.lr": 1e-4}
    assert figures == {"eval/loss": 3.5, "eval/bits_per_byte": pytest.approx(1.7), "train/loss": 4.0,
                       "train/tokens": 2000.0, "perf/tokens_per_second": 2000.0}  # fmt: skip


def test_hyper_parameters_are_the_options_that_are_set(tiny_config):
    from pretrain.options.settings import load_config

    config = load_config(tiny_config, ["optim.betas=[0.8, 0.9]"]).model_dump(mode="json")
    found = hyper_parameters(config, 4)
    assert found["optim.betas"] == "0.8, 0.9" and found["ranks"] == 4 and found["train.num_steps"] > 0
    assert found["data.seq_len"] == 32 and found["run.seed"] == 7
    assert not {"run.dir", "log.every_steps", "data.val_fraction", "resume.from"} & set(found)
    assert all(isinstance(value, (bool, int, float, str)) for value in found.values())


@pytest.mark.slow
@pytest.mark.launches
@pytest.mark.skipif(BROWSER is None, reason="no Chromium is installed (Debian: apt-get install chromium)")
def test_tensorboard_shows_a_run_in_a_browser(tmp_path):
    log = make_log(tmp_path / "run", hyper_parameters=HYPER)
    for step in range(1, 11):
        log.step(step_metrics(step, loss=3.25 - step / 100))
    log.evaluation(10, 10000, 2.875, 17.7, 1.1)
    log.event(10, "done", "trained 10 steps")
    log.close()
    port = free_port()
    command = [Path(sys.executable).with_name("tensorboard"), "--logdir", tmp_path, "--port", str(port)]
    server = subprocess.Popen(
        [*map(str, command), "--load_fast=false"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        listing = f"http://localhost:{port}/data/plugin/scalars/tags"
        give_up = time.monotonic() + 60
        found = b""
        while b"train/loss" not in found:
            assert time.monotonic() < give_up and server.poll() is None, found
            time.sleep(0.2)
            with suppress(OSError), urllib.request.urlopen(listing) as answer:
                found = answer.read()
        num_lines, give_up = 0, time.monotonic() + 120
        while not num_lines and time.monotonic() < give_up:  # on a busy machine the page may be read too early
            curves, num_lines = page_of(f"http://localhost:{port}/?tagFilter=loss#timeseries", tmp_path / "profile")
    finally:
        server.terminate()
        server.wait(30)
    # with the value at the last step, which the page reads from the curve
    assert re.search(r" train /loss .* run/tensorboard [0-9.]+ 3\.15 10 ", curves), curves
    assert num_lines >= 1, "the curve of train/loss is not drawn"
    assert re.search(r" eval /loss .* run/tensorboard 2\.875 2\.875 10 ", curves), curves


def page_of(address: str, profile: Path) -> tuple[str, int]:
    """What a page says in Chromium once its scripts have done their work, and how many lines of ten points it draws."""
    flags = ["--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={profile}", "--window-size=1400,2000"]
    # without WebGL TensorBoard draws by elements of the page
    command = [BROWSER, *flags, "--disable-3d-apis", "--virtual-time-budget=60000", "--dump-dom", address]
    page = subprocess.run(command, capture_output=True, text=True, timeout=120).stdout
    num_lines = len(re.findall(r'<path [^>]*d="M[0-9.,-]+(?:L[0-9.,-]+){9}"', page))
    page = re.sub(r"<(style|script|svg)\b.*?</\1>", " ", page, flags=re.DOTALL)
    return re.sub(r"\s+", " ", re.sub(r"<[^>]*>", " ", page)), num_lines
