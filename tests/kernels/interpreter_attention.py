"""The Triton attention in Triton's interpreter. Run in a process of its own by `test_attention_triton.py`.

`TRITON_INTERPRET` is read when a kernel is defined, so it cannot be set in a process that has imported `kernels`.
"""

from __future__ import annotations

import os

os.environ["TRITON_INTERPRET"] = "1"

import dataclasses
import math

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from kernels import attention_op, tile_table
from kernels.attention import attention
from kernels.attention_torch import attention_truth
from kernels.dropout import SITE_ATTENTION, DropoutKey, attention_seeds
from kernels.tile_table import Tile
from kernels.visibility import visibility
from tests.helpers.attention_cases import DTYPES, Case, check, results
from tests.kernels import interpreter_bf16, interpreter_speed

interpreter_bf16.install()
interpreter_speed.install()
torch.set_num_threads(1)
pytestmark = [
    pytest.mark.filterwarnings("ignore:divide by zero encountered in log2:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:overflow encountered in exp2:RuntimeWarning"),  # what is not seen
]

TILES = (Tile(32, 16, 4, 1), Tile(16, 32, 4, 1))


@pytest.fixture(params=["pointers 32x16", "descriptors 16x32"])
def path(request, monkeypatch):
    """Run with a tile higher than wide through pointers, and with one wider than high through descriptors."""
    described = request.param.startswith("descriptors")
    monkeypatch.setattr(tile_table, "INTERPRETED", TILES[described])
    monkeypatch.setattr(attention_op, "_descriptors_pay", lambda device: described)


DOCUMENTS = (9, 1, 20, 12, 2)
CASES = (
    Case(1),
    Case(49, H=4, K=2, lengths=DOCUMENTS),
    Case(37, C=80, full=True, lengths=DOCUMENTS, window=11, B=1),
    Case(20, 50, K=2, C=40, window=33, softcap=2.0, scale=0.3, B=1),
    Case(37, lengths=DOCUMENTS, dropout_p=0.3, B=1),
)


