"""Triton's RoPE, SwiGLU, GELU and dropout on a GPU, by the rule that the interpreter's tests use."""

import pytest
import torch

from kernels.dropout import dropout, dropout_truth
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

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: torch.cuda is not available"),
]

LARGE = {
    "rope": ((2, 2048, 40, 128), (2, 2048, 20, 64), (1, 4099, 5, 80), (1, 1000, 136, 128), (2, 1024, 1, 256)),
    "swiglu": ((2, 2048, 2 * 2816), (199, 2 * 14336), (4099, 2 * 760)),
    "gelu": ((2, 2048, 8192), (4099, 761)),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_errors_stay_within_twice_those_of_eager_code(kind, dtype):
    for shape in (*SHAPES[kind], *LARGE[kind]):
        ratio = measure(kind, shape, dtype, "cuda")
        assert ratio <= 1.0, f"{shape}: {ratio:.2f} of the bound"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_strided_inputs_and_gradients_are_read_right_and_left_alone(kind, dtype):
    for x, grad in strided(kind, dtype, "cuda"):
        assert ratio_of(kind, x, grad) <= 1.0, (x.stride(), grad.stride())


def test_queries_and_keys_are_turned_as_slices_of_their_projection():
    qkv = drawn((2, 1024, 48, 128), torch.bfloat16, "cuda")
    cos, sin = tables(qkv)
    qk, v = qkv.split((40, 8), dim=2)
    before = qkv.clone()
    together = rope(qk, cos, sin)
    assert torch.equal(together, rope(qk.contiguous(), cos, sin)) and torch.equal(qkv, before)
    assert torch.equal(together[:, :, 32:], rope(qk[:, :, 32:], cos, sin))


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_bits_every_time(kind):
    x = drawn(LARGE[kind][0], torch.bfloat16, "cuda")
    run, grad = operation(kind, x).run, grad_for(kind, x)
    first = results(run, [x], [grad])
    for _ in range(20):
        assert all(torch.equal(a, b) for a, b in zip(first, results(run, [x], [grad]), strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_past_two_to_the_31_elements(kind):
    if torch.cuda.get_device_properties(0).total_memory < 40 * 2**30:
        pytest.skip("needs 40 GiB of GPU memory")
    x = torch.randn(2**31 // 8192 + 3, 8192, device="cuda", dtype=torch.bfloat16)
    last = x[-5:].clone()
    if kind == "rope":  # rows of one token, whose angles are those of the first place
        cos, sin = (torch.rand(1, 1, 1, 64, device="cuda") for _ in range(2))
        x, last = x.view(-1, 1, 64, 128), last.view(-1, 1, 64, 128)
        whole, tail = rope(x, cos, sin), rope(last, cos, sin)
    else:
        run = operation(kind, x).run
        whole, tail = run(x), run(last)
    assert torch.equal(whole[-5:], tail)
    del whole
    x.requires_grad_()
    last.requires_grad_()
    run = (lambda x: rope(x, cos, sin)) if kind == "rope" else operation(kind, x).run
    ones = torch.ones((), device="cuda", dtype=torch.bfloat16)
    found, expected = (torch.autograd.grad(run(y), y, ones.expand(tail.shape[1:]).expand(len(y), *tail.shape[1:]))[0]
                       for y in (x, last))  # fmt: skip
    assert torch.equal(found[-5:], expected)


@pytest.mark.parametrize("kind", KINDS)
def test_nan_in_gives_nan_out(kind):
    x = drawn((3, 5, 2, 64), torch.bfloat16, "cuda")
    x[1, 2, 1, 3] = float("nan")
    y = operation(kind, x).run(x)
    assert y[1, 2, 1, 3].isnan() and int(y.isnan().sum()) == (2 if kind == "rope" else 1)


@pytest.mark.parametrize("kind", KINDS)
def test_compiles_as_one_graph(kind):
    x = drawn(SHAPES[kind][-2], torch.bfloat16, "cuda").requires_grad_()
    run, grad = operation(kind, x).run, grad_for(kind, x)
    compiled = torch.compile(lambda x: run(x * 2), fullgraph=True)
    expected, found = run(x * 2), compiled(x)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(torch.autograd.grad(found, x, grad)[0], torch.autograd.grad(expected, x, grad)[0])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dropout_is_the_truth_to_the_last_bit(dtype):
    for shape in (*DROPPED, (2, 2048, 2816), (3, 4099, 761)):
        for p in (0.1, 0.5):
            assert is_dropout_exact(drawn(shape, dtype, "cuda"), drawn(shape, dtype, "cuda", 1), p), shape


def test_dropout_is_that_of_a_cpu():
    x = drawn((3, 4099, 5), torch.bfloat16, "cpu")
    assert torch.equal(dropout(x.cuda(), 0.3, drop_key(3, "cuda")).cpu(), dropout_truth(x, 0.3, drop_key(3, "cpu")))


def test_dropout_past_two_to_the_31_elements():
    if torch.cuda.get_device_properties(0).total_memory < 40 * 2**30:
        pytest.skip("needs 40 GiB of GPU memory")
    x = torch.ones(3, 2**30, device="cuda", dtype=torch.bfloat16)
    y = dropout(x, 0.5, drop_key(3, "cuda"))
    assert torch.equal(y[2:], dropout(x[2:], 0.5, drop_key(1, "cuda", 2**33 + 1)))
    assert abs(float((y[2] == 0).float().mean()) - 0.5) < 1e-3


def test_dropout_compiles_as_one_graph():
    x, key = drawn((2, 1024, 64), torch.bfloat16, "cuda").requires_grad_(), drop_key(2, "cuda")
    compiled = torch.compile(lambda x: dropout(x * 2, 0.3, key), fullgraph=True)
    expected, found = dropout(x * 2, 0.3, key), compiled(x)
    assert torch.equal(found, expected)
    grad = torch.ones_like(x)
    assert torch.equal(torch.autograd.grad(found, x, grad)[0], torch.autograd.grad(expected, x, grad)[0])
