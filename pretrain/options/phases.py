"""The phases of a run's data: from which step on, of which sources, and in rows of which length."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from pretrain.options.config import Config, DataSection, PhaseSection, SourceSection

KINDS = {"weights": "weight", "epochs": "epochs", "tokens": "tokens"}  # in a phase, and in a source


@dataclass(frozen=True)
class Phase:
    """A part of a run.

    Attributes:
        first_step: Steps of the run before it.
        first_row: Rows of the run before it.
        seq_len: Tokens in a row.
        rows_per_step: Rows in a step, over all ranks.
        kind: What the amounts are: `weights`, `epochs` or `tokens`.
        amounts: How much of each source, by name; sources that are not in the phase are left out.
        option: The option that gives an amount, with `{}` for the source.
    """

    first_step: int
    first_row: int
    seq_len: int
    rows_per_step: int
    kind: str
    amounts: Mapping[str, float]
    option: str


def phases_of(config: Config) -> list[Phase]:
    """Return the phases of a run, the first of which begins with it. They do not depend on its length."""
    data, num_rows = config.data, config.train.global_batch_size
    kind = kind_of_sources(data)
    amounts = {source.name: amount for source in data.sources if (amount := _amount(source, kind)) > 0}
    phases = [Phase(0, 0, data.seq_len, num_rows, kind, amounts, f"data.sources[{{}}].{KINDS[kind]}")]
    for number, phase in enumerate(data.phases):
        last = phases[-1]
        kind, amounts, option = last.kind, dict(last.amounts), last.option
        for own_kind, own in amounts_of(phase).items():
            kind, amounts, option = own_kind, own, f"data.phases.{number}.{own_kind}[{{}}]"
        seq_len = phase.seq_len or last.seq_len
        first_row = last.first_row + (phase.from_step - last.first_step) * last.rows_per_step
        rows_per_step = num_rows * data.seq_len // seq_len
        phases.append(Phase(phase.from_step, first_row, seq_len, rows_per_step, kind, amounts, option))
    return phases


def kind_of_sources(data: DataSection) -> str:
    """Return by what `data.sources` are mixed; checks.py sees to it that all give the same."""
    given = {kind for kind in ("epochs", "tokens") for source in data.sources if getattr(source, kind) is not None}
    return next(iter(sorted(given)), "weights")


def amounts_of(phase: PhaseSection) -> dict[str, dict[str, float]]:
    """Return what a phase gives to mix by, by kind: one of them, checks.py sees to it, or none."""
    given = {"weights": phase.weights, "epochs": phase.epochs, "tokens": phase.tokens}
    return {kind: dict(amounts) for kind, amounts in given.items() if amounts}


def _amount(source: SourceSection, kind: str) -> float:
    amounts = {"weights": source.weight, "epochs": source.epochs, "tokens": source.tokens}
    return amounts[kind] or 0.0


def val_fraction_of(source: SourceSection, data: DataSection) -> float:
    """Share of a source's documents that is held out."""
    return data.val_fraction if source.val_fraction is None else source.val_fraction


def sampling_weights(config: Config) -> dict[str, float]:
    """How much of each source a tokenizer is trained on, relative to the others: as where it matters most."""
    phases = phases_of(config)
    if len(phases) == 1:
        return dict(phases[0].amounts)
    totals = [sum(phase.amounts.values()) for phase in phases]
    names = [source.name for source in config.data.sources]
    return {
        name: max(phase.amounts.get(name, 0.0) / total for phase, total in zip(phases, totals, strict=True))
        for name in names
    }
