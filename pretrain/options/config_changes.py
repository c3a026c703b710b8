"""What may differ between the config of a run that exists and the one that it is to go on with."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pretrain.errors import ConfigError
from pretrain.options.batch_plan import num_steps_of
from pretrain.options.config import Config
from pretrain.options.config_docs import yaml_value
from pretrain.options.families import resolve_shape
from pretrain.options.schedule import lr_at
from pretrain.options.section import Section

# Changing these does not change what the run computes, beyond its length. What is already done of `data.sources` and
# `data.phases` cannot be changed either: a checkpoint is compared with the plan of the rows up to it.
FREE_TO_CHANGE = (
    "parallel.", "train.micro_batch_size", "train.num_steps", "train.num_tokens", "eval.", "checkpoint.", "log.",
    "guard.", "resume.", "run.allow_changes", "run.dir", "data.prefetch_steps", "data.prepare_processes",
    "train.compile", "train.activation_checkpointing", "train.ffn_chunk_tokens", "data.sources", "data.phases",
    "data.allow_pipe", "data.cache_dir", "data.cache_bytes", "data.retry_seconds", "data.max_damaged_fraction",
)  # fmt: skip
# Changing these would make other rows of what is already done, which no checkpoint can follow; phases can.
FIXES_ROWS = ("data.seq_len", "data.packing", "data.shuffle_window_shards", "run.seed")
# These say which weights and moments there are; a checkpoint has no others.
FIXES_STATES = (
    "model.dim", "model.num_layers", "model.num_heads", "model.num_kv_heads", "model.head_dim",
    "model.ffn_dim", "model.norm", "model.activation", "model.positions", "model.qk_norm", "model.attention_bias",
    "model.ffn_bias", "model.tie_embeddings", "tokenizer.vocab_size", "optim.name", "train.lora", "train.lora.rank",
    "train.lora.targets",
)  # fmt: skip


def flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Return a nested mapping as one of dotted names; lists are values."""
    if not isinstance(tree, dict):
        return {prefix[:-1]: tree}
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= flatten(value, f"{prefix}{key}.")
    return flat


def changed_options(old: Config, new: Config) -> list[tuple[str, Any, Any]]:
    """Return (option, old value, new value) of every difference, in the config's order."""
    before, after = flatten(old.model_dump(mode="json")), flatten(new.model_dump(mode="json"))
    names = dict.fromkeys([*after, *before])  # a section that may be null has its options in one of them only
    return [(name, before.get(name), after.get(name)) for name in names if before.get(name) != after.get(name)]


def describe_changes(old: Config, new: Config, step: int) -> str:
    """Say what is other than it was, where that is about more than this start, after `step` updates.

    What changes the learning rate at once is among it: a new length of a run moves the end of its schedule.
    """
    changes = [change for change in changed_options(old, new) if not change[0].startswith(("run.", "resume."))]
    texts = [(name, yaml_value(before), yaml_value(after)) for name, before, after in changes]
    before, after = (f"{lr_at(step, num_steps_of(one), one.optim.lr, one.schedule):.2e}" for one in (old, new))
    if before != after and step < num_steps_of(new):
        texts.append((f"learning rate of step {step + 1:,}", before, after))
    return "; ".join(f"{name}: {before}, now {after}" for name, before, after in texts)


def check_same_run(run: Path, old: Config, new: Config) -> None:
    """Check that a run whose checkpoints were made with `old` can go on with `new`.

    Raises:
        ConfigError: it cannot; with each difference and the ways on.
    """
    fixed = (*FIXES_ROWS, *FIXES_STATES)
    refused = [
        (name, yaml_value(before), yaml_value(after)) for name, before, after in changed_options(old, new)
        if not name.startswith(FREE_TO_CHANGE) and (name not in new.run.allow_changes or name in fixed)
    ]  # fmt: skip
    before, after = old.data.max_seq_len, new.data.max_seq_len
    shape = resolve_shape(new.model, new.tokenizer.vocab_size, after)
    if before != after and shape.positions == "learned":  # one parameter for each
        refused.append(("data.phases", f"rows of up to {before} tokens", f"rows of up to {after} tokens"))
    if refused:
        lines = "\n".join(f"  {name}: {before} in the run folder, {after} now" for name, before, after in refused)
        raise ConfigError(
            f"{run}: belongs to another config; expected the same one:\n{lines}\n"
            f"Start a new run with run.dir=…{_way_on(run, [name for name, *_ in refused], new.run.allow_changes)}"
        )


def check_same_model(where: str, old: Config, new: Config) -> None:
    """Check that a run may begin with the weights of another one's model, which its tensors' shapes do not show.

    Dropout, initial values and the family's name are free, and RoPE may be scaled that was not, which is what scaling
    is for; `run.allow_changes` allows what else is meant to change.

    Raises:
        ConfigError: the models differ; with each difference.
    """
    sections = [(one.model, one.tokenizer.vocab_size, one.data.max_seq_len) for one in (old, new)]
    before, after = (vars(resolve_shape(*section)) for section in sections)
    free = {"family", "dropout", "attention_dropout", "init_std", "vocab_size", "padded_vocab_size"}
    free |= {name.removeprefix("model.") for name in new.run.allow_changes}
    free |= {"rope_scaling"} if before["rope_scaling"] is None else set()
    free |= (
        {"sliding_window"}
        if after["sliding_window"] is None and (before["sliding_window"] or 0) >= after["seq_len"]
        else set()
    )
    free |= set() if before["positions"] == after["positions"] == "learned" else {"seq_len"}
    differences = [
        ("data.seq_len" if name == "seq_len" else f"model.{name}", _option_text(before[name]), _option_text(value))
        for name, value in after.items() if name not in free and before[name] != value
    ]  # fmt: skip
    if differences:
        lines = "\n".join(f"  {name}: {there} there, {here} here" for name, there, here in differences)
        names = ", ".join([*new.run.allow_changes, *(name for name, *_ in differences)])
        raise ConfigError(
            f"resume.from is {where}, whose model is another one; expected the same:\n{lines}\nUse its `model` "
            f"section, or, where a change is meant that leaves all shapes, 'run.allow_changes=[{names}]'."
        )


def _option_text(value: Any) -> str:
    return yaml_value(value.model_dump() if isinstance(value, Section) else value)


def _way_on(run: Path, refused: list[str], allowed: Sequence[str]) -> str:
    """Say what can be done besides a new run with nothing of this one."""
    if rows := [name for name in refused if name in FIXES_ROWS]:
        return f": the rows that are to come cannot be others ({', '.join(rows)})."
    if "optim.name" in refused:
        return f" resume.from={run} resume.optimizer=false: another optimizer has other moments (optim.name)."
    if states := [name for name in refused if name in FIXES_STATES or name == "data.phases"]:
        return f": the checkpoints are of another model ({', '.join(states)})."
    names = ", ".join(dict.fromkeys([*allowed, *refused]))
    return f", or go on with the change by 'run.allow_changes=[{names}]'."