@pytest.mark.parametrize("deterministic", [False, True], ids=["one pass", "deterministic"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_errors_stay_within_twice_those_of_eager_code(path, dtype, deterministic):
    for case in CASES:
        check(dataclasses.replace(case, deterministic=deterministic), dtype, "cpu")


@pytest.mark.parametrize("C", [8, 40, 59, 64, 96, 111, 128, 192, 256])
def test_every_width_of_heads(path, C):
    for deterministic in (False, True):
        check(Case(9, 19, H=1, C=C, B=1, deterministic=deterministic), torch.float32, "cpu")


@pytest.mark.parametrize("shape", [(1, 1), (1, 3), (2, 1), (3, 130), (65, 64), (64, 65), (70, 1), (40, 90), (90, 40)])
@pytest.mark.parametrize("full", [False, True], ids=["causal", "full"])
def test_every_number_of_queries_and_keys(path, shape, full):
    check(Case(*shape, H=1, full=full, B=1), torch.float32, "cpu")
    check(Case(*shape, H=2, full=full, B=1, deterministic=True), torch.float32, "cpu")


@pytest.mark.parametrize(("H", "K"), [(1, 1), (4, 4), (6, 2), (8, 1)])
def test_query_heads_share_key_heads(path, H, K):
    for deterministic in (False, True):
        check(Case(18, H=H, K=K, C=16, B=1, deterministic=deterministic), torch.float32, "cpu")


def test_documents_of_every_length(path):
    for lengths in ((1,), (2, 1), (15, 16, 17), (31, 1, 32, 1, 33), tuple(range(1, 14)), (64, 36)):
        check(Case(100, lengths=lengths, H=1, C=16, B=1), torch.float32, "cpu")


def test_packed_equals_separate(path):
    lengths = (13, 1, 40, 7, 3)
    q, k, v, grad = Case(sum(lengths), B=1).tensors(torch.float32, "cpu")
    packed = results(attention, Case(sum(lengths), B=1, lengths=lengths), [q, k, v, grad])
    begin = 0
    for length in lengths:
        part = slice(begin, begin + length)
        apart = results(attention, Case(length, B=1), [x[:, part] for x in (q, k, v, grad)])
        for a, b in zip(packed, apart, strict=True):
            torch.testing.assert_close(a[:, part], b, atol=2e-6, rtol=1e-5)
        begin += length


def test_dropout_drops_what_the_truth_drops_whatever_else_is_in_the_batch(path):
    case = Case(37, H=3, K=3, B=4, dropout_p=0.4)
    tensors = case.tensors(torch.float32, "cpu")
    together = attention(*tensors[:3], case.visible(torch.float32, "cpu"), 0.4, case.key("cpu"))
    whole = case.key("cpu")
    for b in range(4):
        key = dataclasses.replace(whole, row_ids_B=whole.row_ids_B[b : b + 1])
        visible = visibility(torch.zeros(1, 37, dtype=torch.int64), 37, torch.float32)
        alone = attention(*(x[b : b + 1] for x in tensors[:3]), visible, 0.4, key)
        assert torch.equal(alone[0], together[b])
        assert not torch.equal(alone, attention(*(x[b : b + 1] for x in tensors[:3]), visible))


def test_dropout_does_not_depend_on_the_tile(monkeypatch):
    outputs = []
    for tile in (*TILES, Tile(64, 64, 4, 1)):
        monkeypatch.setattr(tile_table, "INTERPRETED", tile)
        case = Case(50, lengths=(7, 30), dropout_p=0.5)
        outputs.append(results(attention, case, case.tensors(torch.float32, "cpu")))
    for others in outputs[1:]:
        for a, b in zip(outputs[0], others, strict=True):
            torch.testing.assert_close(a, b, atol=5e-6, rtol=1e-5)


def test_gradient_matches_finite_differences(path):
    documents = torch.tensor([[0] * 5 + [5] * 8])
    key = DropoutKey(1, 2, torch.tensor([3]), 0, SITE_ATTENTION)
    visible = visibility(documents, 13, torch.float32)
    torch.manual_seed(0)
    leaves = [torch.randn(1, 13, heads, 16, requires_grad=True) for heads in (2, 1, 1)]
    directions = [torch.randn_like(x) for x in leaves]

    def loss(at, **options):
        return attention(*at, visible, 0.2, key, 3.0, 0.4, **options).double().sin().sum()

    h = 3e-3
    moved = [[x.detach() + sign * h * d for x, d in zip(leaves, directions, strict=True)] for sign in (-1, 1)]
    expected = (loss(moved[1]) - loss(moved[0])).item() / (2 * h)
    for deterministic in (False, True):
        grads = torch.autograd.grad(loss(leaves, deterministic=deterministic), leaves)
        slope = sum((grad * d).sum().item() for grad, d in zip(grads, directions, strict=True))
        assert slope == pytest.approx(expected, rel=1e-3)


def test_strided_tensors_are_read_right_and_left_alone(path):
    # queries, keys and values as slices of one projection, the gradient transposed
    wide = torch.randn(2, 21, 7, 48)
    before = wide.clone()
    q, k, v = wide[:, :, :4, :32], wide[:, ::1, 4:5, 8:40], wide[:, :, 5:6, :32]
    grad = torch.randn(2, 4, 32, 21).permute(0, 3, 1, 2)
    case = Case(21, H=4, K=1)
    for deterministic in (False, True):
        case = dataclasses.replace(case, deterministic=deterministic)
        found = results(attention, case, [q, k, v, grad])
        dense = results(attention, case, [x.contiguous() for x in (q, k, v, grad)])
        assert all(torch.equal(a, b) for a, b in zip(found, dense, strict=True))
    assert torch.equal(wide, before)


def test_expanded_tensors_and_gradients(path):
    q, k, v, _ = Case(9, B=2).tensors(torch.float32, "cpu")
    k, v = k[:1].expand(2, -1, -1, -1), v[:1].expand(2, -1, -1, -1)
    grad = torch.ones(()).expand(q.shape)  # as of .sum().backward()
    found = results(attention, Case(9), [q, k, v, grad])
    for a, b in zip(found, results(attention_truth, Case(9), [q, k, v, grad]), strict=True):
        torch.testing.assert_close(a, b)


def test_the_same_bits_every_time(path):
    case = Case(60, H=4, K=1, lengths=(25, 9), deterministic=True)
    tensors = case.tensors(torch.float32, "cpu")
    first, second = results(attention, case, tensors), results(attention, case, tensors)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_few_queries_of_a_cache_are_the_last_of_many(path):
    q, k, v, _ = Case(45).tensors(torch.float32, "cpu")
    starts = torch.zeros(2, 45, dtype=torch.int64)
    starts[1] = 17
    whole = attention(q, k, v, visibility(torch.minimum(starts, torch.arange(45)), 45, torch.float32))
    for num_queries in (1, 5):
        visible = visibility(starts[:, -num_queries:], 45, torch.float32)
        torch.testing.assert_close(attention(q[:, -num_queries:], k, v, visible), whole[:, -num_queries:])


@pytest.mark.parametrize("deterministic", [False, True], ids=["one pass", "deterministic"])
class TestBugsOfOthers:
    """Each was reported of another implementation."""

    def test_nan_gradient_of_one_key(self, path, deterministic):  # flash-attention#334
        case = Case(1, gain=5.0, deterministic=deterministic)
        out, grad_q, _, _ = results(attention, case, case.tensors(torch.bfloat16, "cpu"))
        assert out.isfinite().all() and grad_q.abs().max() < 0.02

    def test_large_scores(self, path, deterministic):  # flash-attention#1052
        check(Case(40, gain=5.0, deterministic=deterministic), torch.bfloat16, "cpu")

    def test_queries_before_the_first_key(self, path, deterministic):  # flash-attention#443
        case = Case(40, 10, deterministic=deterministic)
        out, grad_q, grad_k, grad_v = results(attention, case, case.tensors(torch.float32, "cpu"))
        assert (out[:, :30] == 0).all() and (grad_q[:, :30] == 0).all()
        assert grad_k.isfinite().all() and grad_v.isfinite().all()

    def test_no_queries_and_no_keys(self, path, deterministic):  # flash-attention#2562
        for case in (Case(0, 5), Case(0, 0), Case(5, 0), Case(5, B=0)):
            case = dataclasses.replace(case, deterministic=deterministic)
            found = results(attention, case, case.tensors(torch.float32, "cpu"))
            assert all((x == 0).all() for x in found), case

    def test_unseen_scores_that_overflow(self, path, deterministic):  # flash-attention#1947
        q, k, v, grad = Case(24, B=1).tensors(torch.float32, "cpu")
        k[:, 12:] = 1e3 * q[:, :1, :1].sign()  # a later document, whose scores with the first one are huge
        case = Case(24, B=1, lengths=(12, 12), deterministic=deterministic)
        found = results(attention, case, [q, k, v, grad])
        part = results(attention, Case(12, B=1), [x[:, :12] for x in (q, k, v, grad)])
        for a, b in zip(found, part, strict=True):
            torch.testing.assert_close(a[:, :12], b, atol=2e-6, rtol=1e-5)

    def test_all_scores_far_below_zero(self, path, deterministic):  # pytorch#196678
        q, k, v, grad = Case(35, B=1).tensors(torch.float32, "cpu")
        k[...], q[...] = 20.0 + 0.1 * k, -(20.0 + 0.1 * q)  # log-sum-exp about -2200
        case = Case(35, B=1, deterministic=deterministic)
        found, expected = (results(function, case, [q, k, v, grad]) for function in (attention, attention_truth))
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b, atol=2e-2, rtol=2e-3)

    def test_backward_of_full_attention(self, path, deterministic):  # triton#4174
        check(Case(50, full=True, deterministic=deterministic), torch.float32, "cpu")

    def test_rows_that_lie_past_two_to_the_31(self, path, deterministic):  # flash-linear-attention#1080, ffpa-attn#299
        near = Case(3, B=3, H=1).tensors(torch.float16, "cpu")
        try:
            memory = torch.empty(2**32 + 2**11, dtype=torch.float16)  # address space; few pages are touched
        except RuntimeError:
            pytest.skip("8 GiB of address space cannot be had")
        for stride in ((2**31, 2**9, 2**7, 1), (2**8, 2**31, 2**7, 1)):
            far = [memory[i * 64 :].as_strided((3, 3, 1, 32), stride) for i in range(3)]
            for target, source in zip(far, near, strict=False):
                target.copy_(source)
            case = Case(3, B=3, H=1, deterministic=deterministic)
            found, expected = (results(attention, case, [*tensors, near[3]]) for tensors in (far, near[:3]))
            assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_passes_opcheck(path):
    case = Case(9, 11, C=16, B=1, dropout_p=0.1)
    q, k, v, grad = case.tensors(torch.float32, "cpu")
    visible = case.visible(torch.float32, "cpu")
    seeds = attention_seeds(2, case.key("cpu"))
    intervals = (visible.first_BT, visible.end_BT, *visible.queries_BS)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    for deterministic in (False, True):
        arguments = (*leaves, *intervals, seeds, 0.1, 2.0, 0.25, deterministic)
        torch.library.opcheck(torch.ops.longhaul.attention.default, arguments)
        out, lse = (x.detach() for x in torch.ops.longhaul.attention(*arguments))
        backward = (grad, *(x.detach() for x in leaves), out, lse, *intervals, seeds, 0.1, 2.0, 0.25, deterministic)
        torch.library.opcheck(torch.ops.longhaul.attention_backward.default, backward)


def test_compiles_as_one_graph(path):
    q, k, v, grad = Case(17).tensors(torch.float32, "cpu")
    visible = Case(17).visible(torch.float32, "cpu")

    def block(q, k, v):
        return attention(q * 2, k, v, visible).sin()

    found = []
    for function in (block, torch.compile(block, fullgraph=True, backend="aot_eager")):
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        out = function(*leaves)
        found.append([out, *torch.autograd.grad(out, leaves, grad)])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)


