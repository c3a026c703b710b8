"""Activation checkpointing: what a block keeps for the backward pass, and what it computes again."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor
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


class _Keep(torch.autograd.Function):
    """The identity, whose input autograd keeps once, however many functions compute from it again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cell: list[Tensor]) -> Tensor:
        ctx.save_for_backward(x)
        ctx.cell = cell
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        ctx.cell.clear()
        return grad, None


def recomputed_in_chunks(function: Callable[[Tensor], Tensor], x: Tensor, size: int) -> Tensor:
    """Call a function for so many items of the first dimension at once, and again for each chunk in the backward pass.

    What the function keeps exists for one chunk at a time. All chunks are taken out of one kept `x`: were each kept
    apart, a block that is computed again would compute every chunk but the last, only to arrive at the next one.

    Args:
        function: treats all items alike; called twice for each chunk.
        x: `[N, ...]`.
        size: of a chunk; the last one has what is left.
    """
    starts = range(0, len(x), size)
    if not (torch.is_grad_enabled() and x.requires_grad):
        return torch.cat([function(x[start : start + size]) for start in starts])
    cell: list[Tensor] = []  # holds what chunks are taken out of, while a pass over them goes on
    whole = _Keep.apply(x, cell)
    node = whole.grad_fn

    def run(start: int) -> Tensor:
        if not cell:  # backward: autograd lets this be read once
            cell.append(node.saved_tensors[0].detach().requires_grad_())
        return function(cell[0][start : start + size])

    cell.append(whole)
    done = [recomputed("full", run, start) for start in starts]
    cell.clear()
    return torch.cat(done)
