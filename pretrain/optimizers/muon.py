"""Muon: momentum whose matrices are orthogonalised, beside AdamW for what is no hidden matrix.

DeepSpeed drives it like any torch optimizer, over the flat fp32 tensors that it divides parameters into. Momentum is
elementwise, so it is kept as flat as the weights; only the update needs whole matrices, which `MatrixExchange` brings
together. Clipping thus comes before the momentum, as in a loop of plain PyTorch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from pretrain.optimizers.matrix_exchange import Held, MatrixExchange
from pretrain.optimizers.matrix_owners import Matrix
from pretrain.optimizers.torch_optimizers import AdamW

_A, _B, _C = 3.4445, -4.7750, 2.0315
_NUM_ITERATIONS = 5


def orthogonalise(matrices: Tensor) -> Tensor:
    """Return about U Vᵀ of each matrix U S Vᵀ: singular values between 0.7 and 1.2, whatever they were.

    Args:
        matrices: `[count, rows, cols]`, in the dtype to compute in.
    Source: Jordan et al. 2024 (kellerjordan.github.io/posts/muon): five quintic Newton-Schulz iterations.
    """
    is_tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if is_tall else matrices
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    for _ in range(_NUM_ITERATIONS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=_B, alpha=_C), x, beta=_A)
    return x.mT if is_tall else x


def update_scale(rows: int, cols: int) -> float:
    """Factor that gives an orthogonal update the root mean square of AdamW's, so that one learning rate serves both.

    Source: Liu et al. 2025 (arXiv:2502.16982), section 2.2.
    """
    return 0.2 * math.sqrt(max(rows, cols))


class Muon(AdamW):
    """Muon for the groups with `muon`, torch's fused AdamW for the others.

    A group with `muon` has `names`, one a parameter, and `parts`: for each name the (rows, cols) of the matrices that
    the parameter is a stack of.
    """

    def __init__(
        self,
        groups: list[dict[str, Any]],
        lr: float,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        momentum: float = 0.95,
        nesterov: bool = True,
    ) -> None:
        super().__init__(groups, lr=lr, betas=betas, eps=eps, fused=True)
        self.momentum, self.nesterov = momentum, nesterov
        self._matrices: list[Matrix] = []
        tensors: list[Tensor] = []
        held: list[Held] = []
        for group in self.param_groups:
            if not group["muon"]:
                continue
            for name, parameter in zip(group["names"], group["params"], strict=True):
                start = 0
                for rows, cols in group["parts"][name]:
                    self._matrices.append(Matrix(name, start, rows, cols, update_scale(rows, cols)))
                    start += rows * cols
                held.append(Held(name, 0, start, len(tensors), 0))
                tensors.append(parameter)
        self.place(tensors, [held], 0, tensors[0].device if tensors else torch.device("cpu"))

    def place(self, tensors: Sequence[Tensor], held: Sequence[Sequence[Held]], rank: int, device: torch.device) -> None:
        """Say where the parameters are once they have been divided.

        Args:
            tensors: this rank's, in the order by which `held` numbers them; a parameter has the same number everywhere.
            held: what each rank holds of the parameters with `muon`.
            rank: this one.
            device: where ranks exchange and orthogonalise matrices; the tensors may be in the host's memory.
        """
        self._number = {id(tensor): number for number, tensor in enumerate(tensors)}
        self._held, self._rank, self._device = held, rank, device
        self._exchanges: dict[tuple[int, ...], MatrixExchange] = {}

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update every tensor that has a gradient; gradients of the groups with `muon` are overwritten.

        Where ranks divide the work, all must come with the same tensors.
        """
        assert closure is None, "DeepSpeed has none"
        groups = self.param_groups
        self.param_groups = [group for group in groups if not group["muon"]]
        try:
            super().step()
        finally:
            self.param_groups = groups
        updated = [
            (group, tensors)
            for group in groups
            if group["muon"] and (tensors := [tensor for tensor in group["params"] if tensor.grad is not None])
        ]
        self._make_updates([tensor for _, tensors in updated for tensor in tensors])
        for group, tensors in updated:
            torch._foreach_mul_(tensors, 1 - group["lr"] * group["weight_decay"])
            torch._foreach_add_(tensors, [tensor.grad for tensor in tensors], alpha=-group["lr"])

    def _make_updates(self, tensors: list[Tensor]) -> None:
        """Turn each gradient into its update in place, which saves a tensor of their size."""
        if not tensors:
            return
        gradients = [tensor.grad for tensor in tensors if tensor.grad is not None]
        for tensor in tensors:
            if "momentum_buffer" not in self.state[tensor]:
                self.state[tensor]["momentum_buffer"] = torch.zeros_like(tensor)
        buffers = [self.state[tensor]["momentum_buffer"] for tensor in tensors]
        torch._foreach_lerp_(buffers, gradients, 1 - self.momentum)
        if self.nesterov:
            torch._foreach_lerp_(gradients, buffers, self.momentum)
        else:
            torch._foreach_copy_(gradients, buffers)
        numbers = [self._number[id(tensor)] for tensor in tensors]
        exchange = self._exchange_of(tuple(sorted(numbers)))
        flat = {number: gradient.view(-1) for number, gradient in zip(numbers, gradients, strict=True)}
        # In bf16 on GPUs, as published; in fp32 on CPUs, where it is exact and bf16 is often slower.
        dtype = torch.bfloat16 if self._device.type == "cuda" else torch.float32
        exchange.apply(flat, orthogonalise, dtype, self._device)

    def _exchange_of(self, numbers: tuple[int, ...]) -> MatrixExchange:
        """Return the plan for these tensors: DeepSpeed comes with one at a time, or with all."""
        if numbers not in self._exchanges:
            held = [[piece for piece in pieces if piece.tensor in numbers] for pieces in self._held]
            names = {piece.parameter for pieces in held for piece in pieces}
            matrices = [matrix for matrix in self._matrices if matrix.parameter in names]
            self._exchanges[numbers] = MatrixExchange(matrices, held, self._rank)
        return self._exchanges[numbers]
