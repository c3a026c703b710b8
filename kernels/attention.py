"""Attention over what each query sees: causal or full, packed documents, sliding window, grouped queries.

In bf16 and fp16 on a GPU of compute capability 8.0 or higher, and on AMD's, own Triton programs run
(`kernels.attention_op`); on a CPU, on older GPUs and in fp32 PyTorch's operators (`kernels.attention_torch`).

Source: Vaswani et al. 2017; grouped queries: Ainslie et al. 2023, "GQA"; sliding window: Beltagy et al. 2020,
"Longformer"; soft-cap: Gemma Team 2024, "Gemma 2".
"""

from __future__ import annotations

import math
import warnings

import torch
from torch import Tensor

from kernels.attention_op import MAX_HEAD_DIM, attention_op
from kernels.attention_torch import attention_sdpa, attention_truth
from kernels.dispatch import use_triton
from kernels.dropout import DropoutKey, attention_seeds
from kernels.visibility import Visibility

OLDEST_CAPABILITY = (8, 0)


def attention(
    q_BTHC: Tensor,
    k_BSKC: Tensor,
    v_BSKC: Tensor,
    visible: Visibility,
    dropout_p: float = 0.0,
    dropout_key: DropoutKey | Tensor | None = None,
    softcap: float | None = None,
    scale: float | None = None,
    deterministic: bool | None = None,
) -> Tensor:
    """Let each query average the values of the keys that it sees.

    Under autocast queries, keys and values are taken in its dtype, as PyTorch's own attention does.

    Args:
        q_BTHC: queries, any strides; H is a multiple of K, and query head h uses key head h // (H / K).
        k_BSKC: keys of the S slots, of which the queries are the last T.
        v_BSKC: values.
        visible: which keys each query sees; one that sees none gets zeros.
        dropout_p: probability that a probability is dropped.
        dropout_key: seed, step, rows and place of the dropout, or the seeds that `attention_seeds` draws from these;
            None for no dropout.
        softcap: scores s become softcap * tanh(s / softcap); None: they stay as they are.
        scale: what scores are multiplied by, above 0; None: 1 / sqrt(C).
        deterministic: gradients have the same bits on every run, which on a GPU costs a second pass over the keys.
            None: as `torch.use_deterministic_algorithms` says.

    Returns:
        `[B, T, H, C]`.

    Raises:
        ValueError: if shapes or dtypes do not fit together.
    """
    kind = q_BTHC.device.type
    if torch.is_autocast_enabled(kind):
        wanted = torch.get_autocast_dtype(kind)
        q_BTHC, k_BSKC, v_BSKC = q_BTHC.to(wanted), k_BSKC.to(wanted), v_BSKC.to(wanted)
    _check(q_BTHC, k_BSKC, v_BSKC, visible, scale, softcap)
    drops = dropout_p > 0.0 and dropout_key is not None
    if _has_programs(q_BTHC, q_BTHC.dtype, q_BTHC.shape[3]):
        seeds_BH = dropout_key if drops else None
        if isinstance(seeds_BH, DropoutKey):
            seeds_BH = attention_seeds(q_BTHC.shape[2], seeds_BH)
        intervals = (visible.first_BT, visible.end_BT, *visible.queries_BS)
        scale = 1.0 / math.sqrt(q_BTHC.shape[3]) if scale is None else scale
        if deterministic is None:
            deterministic = torch.are_deterministic_algorithms_enabled()
        p = dropout_p if drops else 0.0
        return attention_op(q_BTHC, k_BSKC, v_BSKC, intervals, seeds_BH, p, softcap, scale, deterministic)
    if softcap is not None or drops:
        return attention_truth(q_BTHC, k_BSKC, v_BSKC, visible, dropout_p, dropout_key, softcap, scale)
    return attention_sdpa(q_BTHC, k_BSKC, v_BSKC, visible, scale)


def prepare(visible: Visibility, head_dim: int, is_explicit: bool) -> None:
    """Compute what `attention` reads of a visibility now, once, before code that is compiled for a layer does.

    Args:
        visible: what each query sees.
        head_dim: C.
        is_explicit: probabilities are dropped, or there is a soft-cap.
    """
    if _has_programs(visible.first_BT, visible.dtype, head_dim):
        visible.queries_BS  # noqa: B018  a cached property, as the others
    elif is_explicit:
        visible.seen_BTS  # noqa: B018
    else:
        visible.bias_B1TS  # noqa: B018


def _check(
    q_BTHC: Tensor, k_BSKC: Tensor, v_BSKC: Tensor, visible: Visibility, scale: float | None, softcap: float | None
) -> None:
    (B, T, H, C), (of_keys, S, K, width) = q_BTHC.shape, k_BSKC.shape
    if v_BSKC.shape != k_BSKC.shape or of_keys != B or width != C or H % K:
        raise ValueError(
            f"attention: q is {tuple(q_BTHC.shape)}, k {tuple(k_BSKC.shape)}, v {tuple(v_BSKC.shape)}; expected "
            "[B, T, H, C] and twice [B, S, K, C], with H a multiple of K."
        )
    if not q_BTHC.dtype == k_BSKC.dtype == v_BSKC.dtype:
        raise ValueError(
            f"attention: q is {q_BTHC.dtype}, k {k_BSKC.dtype}, v {v_BSKC.dtype}; expected one dtype. Cast them, or "
            "run under autocast."
        )
    if visible.first_BT.shape != (B, T) or visible.num_keys != S:
        raise ValueError(
            f"attention: the visibility is of {tuple(visible.first_BT.shape)} queries and {visible.num_keys} keys; "
            f"expected {(B, T)} and {S}, as q and k have."
        )
    for name, value in (("scale", scale), ("softcap", softcap)):
        if value is not None and not value > 0.0:
            raise ValueError(f"attention: {name} is {value}; expected a number above 0.")


def _has_programs(x: Tensor, dtype: torch.dtype, head_dim: int) -> bool:
    """Tell whether the Triton programs can run on the device of `x`, and say once why not on a GPU."""
    if not use_triton(x) or dtype == torch.float64:
        return False
    missing = None
    if x.is_cuda and not torch.version.hip:
        capability = torch.cuda.get_device_capability(x.device)
        if capability < OLDEST_CAPABILITY:
            missing = f"compute capability {capability}"
    if x.is_cuda and dtype == torch.float32:
        missing = "fp32"  # of which the matrix units have none: it would be slower than PyTorch's
    if head_dim > MAX_HEAD_DIM:
        missing = f"heads of {head_dim}"
    if missing is not None and not torch.compiler.is_compiling():
        warnings.warn(  # Python shows the same warning of the same line once
            f"attention: {missing}: PyTorch's attention runs, with a mask of B x T x S; the Triton programs need bf16 "
            f"or fp16, compute capability {OLDEST_CAPABILITY} and heads of at most {MAX_HEAD_DIM}.",
            stacklevel=2,
        )
    return missing is None
