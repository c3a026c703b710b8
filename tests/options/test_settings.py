"""Reading configs: YAML, overrides, places, messages."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import settings as no_deadline
from hypothesis import strategies as st

from pretrain.errors import ConfigError
from pretrain.options.config import Config
from pretrain.options.config_docs import options
from pretrain.options.settings import load_config, parse_config, resolved_yaml
from pretrain.options.spellings import SPELLINGS, suggest_option

GOOD = """\
tokenizer: {model: data/tokenizer.model, vocab_size: 32000}
data:
  sources:
    - {name: web, paths: [corpus/web], shards: data/web}
    - {name: code, shards: data/code, weight: 0.25}
  seq_len: 2048
model: {dim: 1024, num_layers: 24, num_heads: 16}
optim: {lr: 6e-4}
train: {num_steps: 20000, global_batch_size: 256, micro_batch_size: 8}
"""


def write(folder: Path, text: str) -> Path:
    path = folder / "run.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def problems_of(folder: Path, text: str, *overrides: str) -> list[str]:
    """Return the lines of the error, with the file's path cut to its name."""
    path = write(folder, text)
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides)
    return str(caught.value).replace(str(path), "run.yaml").splitlines()


def test_reads_values_and_defaults(tmp_path: Path) -> None:
    config = load_config(write(tmp_path, GOOD))
    assert config.optim.lr == 6e-4  # PyYAML would read a text
    assert config.optim.betas == (0.9, 0.95)
    assert [source.weight for source in config.data.sources] == [1.0, 0.25]


def test_run_dir_is_named_after_the_file(tmp_path: Path) -> None:
    assert load_config(write(tmp_path, GOOD)).run.dir == "runs/run"
    assert load_config(write(tmp_path, GOOD), ["run.dir=elsewhere/x"]).run.dir == "elsewhere/x"


def test_overrides_are_yaml(tmp_path: Path) -> None:
    overrides = ["optim.lr=3e-4", "optim.betas=[0.8, 0.9]", "data.sources.0.weight=2", "train.num_steps=1e3"]
    config = load_config(write(tmp_path, GOOD), [*overrides, "run.allow_changes=[optim.lr]", "log.tensorboard=false"])
    assert config.optim.lr == 3e-4
    assert config.optim.betas == (0.8, 0.9)
    assert config.data.sources[0].weight == 2
    assert config.train.num_steps == 1000
    assert config.run.allow_changes == ["optim.lr"]
    assert config.log.tensorboard is False


def test_the_last_override_wins(tmp_path: Path) -> None:
    assert load_config(write(tmp_path, GOOD), ["optim.lr=1e-3", "optim.lr=2e-3"]).optim.lr == 2e-3


def test_null_takes_an_option_back_to_its_default(tmp_path: Path) -> None:
    config = load_config(write(tmp_path, GOOD), ["train.num_steps=null", "train.num_tokens=1_000_000"])
    assert config.train.num_steps is None
    assert config.train.num_tokens == 1_000_000
    assert problems_of(tmp_path, GOOD, "optim.lr=null") == [
        "run.yaml:8: optim.lr is missing; expected a number above 0 and at most 1. Add it: Peak learning rate."
    ]


def test_a_section_without_options_has_its_defaults(tmp_path: Path) -> None:
    assert load_config(write(tmp_path, GOOD + "log:\n  # every_steps: 1\n")).log.every_steps == 10


