"""Activation checkpointing: what a block keeps for the backward pass, and what it computes again."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts


@cache
def _kept_operators() -> frozenset[Any]:
    """Matrix products, attention and exchanges between ranks: nearly all of a block's time, and less than half of what
    it keeps."""
    names = (
        "aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "longhaul::attention", "longhaul::exchange_parts",
        "aten::_scaled_dot_product_flash_attention_for_cpu", "aten::_scaled_dot_product_efficient_attention",
    )  # fmt: skip
    found = []
    for name in names:
        namespace, _, operator = name.partition("::")
        found.append(getattr(getattr(torch.ops, namespace), operator).default)
    return frozenset(found)


def _policy(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operator in _kept_operators() else CheckpointPolicy.PREFER_RECOMPUTE


def recomputed(mode: str, function: Callable[..., Any], *args: Any) -> Any:
    """Call a function so that what it keeps for its backward pass is computed again there.

    Args:
        mode: `full` and `offload` keep the arguments only; `selective` also what matrix products and attention return.
        function: called twice, the second time in the backward pass; must give the same both times.
        args: its arguments.
    """
    # Dropout is a function of its key, so no random state needs to be kept for the second computation.
    run = partial(checkpoint, function, *args, use_reentrant=False, preserve_rng_state=False)
    if mode == "selective":
        return run(context_fn=partial(create_selective_checkpoint_contexts, _policy))
    return run()
