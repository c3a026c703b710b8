"""How large gradients and activations are, layer by layer, at every so many steps (`log.layer_norms_every`).

Gradients are those of the whole step, over all ranks and before clipping. Activations are what leaves each block, of
rank 0's last micro-batch: the root of the mean square of the residual stream.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from pretrain.ranks.distributed import PendingSum, Ranks
from pretrain.transformer.model import Transformer
from pretrain.zero.engine import Engine
from pretrain.zero.gradient_norms import squared_norms


@dataclass
class PendingNorms:
    """The norms of a step whose sum over ranks is under way."""

    keys: list[str]
    squares: PendingSum

    def result(self) -> dict[str, float]:
        """Wait for the device; return the norms by their keys in `metrics.jsonl`, NaN where one is not finite."""
        roots = ((key, math.sqrt(square)) for key, square in zip(self.keys, self.squares.result(), strict=True))
        return {key: root if math.isfinite(root) else math.nan for key, root in roots}


class LayerNorms:
    """Sees to the norms of every so many steps; all ranks alike."""

    def __init__(self, every: int, engine: Engine, model: Transformer, ranks: Ranks) -> None:
        """See to those of every step whose number `every` divides; 0: of none."""
        self._every, self._engine, self._model, self._ranks = every, engine, model, ranks
        self._layers = list(dict.fromkeys(map(_layer_of, engine.parameter_shapes())))
        self._activations: list[torch.Tensor] = []

    def is_due(self, step: int) -> bool:
        """Whether the norms of this step are wanted."""
        return self._every > 0 and step % self._every == 0

    @contextmanager
    def watch(self, step: int) -> Iterator[None]:
        """Enclose the forward passes of a step; the last one is what counts."""
        self._activations = []
        if self.is_due(step) and self._ranks.is_first:
            self._model.on_block = self._take
        try:
            yield
        finally:
            self._model.on_block = None

    @torch.no_grad()
    def _take(self, index: int, x_BTD: torch.Tensor, residual_BTD: torch.Tensor) -> None:
        del self._activations[index:]  # of the micro-batch before
        self._activations.append((x_BTD.float() + residual_BTD.float()).square().mean())

    @torch.no_grad()
    def start(self, step: int) -> PendingNorms | None:
        """Begin to sum the norms of a step, if they are wanted: after its backward passes and before its update."""
        if not self.is_due(step):
            return None
        number = {layer: index for index, layer in enumerate(self._layers)}
        num_blocks = self._model.shape.num_layers
        squares = torch.zeros(len(number) + num_blocks, dtype=torch.float64, device=self._ranks.device)
        parts = list(self._engine.gradients())
        if parts:
            if parts[0][1].device != self._ranks.device:  # offloaded, by copies that the host has not waited for
                torch.cuda.synchronize(self._ranks.device)
            found = squared_norms([part for _, part in parts])
            places = torch.tensor([number[_layer_of(name)] for name, _ in parts], device=squares.device)
            squares.index_add_(0, places, found.to(squares.device))
        if self._activations:
            squares[len(number) :] = torch.stack(self._activations)
        keys = [f"layer/{layer}/grad_norm" for layer in self._layers]
        keys += [f"layer/{block}/activation_rms" for block in range(num_blocks)]
        return PendingNorms(keys, self._ranks.start_sum(squares))


def _layer_of(name: str) -> str:
    """The number of the block that a parameter is in, or what is outside of the blocks: `embedding`, `output`."""
    beginning, _, rest = name.partition(".")
    return rest.partition(".")[0] if beginning == "blocks" else beginning
