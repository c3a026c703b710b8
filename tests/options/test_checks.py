"""Rules between options."""

from __future__ import annotations

from typing import Any

import pytest

from launch.pretrain import main
from pretrain.options.checks import check_options, idle_options
from pretrain.options.config import Config


def config_of(**changes: Any) -> Config:
    """Return a good config with some options changed, given by dotted name with `__` for the dot."""
    values: dict[str, Any] = {
        "model": {"dim": 64, "num_layers": 2, "num_heads": 4},
        "data": {"sources": [{"name": "web", "paths": ["x"], "shards": "data/web"}], "seq_len": 64},
        "tokenizer": {"model": "t.model", "vocab_size": 512},
        "optim": {"lr": 1e-3},
        "train": {"num_steps": 100, "global_batch_size": 8, "micro_batch_size": 2},
    }
    for name, value in changes.items():
        section, _, key = name.partition("__")
        values.setdefault(section, {})[key] = value
    return Config.model_validate(values)


def texts_of(config: Config, *given: str) -> list[tuple[str, str]]:
    return [(problem.option, problem.text) for problem in check_options(config, set(given))]


def test_a_good_config_has_no_problem() -> None:
    assert texts_of(config_of(), "optim.betas", "schedule.final_lr_ratio") == []
    assert texts_of(config_of(checkpoint__keep_best=True), "checkpoint.keep_best") == []


def test_shards_from_elsewhere_are_not_prepared_and_have_options_of_their_own() -> None:
    sources = [
        {"name": "far", "shards": "s3://me:secret@bucket/far?key=secret", "paths": ["x"]},
        {"name": "command", "shards": "pipe:ssh host cat corpus"},
    ]
    config = config_of(data__sources=sources, data__seq_len=64, data__retry_seconds=1800)
    assert texts_of(config, "data.cache_dir", "data.cache_bytes", "data.retry_seconds") == [
        ("data.sources.0.shards", "data.sources.0.shards is s3://bucket/far?…; expected a folder, because the source has "
         "paths. Prepare it into a folder, upload that, and train with the URL and without paths."),
        ("data.sources.1.shards", "data.sources.1.shards is pipe:ssh host cat corpus; expected {} where the command takes "
         "the path of a file in the corpus. Write it as in pipe:ssh host cat corpus/{}."),
        ("data.retry_seconds", "data.retry_seconds is 1800; expected less than parallel.timeout_seconds (900), after "
         "which the other ranks give up. Use 300, or raise the other."),
    ]  # fmt: skip
    (problem,) = texts_of(config_of(), "data.cache_dir")
    assert "It is for shards and checkpoints elsewhere, and all" in problem[1]


@pytest.mark.parametrize(
    ("size", "model", "use"),
    [(3, {}, "2 or 4"), (8, {}, "4"), (4, {"model__num_kv_heads": 2}, None), (2, {"model__num_kv_heads": 1}, None),
     (4, {"model__num_heads": 6, "model__dim": 60, "model__num_kv_heads": 3}, "1"), (2, {"data__seq_len": 127}, "1")],
)  # fmt: skip
def test_rows_are_shared_evenly(size, model, use) -> None:
    config = config_of(parallel__sequence_parallel_size=size, **model)
    heads = config.model.num_heads
    expected = (
        f"parallel.sequence_parallel_size is {size}; expected a divisor of data.seq_len ({config.data.seq_len}) and of "
        f"model.num_heads ({heads}), and a divisor or multiple of model.num_kv_heads "
        f"({config.model.num_kv_heads or heads}). Use {use}."
    )
    assert texts_of(config) == ([("parallel.sequence_parallel_size", expected)] if use else [])


