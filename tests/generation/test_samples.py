"""Text sampled during training: complete files at every stage, and a run that does not notice."""

from __future__ import annotations

import json
import re

import pytest

from pretrain.checkpoints.checkpoint_files import list_steps
from pretrain.generation.samples import drop_samples_after, save_samples
from tests.helpers.rank_helpers import losses, metric_lines, newest, run_cases

pytestmark = [pytest.mark.slow, pytest.mark.launches, pytest.mark.timeout(600)]

# Large enough that ZeRO-3 divides its matrices: DeepSpeed keeps parameters below 100,000 elements whole.
COMMON = ["model={family: llama, dim: 256, num_layers: 2, num_heads: 4, num_kv_heads: 2, tie_embeddings: true, "
          "dropout: 0.1, attention_dropout: 0.1}", "train={num_steps: 6, global_batch_size: 4, micro_batch_size: 1, "
          "precision: fp32}"]  # fmt: skip
SAMPLING = "eval={sample_every_steps: 2, sample_tokens: 8, sample_prompts: ['def ', '', 'a longer prompt, '], every_steps: 3, max_rows: 4}"
# Else DeepSpeed keeps up to 10^9 elements whole that it will use again.
COUNTED = {"count_after_sampling": True, "zero": {"stage3_max_reuse_distance": 0, "stage3_max_live_parameters": 0}}
PLAIN = "eval={every_steps: 3, max_rows: 4}"


@pytest.fixture(scope="module")
def runs(tiny_config, tmp_path_factory):
    """Run everything on two ranks in one start; return (outcomes by name, folder)."""
    folder = tmp_path_factory.mktemp("samples")
    cases = {}
    for stage in range(4):
        cases[f"z{stage}"] = {
            "overrides": [SAMPLING, f"parallel.zero_stage={stage}"],
            **(COUNTED if stage == 3 else {}),
        }
        cases[f"z{stage}-without"] = {"overrides": [PLAIN, f"parallel.zero_stage={stage}"]}
    bf16 = ["train.precision=bf16", "parallel.zero_stage=3"]
    cases["bf16-z3"] = {"overrides": [SAMPLING, *bf16], **COUNTED}
    cases["bf16-z3-without"] = {"overrides": [PLAIN, *bf16]}
    cases["cut"] = {"overrides": [SAMPLING, "checkpoint.every_steps=3"], "signal_at": 5, "fail_save": [5]}
    cases["cut-again"] = {"overrides": [SAMPLING, "checkpoint.every_steps=3"]}
    cases["broken-disk"] = {"overrides": [SAMPLING]}
    (folder / "broken-disk").mkdir()
    (folder / "broken-disk" / "samples").write_text("not a folder")
    cases["early"] = {
        "overrides": ["eval={every_steps: 1, max_rows: 4, patience: 1, min_delta: 100, sample_every_steps: 50}"]
    }
    cases["long-prompt"] = {"overrides": ["eval={sample_every_steps: 2, sample_prompts: [a, '" + "def x " * 30 + "']}"]}
    listed = [
        case | {"overrides": [f"run.dir={folder}/{name.removesuffix('-again')}", *COMMON, *case["overrides"]]}
        for name, case in cases.items()
    ]
    outcomes = run_cases(tiny_config, listed, 2, folder / "ranks")
    return dict(zip(cases, outcomes, strict=True)), folder


def samples(run):
    return {path.name: path.read_text() for path in sorted((run / "samples").iterdir())}


def test_sampling_changes_no_bit_of_a_run_at_any_stage(runs):
    outcomes, folder = runs
    for name in ("z0", "z1", "z2", "z3", "bf16-z3"):
        ours, without = folder / name, folder / f"{name}-without"
        assert outcomes[name] == outcomes[f"{name}-without"] == "done"
        assert losses(ours) == losses(without) and len(losses(ours)) == 6
        evaluated = [
            [line["eval/loss"] for line in metric_lines(run) if "eval/loss" in line] for run in (ours, without)
        ]
        assert evaluated[0] == evaluated[1] and len(evaluated[0]) == 2
        one, other = newest(ours), newest(without)
        for parameter in one.shapes:
            assert (one.read_whole(parameter) == other.read_whole(parameter)).all(), (name, parameter)
        assert not (without / "samples").exists()


def test_samples_are_the_same_at_every_stage_and_go_on_from_the_prompts(runs):
    folder = runs[1]
    pages = samples(folder / "z0")
    assert list(pages) == ["step-00000002.txt", "step-00000004.txt", "step-00000006.txt"]
    for stage in (1, 2, 3):  # the losses are equal to within rounding, and so these are
        assert samples(folder / f"z{stage}") == pages
    page = pages["step-00000004.txt"]
    assert page.startswith(
        "step 4, 512 tokens trained on; temperature 1\n\n--- prompt 'def ', ended by length ---\ndef "
    )
    assert "--- prompt 'a longer prompt, ', ended by length ---\na longer prompt, " in page
    assert page.partition("---")[2] != pages["step-00000002.txt"].partition("---")[2]
    assert len(samples(folder / "bf16-z3")) == 3


def test_weights_are_divided_again_and_caches_gone_after_sampling(runs):
    text = (runs[1] / "ranks" / "output-0").read_text()
    counts = re.findall(r"after sampling: (\d+) caches, (\d+) whole matrices of (\d+)", text)
    assert len(counts) == 6 and all(count[:2] == ("0", "0") and int(count[2]) > 5 for count in counts), counts


def test_a_resumed_run_writes_the_samples_of_its_own_steps(runs):
    outcomes, folder = runs
    assert outcomes["cut"].startswith("CheckpointError") and outcomes["cut-again"] == "done"  # it went on from step 3
    assert list_steps(folder / "cut" / "checkpoints") == [3, 6]
    assert samples(folder / "cut") == samples(folder / "z1")  # the page of step 4, which was altered, is written again


def test_later_pages_and_torn_ones_are_dropped(tmp_path):
    for step in (2, 4, 6):
        assert save_samples(tmp_path, step, "text\n").name == f"step-0000000{step}.txt"
    for name in (".step-00000008.txt.tmp-77", "notes.txt", "step-mine.txt"):
        (tmp_path / "samples" / name).write_text("")
    drop_samples_after(tmp_path, 4)
    assert sorted(samples(tmp_path)) == ["notes.txt", "step-00000002.txt", "step-00000004.txt", "step-mine.txt"]
    drop_samples_after(tmp_path / "without", 0)


def test_a_disk_that_fails_costs_the_samples_only(runs):
    outcomes, folder = runs
    assert outcomes["broken-disk"] == "done" and losses(folder / "broken-disk") == losses(folder / "z1")
    events = [line["step"] for line in metric_lines(folder / "broken-disk") if line.get("event") == "samples_failed"]
    assert events == [2, 4, 6]


def test_a_run_that_stops_early_ends_with_samples(runs):
    outcomes, folder = runs
    step = json.loads((folder / "early" / "status.json").read_text())["step"]
    assert outcomes["early"] == "done" and step < 6 and list(samples(folder / "early")) == [f"step-{step:08d}.txt"]


def test_a_prompt_that_is_too_long_is_found_before_the_start(runs):
    outcomes, folder = runs
    assert re.match(r"ConfigError: eval.sample_prompts \(number 2\) is \d+ tokens .* expected fewer than data.seq_len \(32\)",
                    outcomes["long-prompt"])  # fmt: skip
    assert not (folder / "long-prompt" / "metrics.jsonl").exists()
