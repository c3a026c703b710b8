"""The Triton norms in Triton's interpreter. Run in a process of its own by `test_*_norm.py`.

`TRITON_INTERPRET` is read when a kernel is defined, so it cannot be set in a process that has imported `kernels`.
"""

from __future__ import annotations

import os

os.environ["TRITON_INTERPRET"] = "1"

import pytest
import torch

from tests.helpers.norm_cases import (
    DTYPES,
    KINDS,
    SHAPES,
    exact,
    implementations,
    inputs,
    measure,
    results,
    strided_ratio,
)
from tests.kernels import interpreter_bf16, interpreter_speed

interpreter_bf16.install()
interpreter_speed.install()
torch.set_num_threads(1)


# Without a bias nothing depends on the dtype that is not run with one.
CASES = [(kind, dtype) for kind in KINDS for dtype in DTYPES if kind in KINDS[:2] or dtype == torch.float32]


@pytest.mark.parametrize("with_residual", [False, True], ids=["plain", "residual"])
@pytest.mark.parametrize(("kind", "dtype"), CASES, ids=str)
def test_errors_stay_within_twice_those_of_eager_code(kind, dtype, with_residual):  # the weight's too: unsloth#4533
    for shape in SHAPES:
        ratio = measure(kind, shape, dtype, "cpu", with_residual)
        assert ratio <= 1.0, f"{shape}: {ratio:.2f} of the bound"


@pytest.mark.parametrize("kind", KINDS)
def test_strided_inputs_are_read_right_and_left_alone(kind):  # Liger-Kernel#376, unsloth#5001, #10617; fla#759
    assert strided_ratio(kind, "cpu") <= 1.0


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_of_32k_columns(kind):  # columns beyond a block: xformers#785
    assert measure(kind, (4, 32768), torch.float32, "cpu", True) <= 1.0


@pytest.mark.parametrize("kind", KINDS)
def test_large_mean_does_not_cancel(kind):
    x, _, weight, bias = inputs(kind, (3, 192), torch.float32, "cpu", False)
    norm, _ = implementations(kind, False)
    wide = [None if a is None else a.double() for a in (x + 1000, None, weight, bias)]
    # fp32 holds 1000 to 6e-5; a variance taken as E[x^2] - E[x]^2 would be off by 0.1
    torch.testing.assert_close(norm(x + 1000, None, weight, bias), exact(kind, *wide)[0].float(), atol=5e-4, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_no_rows(kind):
    arguments = inputs(kind, (0, 64), torch.float32, "cpu", True)
    norm, _ = implementations(kind, True)
    outputs = results(norm, arguments, [torch.zeros(0, 64)] * 2)
    assert outputs[0].shape == (0, 64)
    assert all((grad == 0).all() for grad in outputs[2:])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("used", [0, 1], ids=["only y", "only the residual"])
def test_gradient_of_one_output_alone(kind, used):
    norm, truth = implementations(kind, True)
    found = []
    for function in (norm, truth):
        leaves = [a if a is None else a.requires_grad_() for a in inputs(kind, (5, 192), torch.float32, "cpu", True)]
        function(*leaves)[used].square().sum().backward()
        found.append([leaf.grad for leaf in leaves if leaf is not None])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a if a is not None else torch.zeros(()), b if b is not None else torch.zeros(()))


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_matches_finite_differences(kind):
    norm, _ = implementations(kind, True)
    torch.manual_seed(0)
    arguments = inputs(kind, (3, 7), torch.float32, "cpu", True)
    leaves = [None if a is None else a.requires_grad_() for a in arguments]
    directions = [None if a is None else torch.randn_like(a) for a in arguments]

    def loss(at):
        y, total = norm(*at)
        return (y.double().sin() + total.double().cos()).sum()

    loss(leaves).backward()
    slope = sum((leaf.grad * d).sum().item() for leaf, d in zip(leaves, directions, strict=True) if d is not None)
    h = 1e-2
    moved = [[None if a is None else a.detach() + s * h * d for a, d in zip(arguments, directions, strict=True)]
             for s in (-1, 1)]  # fmt: skip
    assert slope == pytest.approx((loss(moved[1]) - loss(moved[0])).item() / (2 * h), rel=2e-3, abs=2e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_operators_pass_opcheck(kind):
    x, residual, weight, bias = inputs(kind, (5, 24), torch.float32, "cpu", True)
    leaves = [x.requires_grad_(), residual.requires_grad_(), weight.requires_grad_()]
    ops, statistics = torch.ops.longhaul, torch.rand(5)
    if kind == "rmsnorm":
        torch.library.opcheck(ops.rms_norm.default, (leaves[0], leaves[2], 1e-5))
        torch.library.opcheck(ops.add_rms_norm.default, (*leaves, 1e-5))
        backward = (x.detach(), residual.detach(), x.detach(), weight.detach(), statistics)
        torch.library.opcheck(ops.rms_norm_backward.default, backward)
    else:
        torch.library.opcheck(ops.layer_norm.default, (leaves[0], leaves[2], bias, 1e-5))
        torch.library.opcheck(ops.add_layer_norm.default, (*leaves, bias, 1e-5))
        backward = (x.detach(), None, x.detach(), weight.detach(), statistics, statistics, bias is not None)
        torch.library.opcheck(ops.layer_norm_backward.default, backward)


@pytest.mark.parametrize("kind", KINDS[:2])
def test_what_is_normalised_is_the_residual_that_is_stored(kind):
    arguments = inputs(kind, (5, 192), torch.bfloat16, "cpu", True)
    y, total = implementations(kind, True)[0](*arguments)
    assert torch.equal(total, arguments[0] + arguments[1])
    assert torch.equal(y, implementations(kind, False)[0](total, None, *arguments[2:]))


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_bits_every_time(kind):
    arguments = inputs(kind, (33, 64), torch.float32, "cpu", True)
    norm, _ = implementations(kind, True)
    grads = [torch.randn(33, 64), torch.randn(33, 64)]
    first, second = results(norm, arguments, grads), results(norm, arguments, grads)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_rows_that_lie_past_two_to_the_31(kind):  # Liger-Kernel#1483, #804; fla#1080
    stride = 2**30
    try:
        memory = torch.empty(2 * stride + 64, dtype=torch.float16)  # address space; only three pages are touched
    except RuntimeError:
        pytest.skip("4 GiB of address space cannot be had")
    far = memory.as_strided((3, 64), (stride, 1))
    near, _, weight, bias = inputs(kind, (3, 64), torch.float16, "cpu", False)
    far.copy_(near)
    norm, _ = implementations(kind, False)
    found = [results(norm, [x, None, weight, bias], [near]) for x in (far, near)]
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