def test_a_feed_forward_by_chunks_is_refused_where_it_saves_nothing() -> None:
    assert texts_of(config_of(train__ffn_chunk_tokens=9, train__activation_checkpointing="full")) == []
    assert texts_of(config_of(train__ffn_chunk_tokens=9, train__activation_checkpointing="selective")) == [(
        "train.ffn_chunk_tokens",
        "train.ffn_chunk_tokens is 9; expected 0 with train.activation_checkpointing selective, which keeps what is "
        "model.ffn_dim wide. Use train.activation_checkpointing=full, or drop it.",
    )]  # fmt: skip
    for changes, what, fix in (
        ({"train__ffn_chunk_tokens": 9}, "train.ffn_chunk_tokens 9", "train.ffn_chunk_tokens=0"),
        ({"train__activation_checkpointing": "offload"}, "train.activation_checkpointing offload",
         "train.activation_checkpointing=full"),
    ):  # fmt: skip
        assert texts_of(config_of(train__compile=True, **changes)) == [(
            "train.compile",
            f"train.compile is true; expected false or null with {what}, which compiled code does not heed. Use "
            f"train.compile=false, or {fix}.",
        )]  # fmt: skip


def test_compiled_blocks_and_zero_3_exclude_each_other() -> None:
    assert texts_of(config_of(train__compile=True, parallel__zero_stage=2)) == []
    assert texts_of(config_of(train__compile=False, parallel__zero_stage=3)) == []
    assert texts_of(config_of(parallel__zero_stage=3)) == []
    assert texts_of(config_of(train__compile=True, parallel__zero_stage=3)) == [(
        "train.compile",
        "train.compile is true; expected false or null with parallel.zero_stage 3, which gathers weights inside of a "
        "block. Use train.compile=false, or parallel.zero_stage=2.",
    )]  # fmt: skip


def test_what_deepspeed_has_at_stage_3_only() -> None:
    for name, value, text in (
        ("nvme_dir", "/nvme", '"/nvme"'),
        ("hpz_ranks", 8, "8"),
        ("quantize", ["weights"], "[weights]"),
    ):
        wanted = {f"parallel__{name}": value, "parallel__offload": "optimizer"}
        assert texts_of(config_of(parallel__zero_stage=3, **wanted)) == []
        assert texts_of(config_of(parallel__zero_stage=2, **wanted)) == [(
            f"parallel.{name}",
            f"parallel.{name} is {text}; expected to be left out with parallel.zero_stage 2. DeepSpeed has it at stage 3 "
            "only: use parallel.zero_stage=3.",
        )]  # fmt: skip
    assert texts_of(config_of(parallel__zero_stage=3, parallel__offload="parameters", parallel__hpz_ranks=8)) == [(
        "parallel.hpz_ranks",
        "parallel.hpz_ranks is 8; expected 1 with parallel.offload parameters, which takes weights from the GPU. Use "
        "parallel.offload=optimizer.",
    )]  # fmt: skip
    assert texts_of(config_of(parallel__zero_stage=3, parallel__quantize=["gradients"], train__precision="bf16")) == [(
        "parallel.quantize",
        "parallel.quantize has gradients; expected train.precision fp16 with it, not bf16: DeepSpeed's kernel takes any "
        "gradient's bits for fp16. Drop it.",
    )]  # fmt: skip


def test_norms_of_gradients_that_lie_on_a_disk_are_refused() -> None:
    common = {"parallel__zero_stage": 3, "parallel__offload": "optimizer", "log__layer_norms_every": 10}
    assert texts_of(config_of(**common)) == []
    assert texts_of(config_of(**common, parallel__nvme_dir="/nvme")) == [(
        "log.layer_norms_every",
        "log.layer_norms_every is 10; expected 0 with parallel.nvme_dir, where gradients lie on a disk. Drop one of them.",
    )]  # fmt: skip


