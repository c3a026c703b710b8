import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kernels.rms_norm import add_rms_norm, rms_norm

ROOT = Path(__file__).resolve().parent.parent


def test_triton_in_the_interpreter():
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "tests/interpreter_norms.py",
        "-k",
        "rmsnorm",
    ]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout, done.stdout


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
