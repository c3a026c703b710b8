"""Tuning, whole: full and by adapters, interrupted and on other ranks and stages, judged by the task's own metric."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

from pretrain.checkpoints.checkpoint_files import CheckpointReader, folder_name, list_steps
from pretrain.checkpoints.run_folder import load_run
from pretrain.data.stream import ValRows
from pretrain.errors import CheckpointError
from pretrain.evaluation.evaluate import evaluate
from pretrain.options.settings import load_config
from tests.helpers.rank_helpers import losses, metric_lines, newest, prepare, run_cases, state_hash
from tests.helpers.tuning_helpers import write_task

pytestmark = [pytest.mark.launches, pytest.mark.timeout(900)]
LORA = "train.lora={rank: 4, alpha: 16}"
SHORT = ["train.num_steps=8", "checkpoint.every_steps=4"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A base, and what is tuned from it by one rank; return (outcomes by name, folder)."""
    folder = write_task(tmp_path_factory.mktemp("tuning"))
    for name in ("base", "tune"):
        prepare(folder / f"{name}.yaml")
    cases = {
        "base": [],
        "full": SHORT,
        "lora": [*SHORT, LORA],
        "lora, interrupted": [*SHORT, LORA],
        "lora, interrupted again": [*SHORT, LORA],
        "from lora": [f"resume.from={folder}/lora", "train.num_steps=2"],
        "lora beside lora": [f"resume.from={folder}/lora", "train.num_steps=2", LORA],
        "no base": [f"resume.from={folder}/nowhere", LORA],
    }  # fmt: skip
    extra = {"lora, interrupted": {"signal_at": 6}}
    listed = [
        {"overrides": [f"run.dir={folder}/{name.removesuffix(' again')}", *own],
         "config": str(folder / ("base.yaml" if name == "base" else "tune.yaml")), **extra.get(name, {})}
        for name, own in cases.items()
    ]  # fmt: skip
    outcomes = run_cases(folder / "tune.yaml", listed, 1, folder / "ranks", timeout=600)
    return dict(zip(cases, outcomes, strict=True)), folder


def masters(run, step=None):
    reader = CheckpointReader(run / "checkpoints" / folder_name(step or list_steps(run / "checkpoints")[-1]))
    return {name: reader.read_whole(name) for name in reader.shapes}


def test_full_tuning_begins_with_the_weights_and_moves_them_all(runs):
    outcomes, folder = runs
    assert outcomes["full"] == "done"
    base, tuned = masters(folder / "base"), masters(folder / "full")
    assert base.keys() == tuned.keys() and all(not torch.equal(base[name], tuned[name]) for name in base)
    assert losses(folder / "full")[-1] < losses(folder / "full")[0] - 0.5
    assert [line["step"] for line in metric_lines(folder / "full") if "loss" in line] == list(range(1, 9))


def test_adapters_are_all_that_a_checkpoint_holds_and_the_base_stays_as_it_is(runs):
    outcomes, folder = runs
    assert outcomes["lora"] == "done", outcomes["lora"]
    reader = newest(folder / "lora")
    assert len(reader.shapes) == 2 * 2 * 4 and all(name.endswith((".lora_a", ".lora_b")) for name in reader.shapes)
    assert reader.shapes["blocks.0.attention.qkv.lora_b"] == (128, 4)
    reference = reader.training["base"]
    assert reference["checkpoint"] == str(folder / "base/checkpoints/step-00000020")
    base, whole = masters(folder / "base"), load_run(folder / "lora").model
    adapted = {f"blocks.{i}.{layer}.weight" for i in range(2)
               for layer in ("attention.qkv", "attention.output", "ffn.gate_up", "ffn.down")}  # fmt: skip
    for name, parameter in whole.named_parameters():
        assert torch.equal(parameter, base[name]) is (name not in adapted), name
    assert losses(folder / "lora")[-1] < losses(folder / "lora")[0] - 0.1
    assert losses(folder / "lora")[0] == pytest.approx(losses(folder / "full")[0], abs=1e-6)  # B is 0