def test_only_what_is_divided_is_offloaded() -> None:
    for stage, offload in ((0, "none"), (1, "optimizer"), (3, "optimizer"), (3, "parameters")):
        assert texts_of(config_of(parallel__zero_stage=stage, parallel__offload=offload)) == []
    assert texts_of(config_of(parallel__zero_stage=0, parallel__offload="optimizer")) == [(
        "parallel.offload",
        "parallel.offload is optimizer; expected none with parallel.zero_stage 0, which does not divide anything. Use "
        "parallel.zero_stage=1.",
    )]  # fmt: skip
    assert texts_of(config_of(parallel__zero_stage=2, parallel__offload="parameters")) == [(
        "parallel.offload",
        "parallel.offload is parameters; expected none with parallel.zero_stage 2, which does not divide weights. Use "
        "parallel.zero_stage=3.",
    )]  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "option", "reason"),
    [
        ({}, "optim.alpha", "Only rmsprop has it, and optim.name is adamw."),
        ({"optim__name": "adam"}, "optim.momentum", "Only muon, sgd and rmsprop have it, and optim.name is adam."),
        ({"optim__name": "lion"}, "optim.nesterov", "Only muon and sgd have it, and optim.name is lion."),
        ({"optim__name": "sgd"}, "optim.eps", "Only adamw, adam, muon and rmsprop have it, and optim.name is sgd."),
        (
            {"optim__name": "rmsprop"},
            "optim.betas",
            "Only adamw, adam, muon and lion have it, and optim.name is rmsprop.",
        ),
        ({}, "schedule.decay_steps", "Only wsd has it, and schedule.name is cosine."),
        ({"schedule__name": "constant"}, "schedule.final_lr_ratio", "The rate of a constant schedule does not fall."),
        (
            {"model__rope_scaling": {"type": "linear", "factor": 2.0}},
            "model.rope_scaling.original_seq_len",
            "It is for llama3 and yarn, and model.rope_scaling.type is linear.",
        ),
        (
            {"model__rope_scaling": {"type": "llama3", "factor": 2.0, "original_seq_len": 32}},
            "model.rope_scaling.attention_factor",
            "It is for yarn, and model.rope_scaling.type is llama3.",
        ),
        ({"eval__every_steps": 5}, "eval.min_delta", "It belongs to early stopping, and eval.patience is 0."),
        ({}, "eval.sample_tokens", "It is for text sampled during training, and eval.sample_every_steps is 0."),
        (
            {"data__sources": [{"name": "web", "shards": "x"}]},
            "data.sources.0.text_field",
            "It is for reading raw text, and the source has no paths.",
        ),
        (
            {"data__sources": [{"name": "web", "shards": "x"}]},
            "data.sources.0.format",
            "It is for reading raw text, and the source has no paths.",
        ),
        (
            {"data__sources": [{"name": "web", "shards": "x", "paths": ["a.bin"], "format": "nanogpt"}]},
            "data.sources.0.text_field",
            "The source holds token ids, which have no text.",
        ),
    ],
)
def test_options_that_would_do_nothing(changes: dict[str, Any], option: str, reason: str) -> None:
    config = config_of(**changes)
    assert texts_of(config) == []
    [(place, text)] = texts_of(config, option)
    assert place == option
    assert text.endswith(f"; expected to be left out. {reason}")


def test_options_that_do_something_are_not_idle() -> None:
    config = config_of(
        optim__name="rmsprop",
        schedule__name="wsd",
        eval__every_steps=5,
        eval__patience=2,
        eval__sample_every_steps=5,
        data__sources=[{"name": "far", "paths": ["x"], "shards": "s3://far"}],
        data__seq_len=64,
        parallel__offload="optimizer",
    )
    assert sorted(idle_options(config)) == [
        "data.sources.0.augment.span_shuffle",
        "optim.betas",
        "optim.nesterov",
        "resume.data",
        "resume.optimizer",
        "resume.schedule",
    ]
    stores = ["data.cache_bytes", "data.cache_dir", "data.retry_seconds"]
    config = config_of(optim__name="muon", eval__sample_every_steps=5)
    assert sorted(idle_options(config)) == [
        *stores, "data.sources.0.augment.span_shuffle", "eval.min_delta", "optim.alpha", "parallel.nvme_dir", "resume.data", "resume.optimizer", "resume.schedule",
        "schedule.decay_steps",
    ]  # fmt: skip
    assert "optim.momentum" not in idle_options(config_of(optim__name="sgd"))