def test_activation_checkpointing_draws_the_same_dropout(path):
    case = Case(20, dropout_p=0.5)
    q, k, v, grad = case.tensors(torch.float32, "cpu")
    visible, key = case.visible(torch.float32, "cpu"), case.key("cpu")
    found = []
    for again in (False, True):
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        arguments = (attention, *leaves, visible, 0.5, key)
        out = checkpoint(*arguments, use_reentrant=False) if again else arguments[0](*arguments[1:])
        found.append([out, *torch.autograd.grad(out, leaves, grad)])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_autocast_takes_its_dtype(path):
    q, k, v, _ = Case(8).tensors(torch.float32, "cpu")
    visible = Case(8).visible(torch.float32, "cpu")
    leaf = q.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        out = attention(leaf, k, v, visible)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, attention(*(x.bfloat16() for x in (q, k, v)), visible))
    out.float().sum().backward()
    assert leaf.grad.dtype == torch.float32


def test_splits_of_a_group_fill_the_processors():
    device = torch.device("cpu")  # 4 processors here
    assert attention_op.group_splits(device, 100, 8) == 1
    assert attention_op.group_splits(device, 4, 8) == 2
    assert attention_op.group_splits(device, 1, 8) == 8
    assert attention_op.group_splits(device, 1, 3) == 3
    assert attention_op.group_splits(device, 3, 6) == 3


