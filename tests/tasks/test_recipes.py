"""The recipes of `configs/tasks`: of the quickstart model, of the data that are made for them, and run once each."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from pretrain.options.batch_plan import BatchPlan
from pretrain.options.config import Config, TokenizerSection
from pretrain.options.settings import load_config
from pretrain.preparing.prepare import prepare
from pretrain.tasks.task_data import HELD_OUT_FILE, TASKS, TRAIN_FILE, write_task
from pretrain.tasks.task_metrics import score
from pretrain.tokenizers.sentencepiece_tokenizer import fit
from pretrain.tokenizers.tokenizer import save_file
from tests.helpers.rank_helpers import metric_lines, run_cases

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = sorted((ROOT / "configs/tasks").glob("*.yaml"))


@pytest.fixture
def quickstart() -> Config:
    return load_config(ROOT / "configs/quickstart.yaml")


def test_every_task_has_a_recipe() -> None:
    assert {path.stem for path in CONFIGS} == TASKS.keys()


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_it_goes_on_from_the_quickstart(path: Path, quickstart: Config) -> None:
    config = load_config(path)
    assert config.model == quickstart.model and config.data.seq_len == quickstart.data.seq_len
    assert config.tokenizer.model == quickstart.tokenizer.model
    assert config.tokenizer.vocab_size == quickstart.tokenizer.vocab_size
    assert config.resume.from_ == quickstart.run.dir
    assert config.run.dir == f"runs/{path.stem}" and config.eval.metric == TASKS[path.stem].metric
    train, held_out = config.data.sources
    assert train.paths == [f"data/tasks/{path.stem}/{TRAIN_FILE}"]
    assert held_out.paths == [f"data/tasks/{path.stem}/{HELD_OUT_FILE}"]
    assert BatchPlan.of(config, 1).num_steps == config.train.num_steps > config.schedule.warmup_steps
    head = path.read_text(encoding="utf-8")
    assert re.search(rf"^#   python launch/make_tasks\.py {path.stem}( --train \d+)?$", head, re.MULTILINE)
    for name in ("prepare", "pretrain"):
        assert f"#   python launch/{name}.py configs/tasks/{path.stem}.yaml\n" in head


@pytest.mark.slow
@pytest.mark.launches
def test_each_is_judged_before_and_after(tmp_path: Path) -> None:
    """A model of two small blocks, two steps: that every part of a recipe fits the others."""
    texts = []
    for name in TASKS:
        texts += [file.read_bytes() for file in write_task(name, tmp_path / name, 40, 4)]
    section = TokenizerSection(model="t", vocab_size=420, sample_bytes=100_000)
    save_file(tmp_path / "t.model", fit(texts, section))
    small = [f"tokenizer.model={tmp_path}/t.model", "tokenizer.vocab_size=420", "model.dim=32", "model.num_layers=2",
             "model.num_heads=2", "model.num_kv_heads=1", "data.seq_len=512", "data.prepare_processes=1",
             "train.num_steps=2", "schedule.warmup_steps=1", "log.tensorboard=false",
             "parallel.zero_stage=1"]  # fmt: skip
    base = tmp_path / "base.yaml"
    base.write_text((ROOT / "configs/tasks/generation.yaml").read_text(encoding="utf-8").partition("resume:")[0]
                    + "optim: {lr: 1e-3}\ntrain: {num_steps: 2, global_batch_size: 4, micro_batch_size: 4, "
                    "precision: fp32}\n")  # fmt: skip
    cases = []
    for name in ["generation", *(name for name in TASKS if name != "generation")]:
        folder, config = tmp_path / name, ROOT / f"configs/tasks/{name}.yaml"
        own = [*small, f"data.sources.0.paths=[{folder}/{TRAIN_FILE}]", f"data.sources.0.shards={folder}/shards",
               f"data.sources.1.paths=[{folder}/{HELD_OUT_FILE}]", f"data.sources.1.shards={folder}/held-out"]  # fmt: skip
        prepare(load_config(config, own))
        if not cases:
            cases.append({"overrides": [*own, f"run.dir={tmp_path}/base"], "config": str(base)})
        cases.append({"overrides": [*own, f"run.dir={tmp_path}/runs/{name}", f"resume.from={tmp_path}/base"],
                      "config": str(config)})  # fmt: skip
    outcomes = run_cases(base, cases, 1, tmp_path / "ranks", timeout=280)
    assert outcomes == ["done"] * 7, outcomes
    for name, task in TASKS.items():
        lines = metric_lines(tmp_path / "runs" / name)
        key = f"eval/task/{next(iter(score(task.metric, ['a'], ['a'])))}" if task.metric else "eval/bits_per_byte"
        found = {line["step"]: line[key] for line in lines if key in line}
        assert found.keys() == {0, 2}, name
        assert all(0 <= value <= 100 for value in found.values())
