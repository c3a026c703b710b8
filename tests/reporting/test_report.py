"""The report of runs: every number of the page against what was recorded, and what is not as it should be."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from launch import report as command
from pretrain.errors import ConfigError
from pretrain.reporting import report as module
from pretrain.reporting import run_records, run_series
from pretrain.reporting.report import names_of, read_runs
from pretrain.reporting.report_page import MAX_EVENTS_OF_A_KIND, events_of, page_data
from pretrain.reporting.report_plots import smoothed
from pretrain.reporting.run_figures import config_differences, figure_rows, figures_of
from pretrain.reporting.run_records import parse_samples, read_metrics, read_run
from pretrain.reporting.run_series import curves, slow_steps
from tests.reporting.report_helpers import (
    BEGAN,
    CORPORA,
    PHASES,
    evaluation_line,
    lines_of,
    loss_of,
    training_line,
    write_run,
)

ROOT = Path(__file__).resolve().parents[2]


def data_of(*folders):
    runs = read_runs([str(folder) for folder in folders])
    return page_data(runs, [figures_of(run) for run in runs])


def test_figures_are_those_of_the_lines(tmp_path):
    run = read_run(write_run(tmp_path / "a"), "a")
    found = figures_of(run)
    assert (found["step"], found["num_steps"], found["tokens"], found["starts"], found["state"]) == (
        90,
        90,
        90_000,
        3,
        "done",
    )
    assert found["loss"] == pytest.approx(np.mean([loss_of(step) for step in range(1, 91)]))
    assert found["held_out"] == {"step": 90, "loss": pytest.approx(loss_of(90) + 0.2), "perplexity": pytest.approx(math.exp(loss_of(90) + 0.2)),
                                 "bits_per_byte": pytest.approx((loss_of(90) + 0.2) / 3)}  # fmt: skip
    assert found["best_held_out"]["step"] == 90
    assert found["wall_seconds"] == pytest.approx(
        90 + 100 + 5
    )  # from the first start, which took 5 s to the first step
    assert found["rank_hours"] == pytest.approx((60 * 4 + 30 * 8) / 3600)  # 4, 4 and 8 ranks
    assert (found["step_seconds"], found["tokens_per_second"], found["median_step_seconds"]) == (90, 1000, 1)
    assert found["data_wait_share"] == pytest.approx(0.01) and found["mfu"] == pytest.approx(0.4)
    assert found["phase_seconds"] == pytest.approx(PHASES) and found["clipped_steps"] == 9
    assert found["corpus_tokens"]["code"] == 27_000
    rows = dict(figure_rows([found]))
    assert rows["steps"] == ["90 of 90"] and rows["best held-out loss"] == [f"{loss_of(90) + 0.2:.4f} at step 90"]
    assert rows["waiting for data"] == ["1.0% of the time"] and rows["peak memory of rank 0"] == ["1.1 GB"]


def test_tokens_per_second_are_all_tokens_over_all_seconds(tmp_path):
    lines = [training_line(1, step_seconds=9.0, tokens_per_second=1000 / 9), training_line(2)]
    assert figures_of(read_run(write_run(tmp_path / "a", lines), "a"))["tokens_per_second"] == pytest.approx(200)


def test_curves_of_a_short_run_are_its_steps(tmp_path):
    run = read_run(write_run(tmp_path / "a"), "a")
    found = curves(run, 2000)
    assert found["width"] == 1 and found["step"] == list(range(1, 91)) and found["tokens"][-1] == 90_000
    for key in ("loss", "objective", "grad_norm", "lr", "mfu", "memory_bytes", "epoch/web", "clipped_steps"):
        assert found["series"][key] == [pytest.approx([training_line(step)[key] for step in range(1, 91)], rel=1e-5)]
    assert found["phases"]["forward"] == [0.3] * 90 and list(found["phases"]) == list(PHASES)
    assert [found["mixture"][name][40] for name in CORPORA] == [400, 300, 150, 100, 50]
    assert found["hours"][0] == pytest.approx(6 / 3600, abs=1e-5) and found["hours"][-1] == pytest.approx(
        195 / 3600, abs=1e-5
    )
    json.dumps(found, allow_nan=False)


def test_buckets_keep_what_stands_out(tmp_path):
    lines = lines_of(
        90, step_47={"loss": 11.0, "step_seconds": 8.0}, step_70={"grad_norm": 0.001}, step_72={"loss": None}
    )
    run = read_run(write_run(tmp_path / "a", lines), "a")
    found = curves(run, 20)
    assert found["width"] == 5 and found["step"] == list(range(5, 91, 5)) and set(found["steps"]) == {5}
    mean, least, greatest = found["series"]["loss"]
    for number in range(18):
        own = [11.0 if step == 47 else loss_of(step) for step in range(5 * number + 1, 5 * number + 6) if step != 72]
        assert (mean[number], least[number], greatest[number]) == pytest.approx(
            (np.mean(own), min(own), max(own)), rel=1e-5
        )
    assert found["series"]["grad_norm"][1][13] == 0.001 and found["series"]["step_seconds"][2][9] == 8
    assert sum(found["mixture"]["books"]) == 150 * 90 and found["series"]["epoch/code"] == [
        pytest.approx([step / 50 for step in found["step"]])
    ]


def test_a_long_run_is_short(tmp_path):
    steps = np.arange(1, 1_000_001, dtype=float)
    run = read_run(write_run(tmp_path / "a", []), "a")
    loss = np.random.default_rng(1).normal(2.0, 0.1, len(steps))
    loss[654_320] = 9.87654
    run.metrics.columns = {"step": steps, "tokens": steps * 4096, "timestamp": BEGAN + steps, "loss": loss, "step_seconds": np.ones(len(steps))}  # fmt: skip
    found = curves(run, run_series.num_buckets(1))
    assert found["width"] == 500 and len(found["step"]) == 2000 and len(json.dumps(found)) < 300_000
    assert max(found["series"]["loss"][2]) == 9.87654 and found["series"]["loss"][2].index(9.87654) == 654_320 // 500
    assert min(found["series"]["loss"][1]) == pytest.approx(loss.min(), rel=1e-5)


def test_every_part_of_a_run_is_in_the_page(tmp_path):
    data = data_of(write_run(tmp_path / "a"))
    [run] = data["runs"]
    assert run["evals"]["step"] == [30, 30, 60, 60, 90, 90]
    held_out = [one for one in run["evals"]["values"]["code/loss"] if one is not None]
    assert held_out == pytest.approx([evaluation_line(step)["eval/code/loss"] for step in (30, 60, 90)], rel=1e-5)
    assert [one for one in run["evals"]["values"]["task/arc/acc"] if one is not None] == [0.3, 0.6, 0.9]
    assert [(step, kind) for step, kind, _ in run["events"] if kind in ("start", "checkpoint")] == [
        (0, "start"), (30, "start"), (60, "start"), (60, "checkpoint"), (90, "checkpoint"),
    ]  # fmt: skip
    assert run["start_parts"][1] == [31, {"imports": 4.0, "first step": 33.0}, {"imports": 3.0}]
    assert run["phase_seconds"] == pytest.approx(PHASES) and run["step_seconds"] == 90
    assert run["samples"][1] == [30, "it's <b>\n", " text of\n\nstep 30", "length", 0] and len(run["samples"]) == 4
    assert [start["host"] for start in run["starts"]] == ["node0", "node1", "node2"]
    assert run["kept"] == [{"step": 90, "name": "held-out", "numbers": {"loss": 2.5, "sources.web.loss": 2.25}}]
    assert "num_steps: 90" in run["config"] and run["log"].endswith("step 90/90") and run["notes"] == []
    assert data["differences"] == []


def test_runs_beside_each_other(tmp_path):
    first = write_run(tmp_path / "x/run")
    second = write_run(tmp_path / "y/run", lines_of(40), lr=5e-4, num_steps=40, web_weight=0.7)
    data = data_of(first, second)
    assert [run["name"] for run in data["runs"]] == ["x/run", "y/run"]
    assert data["differences"] == [
        ("data.sources.web.weight", ["0.4", "0.7"]), ("optim.lr", ["0.001", "0.0005"]), ("train.num_steps", ["90", "40"]),
    ]  # fmt: skip
    assert dict(data["figures"])["steps"] == ["90 of 90", "40 of 40"]
    assert len(data["runs"][1]["curves"]["step"]) == 40
    (second / "config.yaml").write_text("model: {no_such_option: 1}\n", encoding="utf-8")
    later = data_of(first, second)
    assert later["differences"] == [] and "of another version" in later["runs"][1]["notes"][0]


def test_names_tell_runs_apart():
    assert names_of([Path("/a/b/run")]) == ["run"]
    assert names_of([Path("/a/b/run"), Path("/c/b/run"), Path("/c/b/other")]) == ["a/b/run", "c/b/run", "c/b/other"]


def test_options_that_only_one_run_has():
    class Of:
        def __init__(self, **tree):
            self.tree = tree

        def model_dump(self, **_):
            return self.tree

    sources = [[{"name": "s", "weight": 1}, {"name": "t", "weight": 2}], [{"name": "t", "weight": 3}]]
    found = config_differences([Of(sources=one) for one in sources])
    assert found == [("sources.s", ["{weight: 1}", "–"]), ("sources.t.weight", ["2", "3"])]
    configs = [
        Of(a={"b": 1, "same": "x"}, run={"dir": "p"}),
        Of(a={"b": None, "same": "x", "c": [1, "y" * 500]}, run={"dir": "q"}),
        None,
    ]
    found = dict(config_differences(configs))
    assert (
        found["a.b"] == ["1", "null", "–"]
        and found["a.c"][0] == "–"
        and len(found["a.c"][1]) == 400
        and len(found) == 2
    )


def test_a_file_that_is_being_written(tmp_path):
    path = write_run(tmp_path / "a") / "metrics.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    damaged = [b"not JSON\n", b"[1]\n", b'{"step": "7"}\n', b'{"loss": 1}\n']
    path.write_bytes(b"".join(lines[:5] + damaged + lines[5:]) + lines[-3][:40])
    run = read_run(tmp_path / "a", "a")
    assert run.metrics.num_steps == 90 and run.metrics.is_cut and run.metrics.num_unreadable == 4
    assert run.notes == [
        "4 lines of metrics.jsonl cannot be read, and are left out.",
        "The last line of metrics.jsonl is not whole (it was being written), and is left out.",
    ]


def test_a_step_that_is_there_twice_counts_once(tmp_path):
    lines = [training_line(step) for step in (1, 2, 3)] + [
        training_line(2, loss=7.0, attempt=2),
        training_line(3, loss=6.0, attempt=2),
    ]
    lines += [evaluation_line(2), evaluation_line(2) | {"eval/loss": 1.5}]
    metrics = read_run(write_run(tmp_path / "a", lines), "a").metrics
    assert metrics.columns["step"].tolist() == [1, 2, 3] and metrics.columns["loss"].tolist() == [loss_of(1), 7.0, 6.0]
    assert [line["eval/loss"] for line in metrics.evaluations] == [1.5]


def test_values_that_are_no_numbers(tmp_path):
    path = write_run(tmp_path / "a") / "metrics.jsonl"
    text = path.read_text(encoding="utf-8")
    odd = {
        "loss": math.nan,
        "grad_norm": math.inf,
        "lr": None,
        "mfu": 3.5,
        "mfu_causal": 3.0,
        "tokens_per_second": "fast",
        "note": "x",
        "list": [1],
    }
    text += (
        json.dumps(training_line(91) | odd) + "\n" + json.dumps(evaluation_line(91) | {"eval/loss": math.nan}) + "\n"
    )
    path.write_text(text, encoding="utf-8")
    [run] = data_of(tmp_path / "a")["runs"]
    assert [run["curves"]["series"][key][0][-1] for key in ("loss", "grad_norm", "lr", "mfu", "mfu_causal")] == [
        None
    ] * 5
    assert (
        run["curves"]["series"]["tokens_per_second"][0] == [1000.0] * 90 + [None]
        and "note" not in run["curves"]["series"]
    )
    assert run["evals"]["values"]["loss"][-1] is None
    assert run["notes"] == [
        "MFU above 100% in 1 steps is left out: the peak of a CPU is measured at the start, and was when others used it."
    ]
    json.dumps(run, allow_nan=False)
    assert figures_of(read_run(tmp_path / "a", "a"))["held_out"]["step"] == 90


@pytest.mark.parametrize("num_steps", [0, 1])
def test_a_run_that_has_just_begun(tmp_path, num_steps):
    folder = write_run(tmp_path / "a", lines_of(num_steps))
    [run] = data_of(folder)["runs"]
    assert len(run["curves"]["step"]) == num_steps and ("No step is recorded yet." in run["notes"]) == (num_steps == 0)


def test_a_folder_with_metrics_alone(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a/metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines_of()), encoding="utf-8")
    [run] = data_of(tmp_path / "a")["runs"]
    assert len(run["curves"]["step"]) == 90 and run["state"] is None and run["samples"] == [] and run["config"] == ""
    assert run["notes"] == [
        "There is no config.yaml that can be read.",
        "There is neither status.json nor environment.json: how the run stands, and where it ran, is not known.",
    ]


def test_events_that_nobody_recorded_and_those_that_are_too_many(tmp_path):
    lines = lines_of(90, step_50={"step_seconds": 4.0}, step_61={"step_seconds": 60.0})
    lines += [{"step": step, "event": "spike", "message": "m" * 3000} for step in range(1, 302)]
    lines += [
        {"step": 9, "event": "damaged_documents", "message": "3 documents", "documents": [f"d{n}" for n in range(25)]}
    ]
    folder = write_run(tmp_path / "a", lines)
    status = json.loads((folder / "status.json").read_text())
    (folder / "status.json").write_text(json.dumps(status | {"status": "failed", "reason": "no memory"}))
    run = read_run(folder, "a")
    assert slow_steps(run) == [
        (50, "4 s, 4.0 times the median of this start (1 s)")
    ]  # step 61 is the first of its start
    events, left_out = events_of(run)
    assert left_out == {"spike": 301 - MAX_EVENTS_OF_A_KIND}
    spikes = [step for step, kind, _ in events if kind == "spike"]
    assert len(spikes) == MAX_EVENTS_OF_A_KIND and (spikes[0], spikes[-1]) == (1, 301)
    assert max(len(message) for *_, message in events) == 2000
    assert (9, "damaged_documents", f"3 documents ({'; '.join(f'd{n}' for n in range(20))}; and 5 more)") in events
    assert (90, "failed", "no memory") in events and (50, "slow_step", slow_steps(run)[0][1]) in events


def test_samples_are_taken_apart_as_they_were_written():
    fake = "--- prompt 'other', ended by eos ---\nno"  # a model can write this
    page = f"step 5, 1 tokens\n\n--- prompt 'a', ended by length ---\na b\n{fake}\n\n--- prompt 'it\\'s\\n', ended by eos ---\nit's\n\n"
    first, second = parse_samples(5, page)
    assert (first.prompt, first.text) == ("a", f" b\n{fake}") and (second.prompt, second.text, second.ended_by) == (
        "it's\n",
        "",
        "eos",
    )


def test_many_samples_are_thinned(tmp_path, monkeypatch):
    monkeypatch.setattr(run_records, "MAX_SAMPLE_PAGES", 3)
    monkeypatch.setattr(run_records, "MAX_SAMPLE_CHARACTERS", 5)
    folder = write_run(tmp_path / "a")
    for step in range(100, 110):
        (folder / f"samples/step-{step:08d}.txt").write_text("head\n\n--- prompt 'p', ended by eos ---\np123456789\n")
    run = read_run(folder, "a")
    assert sorted({sample.step for sample in run.samples}) == [30, 104, 109]
    assert run.notes == ["Of 12 pages of samples 3 are here, evenly spread."]
    assert (run.samples[-1].text, run.samples[-1].num_left_out) == ("12345", 4)


def test_smoothing_is_a_mean_with_weights_that_halve():
    steps, values, counts = [1, 2, 5], [4.0, 8.0, None], [1, 1, 1]
    assert smoothed(steps, values, counts, 1.0) == [4.0, (4 * 0.5 + 8) / 1.5, None]
    assert smoothed(steps, [4.0, 8.0, 1.0], [1, 3, 1], 3.0)[1] == pytest.approx(
        (4 * 0.5 ** (1 / 3) + 24) / (0.5 ** (1 / 3) + 3)
    )
    assert smoothed(steps, [3.0] * 3, counts, 50.0) == pytest.approx([3.0] * 3)  # the first values are not pulled to 0
    assert smoothed(steps, values, counts, 0.0) == values


# The command


def test_command_writes_page_pictures_and_figures(tmp_path, capsys):
    first, second = write_run(tmp_path / "a"), write_run(tmp_path / "b$x$", lines_of(40))
    assert command.main([str(first)]) == 0
    assert re.fullmatch(rf"{first}/report.html \([\d.]+ MB\): a 90 steps\n", capsys.readouterr().out)
    assert command.main([str(first), str(second), "--png", str(tmp_path / "png"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (
        Path(found["out"]) == first / "comparison.html" and found["bytes"] == (first / "comparison.html").stat().st_size
    )
    assert [run["step"] for run in found["runs"]] == [90, 40]
    names = {Path(path).name for path in found["png"]}
    assert names == {"loss.png", "held-out-loss.png", "grad-norm.png", "lr.png", "tokens-per-second.png", "mfu.png", "memory.png",
                     "step-seconds.png", "step-phases-a.png", "step-phases-b$x$.png"}  # fmt: skip
    for path in found["png"]:
        assert Path(path).read_bytes().startswith(b"\x89PNG") and Path(path).stat().st_size > 10_000


def test_command_says_what_it_cannot_do(tmp_path, capsys, monkeypatch):
    run = write_run(tmp_path / "a")
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("x")
    for arguments, message in (
        ([tmp_path / "empty"], f"RUN is {tmp_path}/empty; expected the folder of a run that was started, with a metrics.jsonl, status.json or environment.json. Its"),
        ([tmp_path / "none"], f"RUN is {tmp_path}/none; expected the folder"),
        ([run, f"{run}/."], f"RUN is {run} twice; expected each run once. Leave one out."),
        ([run, "--step", "5"], "--step is 5; expected only with --inspect or --inspect-file, since a report is of all steps. Leave it out."),
        ([run, run, "--inspect", "x"], f"RUN is {run} {run}; expected one run with --inspect and --inspect-file."),
        ([run, "--png", "p", "--inspect", "x"], "--png is p; expected without --inspect and --inspect-file, whose page has no curves."),
        ([run, "--out", tmp_path / "file/page.html"], f"--out is {tmp_path}/file/page.html; expected a file that can be written ("),
        ([run, "--png", tmp_path / "file/png"], f"--png is {tmp_path}/file/png; expected a folder that can be written ("),
    ):  # fmt: skip
        assert command.main([str(argument) for argument in arguments]) == 2
        assert capsys.readouterr().err.startswith(f"error: {message}")
    monkeypatch.setattr(
        "pretrain.reporting.page.write_text", lambda *_: (_ for _ in ()).throw(OSError(30, "Read-only file system"))
    )
    assert command.main([str(run)]) == 2
    assert "Read-only file system). Name a file outside of the run folder by --out." in capsys.readouterr().err


def test_libraries_that_are_not_installed(monkeypatch):
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"^launch/report.py: the library plotly is missing; expected what reports are drawn by\. Install it by "
                       r"pip install 'longhaul\[report\]' \(in a checkout: pip install '\.\[report\]'\)\.$"):  # fmt: skip
        module.report(["x"], None, None)


def test_metrics_that_cannot_be_read(tmp_path):
    folder = write_run(tmp_path / "a")
    (folder / "metrics.jsonl").unlink()
    (folder / "metrics.jsonl").mkdir()
    with pytest.raises(
        ConfigError, match=r"metrics.jsonl: is not readable \(Is a directory\); expected a run's metrics.$"
    ):
        read_run(folder, "a")
    assert read_metrics(tmp_path / "none").num_steps == 0


@pytest.mark.launches
def test_a_report_needs_no_torch(tmp_path):
    run = write_run(tmp_path / "a")
    code = f"import sys, launch.report as r\nr.main([{str(run)!r}]); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.endswith("False\n"), done.stderr