def test_all_problems_are_reported_sorted_by_line(tmp_path: Path) -> None:
    text = GOOD.replace("dim: 1024", "dim: 0").replace("lr: 6e-4", "lr: 6e-4, name: sophia").replace("2048", "4")
    assert problems_of(tmp_path, text, "train.micro_batch_size=many") == [
        "run.yaml:6: data.seq_len is 4; expected a whole number of at least 8.",
        "run.yaml:7: model.dim is 0; expected a whole number of at least 1.",
        "run.yaml:8: optim.name is 'sophia'; expected one of adamw, adam, muon, lion, sgd or rmsprop.",
        "command line: train.micro_batch_size is 'many'; expected a whole number of at least 1.",
    ]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("run: {seed: 1.5}", "run.seed is 1.5; expected a whole number of at least 0 and below 4294967296."),
        ("run: {seed: true}", "run.seed is true; expected a whole number of at least 0 and below 4294967296."),
        ("run: {seed: '7'}", "run.seed is '7'; expected a whole number of at least 0 and below 4294967296. Drop the quotes."),
        ("run: {dir: 2024}", 'run.dir is 2024; expected text. Put it in quotes: "2024".'),
        ("run: {allow_changes: optim.lr}", "run.allow_changes is 'optim.lr'; expected a list of texts. Write [optim.lr]."),
        ("run: {allow_changes: [optim.lrr, optim.lr]}", "run.allow_changes has 'optim.lrr'; expected options. Did you mean optim.lr?"),
        ("run: {allow_changes: [3]}", "run.allow_changes.0 is 3; expected run.allow_changes to be a list of texts."),
        ("run: 3", "run is 3; expected a section of options."),
        ("log: {tensorboard: on}", "log.tensorboard is 'on'; expected true or false. Write true."),
        ("log: {tensorboard: 0}", "log.tensorboard is 0; expected true or false. Write false."),
        ("log: {every_steps: null}", "log.every_steps is null; expected a whole number of at least 1. Leave it out for "
         "the default, 10."),
        ("log: {every_steps: 2, every_steps: 3}", "log.every_steps is given twice; expected once. The first is on line 10."),
        ("log: {every_steps: !int 2}", "log.every_steps has the tag !int; expected none. Drop the tag."),
        ("parallel: {zero_stage: 4}", "parallel.zero_stage is 4; expected a whole number from 0 to 3."),
        ("guard: {max_skipped_steps: .inf}", "guard.max_skipped_steps is inf; expected a whole number of at least 0."),
        ("eval: {min_delta: .nan}", "eval.min_delta is nan; expected a number of at least 0."),
        ("schedule: {name: cosin}", "schedule.name is 'cosin'; expected one of cosine, wsd, linear or constant. Use cosine."),
        ("eval: &x {every_steps: *x}", "eval.every_steps holds itself through an alias. Write the values out."),
    ],
)  # fmt: skip
def test_wrong_values(tmp_path: Path, line: str, message: str) -> None:
    assert problems_of(tmp_path, GOOD + line + "\n") == [f"run.yaml:10: {message}"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("hidden_size: 3", "hidden_size is unknown; expected an option. Did you mean model.dim?"),
        ("gradient_clipping: 1", "gradient_clipping is unknown; expected an option. Did you mean optim.clip_norm?"),
        ("optimizer: {lr: 1}", "optimizer is unknown; expected an option. Did you mean optim?"),
        ("eval: {eval-interval: 3}", "eval.eval-interval is unknown; expected an option. Did you mean eval.every_steps?"),
        ("eval: {lr: 3}", "eval.lr is unknown; expected an option. Did you mean optim.lr?"),
        ("eval: {evry_steps: 3}", "eval.evry_steps is unknown; expected an option. Did you mean eval.every_steps?"),
        ("every_steps: 3", "every_steps is unknown; expected an option. Did you mean eval.every_steps, "
         "checkpoint.every_steps or log.every_steps?"),
        ("log: {xyz: 3}", "log.xyz is unknown; expected an option. log has every_steps, layer_norms_every, tensorboard, wandb."),
        ("3: 3", "3 is unknown; expected an option. A config has checkpoint, data, eval, guard, log, model, optim, "
         "parallel, resume, run, schedule, tokenizer, train."),
    ],
)  # fmt: skip
def test_unknown_options(tmp_path: Path, line: str, message: str) -> None:
    assert problems_of(tmp_path, GOOD + line + "\n") == [f"run.yaml:10: {message}"]


def test_a_misspelled_option_is_not_missing_too(tmp_path: Path) -> None:
    assert problems_of(tmp_path, GOOD.replace("dim:", "hidden_size:")) == [
        "run.yaml:7: model.hidden_size is unknown; expected an option. Did you mean model.dim?"
    ]


def test_an_unknown_option_does_not_hide_what_does_not_go_together(tmp_path: Path) -> None:
    text = GOOD.replace("weight: 0.25", "wieght: 0.25").replace("micro_batch_size: 8", "micro_batch_size: 7")
    assert problems_of(tmp_path, text) == [
        "run.yaml:5: data.sources.1.wieght is unknown; expected an option. Did you mean data.sources.*.weight?",
        "run.yaml:9: train.micro_batch_size is 7; expected a divisor of train.global_batch_size (256). Use 4, or a global "
        "batch of 259.",
    ]


