"""fp16's dynamic loss scale, which DeepSpeed keeps: its state for checkpoints, and what to say where it cannot fall."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from pretrain.errors import TrainingError

_STATE = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


def read_state(optimizer: Any) -> dict[str, Any]:
    """Return the state of the scale of DeepSpeed's optimizer."""
    return {name: getattr(optimizer.loss_scaler, name) for name in _STATE}


def write_state(optimizer: Any, state: Mapping[str, Any]) -> None:
    """Restore what `read_state` returned."""
    for name in _STATE:
        setattr(optimizer.loss_scaler, name, state[name])


@contextmanager
def exhaustion_explained() -> Iterator[None]:
    """Enclose an update: DeepSpeed ends it on all ranks by a plain Exception if gradients overflow at the least scale.

    Raises:
        TrainingError: on all ranks, they do.
    """
    try:
        yield
    except Exception as error:
        if "loss scale already at minimum" not in str(error):
            raise
        exhausted = TrainingError(
            "train.precision is fp16, whose gradients overflow even at a loss scale of 1, the least; expected numbers "
            "that fp16 holds. What was saved is untouched. Compute with more range (train.precision=bf16, or fp32), or "
            "lower optim.lr and raise schedule.warmup_steps."
        )
        exhausted.agreed = True
        raise exhausted from error
