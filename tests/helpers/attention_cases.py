"""What is checked of the Triton attention: in the interpreter by `kernels/interpreter_attention.py`, on a GPU by
`gpu/test_attention.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.attention import attention
from kernels.attention_torch import attention_truth
from kernels.dropout import SITE_ATTENTION, DropoutKey
from kernels.visibility import Visibility, visibility
from tests.helpers.norm_cases import poisoned_memory

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
RMS_BOUNDS = {torch.float32: 4e-5, torch.float16: 0.005, torch.bfloat16: 0.005}


@dataclass(frozen=True)
class Case:
    """One call of attention.

    Args:
        T: queries, of which each row has as many.
        S: keys; None: as many as queries.
        H: query heads.
        K: key heads.
        C: width of heads.
        B: rows.
        lengths: of the documents of every second row, repeated until the row is full; None: one document.
        full: not causal.
        window: of the keys that a query sees.
        softcap: of scores.
        dropout_p: of probabilities.
        scale: of scores.
        gain: what queries are multiplied by.
        deterministic: the backward in two passes.
    """

    T: int
    S: int | None = None
    H: int = 2
    K: int = 1
    C: int = 32
    B: int = 2
    lengths: Sequence[int] | None = None
    full: bool = False
    window: int | None = None
    softcap: float | None = None
    dropout_p: float = 0.0
    scale: float | None = None
    gain: float = 1.0
    deterministic: bool = False

    @property
    def num_keys(self) -> int:
        """S."""
        return self.T if self.S is None else self.S

    def documents(self) -> tuple[Tensor, Tensor]:
        """The slots where each query's document begins and ends, `[B, T]`."""
        S = self.num_keys
        starts, ends = torch.zeros(self.B, S, dtype=torch.int64), torch.full((self.B, S), S)
        for b in range(0, self.B, 2) if self.lengths else ():
            begin, index = 0, b
            while begin < S:
                end = min(begin + self.lengths[index % len(self.lengths)], S)
                starts[b, begin:end], ends[b, begin:end] = begin, end
                begin, index = end, index + 1
        if S == 0:
            return torch.zeros(2, self.B, self.T, dtype=torch.int64).unbind()
        if self.T <= S:
            return starts[:, S - self.T :], ends[:, S - self.T :]
        return starts[:, :1].expand(-1, self.T) * 0, ends[:, :1].expand(-1, self.T) * 0 + S

    def visible(self, dtype: torch.dtype, device: str) -> Visibility:
        """What each query sees."""
        starts, ends = (x.to(device) for x in self.documents())
        return visibility(starts, self.num_keys, dtype, self.window, ends if self.full else None)

    def tensors(self, dtype: torch.dtype, device: str) -> list[Tensor]:
        """Draw queries, keys, values and the gradient of the output."""
        generator = torch.Generator().manual_seed(self.T * 10007 + self.num_keys * 101 + self.C)
        queries, keys = (self.B, self.T, self.H, self.C), (self.B, self.num_keys, self.K, self.C)
        drawn = [torch.randn(size, generator=generator) for size in (queries, keys, keys, queries)]
        drawn[0] *= self.gain
        return [x.to(device, dtype) for x in drawn]

    def key(self, device: str) -> DropoutKey:
        """The key of the dropout."""
        return DropoutKey(2**40 + 3, 7, torch.arange(self.B, device=device) + 2**33, 4, SITE_ATTENTION)


def results(function: Callable[..., Tensor], case: Case, tensors: list[Tensor]) -> list[Tensor]:
    """Run forward and backward; return the output and the gradients of queries, keys and values."""
    leaves = [x.detach().requires_grad_() for x in tensors[:3]]
    device = str(leaves[0].device)
    visible = case.visible(leaves[0].dtype, device)
    options = {} if function is attention_truth else {"deterministic": case.deterministic}
    out = function(*leaves, visible, case.dropout_p, case.key(device), case.softcap, case.scale, **options)
    return [out.detach(), *torch.autograd.grad(out, leaves, tensors[3])]


def worst_ratio(case: Case, actual: list[Tensor], eager: list[Tensor], exact: list[Tensor]) -> tuple[float, float]:
    """Compare by the rule of FlashAttention's tests, and by the relative root mean square of errors.

    Returns:
        The largest of error / (2 x the error of plain PyTorch in that dtype, 3 x with a soft-cap, + noise), and of
        rms(error) / rms(exact) / the larger of the dtype's bound and what plain PyTorch has; neither may pass 1. NaN
        counts as infinite.
    """
    worst, worst_rms = 0.0, 0.0
    for a, e, r in zip(actual, eager, exact, strict=True):
        assert a.dtype == e.dtype and a.shape == e.shape == r.shape
        if a.numel() == 0:
            continue
        rounded = r.to(a.dtype)
        noise = 2 * (rounded + 0.3 - 0.3 - rounded).abs().max().double()
        # 2**-18: sums of tens of fp32 terms that cancel, as in the gradient of the only key of a query
        atol = max(noise, torch.finfo(a.dtype).eps * float(r.abs().max()), 2.0**-18)
        bound = (3 if case.softcap else 2) * (e.double() - r).abs().max() + atol
        error = (a.double() - r).abs()
        ratio = float(error.max() / bound)
        # gradients that are exactly zero (one key) have rounding of what cancelled in them, of the size of one
        size = max(float(r.square().mean().sqrt()), 0.05)
        of_eager = float((e.double() - r).square().mean().sqrt()) / size
        ratio_rms = float(error.square().mean().sqrt()) / size / max(RMS_BOUNDS[a.dtype], of_eager)
        worst = max(worst, ratio if ratio == ratio else float("inf"))
        worst_rms = max(worst_rms, ratio_rms if ratio_rms == ratio_rms else float("inf"))
    return worst, worst_rms


def check(case: Case, dtype: torch.dtype, device: str) -> None:
    """Run a case and hold it against the bounds."""
    tensors = case.tensors(dtype, device)
    with poisoned_memory():
        actual = results(attention, case, tensors)
    eager = results(attention_truth, case, tensors)
    exact = results(attention_truth, case, [x.double() for x in tensors])
    ratio, ratio_rms = worst_ratio(case, actual, eager, exact)
    assert ratio <= 1.0, f"{case} {dtype}: {ratio:.2f} of the bound of the largest error"
    assert ratio_rms <= 1.0, f"{case} {dtype}: {ratio_rms:.2f} of the bound of the root mean square"
