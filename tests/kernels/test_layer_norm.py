import pytest
import torch

from kernels.layer_norm import add_layer_norm, layer_norm
from tests.helpers.interpreter_process import run_interpreted


def test_triton_in_the_interpreter():
    run_interpreted("tests/kernels/interpreter_norms.py", "layernorm")


def test_values():
    y = layer_norm(torch.tensor([[1.0, 3.0]]), torch.tensor([1.0, 2.0]), torch.tensor([0.0, 5.0]), 3.0)
    torch.testing.assert_close(y, torch.tensor([[-0.5, 6.0]]))
    torch.testing.assert_close(
        layer_norm(torch.tensor([[1.0, 3.0]]), torch.ones(2), None, 3.0)[0, 1], torch.tensor(0.5)
    )


def test_residual_is_added_first():
    x, residual, weight, bias = torch.randn(2, 3, 8), torch.randn(2, 3, 8), torch.randn(8), torch.randn(8)
    y, new_residual = add_layer_norm(x, residual, weight, bias, 1e-5)
    assert torch.equal(new_residual, x + residual)
    assert torch.equal(y, layer_norm(x + residual, weight, bias, 1e-5))


def test_refuses_a_bias_of_another_width():
    with pytest.raises(ValueError, match=r"a norm's parameter is \(3,\); expected \(8,\)"):
        layer_norm(torch.zeros(2, 8), torch.zeros(8), torch.zeros(3), 1e-5)