def test_unknown_option_of_a_source(tmp_path: Path) -> None:
    text = GOOD.replace("weight: 0.25", "wieght: 0.25")
    assert problems_of(tmp_path, text) == [
        "run.yaml:5: data.sources.1.wieght is unknown; expected an option. Did you mean data.sources.*.weight?"
    ]


def test_an_unknown_section_on_the_command_line(tmp_path: Path) -> None:
    overrides = "trian.num_steps=3", "optim.sub.lr={a: 1}", "data.sources.1.odd.weight=1"
    assert problems_of(tmp_path, GOOD, *overrides) == [
        "command line: trian.num_steps is unknown; expected an option. Did you mean train.num_steps?",
        "command line: optim.sub.lr is unknown; expected an option. Did you mean optim.lr?",
        "command line: data.sources.1.odd.weight is unknown; expected an option. Did you mean data.sources.*.weight?",
    ]


def test_missing_sections_name_what_they_need(tmp_path: Path) -> None:
    text = GOOD.replace("optim: {lr: 6e-4}\n", "")
    assert problems_of(tmp_path, text) == [
        "run.yaml:1: optim is missing; expected a section that gives lr. Add it: The optimizer. Weight decay applies to "
        "matrices only, never to norms, biases or learned positions."
    ]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optim.lr", "'optim.lr' is not an override; expected option=value, such as optim.lr=3e-4."),
        ("optim.lr=", "optim.lr has no value; expected optim.lr=value. optim.lr=null takes the default."),
        ("optim.betas=[0.9", "optim.betas is '[0.9'; expected YAML: expected ',' or ']', but got '<stream end>'."),
        ("optim.learning_rate=1", "optim.learning_rate is unknown; expected an option. Did you mean optim.lr?"),
        ("model.dim.x=1", "model.dim.x does not exist; model.dim is 1024."),
        ("data.sources.2.weight=1", "data.sources.2.weight does not exist; data.sources has 2, counted from 0."),
        ("data.sources.web.weight=1", "data.sources.web.weight does not exist; data.sources has 2, counted from 0."),
        ("data.sources.1.weight=-1", "data.sources.1.weight is -1; expected a number of at least 0."),
    ],
)
def test_wrong_overrides(tmp_path: Path, override: str, message: str) -> None:
    assert problems_of(tmp_path, GOOD, override) == [f"command line: {message}"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "run.yaml:1: the config is empty; expected sections such as model and data. See docs/config.md."),
        (
            "# nothing\n",
            "run.yaml:1: the config is empty; expected sections such as model and data. See docs/config.md.",
        ),
        ("- 1\n", "run.yaml:1: the config is [1]; expected sections such as model and data."),
        ("just words\n", "run.yaml:1: the config is 'just words'; expected sections such as model and data."),
        ("model:\n\tdim: 3\n", "run.yaml:2: the file is not YAML: a tab is used for indentation; expected spaces."),
        ("a: 1\n---\nb: 2\n", "run.yaml:2: the file is not YAML: a second document begins; expected one."),
        ("a: 1\nb: c: d\n", "run.yaml:2: the file is not YAML: mapping values are not allowed here."),
        (
            "a: \x00\n",
            "run.yaml:1: the file is not YAML: unacceptable character #x0000: special characters are not allowed.",
        ),
    ],
)
def test_files_that_are_no_config(tmp_path: Path, text: str, message: str) -> None:
    assert problems_of(tmp_path, text) == [message]


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    write(tmp_path, GOOD)
    with pytest.raises(
        ConfigError, match=r"runs\.yaml: cannot be read: No such file or directory\. Did you mean .*run\.yaml\?"
    ):
        load_config(tmp_path / "runs.yaml")
    with pytest.raises(ConfigError, match=r"cannot be read: Is a directory\."):
        load_config(tmp_path)
    (tmp_path / "latin.yaml").write_bytes(b"model: caf\xe9\n")
    with pytest.raises(ConfigError, match=r"latin\.yaml: the file is not UTF-8 \(byte 10\); expected a YAML file\."):
        load_config(tmp_path / "latin.yaml")


