"""Rules that hold between options: what one section alone cannot see."""

from __future__ import annotations

import math
from collections.abc import Iterator, Set

from pretrain.errors import ConfigError, Problem
from pretrain.options.batch_plan import num_steps_of
from pretrain.options.config import Config
from pretrain.options.config_docs import yaml_value
from pretrain.options.families import FAMILIES, resolve_shape
from pretrain.options.parallel_checks import parallel_problems
from pretrain.options.phases import KINDS, amounts_of, kind_of_sources, val_fraction_of
from pretrain.options.schedule import num_decay_steps
from pretrain.storage.stores import PIPE, has_credentials, is_remote, shown

_OPTIMIZERS_WITH = {
    "betas": "adamw adam muon lion",
    "eps": "adamw adam muon rmsprop",
    "alpha": "rmsprop",
    "momentum": "muon sgd rmsprop",
    "nesterov": "muon sgd",
}
# Which types of RoPE scaling take an option; an option that is not here is for all.
_ROPE_SCALING_TYPES = {
    "original_seq_len": "llama3 and yarn",
    "low_freq_factor": "llama3",
    "high_freq_factor": "llama3",
    "beta_fast": "yarn",
    "beta_slow": "yarn",
    "attention_factor": "yarn",
}


def check_options(config: Config, given: Set[str]) -> list[Problem]:
    """Return every problem between the options of a config whose single values are right.

    Args:
        config: the config.
        given: dotted names of the options that the user wrote; an item of a list is its number.
    """
    problems = [
        Problem(name, f"{name} is {yaml_value(_value(config, name))}; expected to be left out. {reason}")
        for name, reason in idle_options(config).items()
        if name in given
    ]
    rules = (
        _length_problems,
        _optimizer_problems,
        _schedule_problems,
        _batch_problems,
        _evaluation_problems,
        _lora_problems,
        _source_problems,
        _mixture_problems,
        _phase_problems,
        _store_problems,
        _checkpoint_problems,
        _model_problems,
    )
    problems += parallel_problems(config)
    return problems + [problem for rule in rules for problem in rule(config)]


def idle_options(config: Config) -> dict[str, str]:
    """Return the options that would do nothing in this config, each with the reason.

    To give one is an error, because whoever gives it expects it to do something.
    """
    optimizer, shape = config.optim.name, config.schedule.name
    idle: dict[str, str] = {}
    for option, users in _OPTIMIZERS_WITH.items():
        if optimizer not in users.split():
            *others, last = users.split()
            who = f"{', '.join(others)} and {last} have" if others else f"{last} has"
            idle[f"optim.{option}"] = f"Only {who} it, and optim.name is {optimizer}."
    if shape != "wsd":
        idle["schedule.decay_steps"] = f"Only wsd has it, and schedule.name is {shape}."
    if shape == "constant":
        idle["schedule.final_lr_ratio"] = "The rate of a constant schedule does not fall."
    if config.model.rope_scaling is not None:
        idle |= _idle_rope_options(config.model.rope_scaling.type)
    if config.checkpoint.every_steps == 0 < config.checkpoint.keep_every:
        idle["checkpoint.keep_every"] = "It is for checkpoints on the way, and checkpoint.every_steps is 0."
    if config.eval.patience == 0:
        idle["eval.min_delta"] = "It belongs to early stopping, and eval.patience is 0."
    if config.eval.sample_every_steps == 0:
        for name in ("sample_prompts", "sample_tokens", "sample_temperature"):
            idle[f"eval.{name}"] = "It is for text sampled during training, and eval.sample_every_steps is 0."
    if config.guard.spike_sigmas == 0:
        for name in ("spike_steps", "rollback_steps", "max_rollbacks"):
            idle[f"guard.{name}"] = "It is about spikes, and guard.spike_sigmas is 0."
    if not config.resume.from_:
        for name in ("optimizer", "schedule", "data"):
            idle[f"resume.{name}"] = "It is for beginning from another run, and resume.from is empty."
    elif config.train.lora is not None and config.resume.optimizer:
        idle["resume.optimizer"] = "Adapters have moments of their own, which begin anew."
    if config.parallel.offload == "none":
        idle["parallel.nvme_dir"] = "It is where offloaded states lie, and parallel.offload is none."
    if not _reads_elsewhere(config):
        for name in ("cache_dir", "cache_bytes", "retry_seconds"):
            idle[f"data.{name}"] = (
                "It is for shards and checkpoints elsewhere, and all sources have theirs in folders, as has the run."
            )
    kind = kind_of_sources(config.data)
    for number, source in enumerate(config.data.sources):
        if kind != "weights":
            idle[f"data.sources.{number}.weight"] = f"The sources are mixed by their {kind}."
        if not source.paths:
            reason = "It is for reading raw text, and the source has no paths."
            for name in ("text_field", "format", "filter", "examples", "augment.back_translation"):
                idle[f"data.sources.{number}.{name}"] = reason
        elif source.examples is not None:
            for name in ("text_field", "filter"):
                idle[f"data.sources.{number}.{name}"] = "The source holds examples, whose fields `examples` names."
        elif source.format in ("megatron", "nanogpt"):
            for name in ("text_field", "filter", "augment.back_translation"):
                idle[f"data.sources.{number}.{name}"] = "The source holds token ids, which have no text."
        elif source.format != "auto":
            idle[f"data.sources.{number}.text_field"] = f"Where the text is in {source.format}'s files is known."
    for number, source in enumerate(config.data.sources):
        if source.paths and source.examples is None:
            idle[f"data.sources.{number}.augment.span_shuffle"] = "It is for prompts, and the source has no `examples`."
        if source.val_fraction == 1:
            for name in ("token_dropout", "span_shuffle", "back_translation"):
                idle[f"data.sources.{number}.augment.{name}"] = "It is for training, and all of the source is held out."
    return idle


