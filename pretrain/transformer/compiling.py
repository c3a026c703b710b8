"""`torch.compile` of the Transformer's blocks: where it runs, and what its failures mean to a user.

One function runs a block, and one compiled code of it serves all of them (docs/notes/0012, "Compiling the blocks").
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar

import torch

from pretrain.errors import TrainingError
from pretrain.options.config import Config

_Function = TypeVar("_Function", bound=Callable[..., Any])

# Kinds of devices where compiled blocks were measured to shorten a run, by `benchmarks/step.py`. On a CPU they do not
# (docs/notes/0012); on GPUs nothing has been measured yet.
WINS: frozenset[str] = frozenset()


def should_compile(config: Config, device: torch.device) -> bool:
    """Say whether a run compiles its blocks: as `train.compile` says, else where that was measured to win."""
    if config.train.compile is None:
        train = config.train
        hooked = (
            config.parallel.zero_stage == 3 or train.ffn_chunk_tokens or train.activation_checkpointing == "offload"
        )
        return device.type in WINS and not hooked
    return config.train.compile


def compiled(function: _Function, backend: str = "inductor") -> _Function:
    """Compile a function of tensors, as one graph for each of the shapes that it is called with.

    Args:
        function: has no branches that depend on values of tensors.
        backend: of `torch.compile`.

    Returns:
        A function that raises TrainingError where the compiler fails.
    """
    # Nothing is timed and chosen on the device: every rank and every attempt runs the same code.
    options: dict[str, Any] | None = {"deterministic": True} if backend == "inductor" else None
    # It says that what is computed again must not change its input in place, which nothing here does.
    logging.getLogger("torch._higher_order_ops.wrap").setLevel(logging.ERROR)
    inner = torch.compile(function, fullgraph=True, dynamic=False, backend=backend, options=options)

    @wraps(function)
    def run(*args: Any) -> Any:
        try:
            return inner(*args)
        except Exception as error:
            if isinstance(error, _failures()):
                raise TrainingError(_explain(error)) from error
            raise

    return run  # type: ignore[return-value]


def _failures() -> tuple[type[Exception], ...]:
    from torch._dynamo import exc  # a second of imports, which torch.compile has paid by now

    return exc.TorchDynamoException, exc.FailOnRecompileLimitHit


def _explain(error: Exception) -> str:
    cause = getattr(error, "inner_exception", error)
    lines = [line.strip() for line in str(cause).splitlines() if line.strip()]
    reason = f"{type(cause).__name__}: {lines[0]}" if lines else type(cause).__name__
    return (
        f"train.compile: the blocks cannot be compiled here ({reason}). Use train.compile=false; or mend the compiler: "
        "on a CPU it needs g++, on a GPU Triton and a C compiler."
    )
