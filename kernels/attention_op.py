"""Attention on a GPU as a PyTorch operator: how its Triton programs are laid out and launched, and its autograd.

Descriptors of tensors (TMA) are made on the host for Hopper and Blackwell; other GPUs, and tensors whose strides are
not multiples of 16 bytes, are read through pointers.
"""

from __future__ import annotations

import math
from functools import cache, lru_cache
from typing import Any

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from kernels.attention_backward import delta_kernel, grad_kv_kernel, grad_q_kernel
from kernels.attention_forward import forward_kernel
from kernels.dropout import drop_threshold
from kernels.tile_table import Tile, block_of_width, find_tile

MAX_HEAD_DIM = 256
INTERPRETED_PROCESSORS, INTERPRETED_CACHE_BYTES = 4, 2**14  # small, so that tests have several sections and splits
_DELTA_ROWS = 64


@cache
def _capacity(device: torch.device) -> tuple[int, int]:
    """Return the multiprocessors and the bytes of L2 of a device."""
    if device.type != "cuda":
        return INTERPRETED_PROCESSORS, INTERPRETED_CACHE_BYTES
    properties = torch.cuda.get_device_properties(device)
    return properties.multi_processor_count, properties.L2_cache_size


@cache
def _descriptors_pay(device: torch.device) -> bool:
    return device.type == "cuda" and not torch.version.hip and torch.cuda.get_device_capability(device)[0] in (9, 10)