def _idle_rope_options(scaling_type: str) -> dict[str, str]:
    """Return the options of `model.rope_scaling` that its type does not take."""
    return {
        f"model.rope_scaling.{name}": f"It is for {types}, and model.rope_scaling.type is {scaling_type}."
        for name, types in _ROPE_SCALING_TYPES.items()
        if scaling_type not in types.split()
    }


def _value(config: Config, name: str) -> object:
    """Return the value of the option with a dotted name."""
    value: object = config
    for segment in name.split("."):
        value = value[int(segment)] if isinstance(value, list) else _field(value, segment)
    return value


def _field(section: object, option: str) -> object:
    return getattr(section, option if hasattr(section, option) else f"{option}_")  # as section.option_of


def _length_problems(config: Config) -> Iterator[Problem]:
    """Check that the length of the run is given once."""
    train = config.train
    if train.num_steps is None and train.num_tokens is None:
        yield Problem("train", "train.num_steps is missing; expected train.num_steps or train.num_tokens. Add one.")
    if train.num_steps is not None and train.num_tokens is not None:
        text = f"train.num_tokens is {train.num_tokens}; expected train.num_steps or train.num_tokens, not both. Drop "
        yield Problem("train.num_tokens", text + "one: train.num_tokens=null or train.num_steps=null as an override.")


def _optimizer_problems(config: Config) -> Iterator[Problem]:
    """Check that there is momentum where it is to be Nesterov's."""
    optim = config.optim
    if optim.nesterov and not optim.momentum and optim.name in _OPTIMIZERS_WITH["nesterov"].split():
        text = f"optim.momentum is {optim.momentum}; expected above 0, because optim.nesterov is true. Use 0.9, or "
        yield Problem("optim.momentum", text + "optim.nesterov=false.")


