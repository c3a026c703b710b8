"""Triton's RoPE, SwiGLU, GELU and dropout in Triton's interpreter, in a process of its own: `helpers/interpreter_process.py` says why."""

from __future__ import annotations

import os

os.environ["TRITON_INTERPRET"] = "1"

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from kernels.activation import gelu, swiglu
from kernels.dropout import DropoutKey, dropout, dropout_truth
from kernels.rope import rope
from tests.helpers.norm_cases import DTYPES, results
from tests.helpers.operator_cases import (
    DROPPED,
    KINDS,
    SHAPES,
    drawn,
    drop_key,
    grad_for,
    is_dropout_exact,
    measure,
    operation,
    ratio_of,
    strided,
    tables,
)
from tests.kernels import interpreter_bf16, interpreter_speed

interpreter_bf16.install()
interpreter_speed.install()
torch.set_num_threads(1)
ROPE, ACTIVATIONS = KINDS[:1], KINDS[1:]
SMALL = {"rope": (2, 5, 3, 6), "swiglu": (5, 14), "gelu": (5, 7)}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_errors_stay_within_twice_those_of_eager_code(kind, dtype):
    for shape in SHAPES[kind]:
        ratio = measure(kind, shape, dtype, "cpu")
        assert ratio <= 1.0, f"{shape}: {ratio:.2f} of the bound"


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_rounded_once(kind, dtype):
    x = drawn(SMALL[kind], dtype, "cpu")
    run, grad = operation(kind, x).run, grad_for(kind, x)
    for a, b in zip(results(run, [x], [grad]), results(run, [x.float()], [grad]), strict=True):
        assert a.dtype == dtype and torch.equal(a, b.to(dtype))


@pytest.mark.parametrize("kind", KINDS)
def test_strided_inputs_and_gradients_are_read_right_and_left_alone(kind):  # Liger-Kernel#376, unsloth#10617
    for x, grad in strided(kind, torch.float32, "cpu"):
        assert ratio_of(kind, x, grad) <= 1.0, (x.stride(), grad.stride())
    assert operation(kind, x).run(x).is_contiguous()  # of an expanded tensor