def test_defaults_are_the_optimizers_own() -> None:
    own = {
        name: (optim.betas, optim.momentum, optim.nesterov)
        for name in ("adamw", "muon", "lion", "sgd", "rmsprop")
        for optim in [config_of(optim__name=name).optim]
    }
    assert own == {
        "adamw": ((0.9, 0.95), 0.0, False),
        "muon": ((0.9, 0.95), 0.95, True),
        "lion": ((0.9, 0.99), 0.0, False),
        "sgd": ((0.9, 0.95), 0.0, False),
        "rmsprop": ((0.9, 0.95), 0.0, False),
    }
    assert config_of(optim__name="muon", optim__momentum=0.9).optim.momentum == 0.9


def test_nesterov_needs_momentum() -> None:
    text = "optim.momentum is 0.0; expected above 0, because optim.nesterov is true. Use 0.9, or optim.nesterov=false."
    assert texts_of(config_of(optim__name="sgd", optim__nesterov=True)) == [("optim.momentum", text)]
    assert texts_of(config_of(optim__name="sgd", optim__nesterov=True, optim__momentum=0.9)) == []
    assert texts_of(config_of(optim__name="muon", optim__momentum=0.0)) == [("optim.momentum", text)]


def sources_of(**options: list[float | None]) -> list[dict[str, Any]]:
    """Three sources with these options, each for those where it is not None."""
    names = ("web", "code", "books")
    return [
        {"name": name, "shards": f"data/{name}"}
        | {key: values[number] for key, values in options.items() if values[number] is not None}
        for number, name in enumerate(names)
    ]


def test_all_sources_are_mixed_by_the_same() -> None:
    assert texts_of(config_of(data__sources=sources_of(epochs=[1, 2, 0.5]))) == []
    assert texts_of(config_of(data__sources=sources_of(epochs=[1, None, 0.5]))) == [(
        "data.sources.1",
        "data.sources.1.epochs is missing; expected it in every source, because data.sources.0 has it. Add it; 0 leaves "
        "code to later phases.",
    )]  # fmt: skip
    both = config_of(data__sources=sources_of(epochs=[1, 2, 3], tokens=[None, 5, None]))
    assert texts_of(both) == [
        (
            "data.sources.1.tokens",
            "data.sources.1.tokens is 5.0; expected epochs or tokens in all sources, not both. Drop one.",
        )
    ]
    weighed = config_of(data__sources=sources_of(tokens=[1, 2, 3], weight=[1, None, None]))
    assert texts_of(weighed, "data.sources.0.weight") == [(
        "data.sources.0.weight",
        "data.sources.0.weight is 1.0; expected to be left out. The sources are mixed by their tokens.",
    )]  # fmt: skip


def test_sources_are_used_at_last_and_some_at_first() -> None:
    later = [{"from_step": 50, "weights": {"books": 1.0}}]
    assert texts_of(config_of(data__sources=sources_of(weight=[1, 1, 0]), data__phases=later)) == []
    assert texts_of(config_of(data__sources=sources_of(weight=[1, 0, 0]), data__phases=later)) == [(
        "data.sources.1.weight",
        "data.sources.1.weight is 0; expected above 0, or code in one of data.phases. Drop the source, or use it.",
    )]  # fmt: skip
    text = (
        "data.sources.0.tokens is 0; expected above 0 in one source, so that there is something to begin with. Use 1."
    )
    phases = [{"from_step": 50, "tokens": {"web": 1, "code": 1, "books": 1}}]
    found = texts_of(config_of(data__sources=sources_of(tokens=[0, 0, 0]), data__phases=phases))
    assert found == [("data.sources.0.tokens", text)]


PHASE_SOURCES = sources_of(weight=[1, 1, 1])