def _schedule_problems(config: Config) -> Iterator[Problem]:
    """Check that warm-up, decay and the steps that are traced fit into the run."""
    if config.train.num_steps is None and config.train.num_tokens is None:
        return
    schedule, num_steps = config.schedule, num_steps_of(config)
    if beyond := [step for step in config.train.profile_steps if step > num_steps]:
        text = f"train.profile_steps has {beyond[0]}; expected at most the run's {num_steps} steps. Use {num_steps}."
        yield Problem("train.profile_steps", text)
    warmup = schedule.warmup_steps
    if warmup > num_steps:
        text = (
            f"schedule.warmup_steps is {warmup}; expected at most the run's {num_steps} steps. Use {num_steps // 10}."
        )
        yield Problem("schedule.warmup_steps", text)
    elif schedule.name == "wsd" and warmup + (decay := num_decay_steps(schedule, num_steps)) > num_steps:
        own = "" if schedule.decay_steps else " (a tenth of the run)"
        yield Problem(
            "schedule.decay_steps" if schedule.decay_steps else "schedule.warmup_steps",
            f"schedule.decay_steps is {decay}{own}; expected at most the {num_steps - warmup} steps that the warm-up "
            f"of {warmup} leaves of {num_steps}. Shorten one of them.",
        )


def _batch_problems(config: Config) -> Iterator[Problem]:
    """Check what holds for any number of ranks; `BatchPlan` checks the rest."""
    rows, micro = config.train.global_batch_size, config.train.micro_batch_size
    if rows % micro:
        divisor = max(size for size in range(1, micro + 1) if rows % size == 0)
        yield Problem(
            "train.micro_batch_size",
            f"train.micro_batch_size is {micro}; expected a divisor of train.global_batch_size ({rows}). Use "
            f"{divisor}, or a global batch of {math.ceil(rows / micro) * micro}.",
        )
    if config.train.grad_accum_dtype == "bf16" and config.train.precision != "bf16":
        text = f"train.grad_accum_dtype is bf16; expected fp32 with train.precision {config.train.precision}. Use fp32."
        yield Problem("train.grad_accum_dtype", text)


def _evaluation_problems(config: Config) -> Iterator[Problem]:
    """Check that evaluation has documents, and early stopping evaluations."""
    patience, every = config.eval.patience, config.eval.every_steps
    if patience and not every:
        text = f"eval.patience is {patience}; expected 0, because eval.every_steps is 0. Set eval.every_steps."
        yield Problem("eval.patience", text)
    if config.eval.metric and not every:
        text = f"eval.metric is {config.eval.metric}; expected null, because eval.every_steps is 0. Set every_steps."
        yield Problem("eval.metric", text)
    prepared_here = [source.name for source in config.data.sources if source.paths]
    if every and prepared_here and not any(val_fraction_of(source, config.data) for source in config.data.sources):
        text = (
            f"data.val_fraction is {config.data.val_fraction}; expected above 0, because eval.every_steps is {every}."
        )
        yield Problem("data.val_fraction", f"{text} Use 0.001, or eval.every_steps=0.")
    for task, given in config.eval.tasks.items():
        if unknown := sorted(given.keys() - {"every_steps", "limit", "num_fewshot"}):
            text = f"eval.tasks has {unknown[0]} for {task}; expected every_steps, limit or num_fewshot. Drop it."
            yield Problem("eval.tasks", text)
        elif not given.get("every_steps", every):
            text = f"eval.tasks does {task} at no step, since every_steps is 0; expected 1 or more. Write"
            yield Problem("eval.tasks", f"{text} {task}: {{every_steps: 1000}}.")


def _lora_problems(config: Config) -> Iterator[Problem]:
    """Check that adapters have weights to stand beside, and nothing that does not know them."""
    if config.train.lora is None:
        return
    for is_wrong, name, value, expected, fix in (
        (not config.resume.from_, "resume.from", '""', "the run or checkpoint whose weights are adapted", "Name it"),
        (config.optim.name == "muon", "optim.name", "muon", "another with train.lora: it is for whole matrices",
         "Use adamw"),
    ):  # fmt: skip
        if is_wrong:
            yield Problem(name, f"{name} is {value}; expected {expected}. {fix}.")


