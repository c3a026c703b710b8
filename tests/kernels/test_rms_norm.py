import pytest
import torch

from kernels.rms_norm import add_rms_norm, rms_norm
from tests.helpers.interpreter_process import run_interpreted


def test_triton_in_the_interpreter():
    run_interpreted("tests/kernels/interpreter_norms.py", "rmsnorm")


def test_values():
    y = rms_norm(torch.tensor([[3.0, 4.0]]), torch.tensor([1.0, 2.0]), 0.5)
    torch.testing.assert_close(y, torch.tensor([[3.0, 8.0]]) / 13**0.5)


def test_residual_is_added_first():
    x, residual, weight = torch.randn(2, 3, 8), torch.randn(2, 3, 8), torch.randn(8)
    y, new_residual = add_rms_norm(x, residual, weight, 1e-5)
    assert torch.equal(new_residual, x + residual)
    assert torch.equal(y, rms_norm(x + residual, weight, 1e-5))


def test_bf16_is_rounded_once():
    x, weight = torch.randn(4, 64).bfloat16(), torch.randn(64)
    y = rms_norm(x, weight, 1e-5)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, rms_norm(x.float(), weight, 1e-5).bfloat16())


def test_refuses_what_would_be_broadcast_or_read_out_of_bounds():
    x, weight = torch.zeros(2, 8), torch.zeros(8)
    with pytest.raises(
        ValueError, match=r"residual is \(8,\) torch.float32; expected the shape and dtype of x, \(2, 8\)"
    ):
        add_rms_norm(x, torch.zeros(8), weight, 1e-5)
    with pytest.raises(ValueError, match="residual is .* torch.bfloat16; expected"):
        add_rms_norm(x, x.bfloat16(), weight, 1e-5)
    with pytest.raises(ValueError, match=r"a norm's parameter is \(4,\); expected \(8,\)"):
        rms_norm(x, weight[:4], 1e-5)