@pytest.mark.parametrize(
    ("phases", "option", "text"),
    [
        (
            [{"from_step": 50, "seq_len": 32}, {"from_step": 50, "seq_len": 64}],
            "data.phases.1.from_step",
            "data.phases.1.from_step is 50; expected more than data.phases.0.from_step (50). Put the phases into their "
            "order.",
        ),
        (
            [{"from_step": 100, "weights": {"web": 1.0}}],
            "data.phases.0.from_step",
            "data.phases.0.from_step is 100; expected less than the run's 100 steps. Lengthen the run, or drop the phase.",
        ),
        (
            [{"from_step": 50}],
            "data.phases.0",
            "data.phases.0 gives nothing but from_step; expected weights, epochs, tokens or seq_len. Add one, or drop it.",
        ),
        (
            [{"from_step": 50, "weights": {"web": 1.0}, "tokens": {"code": 2.0}}],
            "data.phases.0.tokens",
            "data.phases.0.tokens is {code: 2.0}; expected one of weights, epochs and tokens. Drop one.",
        ),
        (
            [{"from_step": 50, "weights": {"web": 1.0, "wiki": 2.0}}],
            "data.phases.0.weights",
            "data.phases.0.weights has wiki; expected names of data.sources. Use web or code or books.",
        ),
        (
            [{"from_step": 50, "seq_len": 512}],
            "data.phases.0.seq_len",
            "data.phases.0.seq_len is 512; expected a divisor of train.micro_batch_size x data.seq_len (2 x 64 = 128), so "
            "that a step has as many tokens in every phase. Use another length, or a micro-batch of a multiple of 8 rows.",
        ),
    ],
)
def test_phases_follow_each_other_and_name_sources(phases: list[Any], option: str, text: str) -> None:
    assert texts_of(config_of(data__sources=PHASE_SOURCES, data__phases=phases)) == [(option, text)]
    good = [{"from_step": 50, "weights": {"web": 2.0, "code": 1.0}, "seq_len": 128}, {"from_step": 60, "seq_len": 32}]
    assert texts_of(config_of(data__sources=PHASE_SOURCES, data__phases=good)) == []


def test_length_is_given_once() -> None:
    assert texts_of(config_of(train__num_steps=None)) == [
        ("train", "train.num_steps is missing; expected train.num_steps or train.num_tokens. Add one.")
    ]
    assert texts_of(config_of(train__num_tokens=5)) == [
        (
            "train.num_tokens",
            "train.num_tokens is 5; expected train.num_steps or train.num_tokens, not both. Drop one: "
            "train.num_tokens=null or train.num_steps=null as an override.",
        )
    ]


def test_warmup_fits_into_the_run() -> None:
    assert texts_of(config_of(schedule__warmup_steps=100)) == []
    message = "schedule.warmup_steps is 101; expected at most the run's 100 steps. Use 10."
    assert texts_of(config_of(schedule__warmup_steps=101)) == [("schedule.warmup_steps", message)]
    config = config_of(train__num_steps=None, train__num_tokens=100 * 8 * 64, schedule__warmup_steps=101)
    assert texts_of(config) == [("schedule.warmup_steps", message)]


def test_gradients_are_summed_in_bf16_with_bf16_only() -> None:
    assert texts_of(config_of(train__precision="bf16", train__grad_accum_dtype="bf16")) == []
    message = "train.grad_accum_dtype is bf16; expected fp32 with train.precision fp32. Use fp32."
    found = texts_of(config_of(train__precision="fp32", train__grad_accum_dtype="bf16"))
    assert found == [("train.grad_accum_dtype", message)]


def test_steps_that_are_traced_are_steps_of_the_run() -> None:
    assert texts_of(config_of(train__profile_steps=[1, 100])) == []
    message = "train.profile_steps has 101; expected at most the run's 100 steps. Use 100."
    assert texts_of(config_of(train__profile_steps=[5, 101, 102])) == [("train.profile_steps", message)]


