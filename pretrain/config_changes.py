"""What may differ between the config of a run that exists and the one that it is to go on with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pretrain.config import Config
from pretrain.errors import ConfigError
from pretrain.families import resolve_shape

# Changing these does not change what the run computes, beyond its length. What is already done of `data.sources` and
# `data.phases` cannot be changed either: a checkpoint is compared with the plan of the rows up to it.
FREE_TO_CHANGE = (
    "parallel.", "train.micro_batch_size", "train.num_steps", "train.num_tokens", "eval.", "checkpoint.", "log.",
    "guard.", "resume.", "run.allow_changes", "run.dir", "data.prefetch_steps", "data.prepare_processes",
    "train.compile", "data.sources", "data.phases",
    "data.allow_pipe", "data.cache_dir", "data.cache_bytes", "data.retry_seconds", "data.max_damaged_fraction",
)  # fmt: skip
# Changing these would make other rows of what is already done, which no checkpoint can follow; phases can.
FIXES_ROWS = ("data.seq_len", "data.packing", "data.shuffle_window_shards", "run.seed")


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


def check_same_run(run: Path, old: Config, new: Config) -> None:
    """Check that a run whose checkpoints were made with `old` can go on with `new`.

    Raises:
        ConfigError: it cannot; with each difference and the ways on.
    """
    refused = [
        change for change in changed_options(old, new)
        if not change[0].startswith(FREE_TO_CHANGE)
        and (change[0] not in new.run.allow_changes or change[0] in FIXES_ROWS)
    ]  # fmt: skip
    before, after = old.data.max_seq_len, new.data.max_seq_len
    shape = resolve_shape(new.model, new.tokenizer.vocab_size, after)
    if before != after and shape.positions == "learned":  # one parameter for each
        refused.append(("data.phases", f"rows of up to {before} tokens", f"rows of up to {after} tokens"))
    if refused:
        lines = "\n".join(f"  {name}: {before!r} in the run folder, {after!r} now" for name, before, after in refused)
        names, fixed = ", ".join(name for name, _, _ in refused), [n for n, _, _ in refused if n in FIXES_ROWS]
        way_on = f", or go on with the change by 'run.allow_changes=[{names}]'."
        if fixed:
            way_on = f": the rows that are to come cannot be others ({', '.join(fixed)})."
        raise ConfigError(
            f"{run}: belongs to another config; expected the same one:\n{lines}\nStart a new run with run.dir=…{way_on}"
        )
