import math

import pytest
import torch

from kernels.activation import gelu, swiglu, swiglu_truth
from tests.helpers.interpreter_process import run_interpreted


def test_triton_in_the_interpreter():
    run_interpreted("tests/kernels/interpreter_operators.py", "swiglu or gelu")


def test_values():
    torch.testing.assert_close(swiglu(torch.tensor([2.0, 3.0])), torch.tensor([3.0 * 2.0 / (1 + math.exp(-2.0))]))
    inner = math.sqrt(2 / math.pi) * (1.5 + 0.044715 * 1.5**3)
    torch.testing.assert_close(gelu(torch.tensor(1.5)), torch.tensor(0.75 * (1 + math.tanh(inner))))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_swiglu_equals_the_truth_forward_and_backward(dtype):
    x = torch.randn(3, 5, 14).to(dtype).requires_grad_()
    grad = torch.randn(3, 7, 5).to(dtype).transpose(1, 2)  # not contiguous
    y, truth = swiglu(x), swiglu_truth(x)
    torch.testing.assert_close(y, truth)
    torch.testing.assert_close(torch.autograd.grad(y, x, grad)[0], torch.autograd.grad(truth, x, grad)[0])


def test_swiglu_gradient_matches_finite_differences():
    assert torch.autograd.gradcheck(swiglu, (torch.randn(2, 6, dtype=torch.float64, requires_grad=True),))


def test_without_gradients_the_bits_are_the_same():
    x = torch.randn(2, 3, 14)
    with_gradients = swiglu(x)
    with torch.no_grad():
        assert torch.equal(swiglu(x), with_gradients)
