"""Filling an engine from a checkpoint."""

from __future__ import annotations

from pretrain.checkpoints.checkpoint_files import CheckpointReader
from pretrain.errors import CheckpointError
from pretrain.ranks.distributed import Ranks
from pretrain.zero.engine import MASTER, Engine


def fill(engine: Engine, reader: CheckpointReader, ranks: Ranks, with_optimizer: bool = True) -> None:
    """Fill the engine from a checkpoint that was verified; each rank reads what it owns.

    Args:
        engine: whose masters and moments are filled.
        reader: the checkpoint.
        ranks: all ranks.
        with_optimizer: the moments too, and the optimizer's own step; else they stay as they are before the first one.
    Raises:
        CheckpointError: on all ranks, it is of another model or of another optimizer, or cannot be read.
    """
    ranks.agree(lambda: _read_into(engine, reader, with_optimizer))
    reader.close()
    engine.finish_loading(reader.training["optimizer_step"] if with_optimizer else 0)
    engine.load_loss_scale_state(reader.training["loss_scale"])


def fill_base(engine: Engine, reader: CheckpointReader, ranks: Ranks) -> None:
    """Fill the weights that are not trained from a checkpoint that was verified.

    Raises:
        CheckpointError: on all ranks, it is of another model, or cannot be read.
    """
    ranks.agree(lambda: _check_shapes(reader, engine.untrained_shapes))
    ranks.agree(lambda: engine.fill_untrained(lambda name, start, length: reader.read(name, MASTER, start, length)))
    reader.close()


def _check_shapes(reader: CheckpointReader, ours: dict[str, tuple[int, ...]]) -> None:
    if reader.shapes != ours:
        raise CheckpointError(
            f"{reader.folder}: holds another model than the config's ({_difference(ours, reader.shapes)}); expected "
            "the same parameters. Use the `model` of the config that wrote it, or begin with another run.dir."
        )


def _read_into(engine: Engine, reader: CheckpointReader, with_optimizer: bool) -> None:
    _check_shapes(reader, engine.parameter_shapes())
    if with_optimizer and (lacking := _lacking(engine, reader)):
        raise CheckpointError(
            f"{reader.folder}: has no {lacking}; expected the states of optim.name. Use the `optim` of the config that "
            "wrote it; a new run can do without by resume.from and resume.optimizer=false."
        )
    for fragment in engine.replicated_fragments():
        for state, view in fragment.tensors.items():
            if with_optimizer or state == MASTER:
                reader.read_into(view, fragment.name, state, fragment.start)
        engine.ranks.heartbeat.beat()


def _difference(ours: dict[str, tuple[int, ...]], theirs: dict[str, tuple[int, ...]]) -> str:
    """Name the first parameter that a checkpoint has otherwise."""
    name = next(name for name in [*ours, *theirs] if ours.get(name) != theirs.get(name))
    shapes = [f"of shape {list(one[name])}" if name in one else "not there" for one in (theirs, ours)]
    return f"{name} is {shapes[0]}, and would be {shapes[1]}"


def _lacking(engine: Engine, reader: CheckpointReader) -> str:
    """Name a state that the engine has and a checkpoint has not."""
    missing = ((state, name) for name, states in engine.states.items() for state in states
               if state not in reader.states[name])  # fmt: skip
    return next((f"'{state}' of '{name}'" for state, name in missing), "")