def _source_problems(config: Config) -> Iterator[Problem]:
    """Check that each source has a name and a folder of its own."""
    names: dict[str, int] = {}
    folders: dict[str, int] = {}
    if config.data.packing == "concat" and any(source.examples for source in config.data.sources):
        text = "data.packing is concat; expected best_fit or document, because a source has examples, which are not cut"
        yield Problem("data.packing", f"{text}. Use best_fit.")
    for number, source in enumerate(config.data.sources):
        first = names.setdefault(source.name, number)
        if first != number:
            text = (
                f"data.sources.{number}.name is {source.name}; expected a name of its own. data.sources.{first} has it."
            )
            yield Problem(f"data.sources.{number}.name", text)
        folder = source.shards.rstrip("/")
        first = folders.setdefault(folder, number)
        if first != number:
            name = f"data.sources.{number}.shards"
            text = f"{name} is {shown(folder)}; expected a folder of its own. data.sources.{first} has it."
            yield Problem(name, text)


def _reads_elsewhere(config: Config) -> bool:
    """Whether something is in no folder."""
    places = [config.checkpoint.dir, config.resume.from_, *(source.shards for source in config.data.sources)]
    return any(map(is_remote, places))


def _checkpoint_problems(config: Config) -> Iterator[Problem]:
    """Check which checkpoints are kept, where they are written, and where others are read."""
    every, keep = config.checkpoint.every_steps, config.checkpoint.keep_every
    if every and keep % every:
        text = f"checkpoint.keep_every is {keep}; expected a multiple of checkpoint.every_steps ({every}), which are"
        yield Problem("checkpoint.keep_every", f"{text} the steps that are saved. Use {-(-keep // every) * every}.")
    for place, name in ((config.checkpoint.dir, "checkpoint.dir"), (config.resume.from_, "resume.from")):
        if not is_remote(place):
            continue
        if place.partition(":")[0].lower() in ("pipe", "http", "https", "memory"):
            text = f"{name} is {shown(place)}; expected a folder or an object store. Use s3:// or gs://, or none."
            yield Problem(name, text)
        elif has_credentials(place):
            text = f"{name} is {shown(place)} with a password or a query; expected neither, for this is written to the"
            yield Problem(name, f"{text} run folder. Leave them out: credentials come from the environment.")


def _store_problems(config: Config) -> Iterator[Problem]:
    """Check the sources whose shards are not in a folder, and how long what is elsewhere is waited for."""
    remote = [(number, source) for number, source in enumerate(config.data.sources) if is_remote(source.shards)]
    for number, source in remote:
        name = f"data.sources.{number}.shards"
        if source.paths:
            text = (
                f"{name} is {shown(source.shards)}; expected a folder, because the source has paths. Prepare it into a "
            )
            yield Problem(name, text + "folder, upload that, and train with the URL and without paths.")
        if source.shards.startswith(PIPE) and "{}" not in source.shards:
            text = (
                f"{name} is {source.shards}; expected {{}} where the command takes the path of a file in the corpus. "
            )
            yield Problem(name, text + "Write it as in pipe:ssh host cat corpus/{}.")
    limit, timeout = config.data.retry_seconds, config.parallel.timeout_seconds
    if _reads_elsewhere(config) and limit >= timeout:
        text = (
            f"data.retry_seconds is {limit}; expected less than parallel.timeout_seconds ({timeout}), after which the "
        )
        yield Problem("data.retry_seconds", text + f"other ranks give up. Use {timeout // 3 or 1}, or raise the other.")