def test_the_merged_model_computes_what_the_adapters_did(runs):
    _, folder = runs
    loaded = load_run(folder / "lora", 4)
    config = load_config(folder / "tune.yaml")
    rows = ValRows(config, loaded.tokenizer.fingerprint, 0)
    merged = evaluate(loaded.model, rows, loaded.tokenizer.token_bytes(), 8)
    model = adapted_model(folder, loaded, 4)
    apart = evaluate(model, rows, loaded.tokenizer.token_bytes(), 8)
    assert merged.loss == pytest.approx(apart.loss, abs=1e-5) and merged.tokens == apart.tokens


def adapted_model(folder, loaded, step):
    """The base with the adapters beside it, as training computed it."""
    from pretrain.transformer.lora import add_adapters
    from pretrain.transformer.model import Transformer

    model = Transformer(loaded.model.shape, 3)
    add_adapters(model, loaded.config.train.lora)
    states = masters(folder / "base") | masters(folder / "lora", step)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(states[name])
    return model.eval()


def test_an_interrupted_tuning_goes_on_bit_for_bit(runs):
    outcomes, folder = runs
    assert (outcomes["lora, interrupted"], outcomes["lora, interrupted again"]) == ("stopped", "done")
    assert losses(folder / "lora, interrupted") == losses(folder / "lora")
    assert state_hash(newest(folder / "lora, interrupted")) == state_hash(newest(folder / "lora"))


def test_tuning_goes_on_from_a_tuned_model(runs):
    outcomes, folder = runs
    assert (outcomes["from lora"], outcomes["lora beside lora"]) == ("done", "done"), outcomes
    after = losses(folder / "lora")[-1] + 0.3
    assert losses(folder / "from lora")[0] < after and losses(folder / "lora beside lora")[0] < after
    names = dict(load_run(folder / "lora beside lora").model.named_parameters())
    assert not torch.equal(names["blocks.0.ffn.down.weight"], dict(load_run(folder / "lora").model.named_parameters())["blocks.0.ffn.down.weight"])  # fmt: skip


def test_a_base_that_is_gone_or_another_is_named(runs):
    outcomes, folder = runs
    assert "resume.from is" in outcomes["no base"] and "expected a run folder with checkpoints" in outcomes["no base"]
    base = folder / "base/checkpoints/step-00000020"
    moved = folder / "elsewhere"
    base.rename(moved)
    try:
        with pytest.raises(
            CheckpointError, match=r"stand beside the weights of .*step-00000020, which cannot be had"
        ) as caught:
            load_run(folder / "lora")
        assert str(caught.value).count("is not readable") == 1
    finally:
        moved.rename(base)
    manifest = (base / "manifest.json").read_text()
    other = json.loads(newest(folder / "full")._source.read_manifest())
    (base / "manifest.json").write_text(json.dumps(other, indent=1))
    try:
        with pytest.raises(CheckpointError, match="is another checkpoint than when tuning began"):
            load_run(folder / "lora")
    finally:
        (base / "manifest.json").write_text(manifest)


GATHERS = {
    "stage3_param_persistence_threshold": 0, "stage3_max_reuse_distance": 0, "stage3_max_live_parameters": 0,
}  # fmt: skip


