"""What is checked of Triton's RoPE, SwiGLU, GELU and dropout: interpreted by `kernels/interpreter_operators.py`, on a GPU by `gpu/`."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from kernels.activation import gelu, gelu_truth, swiglu, swiglu_truth
from kernels.dropout import SITE_FFN_OUTPUT, DropoutKey, dropout, dropout_truth
from kernels.rope import rope, rope_tables, rope_truth
from tests.helpers.norm_cases import poisoned_memory, results, worst_ratio

KINDS = ("rope", "swiglu", "gelu")
# rope: rows, tokens, heads, their width; the last has more heads than a tile
SHAPES: dict[str, tuple[tuple[int, ...], ...]] = {
    "rope": ((1, 1, 1, 2), (2, 7, 3, 6), (2, 19, 5, 80), (1, 9, 7, 128), (3, 5, 1, 64), (1, 2, 70, 128)),
    "swiglu": ((1, 2), (5, 14), (199, 14), (2, 3, 1520), (3, 5632)),
    "gelu": ((), (1,), (5, 7), (199, 7), (2, 3, 760), (1, 2816)),
}
LENGTHS = (3, 1, 5, 2)  # of packed documents, over and over


class Operation(NamedTuple):
    """An operation of one tensor, its truth in plain PyTorch, and what it computes exactly in fp64."""

    run: Callable[[Tensor], Tensor]
    truth: Callable[[Tensor], Tensor]
    exact: Callable[[Tensor], Tensor]


def operation(kind: str, x: Tensor) -> Operation:
    """Return the operation for a tensor; for `rope`, with the angles of packed documents."""
    if kind == "swiglu":
        return Operation(swiglu, swiglu_truth, _exact_swiglu)
    if kind == "gelu":
        return Operation(gelu, gelu_truth, _exact_gelu)
    cos, sin = tables(x)
    return Operation(lambda x: rope(x, cos, sin), lambda x: rope_truth(x, cos, sin), lambda x: _exact_rope(x, cos, sin))


def tables(x: Tensor) -> tuple[Tensor, Tensor]:
    """Compute the angles of packed documents, another row of them for each row."""
    B, T, _, C = x.shape
    places = torch.cat([torch.arange(n) for n in LENGTHS * (B + T)])
    positions = torch.stack([places[b : b + T] * (b + 1) for b in range(B)]) if B else torch.zeros(0, T)
    return rope_tables(positions.to(x.device), C, 100.0)


def _exact_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    turned = torch.complex(*x.chunk(2, dim=-1)) * torch.complex(cos.double(), sin.double())
    return torch.cat((turned.real, turned.imag), dim=-1)


def _exact_swiglu(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return gate * up / (1 + (-gate).exp())


def _exact_gelu(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + (math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)).tanh())


def drawn(shape: tuple[int, ...], dtype: torch.dtype, device: str, seed: int = 0) -> Tensor:
    """Draw a tensor, the same on every device."""
    generator = torch.Generator().manual_seed(seed + math.prod(shape))
    return (2 * torch.randn(shape, generator=generator)).to(device, dtype)


def grad_for(kind: str, x: Tensor) -> Tensor:
    """Draw a gradient of the operation's result."""
    width = x.shape[-1:] if kind != "swiglu" else (x.shape[-1] // 2,)
    return drawn((*x.shape[:-1], *width), x.dtype, x.device.type, 1)


def ratio_of(kind: str, x: Tensor, grad: Tensor) -> float:
    """Run forward and backward with memory poisoned; return the worst ratio. Inputs must be left as they were."""
    run, truth, exact = operation(kind, x)
    before = x.clone(), grad.clone()
    with poisoned_memory():
        actual = results(run, [x], [grad])
    assert torch.equal(x, before[0]) and torch.equal(grad, before[1])
    return worst_ratio(actual, results(truth, [x], [grad]), results(exact, [x.double()], [grad.double()]))


def measure(kind: str, shape: tuple[int, ...], dtype: torch.dtype, device: str) -> float:
    """Run one case and return its worst ratio."""
    x = drawn(shape, dtype, device)
    return ratio_of(kind, x, grad_for(kind, x))


def strided(kind: str, dtype: torch.dtype, device: str) -> list[tuple[Tensor, Tensor]]:
    """Return inputs and gradients that are slices of wider, transposed or expanded tensors."""
    wide, dense = drawn((2, 4, 6, 96), dtype, device), drawn((2, 2, 64, 3), dtype, device).transpose(2, 3)
    rows = drawn((2, 2, 3, 96), dtype, device)[..., 16:80]  # the only one that can be viewed as rows
    xs = [rows, wide[:, ::2, 2:5, 16:80], wide[:, :2, :3, ::3], wide.transpose(1, 2)[:, :2, :3, :64]]
    xs += [dense, dense[:, :, :1].expand(2, 2, 3, 64)]
    grads = [drawn((2, 64, 3, 2), dtype, device, 1).permute(3, 0, 2, 1), rows, wide[:, :2, 3:, 16:80]]
    grads.append(torch.ones((), dtype=dtype, device=device).expand(2, 2, 3, 64))  # as of .sum().backward()
    return [(x, grad[..., : grad_for(kind, x).shape[-1]]) for x in xs for grad in grads]


DROPPED = ((1, 1), (3, 5), (2, 7, 33), (2, 3, 1520), (1, 4096))  # rows that are no multiple of four, of a tile, or both


def drop_key(rows: int, device: str, first: int = 2**33 - 1) -> DropoutKey:
    """Return a key whose numbers all fill more than 32 bits, but for the layer."""
    return DropoutKey(2**64 - 5, 2**35 + 7, torch.arange(rows, device=device) + first, 11, SITE_FFN_OUTPUT)


def is_dropout_exact(x: Tensor, grad: Tensor, p: float, first_slot: int = 0) -> bool:
    """Whether forward and backward are those of the truth to the last bit, with memory poisoned."""
    key = dataclasses.replace(drop_key(len(x), x.device.type), first_slot=first_slot)
    with poisoned_memory():
        found = results(lambda x: dropout(x, p, key), [x], [grad])
    # The truth multiplies by the scale and then drops; so does its gradient, in the other order: -0.0 is 0.0 here.
    truth = results(lambda x: dropout_truth(x, p, key), [x], [grad])
    return all(torch.equal(a, b) for a, b in zip(found, truth, strict=True))