@pytest.mark.parametrize(
    ("kind", "shape"),
    [("rope", (0, 5, 2, 8)), ("rope", (2, 0, 2, 8)), ("rope", (2, 5, 0, 8)), ("swiglu", (0, 8)), ("swiglu", (3, 0)),
     ("gelu", (0, 8)), ("gelu", (3, 0))],
)  # fmt: skip
def test_no_elements(kind, shape):
    x = torch.randn(shape)
    y, grad_x = results(operation(kind, x).run, [x], [grad_for(kind, x)])
    assert y.shape == grad_for(kind, x).shape and grad_x.shape == shape


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_matches_finite_differences(kind):
    x = drawn(SMALL[kind], torch.float32, "cpu").requires_grad_()
    run, direction, h = operation(kind, x).run, torch.randn_like(x), 1e-2
    weights = {-2: 1 / 12, -1: -2 / 3, 1: 2 / 3, 2: -1 / 12}  # the error grows with h^4: no draw comes near the bound

    def loss(at):
        return run(at).double().sin().sum()

    slope = (torch.autograd.grad(loss(x), x)[0] * direction).sum().item()
    moved = sum(weight * loss(x.detach() + step * h * direction).item() for step, weight in weights.items())
    assert slope == pytest.approx(moved / h, rel=1e-3, abs=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_operators_pass_opcheck(kind):
    x = drawn(SMALL[kind], torch.float32, "cpu")
    ops, grad = torch.ops.longhaul, grad_for(kind, x)
    if kind == "rope":
        for back in (False, True):
            torch.library.opcheck(ops.rope.default, (x.clone().requires_grad_(), *tables(x), back))
    else:
        torch.library.opcheck(getattr(ops, kind).default, (x.clone().requires_grad_(),))
        torch.library.opcheck(getattr(ops, f"{kind}_backward").default, (grad, x))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compiles_as_one_graph(kind, dynamic):
    x = drawn(SMALL[kind], torch.float32, "cpu").requires_grad_()
    run = operation(kind, x).run
    compiled = torch.compile(lambda x: run(x * 2) * 3, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    expected, found = run(x * 2) * 3, compiled(x)
    torch.testing.assert_close(found, expected)
    grad = grad_for(kind, x)
    torch.testing.assert_close(torch.autograd.grad(found, x, grad)[0], torch.autograd.grad(expected, x, grad)[0])


@pytest.mark.parametrize("kind", KINDS)
def test_recomputed_in_the_backward_pass(kind):
    x = drawn(SMALL[kind], torch.float32, "cpu").requires_grad_()
    run, grad = operation(kind, x).run, grad_for(kind, x)
    recomputed = checkpoint(run, x, use_reentrant=False)
    assert torch.equal(torch.autograd.grad(recomputed, x, grad)[0], torch.autograd.grad(run(x), x, grad)[0])


@pytest.mark.parametrize("kind", KINDS)
def test_fp64_is_left_to_pytorch(kind):
    x = drawn(SMALL[kind], torch.float64, "cpu").requires_grad_()
    run, truth, _ = operation(kind, x)
    assert run(x).dtype == torch.float64 and "longhaul" not in run(x).grad_fn.name()
    torch.testing.assert_close(run(x), truth(x))
    if kind != "rope":  # which turns in fp32
        assert torch.autograd.gradcheck(run, (x,))


@pytest.mark.parametrize("kind", KINDS)
def test_the_programs_are_what_runs(kind):
    x = drawn(SMALL[kind], torch.float32, "cpu").requires_grad_()
    assert f"longhaul_{kind}" in operation(kind, x).run(x).grad_fn.name()


@pytest.mark.parametrize("kind", KINDS)
def test_rows_that_lie_past_two_to_the_31(kind):  # Liger-Kernel#1483, #804; fla#1080
    stride = 2**30
    try:
        memory = torch.empty(2 * stride + 64, dtype=torch.float16)  # address space; only three pages are touched
    except RuntimeError:
        pytest.skip("4 GiB of address space cannot be had")
    far, near = memory.as_strided((3, 64), (stride, 1)), drawn((3, 64), torch.float16, "cpu")
    far.copy_(near)
    # rope: along rows, along tokens, along heads
    places = [(slice(None), None, None), (None, slice(None), None), (None, None)] if kind == "rope" else [slice(None)]
    for place in places:
        x = near[place]
        width = grad_for(kind, x).shape[-1]
        found, expected = (results(operation(kind, x).run, [y[place]], [y[place][..., :width]]) for y in (far, near))
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("kind", ACTIVATIONS)
def test_large_values_neither_overflow_nor_give_nan(kind):
    x = torch.tensor([[-1e4, -100.0, -20.0, 0.0, 20.0, 100.0, 1e4, 3e4]])
    x = torch.cat((x, torch.ones_like(x)), dim=-1) if kind == "swiglu" else x
    y, grad = results(operation(kind, x).run, [x], [torch.ones(1, 8)])
    assert y.isfinite().all() and grad.isfinite().all()
    assert torch.equal(y[0, 4:], x[0, 4:8]) and (y[0, :3].abs() < 1e-6).all()
    torch.testing.assert_close(grad[0, :8], torch.tensor([0, 0, 0, 0.5, 1, 1, 1, 1]), atol=1e-6, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_nan_in_gives_nan_out(kind):
    x = drawn((3, 5, 2, 8), torch.float32, "cpu")
    x[1, 2, 1, 3] = float("nan")
    y, grad_x = results(operation(kind, x).run, [x], [grad_for(kind, x)])
    assert y[1, 2, 1, 3].isnan() and int(y.isnan().sum()) == (2 if kind == "rope" else 1)
    assert int(grad_x.isnan().sum()) == {"rope": 0, "swiglu": 2, "gelu": 1}[kind]


@pytest.mark.parametrize("kind", ROPE)
class TestRope:
    def test_queries_and_keys_side_by_side_are_turned_as_apart(self, kind):  # one key head: Liger-Kernel#342
        qkv = drawn((2, 9, 6, 16), torch.float32, "cpu")
        cos, sin = tables(qkv)
        qk, q, k = qkv[:, :, :5], qkv[:, :, :4], qkv[:, :, 4:5]
        together = rope(qk, cos, sin)
        assert torch.equal(together, torch.cat((rope(q, cos, sin), rope(k, cos, sin)), dim=2))
        assert not torch.equal(together[:, 1, 4], k[:, 1, 0])

    def test_tables_of_one_row_serve_all(self, kind):
        x = drawn((3, 5, 2, 8), torch.float32, "cpu")
        cos, sin = (table[:1] for table in tables(x))
        expected = rope(x, *(table.expand(3, -1, -1, -1).contiguous() for table in (cos, sin)))
        assert torch.equal(rope(x, cos, sin), expected)
        transposed = sin.transpose(1, 3).contiguous().transpose(1, 3)
        assert transposed.stride(-1) != 1 and torch.equal(rope(x, cos, transposed), expected)

    def test_backward_turns_back(self, kind):
        x = drawn((2, 9, 3, 16), torch.float32, "cpu").requires_grad_()
        y = rope(x, *tables(x))
        torch.testing.assert_close(torch.autograd.grad(y, x, y.detach())[0], x.detach())

    def test_gradient_of_the_gradient(self, kind):
        x, grad = (drawn((2, 5, 3, 6), torch.float32, "cpu", seed).requires_grad_() for seed in (0, 1))
        (once,) = torch.autograd.grad(rope(x, *tables(x)), x, grad, create_graph=True)
        (twice,) = torch.autograd.grad(once, grad, x.detach())
        assert torch.equal(twice, rope(x, *tables(x)))

    @pytest.mark.parametrize("shape", [(1, 5, 1, 3), (2, 4, 1, 4), (1, 5, 2, 4)])
    def test_refuses_tables_of_other_shapes(self, kind, shape):
        x, table = torch.randn(1, 5, 2, 8), torch.randn(shape)
        with pytest.raises((ValueError, RuntimeError), match="expected|expanded size"):
            rope(x, table, table)

    def test_refuses_tables_of_other_dtypes(self, kind):
        x, table = torch.randn(1, 5, 2, 8), torch.randn(1, 5, 1, 4).bfloat16()
        with pytest.raises(
            ValueError, match=r"is \(1, 5, 1, 4\) torch.bfloat16; expected \(1, 5, 1, 4\) torch.float32"
        ):
            rope(x, table, table)


@pytest.mark.parametrize("kind", ["swiglu"])
def test_refuses_halves_of_unlike_width(kind):
    with pytest.raises(ValueError, match=r"gate and up are \(2, 7\); expected an even last dimension"):
        swiglu(torch.randn(2, 7))


@pytest.mark.parametrize("kind", ["gelu"])
def test_gelu_of_a_number(kind):
    assert gelu(torch.tensor(1.5)).shape == ()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("p", [0.1, 0.5, 0.999])
def test_dropout_is_the_truth_to_the_last_bit(dtype, p):
    for shape in DROPPED:
        assert is_dropout_exact(drawn(shape, dtype, "cpu"), drawn(shape, dtype, "cpu", 1), p), shape


@pytest.mark.parametrize("first_slot", [1, 2, 3, 2**30 + 5])  # between words, and beyond 32 bits of groups of them
def test_dropout_of_a_part_of_a_row(first_slot):
    for shape in ((2, 7, 33), (1, 3, 1)):
        assert is_dropout_exact(
            drawn(shape, torch.float32, "cpu"), drawn(shape, torch.float32, "cpu", 1), 0.5, first_slot
        )


def test_dropout_of_strided_tensors():
    wide = drawn((4, 6, 5, 32), torch.float32, "cpu")
    for x in (wide[::2, 1:4], wide.transpose(0, 1), wide[..., ::3], wide[:1].expand(3, 6, 5, 32)):
        for grad in (wide.new_ones(()).expand(x.shape), drawn(x.shape[::-1], torch.float32, "cpu").permute(3, 2, 1, 0)):
            assert is_dropout_exact(x, grad, 0.3)


def test_dropout_of_nothing():
    for shape in ((0, 4), (3, 0), (2, 0, 5)):
        assert is_dropout_exact(torch.randn(shape), torch.randn(shape), 0.5)


def test_dropout_takes_numbers_and_tensors():
    x, key = drawn((2, 40), torch.float32, "cpu"), drop_key(2, "cpu")
    of_tensors = DropoutKey(key.seed, torch.tensor(key.step), key.row_ids_B, torch.arange(20)[key.layer], key.site)
    assert torch.equal(dropout(x, 0.5, key), dropout(x, 0.5, of_tensors))
    for seed in (0, 1, 16, 2**31, 2**32 - 1, 2**63 - 1, 2**63):
        key = DropoutKey(seed, 1, key.row_ids_B)
        assert torch.equal(dropout(x, 0.5, key), dropout_truth(x, 0.5, key))


def test_dropout_passes_opcheck():
    x, key = drawn((2, 5, 7), torch.float32, "cpu").requires_grad_(), drop_key(2, "cpu")
    numbers = torch.tensor(key.step), torch.tensor(key.layer), -5, key.site, 6, 0.3
    torch.library.opcheck(torch.ops.longhaul.dropout.default, (x, key.row_ids_B, *numbers))
    seeds = torch.arange(6).view(2, 3)
    torch.library.opcheck(torch.ops.longhaul.attention_keep_mask.default, (seeds, 4, 6, 0.3))


def test_dropout_draws_its_mask_again_and_keeps_the_key_only():
    x, kept = drawn((2, 512), torch.float32, "cpu").requires_grad_(), []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):
        y = dropout(x, 0.5, drop_key(2, "cpu"))
    assert kept == [2, 1, 1]
    y.sum().backward()
    assert torch.equal(x.grad, torch.where(y == 0, 0.0, 2.0))