def test_what_cannot_be_described_is_read_through_pointers(monkeypatch):
    assert attention_op.describable(torch.zeros(2, 3, 4, 16, dtype=torch.bfloat16))
    assert not attention_op.describable(torch.zeros(2, 3, 4, 20, dtype=torch.bfloat16))  # 40 bytes
    assert not attention_op.describable(torch.zeros(97, dtype=torch.bfloat16)[1:].view(1, 2, 3, 16))
    assert not attention_op.describable(torch.zeros(1, 3, 4, 16).expand(2, -1, -1, -1))
    for B, T, H in ((1, 1, 1), (1, 5, 1), (2, 1, 3)):
        described = attention_op.describe(torch.zeros(B, T, H, 24, dtype=torch.bfloat16), 16, 32)
        assert described.shape == [B, H, T, 24] and all(stride % 8 == 0 for stride in described.strides[:-1])
    monkeypatch.setattr(attention_op, "_descriptors_pay", lambda device: True)
    check(Case(12, C=20, H=1), torch.bfloat16, "cpu")


def test_lse_of_a_query_that_sees_nothing_is_infinite():
    q, k, v, _ = Case(4, 2, H=1, C=16, B=1).tensors(torch.float32, "cpu")
    visible = Case(4, 2, H=1, C=16, B=1).visible(torch.float32, "cpu")
    intervals = (visible.first_BT, visible.end_BT, *visible.queries_BS)
    _, lse_BHT = torch.ops.longhaul.attention(q, k, v, *intervals, None, 0.0, 0.0, 0.25, False)
    assert lse_BHT[0, 0, :2].tolist() == [math.inf, math.inf]
    scores = (q[0, :, 0] @ k[0, :, 0].T) * 0.25
    expected = torch.stack([scores[2, 0], scores[3].logsumexp(0)]) / math.log(2)
    torch.testing.assert_close(lse_BHT[0, 0, 2:], expected)