def test_rules_between_options_have_places(tmp_path: Path) -> None:
    text = GOOD + "schedule: {warmup_steps: 30000, decay_steps: 5}\n"
    assert problems_of(tmp_path, text, "model.num_heads=15") == [
        "run.yaml:7: model.dim is 1024; expected a multiple of model.num_heads (15). Use 1020 or 1035.",
        "run.yaml:10: schedule.decay_steps is 5; expected to be left out. Only wsd has it, and schedule.name is cosine.",
        "run.yaml:10: schedule.warmup_steps is 30000; expected at most the run's 20000 steps. Use 2000.",
    ]


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["optim.name=rmsprop", "optim.momentum=0.9"],
        ["optim.name=lion", "optim.groups=[{match: 'embedding.*', lr_ratio: 2}, {match: x, weight_decay: 0.2}]"],
        ["optim.name=muon", "optim.nesterov=false"],
        ["data.phases=[{from_step: 9, weights: {web: 1}}, {from_step: 12, tokens: {web: 2e9, code: 1}, seq_len: 64}]"],
        ["data.sources.0.epochs=2", "data.sources.1.epochs=0.5", "data.sources.1.weight=null", "data.packing=concat"],
        [
            "schedule.name=wsd",
            "schedule.decay_steps=100",
            "eval.every_steps=5",
            "eval.patience=2",
            "eval.min_delta=0.01",
        ],
        [
            "model.rope_scaling={type: yarn, factor: 2, original_seq_len: 1024, beta_fast: 16}",
            "model.attention_bias=true",
        ],
        ["model={family: stablelm, dim: 64, num_layers: 1, num_heads: 4, attention_bias: qkv}"],
        ["data.sources.1={name: b, shards: s, paths: [x], weight: 0, val_fraction: 1}"],  # a section all of comments
        ["schedule.name=constant", "run.dir='a b: #c'", "data.sources.1.text_field='\\'", "data.sources.1.paths=[x]"],
    ],
)
def test_resolved_yaml_reads_back_as_the_same_config(tmp_path: Path, overrides: list[str]) -> None:
    config = load_config(write(tmp_path, GOOD), overrides)
    text = resolved_yaml(config)
    assert load_config(write(tmp_path, text)) == config
    assert parse_config(config.model_dump()) == config
    for option in options().values():
        of_no_group = option.name.startswith("optim.groups.*") and not config.optim.groups
        of_no_group |= option.name.startswith("data.phases.*") and not config.data.phases
        in_null_section = config.model.rope_scaling is None and option.name.startswith("model.rope_scaling.")
        in_null_section |= option.name.startswith(("data.sources.*.examples.", "train.lora."))
        is_absent = option.section or of_no_group or in_null_section
        assert is_absent or option.name.rpartition(".")[2] + ": " in text


def test_options_of_a_section_that_may_be_null(tmp_path: Path) -> None:
    scaled = "model.rope_scaling.type=linear", "model.rope_scaling.factor=4"
    config = load_config(write(tmp_path, GOOD), scaled)
    assert config.model.rope_scaling is not None and config.model.rope_scaling.factor == 4.0
    assert "    # beta_fast: 32.0  # It is for yarn, and model.rope_scaling.type is linear." in resolved_yaml(config)
    assert load_config(write(tmp_path, GOOD), [*scaled, "model.rope_scaling=null"]).model.rope_scaling is None
    assert problems_of(tmp_path, GOOD, *scaled, "model.rope_scaling.beta_fast=2") == [
        "command line: model.rope_scaling.beta_fast is 2.0; expected to be left out. It is for yarn, and "
        "model.rope_scaling.type is linear."
    ]
    assert problems_of(tmp_path, GOOD, "model.rope_scaling={factor: 4}") == [
        "command line: model.rope_scaling.type is missing; expected one of linear, llama3 or yarn. Add it: How the "
        "frequencies are lowered."
    ]
    assert problems_of(tmp_path, GOOD, "model.rope_scaling=yarn") == [
        "command line: model.rope_scaling is 'yarn'; expected a section of options or null."
    ]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("both", "model.attention_bias is 'both'; expected one of true, false or qkv or null."),
        ("yes", "model.attention_bias is 'yes'; expected one of true, false or qkv or null. Write true."),
        ("2", "model.attention_bias is 2; expected one of true, false or qkv or null."),
        ("qvk", "model.attention_bias is 'qvk'; expected one of true, false or qkv or null. Use qkv."),
    ],
)
def test_a_choice_that_may_be_true_or_false(tmp_path: Path, value: str, message: str) -> None:
    assert problems_of(tmp_path, GOOD, f"model.attention_bias={value}") == [f"command line: {message}"]
    for text, meant in (("true", True), ("1", True), ("0", False), ("false", False)):  # as pydantic takes a choice
        assert load_config(write(tmp_path, GOOD), [f"model.attention_bias={text}"]).model.attention_bias is meant