def _mixture_problems(config: Config) -> Iterator[Problem]:
    """Check that all sources are mixed by the same, that some are there from the start, and that each is at last."""
    data, kind = config.data, kind_of_sources(config.data)
    if kind != "weights":
        first = next(number for number, source in enumerate(data.sources) if getattr(source, kind) is not None)
        for number, source in enumerate(data.sources):
            if getattr(source, kind) is None:
                name = f"data.sources.{number}.{kind}"
                text = f"{name} is missing; expected it in every source, because data.sources.{first} has it."
                yield Problem(f"data.sources.{number}", f"{text} Add it; 0 leaves {source.name} to later phases.")
            if kind == "epochs" and source.tokens is not None:
                text = f"data.sources.{number}.tokens is {yaml_value(source.tokens)}; expected epochs or tokens in all"
                yield Problem(f"data.sources.{number}.tokens", f"{text} sources, not both. Drop one.")
    option = KINDS[kind]
    if all(not getattr(source, option) for source in data.sources):
        text = (
            f"data.sources.0.{option} is 0; expected above 0 in one source, so that there is something to begin with."
        )
        yield Problem(f"data.sources.0.{option}", f"{text} Use 1.")
    for number, source in enumerate(data.sources):
        is_used = getattr(source, option) != 0 or any(
            source.name in amounts for phase in data.phases for amounts in amounts_of(phase).values()
        )
        if source.val_fraction == 1:
            if is_used:
                text = f"data.sources.{number}.val_fraction is 1; expected less, because {source.name} is trained on."
                yield Problem(f"data.sources.{number}.val_fraction", f"{text} Set its {option} to 0, or lower it.")
        elif not is_used:
            text = f"data.sources.{number}.{option} is 0; expected above 0, or {source.name} in one of data.phases."
            yield Problem(f"data.sources.{number}.{option}", f"{text} Drop the source, or use it.")


def _phase_problems(config: Config) -> Iterator[Problem]:
    """Check that phases follow each other within the run, and name sources that there are."""
    data, micro = config.data, config.train.micro_batch_size
    known, before = [source.name for source in data.sources], 0
    has_length = (config.train.num_steps is None) != (config.train.num_tokens is None)
    for number, phase in enumerate(data.phases):
        name = f"data.phases.{number}"
        if phase.from_step <= before:
            text = f"{name}.from_step is {phase.from_step}; expected more than data.phases.{number - 1}.from_step"
            yield Problem(f"{name}.from_step", f"{text} ({before}). Put the phases into their order.")
        elif has_length and phase.from_step >= (num_steps := num_steps_of(config)):
            text = (
                f"{name}.from_step is {phase.from_step}; expected less than the run's {num_steps} steps. Lengthen the"
            )
            yield Problem(f"{name}.from_step", f"{text} run, or drop the phase.")
        before = phase.from_step
        given = amounts_of(phase)
        if not given and phase.seq_len is None:
            text = (
                f"{name} gives nothing but from_step; expected weights, epochs, tokens or seq_len. Add one, or drop it."
            )
            yield Problem(name, text)
        for kind in list(given)[1:]:
            text = f"{name}.{kind} is {yaml_value(given[kind])}; expected one of weights, epochs and tokens. Drop one."
            yield Problem(f"{name}.{kind}", text)
        for kind, amounts in given.items():
            for unknown in [source for source in amounts if source not in known]:
                text = f"{name}.{kind} has {unknown}; expected names of data.sources. Use {' or '.join(known)}."
                yield Problem(f"{name}.{kind}", text)
        seq_len = phase.seq_len or data.seq_len
        if micro * data.seq_len % seq_len:
            least = seq_len // math.gcd(seq_len, data.seq_len)
            text = (
                f"{name}.seq_len is {seq_len}; expected a divisor of train.micro_batch_size x data.seq_len ({micro} x "
            )
            text += f"{data.seq_len} = {micro * data.seq_len}), so that a step has as many tokens in every phase. Use "
            yield Problem(f"{name}.seq_len", f"{text}another length, or a micro-batch of a multiple of {least} rows.")


def _model_problems(config: Config) -> Iterator[Problem]:
    """Check the model's options against its family: one problem for each line of the family's error."""
    try:
        resolve_shape(config.model, config.tokenizer.vocab_size, config.data.max_seq_len)
    except ConfigError as error:
        for line in str(error).splitlines():
            words = [word for word in line.split() if word.startswith("model.")]
            yield Problem(words[0] if words else "model", line)
    if FAMILIES[config.model.family].json_tokenizer and config.tokenizer.model.endswith(".model"):
        yield Problem(
            "model.family", f"model.family is {config.model.family}, and tokenizer.model is {config.tokenizer.model}; "
            "expected a tokenizer.json for it, because transformers 5 reads tokenizers of this family by a class of "
            "its own, "
            "which gives other ids for a sentencepiece model. Use model.family qwen3, or llama."
        )  # fmt: skip