@lru_cache(maxsize=1024)  # the host has a dozen of them to look up in every layer
def _layout(shape: torch.Size, strides: tuple[int, ...], element_size: int) -> tuple[list[int], list[int]] | None:
    """Return shape and strides of `[B, T, H, C]` as `[B, H, T, C]`; None where a descriptor cannot have them."""
    of, dense = list(strides), shape[-1]
    for index in (2, 1, 0):
        if shape[index] == 1:  # its stride may be anything, but is checked: give that of a dense tensor
            of[index] = -(-dense // 16) * 16
        elif of[index] <= 0 or of[index] * element_size % 16:
            return None
        dense = of[index] * shape[index]
    return [shape[0], shape[2], shape[1], shape[3]], [of[0], of[2], of[1], 1]


def describable(x: Tensor) -> bool:
    """Tell whether the hardware can read `x` through a descriptor: all strides but the last multiples of 16 bytes."""
    return _layout(x.shape, x.stride(), x.element_size()) is not None and x.data_ptr() % 16 == 0


def describe(x: Tensor, block: int, block_c: int) -> TensorDescriptor:
    """Describe tiles of `block` rows of one head of `x` `[B, T, H, C]`, which must be describable.

    As `[B, H, T, C]`: where the dimensions of size 1 of a tile come first, Triton leaves the tile in shared memory,
    and otherwise takes it through registers, of which the programs have none to spare.
    """
    layout = _layout(x.shape, x.stride(), x.element_size())
    assert layout is not None
    return TensorDescriptor(x, *layout, [1, 1, block, block_c])


def _rows_dense(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _three_strides(x: Tensor) -> tuple[int, ...]:
    return tuple(x.stride()[:3])


def _section(device: torch.device, bytes_of_head: int) -> int:
    """Count the heads whose keys and values fit half of L2 together."""
    return max(1, _capacity(device)[1] // 2 // max(bytes_of_head, 1))


def group_splits(device: torch.device, num_programs: int, group: int) -> int:
    """Choose how many programs share the query heads of a key head: as few as fill the GPU twice.

    Args:
        device: where they run.
        num_programs: programs without splits.
        group: query heads of a key head.
    """
    enough = [n for n in range(1, group + 1) if group % n == 0 and n * num_programs >= 2 * _capacity(device)[0]]
    return enough[0] if enough else group


def launch_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    first_BT: Tensor,
    end_BT: Tensor,
    seeds_BH: Tensor | None,
    dropout_p: float,
    softcap: float,
    scale: float,
    tile: Tile | None = None,
) -> tuple[Tensor, Tensor]:
    """Launch the forward program; return the output and log2 of the sums of exponentials, `[B, H, T]`.

    `tile` is for tuning: None, in training, takes that of the table.
    """
    q, k, v = _rows_dense(q), _rows_dense(k), _rows_dense(v)
    B, T, H, C = q.shape
    S, K = k.shape[1:3]
    out = torch.empty((B, T, H, C), dtype=q.dtype, device=q.device)
    lse_BHT = torch.empty((B, H, T), dtype=torch.float32, device=q.device)
    if out.numel() == 0 or S == 0:
        return out.zero_(), lse_BHT.fill_(math.inf)
    tile = tile or find_tile("forward", q, S, softcap > 0.0 or seeds_BH is not None)
    block_c = block_of_width(C)
    described = _descriptors_pay(q.device) and all(map(describable, (q, k, v)))

    def tiles_of(x: Tensor, block: int) -> Any:
        return describe(x, block, block_c) if described else x

    section = min(_section(q.device, S * C * 2 * k.element_size()) * (H // K), B * H)
    with torch.cuda.device_of(q):
        forward_kernel[(triton.cdiv(T, tile.block_q) * B * H,)](
            tiles_of(q, tile.block_q), tiles_of(k, tile.block_k), tiles_of(v, tile.block_k),
            out, lse_BHT, first_BT, end_BT, lse_BHT if seeds_BH is None else seeds_BH,
            _three_strides(q), _three_strides(k), _three_strides(v), _three_strides(out),
            T, S, B * H, section, scale, softcap, 1.0 / (1.0 - dropout_p), drop_threshold(dropout_p),
            H=H, GROUP=H // K, C=C, BLOCK_Q=tile.block_q, BLOCK_K=tile.block_k, BLOCK_C=block_c,
            HAS_SOFTCAP=softcap > 0.0, HAS_DROPOUT=seeds_BH is not None, DESCRIPTORS=described,
            num_warps=tile.num_warps, num_stages=tile.num_stages,
        )  # fmt: skip
    return out, lse_BHT


def _has_extra(numbers: dict[str, Any]) -> bool:
    return numbers["HAS_SOFTCAP"] or numbers["HAS_DROPOUT"]


class Backward:
    """The tensors of one backward pass, and the launches that it is made of.

    `tile` is for tuning: None, in training, takes that of the table.
    """

    def __init__(self, grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse_BHT: Tensor) -> None:
        self.q, self.k, self.v = _rows_dense(q), _rows_dense(k), _rows_dense(v)
        self.grad_out, self.out, self.lse_BHT = _rows_dense(grad_out), out, lse_BHT
        self.B, self.T, self.H, self.C = q.shape
        self.S, self.K = k.shape[1:3]
        self.block_c = block_of_width(self.C)
        self.delta_BHT = torch.empty_like(lse_BHT)
        self.described = _descriptors_pay(q.device) and all(map(describable, (self.q, self.k, self.v, self.grad_out)))

    def tiles_of(self, x: Tensor, block: int) -> Any:
        """Describe tiles of `block` rows of a tensor, or return it where programs take pointers."""
        return describe(x, block, self.block_c) if self.described else x

    def delta(self, grad_q: Tensor | None) -> None:
        """Compute the row sums of out * grad_out; clear `grad_q`."""
        target = self.out if grad_q is None else grad_q
        delta_kernel[(triton.cdiv(self.T, _DELTA_ROWS) * self.B * self.H,)](
            self.out, self.grad_out, self.delta_BHT, target,
            _three_strides(self.out), _three_strides(self.grad_out), _three_strides(target),
            self.T, H=self.H, C=self.C, BLOCK=_DELTA_ROWS, BLOCK_C=self.block_c, CLEAR_GRAD_Q=grad_q is not None,
        )  # fmt: skip

    def numbers(self, seeds_BH: Tensor | None, dropout_p: float, softcap: float, scale: float) -> dict[str, Any]:
        """Return the arguments that both programs share."""
        return {
            "lse_ptr": self.lse_BHT, "delta_ptr": self.delta_BHT,
            "seeds_ptr": self.lse_BHT if seeds_BH is None else seeds_BH,
            "q_strides": _three_strides(self.q), "k_strides": _three_strides(self.k),
            "v_strides": _three_strides(self.v), "grad_out_strides": _three_strides(self.grad_out),
            "T": self.T, "S": self.S, "scale": scale, "softcap": softcap, "keep_scale": 1.0 / (1.0 - dropout_p),
            "threshold": drop_threshold(dropout_p), "H": self.H, "GROUP": self.H // self.K, "C": self.C,
            "BLOCK_C": self.block_c, "HAS_SOFTCAP": softcap > 0.0, "HAS_DROPOUT": seeds_BH is not None,
            "DESCRIPTORS": self.described,
        }  # fmt: skip

    def grad_q(self, first_BT: Tensor, end_BT: Tensor, numbers: dict[str, Any], tile: Tile | None = None) -> Tensor:
        """Compute the gradient of the queries in a pass of its own."""
        q, tile = self.q, tile or find_tile("grad_q", self.q, self.S, _has_extra(numbers))
        grad_q = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        section = _section(q.device, self.S * self.C * 2 * q.element_size()) * (self.H // self.K)
        section = min(section, self.B * self.H)
        grad_q_kernel[(triton.cdiv(self.T, tile.block_q) * self.B * self.H,)](
            self.tiles_of(q, tile.block_q), self.tiles_of(self.k, tile.block_k), self.tiles_of(self.v, tile.block_k),
            self.tiles_of(self.grad_out, tile.block_q), grad_q, first_ptr=first_BT, end_ptr=end_BT,
            grad_q_strides=_three_strides(grad_q), num_rows=self.B * self.H, heads_in_section=section,
            BLOCK_Q=tile.block_q, BLOCK_K=tile.block_k, num_warps=tile.num_warps, num_stages=tile.num_stages, **numbers,
        )  # fmt: skip
        return grad_q

    def grad_kv(
        self,
        first_BS: Tensor,
        end_BS: Tensor,
        numbers: dict[str, Any],
        grad_q: Tensor | None,
        tile: Tile | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Compute the gradients of keys and values, and add those of the queries into `grad_q`, if it is given."""
        q, k = self.q, self.k
        tile = tile or find_tile("grad_kv" if grad_q is None else "grad_kv_atomic", q, self.S, _has_extra(numbers))
        num_tiles = triton.cdiv(self.S, tile.block_k)
        splits = group_splits(q.device, num_tiles * self.B * self.K, self.H // self.K)
        kind = k.dtype if splits == 1 else torch.float32
        grads = [torch.empty((self.B, self.S, self.K * splits, self.C), dtype=kind, device=k.device) for _ in range(2)]
        num_rows = self.B * self.K * splits
        section = _section(q.device, self.T * self.C * 2 * q.element_size() * (self.H // self.K // splits))
        # the interpreter cannot
        add_described = self.described and q.is_cuda and grad_q is not None and describable(grad_q)
        target: Any = q if grad_q is None else grad_q
        grad_kv_kernel[(num_tiles * num_rows,)](
            self.tiles_of(q, tile.block_q), self.tiles_of(k, tile.block_k), self.tiles_of(self.v, tile.block_k),
            self.tiles_of(self.grad_out, tile.block_q),
            self.tiles_of(target, tile.block_q) if add_described else target,
            *grads, first_ptr=first_BS, end_ptr=end_BS,
            grad_q_strides=_three_strides(target), grad_kv_strides=_three_strides(grads[0]), num_rows=num_rows,
            heads_in_section=min(section, num_rows),
            SPLITS=splits, BLOCK_Q=tile.block_q, BLOCK_K=tile.block_k, ATOMIC_GRAD_Q=grad_q is not None,
            DESCRIPTOR_ADD=add_described, num_warps=tile.num_warps, num_stages=tile.num_stages, **numbers,
        )  # fmt: skip
        if splits == 1:
            return grads[0], grads[1]
        summed = [grad.view(self.B, self.S, self.K, splits, self.C).sum(3).to(k.dtype) for grad in grads]
        return summed[0], summed[1]


@torch.library.custom_op("longhaul::attention", mutates_args=())
def _forward_op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    first_BT: Tensor,
    end_BT: Tensor,
    first_BS: Tensor,
    end_BS: Tensor,
    seeds_BH: Tensor | None,
    dropout_p: float,
    softcap: float,
    scale: float,
    deterministic: bool,
) -> tuple[Tensor, Tensor]:
    return launch_forward(q, k, v, first_BT, end_BT, seeds_BH, dropout_p, softcap, scale)


@torch.library.custom_op("longhaul::attention_backward", mutates_args=())
def _backward_op(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse_BHT: Tensor,
    first_BT: Tensor,
    end_BT: Tensor,
    first_BS: Tensor,
    end_BS: Tensor,
    seeds_BH: Tensor | None,
    dropout_p: float,
    softcap: float,
    scale: float,
    deterministic: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    if q.numel() == 0 or k.numel() == 0:
        return torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    with torch.cuda.device_of(q):
        backward = Backward(grad_out, q, k, v, out, lse_BHT)
        numbers = backward.numbers(seeds_BH, dropout_p, softcap, scale)
        if deterministic:
            backward.delta(None)
            grad_k, grad_v = backward.grad_kv(first_BS, end_BS, numbers, None)
            return backward.grad_q(first_BT, end_BT, numbers), grad_k, grad_v
        sums = torch.empty(q.shape, dtype=torch.float32, device=q.device)
        backward.delta(sums)
        grad_k, grad_v = backward.grad_kv(first_BS, end_BS, numbers, sums)
        return torch.mul(sums, scale, out=torch.empty_like(sums, dtype=q.dtype)), grad_k, grad_v


@_forward_op.register_fake
def _(q: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    B, T, H, C = q.shape
    return q.new_empty((B, T, H, C)), q.new_empty((B, H, T), dtype=torch.float32)


@_backward_op.register_fake
def _(grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.dropout_p, ctx.softcap, ctx.scale, ctx.deterministic = inputs
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[1])
    q, k, v, *others = tensors
    ctx.save_for_backward(q, k, v, *output, *others)


def _backward(ctx: Any, grad_out: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad_out is None:
        return (None,) * 12
    numbers = (ctx.dropout_p, ctx.softcap, ctx.scale, ctx.deterministic)
    return *_backward_op(grad_out, *ctx.saved_tensors, *numbers), *(None,) * 9


_forward_op.register_autograd(_backward, setup_context=_keep)


def attention_op(
    q_BTHC: Tensor,
    k_BSKC: Tensor,
    v_BSKC: Tensor,
    intervals: tuple[Tensor, Tensor, Tensor, Tensor],
    seeds_BH: Tensor | None,
    dropout_p: float,
    softcap: float | None,
    scale: float,
    deterministic: bool,
) -> Tensor:
    """Run the operator.

    Args:
        q_BTHC: queries.
        k_BSKC: keys.
        v_BSKC: values.
        intervals: int32, first and end of the keys of each query `[B, T]`, and of the queries of each key `[B, S]`.
        seeds_BH: Philox keys of the dropout; None: nothing is dropped.
        dropout_p: probability that a probability is dropped.
        softcap: as in `kernels.attention.attention`.
        scale: of scores.
        deterministic: the same bits on every run, for a second pass in the backward.

    Returns:
        `[B, T, H, C]`.
    """
    return _forward_op(q_BTHC, k_BSKC, v_BSKC, *intervals, seeds_BH, dropout_p, softcap or 0.0, scale, deterministic)[0]
