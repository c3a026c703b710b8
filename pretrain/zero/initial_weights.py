"""Initial weights, drawn one parameter at a time, so that a model which ZeRO divides is whole nowhere.

A model is built on the meta device, where it has names and shapes and no memory. Here each parameter gets its memory
and its values when somebody takes it: who divides it at once, as ZeRO's stage 3 does, holds one whole parameter.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor, nn

from pretrain.ranks.distributed import Ranks

_AHEAD_ELEMENTS = 2**29  # that a rank draws before they are taken: 2 GiB, in which its threads find work


class InitialWeights(nn.Module):
    """The parameters of a model on their way to this rank's device, each there when it is taken from `parameters`.

    The ranks divide the drawing between them and give each other what they drew: a core draws some 10^8 numbers a
    second, and a model of 70 billion parameters on every rank would take minutes. It is a module because DeepSpeed
    takes the parameters of modules only.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype, ranks: Ranks) -> None:
        """Take note of a model; nothing is drawn yet.

        Args:
            model: if it has parameters on the meta device, its `draw(name, tensor)` fills a tensor with the initial
                values of one, the same on every rank; the others have their values.
            dtype: of the weights.
            ranks: all of them.
        """
        super().__init__()
        self._named = list(model.named_parameters())
        self._fill: Callable[[str, Tensor], None] = getattr(model, "draw", _cannot_draw)
        self._dtype, self._ranks = dtype, ranks

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        """Yield each parameter, in the model's order, once its values are on this rank's device; all ranks together.

        A parameter that was on the meta device stays the same object, so that what refers to it goes on to do so.
        """
        num_ranks, rank = self._ranks.world_size, self._ranks.rank
        own = deque(index for index, (_, one) in enumerate(self._named) if one.is_meta and index % num_ranks == rank)
        drawn: dict[int, Future[Tensor]] = {}
        num_ahead = 0
        with ThreadPoolExecutor(torch.get_num_threads()) as pool:  # a generator draws on one core
            for index, (_, parameter) in enumerate(self._named):
                while own and (not drawn or num_ahead + self._named[own[0]][1].numel() <= _AHEAD_ELEMENTS):
                    number = own.popleft()
                    num_ahead += self._named[number][1].numel()
                    drawn[number] = pool.submit(self._draw, number)
                if parameter.is_meta:
                    if index in drawn:
                        weight = drawn.pop(index).result().to(self._ranks.device)
                        num_ahead -= weight.numel()
                    else:
                        weight = torch.empty(parameter.shape, dtype=self._dtype, device=self._ranks.device)
                    self._ranks.take_from(index % num_ranks, weight.view(-1).view(torch.uint8))
                    torch.utils.swap_tensors(parameter, nn.Parameter(weight, parameter.requires_grad))
                    del weight  # whoever divides the parameter is to free it
                else:
                    parameter.data = parameter.data.to(self._ranks.device, self._dtype)
                self._ranks.heartbeat.beat()
                yield parameter

    def _draw(self, index: int) -> Tensor:
        name, parameter = self._named[index]
        weight = torch.empty(parameter.shape, dtype=self._dtype)
        self._fill(name, weight)
        return weight


def _cannot_draw(name: str, _: Tensor) -> None:
    raise AssertionError(f"{name} is on the meta device, and its model has no `draw`")
