"""With what a run begins: its own newest checkpoint, another run's, or nothing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from pretrain.checkpoints.adapters import BASE, merged, open_base, reference_to
from pretrain.checkpoints.checkpoint import Checkpoints, list_together
from pretrain.checkpoints.checkpoint_files import MANIFEST, CheckpointReader, step_of
from pretrain.checkpoints.checkpoint_loading import fill, fill_base
from pretrain.checkpoints.checkpoint_places import Place
from pretrain.checkpoints.checkpoint_store import StorePlace
from pretrain.checkpoints.run_folder import place_of_run
from pretrain.data.stream import TokenStream
from pretrain.errors import CheckpointError, ConfigError
from pretrain.options.config import Config, DataSection
from pretrain.options.config_changes import check_same_model
from pretrain.options.settings import parse_config
from pretrain.ranks.distributed import Ranks
from pretrain.storage.stores import is_remote
from pretrain.zero.engine import Engine


@dataclass
class Progress:
    """How far the run is; part of every checkpoint."""

    step: int = 0
    num_tokens: int = 0
    num_skipped: int = 0
    num_clipped: int = 0  # updates whose gradients were longer than optim.clip_norm
    best_loss: float | None = None  # of what is followed: the held-out loss, or eval.metric times -1
    best_step: int | None = None
    best_counted_loss: float | None = None  # the best by more than eval.min_delta, for early stopping
    evals_without_improvement: int = 0
    followed: str = "loss"  # what the best is the best of: that, or eval.metric


@dataclass
class Start:
    """What a run goes on with.

    Args:
        progress: how far it is.
        spikes: state of its `SpikeGuard`.
        own: whether it has a checkpoint of its own.
        base: of adapters, where the weights lie that they stand beside, as `adapters.reference_to` says it.
    """

    progress: Progress
    spikes: dict[str, Any]
    own: bool
    base: dict[str, str] | None = None


def load_start(
    config: Config,
    num_steps: int,
    checkpoints: Checkpoints,
    engine: Engine,
    stream: TokenStream,
    ranks: Ranks,
    fingerprint: str,
    report: Callable[[str, str], None],
) -> Start:
    """Fill engine and stream with what the run begins with; all ranks together.

    Args:
        config: of the run; its `resume` says what to begin with.
        num_steps: of the whole run.
        checkpoints: of the run folder; the newest good one of them wins.
        engine: filled with weights and moments.
        stream: moved to the rows that come next.
        ranks: all ranks.
        fingerprint: of the tokenizer.
        report: called on rank 0 with (event, message).
    Raises:
        ConfigError: `resume.from` is not a run or a checkpoint.
        CheckpointError: no checkpoint is good, or it does not fit the config.
        DataError: rows up to the checkpoint would be others.
    """
    section = config.resume
    own = checkpoints.load_newest(engine)
    if own is not None:
        ranks.agree(lambda: stream.load_state(own["data"]))
        base = own.get(BASE)
        if base is not None:
            _fill_from(base, config, checkpoints, engine, ranks)
        return Start(Progress(**own["progress"]), own.get("spikes", {}), own=True, base=base)
    if not section.from_:
        return Start(Progress(), {}, own=False)
    reader = _open_other(config, checkpoints, ranks, report)
    other = reader.manifest["about"].get("tokenizer", fingerprint)
    if other != fingerprint:
        raise ConfigError(
            f"resume.from is {section.from_}, whose tokenizer is another one; expected the one of tokenizer.model, "
            "since the ids of its embedding mean other pieces. Use the tokenizer of that run's folder."
        )
    if "config" in reader.manifest["about"]:
        check_same_model(section.from_, parse_config(reader.manifest["about"]["config"]), config)
    if not reader.training["progress"]:  # of an import: weights are all that there is
        section = section.model_copy(update=dict.fromkeys(("optimizer", "schedule", "data"), False))
    base = None
    if config.train.lora is not None:  # adapters have moments of their own, which begin anew
        base, section = reference_to(reader, checkpoints.run_path), section.model_copy(update={"optimizer": False})
    folder = reader.folder
    whole = ranks.agree(
        lambda: merged(reader, folder.parent.parent if isinstance(folder, Path) else Path(), config.data)
    )
    if base is not None:
        fill_base(engine, whole, ranks)
    else:
        fill(engine, whole, ranks, section.optimizer)
    training, progress = reader.training, Progress()
    spikes: dict[str, Any] = {}
    if section.data:
        way_on = "train on other rows by resume.data=false."
        ranks.agree(lambda: stream.load_state(reader.training["data"], way_on))
    if section.schedule:  # but which of its checkpoints was the best means nothing in another folder
        progress = replace(Progress(**training["progress"]), best_loss=None, best_step=None, best_counted_loss=None,
                           evals_without_improvement=0)  # fmt: skip
        spikes = training.get("spikes", {}) if section.data else {}
    if progress.step >= num_steps:
        raise ConfigError(
            f"train.num_steps is {num_steps}; expected more than the {progress.step} steps of resume.from, from which "
            "this run goes on counting. Raise it, or count from 0 by resume.schedule=false."
        )
    if ranks.is_first:
        taken = [name for name in ("optimizer", "schedule", "data") if getattr(section, name)]
        report("resumed_from", f"{reader.folder}: {', '.join(['weights', *taken])}")
    return Start(progress, spikes, own=False, base=base)


def _fill_from(base: dict[str, str], config: Config, checkpoints: Checkpoints, engine: Engine, ranks: Ranks) -> None:
    """Fill the weights that adapters stand beside."""
    run_path = checkpoints.run_path
    open_reader = partial(open_base, base, run_path, config.data, config.resume.from_)
    if problems := checkpoints.verify(open_reader):
        raise CheckpointError(
            f"{'; '.join(problems)}: adapters stand beside these weights; expected them whole. "
            "Restore them from a backup."
        )
    reader = ranks.agree(open_reader)
    folder = reader.folder
    fill_base(
        engine,
        ranks.agree(
            lambda: merged(reader, folder.parent.parent if isinstance(folder, Path) else run_path, config.data)
        ),
        ranks,
    )


def _open_other(
    config: Config, checkpoints: Checkpoints, ranks: Ranks, report: Callable[[str, str], None]
) -> CheckpointReader:
    """Open the checkpoint that `resume.from` names, or the newest good one of the run that it names."""
    named = config.resume.from_
    if not is_remote(named) and Path(named).resolve() == checkpoints.run_path.resolve():
        raise ConfigError(f"resume.from is {named}, the run folder itself; expected another one. Leave it out.")
    readers = _candidates(named, config.data, ranks)
    if not readers:
        raise ConfigError(
            f"resume.from is {named}; expected a run folder with checkpoints, a folder with a {MANIFEST}, or the URL "
            "of one. Name one, such as runs/other, runs/other/checkpoints/step-00001000 or "
            "s3://bucket/other/step-00001000."
        )
    damaged = []
    for open_reader in readers:
        if not (problems := checkpoints.verify(open_reader)):
            return ranks.agree(open_reader)
        damaged += problems
        if ranks.is_first:
            report("checkpoint_damaged", f"{'; '.join(problems)}. Looking at the one before.")
    raise CheckpointError(
        f"resume.from is {named}; expected a checkpoint that is intact ({damaged[0]}). Restore it from a backup, or "
        "name another one."
    )


def _candidates(named: str, data: DataSection, ranks: Ranks) -> list[Callable[[], CheckpointReader]]:
    """What opens each checkpoint that is meant, the newest first."""
    if is_remote(named):
        above, _, last = named.rstrip("/").rpartition("/")
        step = step_of(last)
        place: Place = ranks.agree(lambda: StorePlace(named if step is None else above, data))
        if step is not None:
            return [partial(place.open, step)]
    elif ranks.from_first((Path(named) / MANIFEST).is_file()):
        return [partial(CheckpointReader, Path(named))]
    else:
        place = ranks.agree(lambda: place_of_run(Path(named)))
    return [partial(place.open, step) for step in reversed(list_together(place, ranks))]