def test_decay_fits_beside_the_warmup() -> None:
    assert texts_of(config_of(schedule__name="wsd", schedule__warmup_steps=90)) == []
    assert texts_of(config_of(schedule__name="wsd", schedule__warmup_steps=91)) == [
        (
            "schedule.warmup_steps",
            "schedule.decay_steps is 10 (a tenth of the run); expected at most the 9 steps that the warm-up of 91 leaves "
            "of 100. Shorten one of them.",
        )
    ]
    assert texts_of(config_of(schedule__name="wsd", schedule__warmup_steps=50, schedule__decay_steps=51)) == [
        (
            "schedule.decay_steps",
            "schedule.decay_steps is 51; expected at most the 50 steps that the warm-up of 50 leaves of 100. Shorten one "
            "of them.",
        )
    ]


def test_micro_batches_divide_the_batch() -> None:
    assert texts_of(config_of(train__global_batch_size=12, train__micro_batch_size=8)) == [
        (
            "train.micro_batch_size",
            "train.micro_batch_size is 8; expected a divisor of train.global_batch_size (12). Use 6, or a global batch of "
            "16.",
        )
    ]
    assert texts_of(config_of(train__global_batch_size=2, train__micro_batch_size=8)) == [
        (
            "train.micro_batch_size",
            "train.micro_batch_size is 8; expected a divisor of train.global_batch_size (2). Use 2, or a global batch of 8.",
        )
    ]


def test_early_stopping_needs_evaluations() -> None:
    assert texts_of(config_of(eval__patience=3)) == [
        (
            "eval.patience",
            "eval.patience is 3; expected 0, because eval.every_steps is 0. Set eval.every_steps.",
        )
    ]


def test_evaluations_need_held_out_documents() -> None:
    assert texts_of(config_of(eval__every_steps=3, data__val_fraction=0)) == [
        (
            "data.val_fraction",
            "data.val_fraction is 0.0; expected above 0, because eval.every_steps is 3. Use 0.001, or eval.every_steps=0.",
        )
    ]
    prepared = [{"name": "web", "shards": "x"}]  # its validation split exists already
    assert texts_of(config_of(eval__every_steps=3, data__val_fraction=0, data__sources=prepared)) == []


def test_sources_are_distinct() -> None:
    sources = [{"name": "web", "shards": "data/web"}, {"name": "web", "shards": "data/web/"}]
    assert texts_of(config_of(data__sources=sources)) == [
        (
            "data.sources.1.name",
            "data.sources.1.name is web; expected a name of its own. data.sources.0 has it.",
        ),
        (
            "data.sources.1.shards",
            "data.sources.1.shards is data/web; expected a folder of its own. data.sources.0 has it.",
        ),
    ]


def test_a_url_twice_is_named_without_its_password() -> None:
    url = "https://me:secret@host/web?signature=secret"
    sources = [{"name": "web", "shards": url}, {"name": "code", "shards": f"{url}/"}]
    problems = texts_of(config_of(data__sources=sources, data__retry_seconds=60))
    assert problems == [
        (
            "data.sources.1.shards",
            "data.sources.1.shards is https://host/web?…; expected a folder of its own. data.sources.0 has it.",
        )
    ]


def test_the_family_takes_the_models_options() -> None:
    problems = texts_of(config_of(model__num_heads=3, model__norm="layernorm"))
    assert sorted(option for option, _ in problems) == ["model.dim", "model.norm"]
    assert all(text.startswith(f"{option} is ") for option, text in problems)


def test_qwen2_is_not_for_a_tokenizer_that_its_clients_read_otherwise() -> None:
    (problem,) = texts_of(config_of(model__family="qwen2"))
    assert problem[0] == "model.family" and problem[1].startswith(
        "model.family is qwen2, and tokenizer.model is t.model; expected a tokenizer.json for it, because transformers 5"
    )
    assert texts_of(config_of(model__family="qwen2", tokenizer__model="downloads/qwen/tokenizer.json")) == []


