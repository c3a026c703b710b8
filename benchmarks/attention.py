"""Attention beside PyTorch's: SDPA by flash and by cuDNN, FlexAttention, and varlen_attn for packed documents.

Cases: causal, causal with four query heads a key head (gqa), packed documents (causal within each), and full. Rates
are TFLOP/s by the convention of published numbers: forward 4 C floating point operations for every scored pair of a
query and a key and every query head, backward 2.5 times as many, whatever an implementation really does. Scored are
T T / 2 pairs a row when causal, T T when full, and of packed documents exactly the pairs that are seen.
"""

from __future__ import annotations

import argparse
import inspect
import random
import sys
import time
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

if sys.path[0] == str(Path(__file__).resolve().parent):  # run as a file
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.record import Record, first_line
from benchmarks.timing import Timer
from kernels.attention import attention
from kernels.attention_torch import attention_truth
from kernels.visibility import Visibility, visibility

EXAMPLES = """examples:
  python benchmarks/attention.py --out bench-results/attention.json
  python benchmarks/attention.py --head-dims 128 --lengths 4096,8192
  python benchmarks/attention.py --shrink        (a CPU: shows that it runs, not how fast)"""

LENGTHS = (2048, 4096, 8192, 16384, 32768)
HEAD_DIMS = (128, 64)
LENGTHS_OF_KIND = {"documents": (8192, 32768), "full": (8192,), "gqa": (8192,)}
GROUP = 4  # query heads of a key head, in gqa
LONGEST_FIRST_LENGTH = 16384  # causal rows up to this length are measured before everything else
FLEX_LENGTH = 8192  # FlexAttention compiles seconds a shape: this length first
NUM_CHECKED = 2048  # slots of a row that are compared with fp64
DOCUMENTS_OF_ROW = 8  # on average
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
SDPA = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}
NEED_GPU = {
    "cudnn": "cuDNN runs on a GPU only",
    "varlen": "varlen_attn runs on a GPU only",
    "flex": "FlexAttention has no backward on a CPU",
}

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]  # q_BTHC, k_BTKC, v_BTKC


class Part(NamedTuple):
    """One implementation of one case."""

    name: str
    kind: str
    T: int
    head_dim: int

    def __str__(self) -> str:
        return f"{self.kind} T={self.T} C={self.head_dim} {self.name}"


def draw_documents(num_rows: int, T: int, seed: int) -> Tensor:
    """Pack rows with documents of long-tailed (log-normal) lengths, on average T / 8.

    Returns:
        int64 `[B, T]`, the slot where each slot's document begins.
    """
    source = random.Random(seed)
    rows = []
    for _ in range(num_rows):
        row: list[int] = []
        while len(row) < T:
            # exp(mu + 1/2) is the mean for sigma = 1
            drawn = T / DOCUMENTS_OF_ROW * source.lognormvariate(-0.5, 1.0)
            row += [len(row)] * min(max(1, round(drawn)), T - len(row))
        rows.append(row)
    return torch.tensor(rows)


