"""Every file of `configs/`: loads, divides, has the size that its name says, and shrinks to a test."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from pretrain.errors import ConfigError
from pretrain.options.batch_plan import BatchPlan
from pretrain.options.config import Config
from pretrain.options.families import CHOICES, EXTRAS, ModelShape, num_parameters, resolve_shape
from pretrain.options.settings import load_config, resolved_yaml
from tests.helpers.rank_helpers import losses, prepare, run_cases

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
UNITS = {"m": 1e6, "b": 1e9}


def shape_of(config: Config) -> ModelShape:
    return resolve_shape(config.model, config.tokenizer.vocab_size, config.data.seq_len)


def shrink(config: Config) -> list[str]:
    """Return overrides that make a config small enough to train two steps of it, with its family's features kept."""
    shape = shape_of(config)
    num_kv_heads = 4 if shape.num_kv_heads == shape.num_heads else 1 if shape.num_kv_heads == 1 else 2
    kv_heads = [] if config.model.num_kv_heads is None else [f"model.num_kv_heads={num_kv_heads}"]
    return [
        "model.dim=64",
        "model.num_layers=2",
        "model.num_heads=4",
        *kv_heads,
        *(["model.head_dim=24"] if config.model.head_dim is not None else []),
        *(["model.sliding_window=20"] if config.model.sliding_window is not None else []),
        "model.ffn_dim=null",
        "tokenizer.vocab_size=512",
        "data.seq_len=64",
        "train.num_steps=2",
        "train.num_tokens=null",
        "train.global_batch_size=4",
        "train.micro_batch_size=1",
        "schedule.warmup_steps=1",
    ]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_it_loads_and_divides(path: Path, tmp_path: Path) -> None:
    config = load_config(path)
    assert config.run.dir == f"runs/{path.stem}"
    largest = config.train.global_batch_size // config.train.micro_batch_size
    for world_size in [1, 2, largest]:
        plan = BatchPlan.of(config, world_size)
        assert plan.num_micro_steps * plan.world_size == largest
        assert plan.num_steps > config.schedule.warmup_steps
    (tmp_path / "resolved.yaml").write_text(resolved_yaml(config), encoding="utf-8")
    assert load_config(tmp_path / "resolved.yaml") == config


@pytest.mark.parametrize(
    "path", [path for path in CONFIGS if re.search(r"-[0-9.]+[mb]$", path.stem)], ids=lambda p: p.stem
)
def test_it_has_the_size_that_its_name_says(path: Path) -> None:
    name = path.stem.rpartition("-")[2]
    expected = float(name[:-1]) * UNITS[name[-1]]
    assert num_parameters(shape_of(load_config(path))) == pytest.approx(expected, rel=0.05)


def test_published_sizes_are_met_exactly() -> None:
    # transformers' GPT2LMHeadModel has 124,439,808 parameters and Llama-2-70b-hf 68,976,648,192; ours pads GPT-2's
    # vocabulary by 47 rows of 768
    assert num_parameters(shape_of(load_config(ROOT / "configs/gpt2-124m.yaml"))) == 124_439_808 + 47 * 768
    assert num_parameters(shape_of(load_config(ROOT / "configs/llama-7b.yaml"))) == 6_738_415_616
    assert num_parameters(shape_of(load_config(ROOT / "configs/llama-70b.yaml"))) == 68_976_648_192
    # Qwen/Qwen3-0.6B and bigcode/starcoder2-3b
    assert num_parameters(shape_of(load_config(ROOT / "configs/qwen3-0.6b.yaml"))) == 596_049_920
    assert num_parameters(shape_of(load_config(ROOT / "configs/starcoder2-3b.yaml"))) == 3_030_371_328


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_option_is_explained(path: Path) -> None:
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        option = re.match(r" +(- )?[a-z_]+: (?!\[?$)", line)
        assert not option or " # " in line, f"{path.name}:{number} has no comment"


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_shrinking_keeps_the_features(path: Path) -> None:
    full = load_config(path)
    small = load_config(path, shrink(full))
    for name in (*CHOICES, "family", "dropout"):
        assert getattr(shape_of(small), name) == getattr(shape_of(full), name)
    for name in EXTRAS:
        assert (getattr(shape_of(small), name) is None) == (getattr(shape_of(full), name) is None)
    assert (shape_of(small).head_dim * 4 == 64) == (shape_of(full).head_dim * full.model.num_heads == full.model.dim)
    assert (shape_of(small).num_kv_heads < 4) == (shape_of(full).num_kv_heads < shape_of(full).num_heads)
    assert num_parameters(shape_of(small)) < 300_000
    assert small.parallel == full.parallel


@pytest.mark.slow
@pytest.mark.launches
@pytest.mark.timeout(900)
def test_every_config_trains_two_steps_at_a_shrunken_size(tiny_config: Path, tmp_path: Path) -> None:
    prepare(tiny_config, "data.seq_len=64")  # adds the row table of this length
    folder = tiny_config.parent
    data = [
        f"tokenizer.model={folder}/tokenizer.model",
        f"data.sources=[{{name: code, shards: {folder}/shards/code}}]",
        "log.tensorboard=false",
    ]
    cases = [
        {"config": str(path), "overrides": [*shrink(load_config(path)), *data, f"run.dir={tmp_path}/{path.stem}"]}
        for path in CONFIGS
    ]
    assert run_cases(tiny_config, cases, 2, tmp_path / "ranks") == ["done"] * len(CONFIGS)
    for path in CONFIGS:
        first, second = losses(tmp_path / path.stem)
        assert 5.5 < first < 7.0 and second < 7.0  # ln(512) is 6.24


def test_the_readmes_config_loads(tmp_path: Path) -> None:
    [block] = re.findall(r"```yaml\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    (tmp_path / "mine.yaml").write_text(block, encoding="utf-8")
    config = load_config(tmp_path / "mine.yaml")
    assert BatchPlan.of(config, 32).num_micro_steps == 1  # as its batch script asks for


def test_the_guides_error_messages_are_true(tmp_path: Path) -> None:
    text = """tokenizer: {model: t.model, vocab_size: 32000}
data:
  sources:
    - {name: mine, paths: [corpus], shards: data/mine}
  seq_len: 2048

model: {hidden_size: 1024, num_layers: 24, num_heads: 16}
optim: {lr: '6e-4'}
train: {num_steps: 20000, global_batch_size: 256, micro_batch_size: 12}
"""
    guide = (ROOT / "docs/getting-started.md").read_text(encoding="utf-8")
    for wrong in (text, text.replace("hidden_size", "dim").replace("'6e-4'", "6e-4")):
        (tmp_path / "mine.yaml").write_text(wrong, encoding="utf-8")
        with pytest.raises(ConfigError) as caught:
            load_config(tmp_path / "mine.yaml")
        assert "error: " + str(caught.value).replace(f"{tmp_path}/", "") + "\n```" in guide