def test_checkpoints_go_where_writing_is_possible_and_no_secret_is_written() -> None:
    for place, text in {
        "s3://me:hidden@bucket/run": "is s3://bucket/run with a password or a query; expected neither, for this is written "
        "to the run folder. Leave them out: credentials come from the environment.",
        "s3://bucket/run?signature=hidden": "is s3://bucket/run?… with a password or a query; expected neither,",
        "https://host/run": "is https://host/run; expected a folder or an object store. Use s3:// or gs://, or none.",
        "memory://run": "is memory://run; expected a folder or an object store.",
    }.items():
        for name, config in (
            ("checkpoint.dir", config_of(checkpoint__dir=place)),
            ("resume.from", config_of(resume__from=place)),
        ):
            (problem,) = texts_of(config)
            assert problem[0] == name and problem[1].startswith(f"{name} {text}"), problem
            assert "hidden" not in problem[1]
    for place in ("", "/somewhere", "s3://bucket/run", "sftp://me@host/run"):
        assert texts_of(config_of(checkpoint__dir=place)) == [] == texts_of(config_of(resume__from=place))
    assert texts_of(config_of(resume__from="s3://bucket/run"), "data.retry_seconds") == []
    assert texts_of(config_of(checkpoint__dir="s3://bucket/run"), "data.retry_seconds") == []  # it is read then


def test_what_is_kept_for_ever_is_saved_at_all() -> None:
    assert texts_of(config_of(checkpoint__every_steps=1000, checkpoint__keep_every=3000)) == []
    (problem,) = texts_of(config_of(checkpoint__every_steps=1000, checkpoint__keep_every=1500))
    assert problem == (
        "checkpoint.keep_every",
        "checkpoint.keep_every is 1500; expected a multiple of checkpoint.every_steps (1000), which are the steps that "
        "are saved. Use 2000.",
    )
    (problem,) = texts_of(config_of(checkpoint__keep_every=1500), "checkpoint.keep_every")
    assert problem[1] == (
        "checkpoint.keep_every is 1500; expected to be left out. It is for checkpoints on the way, and "
        "checkpoint.every_steps is 0."
    )


def test_what_reads_urls_is_looked_for_without_opening_them(tmp_path, monkeypatch, capsys) -> None:
    import fsspec

    def found(protocol: str) -> type:
        if protocol in ("gs", "s3"):
            raise ImportError(f"Install what is for {protocol}")
        return known(protocol)

    known = fsspec.get_filesystem_class
    monkeypatch.setattr(fsspec, "get_filesystem_class", found)
    path = tmp_path / "config.yaml"
    path.write_text(
        "run: {dir: runs/here}\ntokenizer: {model: t, vocab_size: 300}\nmodel: {family: llama, dim: 32, num_layers: 1, "
        "num_heads: 2}\ndata: {seq_len: 32, sources: [{name: web, shards: 'simplecache::s3://b/web'}, {name: own, shards: "
        "own}, {name: cat, shards: 'pipe:cat {}'}]}\noptim: {lr: 1}\ntrain: {num_steps: 1, global_batch_size: 1, "
        "micro_batch_size: 1}\n"
    )
    assert main([str(path), "checkpoint.dir=gs://b/run", "resume.from=gcz://b/run", "--check"]) == 2
    said = capsys.readouterr().err
    for line in (
        "data.sources.0.shards is simplecache::s3://b/web: Install what is for s3. Install what reads s3: pip install "
        "'longhaul[s3]'",
        "checkpoint.dir is gs://b/run: Install what is for gs. Install what reads gs: pip install 'longhaul[gs]'",
        "resume.from is gcz://b/run cannot be opened: Protocol not known: gcz. Use a folder or s3://, gs://",
    ):
        assert line in said, said
    assert main([str(path), "data.sources.0.shards=web", "--check"]) == 0 and capsys.readouterr().out == "runs/here\n"