@pytest.mark.slow
def test_stages_and_ranks_tune_alike(runs):
    """Two ranks, in bf16 too, with all weights gathered; and on from one rank's checkpoint, with small weights whole."""
    _, folder = runs
    half = "train.micro_batch_size=4"
    places = {"1": {}, "3": {"zero": GATHERS}}
    cases = {
        f"{kind} at {name}": (["train.num_steps=8", "optim.weight_decay=0.1", half, f"parallel.zero_stage={name[0]}", *own], more)
        for kind, own in {"lora": [LORA], "full": [], "bf16": [LORA, "train.precision=bf16"],
                          "recomputed": [LORA, "train.activation_checkpointing=full"]}.items()
        for name, more in places.items() if kind != "recomputed" or name == "3"
    }  # fmt: skip
    step_4 = folder / "goes on" / "checkpoints"
    step_4.mkdir(parents=True)
    shutil.copytree(folder / "lora/checkpoints/step-00000004", step_4 / "step-00000004")
    for name in ("config.yaml", "t.model"):
        if (folder / "lora" / name).exists():
            shutil.copy(folder / "lora" / name, folder / "goes on" / name)
    cases["goes on"] = (["train.num_steps=8", "checkpoint.every_steps=4", half, LORA, "parallel.zero_stage=3"], {})
    listed = [{"overrides": [f"run.dir={folder}/{name}", *own], "watch_untrained": "full" not in name} | more
              for name, (own, more) in cases.items()]  # fmt: skip
    outcomes = run_cases(folder / "tune.yaml", listed, 2, folder / "two ranks", timeout=800)
    assert outcomes == ["done"] * len(cases), dict(zip(cases, outcomes, strict=True))
    for name in cases:
        kind = name.partition(" at")[0]
        same = losses(folder / f"{kind if kind in ('lora', 'full') else 'lora'} at 1")
        if name == "goes on":
            assert losses(folder / name) == pytest.approx(losses(folder / "lora")[4:], abs=1e-5)
        else:
            assert losses(folder / name) == pytest.approx(same, abs=3e-2 if kind == "bf16" else 1e-5), name


@pytest.fixture(scope="module")
def learned(runs):
    """A model that is tuned until its answers are right, judged by them; by two ranks that divide the answering."""
    _, folder = runs
    judged = ["train.num_steps=60", "eval={every_steps: 20, metric: exact}", "checkpoint.every_steps=20"]
    cases = {
        "full, judged": judged,
        "lora, judged": [*judged, "train.lora={rank: 16, alpha: 32}", "optim.lr=1e-2"],
        "stops": [*judged, "train.num_steps=100", "eval={every_steps: 10, metric: exact, patience: 1, min_delta: 200}"],
        "divided": [*judged, "train.num_steps=20", "parallel.zero_stage=3"],
    }
    listed = [
        {"overrides": [f"run.dir={folder}/{name}", "train.micro_batch_size=4", *own]} for name, own in cases.items()
    ]
    outcomes = run_cases(folder / "tune.yaml", listed, 2, folder / "judged", timeout=500)
    assert outcomes == ["done"] * len(cases), outcomes
    return folder


def judged(run):
    return {
        line["step"]: line["eval/task/exact_match"] for line in metric_lines(run) if "eval/task/exact_match" in line
    }


@pytest.mark.slow
def test_tuning_raises_the_metric_from_nothing(learned):
    for name in ("full, judged", "lora, judged"):
        values = judged(learned / name)
        assert list(values) == [0, 20, 40, 60] and values[0] < 5 and values[60] > 60, (name, values)


@pytest.mark.slow
def test_a_run_stops_by_its_metric_and_keeps_the_best(learned):
    values = judged(learned / "stops")
    status = json.loads((learned / "stops" / "status.json").read_text())
    assert list(values) == [0, 10, 20] and status["step"] == 20
    assert status["reason"].startswith(f"stopped early at step 20: exact has not risen above {values[10]:.2f}")
    progress = newest(learned / "stops").training["progress"]
    best = max((10, 20), key=lambda step: (values[step], -step))
    assert progress["best_step"] == best and progress["best_loss"] == -values[best]


@pytest.mark.slow
def test_divided_weights_answer_alike(learned):
    assert judged(learned / "divided")[0] == judged(learned / "full, judged")[0]


@pytest.mark.slow
def test_the_command_shows_what_training_logged(learned, capsys):
    from launch.evaluate import main

    assert main([str(learned / "lora, judged"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["answers"]["metric"] == "exact" and found["answers"]["num_examples"] > 30
    assert found["answers"]["values"]["exact_match"] == judged(learned / "lora, judged")[60]
    assert found["loss"] == pytest.approx(
        [line["eval/loss"] for line in metric_lines(learned / "lora, judged") if "eval/loss" in line][-1], abs=1e-4
    )