class Case:
    """The inputs of one kind of attention at one length and width, and what is done with an implementation of it."""

    def __init__(self, kind: str, T: int, head_dim: int, arguments: argparse.Namespace, timer: Timer) -> None:
        self.kind, self.T, self.head_dim, self.timer = kind, T, head_dim, timer
        self.B = max(1, arguments.tokens // T)
        self.H = max(1, arguments.width // head_dim)
        self.K = max(1, self.H // GROUP) if kind == "gqa" else self.H
        self.dtype = DTYPES[arguments.dtype]
        device = timer.device
        starts_BT = torch.zeros(self.B, T, dtype=torch.int64)
        if kind == "documents":
            starts_BT = draw_documents(self.B, T, seed=T)
        ends_BT = torch.full_like(starts_BT, T).to(device) if kind == "full" else None
        self.visible = visibility(starts_BT.to(device), T, self.dtype, doc_end_BT=ends_BT)
        generator = torch.Generator(device).manual_seed(T + head_dim)

        def draw(num_heads: int) -> Tensor:
            size = (self.B, T, num_heads, head_dim)
            return torch.randn(size, generator=generator, device=device, dtype=self.dtype)

        self.q, self.k, self.v, self.grad_out = draw(self.H), draw(self.K), draw(self.K), draw(self.H)

    @property
    def causal(self) -> bool:
        """Whether no query sees a later key."""
        return self.kind != "full"

    @cached_property
    def scored(self) -> int:
        """Pairs of a query and a key that count, of one head in all rows."""
        if self.kind == "documents":
            return int((self.visible.end_BT - self.visible.first_BT).sum())
        return self.B * self.T * self.T // (2 if self.causal else 1)

    def flops(self, direction: str) -> float:
        """Return the floating point operations that a direction counts as."""
        forward = 4 * self.H * self.head_dim * self.scored
        return forward if direction == "forward" else 2.5 * forward

    @property
    def num_checked(self) -> int:
        """Slots that are compared with fp64: a causal row can be cut, a full one cannot."""
        return min(self.T, NUM_CHECKED) if self.causal else self.T

    @cached_property
    def exact(self) -> list[Tensor]:
        """The output and the gradients of the first slots, and of the first key head with its query heads, in fp64."""
        q, k, v, grad_out = (x.double() for x in self._first(self.q, self.k, self.v, self.grad_out))
        leaves = q.requires_grad_(), k.requires_grad_(), v.requires_grad_()
        n = self.num_checked
        seen = Visibility(self.visible.first_BT[:1, :n], self.visible.end_BT[:1, :n], n, torch.float64)
        out = attention_truth(q, k, v, seen)
        return [out.detach(), *torch.autograd.grad(out, leaves, grad_out)]

    def _first(self, q: Tensor, k: Tensor, v: Tensor, out: Tensor) -> list[Tensor]:
        heads = (self.H // self.K, 1, 1, self.H // self.K)
        return [x[:1, : self.num_checked, :n].detach() for x, n in zip((q, k, v, out), heads, strict=True)]

    def _leaves(self) -> list[Tensor]:
        return [x.detach().requires_grad_() for x in (self.q, self.k, self.v)]

    def errors(self, attend: Attend) -> dict[str, float]:
        """Return ||actual - exact|| / ||exact|| of the output, and the largest of the three gradients'."""
        leaves = self._leaves()
        out = attend(*leaves)
        grad_out = self.grad_out.clone()
        grad_out[:, self.num_checked :] = 0  # so that later slots have no part in the gradients of the first ones
        grad_q, grad_k, grad_v = torch.autograd.grad(out, leaves, grad_out)
        *grads, first_out = self._first(grad_q, grad_k, grad_v, out)
        actual = (first_out, *grads)
        forward, *backward = (
            float((a.double() - e).norm() / e.norm()) for a, e in zip(actual, self.exact, strict=True)
        )
        usable = all(error == error for error in backward)
        return {"forward": forward, "backward": max(backward) if usable else float("nan")}

    def seconds(self, attend: Attend, direction: str) -> float:
        """Time one direction: forward as training runs it, with what the backward pass needs."""
        leaves = self._leaves()
        if direction == "forward":
            return self.timer.median_seconds(lambda _: attend(*leaves), lambda: None)
        return self.timer.median_seconds(
            lambda out: torch.autograd.grad(out, leaves, self.grad_out), lambda: attend(*leaves)
        )


def implementation(name: str, case: Case) -> Attend:
    """Return one implementation of a case: ours, ours-deterministic, flash, cudnn, varlen or flex."""
    if name.startswith("ours"):
        deterministic = name == "ours-deterministic"
        return lambda q, k, v: attention(q, k, v, case.visible, deterministic=deterministic)
    if name == "varlen":
        return _varlen(case)
    return _flex(case) if name == "flex" else _sdpa(SDPA[name], case)


def _sdpa(backend: SDPBackend, case: Case) -> Attend:
    if case.kind == "documents":
        raise ValueError("SDPA by flash and cuDNN has no documents")

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        with sdpa_kernel(backend):
            out = F.scaled_dot_product_attention(q, k, v, is_causal=case.causal, enable_gqa=case.H != case.K)
        return out.transpose(1, 2)

    return attend


def _varlen(case: Case) -> Attend:
    """PyTorch's attention over documents one after another, without rows."""
    from torch.nn.attention.varlen import varlen_attn

    row_B1 = torch.arange(case.B, device=case.q.device)[:, None] * case.T
    begins = torch.unique(case.visible.first_BT + row_B1)
    bounds = torch.cat((begins, begins.new_tensor([case.B * case.T]))).int()
    longest = int(bounds.diff().max())
    # torch 2.10 still said is_causal
    new = "window_size" in inspect.signature(varlen_attn).parameters
    causal: dict[str, Any] = {"window_size": (-1, 0)} if new else {"is_causal": True}

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = varlen_attn(q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), bounds, bounds, longest, longest, **causal)
        assert isinstance(out, Tensor)
        return out.view(q.shape)

    return attend


def _flex(case: Case) -> Attend:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    first_BT = case.visible.first_BT

    def causal(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return query >= key

    def documents(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (query >= key) & (first_BT[b, query] == first_BT[b, key])  # a document is known by where it begins

    apart = case.kind == "documents"
    blocks = None
    if case.causal:
        mask, rows = (documents, case.B) if apart else (causal, None)
        blocks = create_block_mask(mask, rows, None, case.T, case.T, device=case.q.device)
    torch._dynamo.reset()  # else it stops compiling after a few shapes
    compiled = torch.compile(flex_attention, dynamic=False)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        return compiled(q, k, v, block_mask=blocks, enable_gqa=case.H != case.K).transpose(1, 2)

    return attend


def plan(lengths: Sequence[int], head_dims: Sequence[int]) -> list[Part]:
    """List what is measured, the most important first and what compiles for seconds last."""
    main = [("causal", T) for T in lengths if T <= LONGEST_FIRST_LENGTH]
    others = [("causal", T) for T in lengths if T > LONGEST_FIRST_LENGTH]
    for kind, wanted in LENGTHS_OF_KIND.items():
        others += [(kind, T) for T in [T for T in lengths if T in wanted] or [max(lengths)]]
    flex = sorted(main + others, key=lambda case: case[1] != FLEX_LENGTH)  # stable
    groups = (
        (("ours", "flash", "cudnn"), main),
        (("ours-deterministic",), main),
        (("ours", "flash", "cudnn", "varlen", "ours-deterministic"), others),
        (("flex",), flex),
    )
    return [
        Part(name, kind, T, head_dim)
        for names, cases in groups
        for kind, T in cases
        for head_dim in head_dims
        for name in names
        if name not in ((*SDPA,) if kind == "documents" else ("varlen",))
    ]


def run(record: Record, arguments: argparse.Namespace, deadline: float) -> None:
    """Measure every part of the plan; what fails is recorded and left out."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    timer = Timer(device, arguments.repeats, warm_up=1 if arguments.shrink else 3)
    left_out = {} if device.type == "cuda" else NEED_GPU
    for name, reason in left_out.items():
        record.fail(name, f"left out: {reason}")
    case: Case | None = None
    for part in plan(arguments.lengths, arguments.head_dims):
        if part.name in left_out:
            continue
        if time.monotonic() > deadline:
            record.fail(str(part), "left out: no time left")
            continue
        try:
            if case is None or (case.kind, case.T, case.head_dim) != part[1:]:
                case = None  # frees the one before
                case = Case(*part[1:], arguments, timer)
            measure(record, case, part.name)
        except Exception as error:  # one part must not stop the others, whatever is wrong with it
            record.fail(str(part), first_line(error))


def measure(record: Record, case: Case, name: str) -> None:
    """Check and time one implementation in both directions; the deterministic one differs in the backward only."""
    attend = implementation(name, case)
    errors = case.errors(attend)
    for direction in ("backward",) if name == "ours-deterministic" else ("forward", "backward"):
        seconds = case.seconds(attend, direction)
        record.add(
            case=case.kind,
            implementation=name,
            direction=direction,
            B=case.B,
            T=case.T,
            H=case.H,
            K=case.K,
            head_dim=case.head_dim,
            dtype=record.content["settings"]["dtype"],
            tflops=case.flops(direction) / seconds / 1e12,
            microseconds=seconds * 1e6,
            scored=case.scored,
            picoseconds_per_scored=seconds * 1e12 / case.scored,
            relative_error=errors[direction],
        )


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return its exit status."""
    parser = argparse.ArgumentParser(
        prog="attention", description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--tokens", type=int, help="B x T, where a row is not longer; 16384 by default")
    parser.add_argument("--width", type=int, help="H x C; 2048 by default")
    parser.add_argument("--head-dims", type=_numbers, help="C, with commas")
    parser.add_argument("--lengths", type=_numbers, help="T, with commas")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--repeats", type=int, help="timed runs; 25 by default")
    parser.add_argument("--seconds", type=float, default=1e9, help="start nothing new after this time")
    parser.add_argument("--shrink", action="store_true", help="tiny sizes")
    arguments = parser.parse_args(argv)
    defaults: dict[str, Any] = {
        "tokens": 16384, "width": 2048, "head_dims": HEAD_DIMS, "lengths": LENGTHS, "repeats": 25
    }  # fmt: skip
    if arguments.shrink:
        defaults = {"tokens": 256, "width": 256, "head_dims": HEAD_DIMS, "lengths": (64, 128), "repeats": 3}
    for option, value in defaults.items():
        setattr(arguments, option, getattr(arguments, option) or value)
    settings = {name: value for name, value in vars(arguments).items() if name != "out"}
    record = Record("attention", arguments.out, settings)
    run(record, arguments, time.monotonic() + arguments.seconds)
    record.write()
    from benchmarks.table import render

    print(render([record.content]))
    return 0 if record.content["rows"] else 1


if __name__ == "__main__":
    sys.exit(main())