@no_deadline(deadline=None)  # the machine may be busy
@given(st.text(st.characters(exclude_categories=["Cs"]), min_size=1))
def test_resolved_yaml_keeps_any_text(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    folder = tmp_path_factory.mktemp("text")
    config = load_config(write(folder, GOOD))
    config = config.model_copy(update={"run": config.run.model_copy(update={"dir": text})})
    assert load_config(write(folder, resolved_yaml(config))).run.dir == text


def test_stored_configs_are_checked(tmp_path: Path) -> None:
    stored = load_config(write(tmp_path, GOOD)).model_dump()
    stored["optim"]["alpha"] = 0.5
    with pytest.raises(
        ConfigError, match="^stored config: optim.alpha is 0.5; expected to be left out. Only rmsprop has"
    ):
        parse_config(stored)
    stored["model"]["hidden"] = 3
    with pytest.raises(ConfigError, match="^stored config: model.hidden is unknown"):
        parse_config(stored)


def test_spellings_lead_to_options() -> None:
    known = options()
    assert sorted({option for meant in SPELLINGS.values() for option in meant if option not in known}) == []
    own_words = {name.rpartition(".")[2] for name in known}
    # DeepSpeed's and NeoX's `type` is an optimizer's or a schedule's name; model.rope_scaling has one of its own.
    # Others' `epochs` are the length of the run; those of data.sources are of one corpus.
    # An `optimizer` elsewhere is the section; resume.optimizer is whether its moments are taken along.
    assert sorted(own_words & set(SPELLINGS)) == [
        "epochs",
        "optimizer",
        "type",
    ]  # others would never be looked up, or hide the option itself


@pytest.mark.parametrize(
    ("name", "option"),
    [
        ("train_micro_batch_size_per_gpu", "train.micro_batch_size"),
        ("train.max_steps", "train.num_steps"),
        ("train-iters", "train.num_steps"),
        ("model.num_hidden_layers", "model.num_layers"),
        ("n_embd", "model.dim"),
        ("optim.min-lr", "schedule.final_lr_ratio"),
        ("weight-decay", "optim.weight_decay"),
        ("lr_decay_style", "schedule.name"),
        ("seq_length", "data.seq_len"),
        ("zero_optimization", "parallel.zero_stage"),
        ("optim.type", "optim.name or schedule.name"),
        ("model.rope_scaling.rope_type", "model.rope_scaling.type"),
        ("model.rope_scaling.original_max_position_embeddings", "model.rope_scaling.original_seq_len"),
        ("model.attn_logit_softcapping", "model.attention_softcap"),
        ("resume.form", "resume.from"),
        ("resume.from_checkpoint", "resume.from"),
        ("parallel.timeout", "parallel.timeout_seconds"),
        ("checkpoint.async", "checkpoint.asynchronous"),
        ("batch_size", "train.global_batch_size or train.micro_batch_size"),  # of a step here, of a GPU there
    ],
)
def test_other_trainers_spellings(name: str, option: str) -> None:
    assert suggest_option(name, list(options())) == f"Did you mean {option}?"


def test_every_section_is_in_the_config() -> None:
    assert {name for name, option in options().items() if option.section and "." not in name} == set(
        Config.model_fields
    )


@pytest.mark.parametrize(
    "name", ["tensor_parallel_size", "pipeline_parallel_size", "expert_model_parallel_size", "tp_size"]
)
def test_other_ways_to_divide_a_model_are_not_taken_for_sequence_parallelism(name: str) -> None:
    text = "Tensor, pipeline and expert parallelism are not part of Longhaul; parallel.zero_stage divides the states, "
    for asked in (name, f"parallel.{name}"):
        assert suggest_option(asked, list(options())) == text + "parallel.sequence_parallel_size the rows."
