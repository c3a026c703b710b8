import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from kernels import linear_cross_entropy as module
from kernels.cross_entropy import row_stride, vocabulary_block
from kernels.linear_cross_entropy import linear_cross_entropy, linear_cross_entropy_truth, soft_cap, token_losses
from kernels.loss_chunks import chunk_rows

ROOT = Path(__file__).resolve().parents[2]
OPTIONS = [
    {},
    {"z_loss": 1e-2},
    {"label_smoothing": 0.1},
    {"softcap": 3.0},
    {"z_loss": 1e-2, "label_smoothing": 0.2, "softcap": 2.0},
]


def draw(tokens=37, dim=16, classes=50, padded=64, dtype=torch.float32):
    torch.manual_seed(0)
    x, weight = torch.randn(tokens, dim).to(dtype).requires_grad_(), torch.randn(padded, dim).to(dtype).requires_grad_()
    targets = torch.randint(0, classes, (tokens,))
    targets[::5] = -100
    return x, weight, targets, classes


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("function", [linear_cross_entropy, linear_cross_entropy_truth])
def test_sums_equal_pytorch_over_the_classes_that_count(function, options):
    x, weight, targets, classes = draw()
    logits = x @ weight[:classes].T
    if "softcap" in options:
        logits = options["softcap"] * torch.tanh(logits / options["softcap"])
    plain = F.cross_entropy(logits, targets, ignore_index=-100, reduction="sum")
    smoothing = options.get("label_smoothing", 0.0)
    expected = F.cross_entropy(logits, targets, ignore_index=-100, reduction="sum", label_smoothing=smoothing)
    expected = expected + options.get("z_loss", 0.0) * (logits.logsumexp(-1)[targets != -100] ** 2).sum()
    objective, cross_entropy = function(x, weight, targets, classes, **options)
    torch.testing.assert_close(objective, expected)
    torch.testing.assert_close(cross_entropy, plain.detach())
    assert objective.requires_grad and not cross_entropy.requires_grad
    assert (objective != cross_entropy) == bool(options.keys() - {"softcap"})
    found = torch.autograd.grad(objective, (x, weight))
    for gradient, wanted in zip(found, torch.autograd.grad(expected, (x, weight)), strict=True):
        torch.testing.assert_close(gradient, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("chunk", [1, 7, 37, 1000])
def test_gradients_equal_those_of_the_truth_for_any_chunk(chunk, dtype, options, monkeypatch):
    x, weight, targets, classes = draw(dtype=dtype)
    monkeypatch.setattr(module, "_CHUNK_ELEMENTS_CPU", chunk * classes)
    monkeypatch.setattr(module, "_MIN_CHUNK_TOKENS_CPU", 1)
    found = torch.autograd.grad(0.1 * linear_cross_entropy(x, weight, targets, classes, **options)[0], (x, weight))
    truth = linear_cross_entropy_truth(x, weight, targets, classes, **options)[0]
    for a, b in zip(found, torch.autograd.grad(0.1 * truth, (x, weight)), strict=True):
        assert a.dtype == dtype
        torch.testing.assert_close(
            a, b, rtol=3e-2 if dtype == torch.bfloat16 else 1e-5, atol=4e-3 if dtype == torch.bfloat16 else 1e-6
        )


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_gradients_equal_finite_differences(options):
    x, weight, targets, classes = (part.detach() if torch.is_tensor(part) else part for part in draw(6, 4, 7, 8))
    x, weight = x.requires_grad_(), weight.requires_grad_()

    def objective(x, weight):
        return linear_cross_entropy_truth(x.double(), weight.double(), targets, classes, **options)[0]

    found = torch.autograd.grad(linear_cross_entropy(x, weight, targets, classes, **options)[0], (x, weight))
    with torch.no_grad():
        for tensor, gradient in zip((x, weight), found, strict=True):
            for position in range(0, tensor.numel(), 5):
                step = torch.zeros(tensor.numel()).index_fill(0, torch.tensor(position), 1e-2).view_as(tensor)
                pairs = [(x + s, weight) if tensor is x else (x, weight + s) for s in (step, -step)]
                difference = (objective(*pairs[0]) - objective(*pairs[1])) / 2e-2
                torch.testing.assert_close(gradient.flatten()[position], difference.float(), rtol=1e-2, atol=2e-3)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_padding_has_no_gradient_whatever_it_holds(options):
    x, weight, targets, classes = draw()
    with torch.no_grad():
        weight[classes:] = float("nan")
    loss, _ = linear_cross_entropy(x, weight, targets, classes, **options)
    grad = torch.autograd.grad(loss, weight)[0]
    assert loss.isfinite()
    assert (grad[classes:] == 0).all() and grad[:classes].isfinite().all()


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_nothing_scored_gives_zero_loss_and_zero_gradients(options):
    x, weight, targets, classes = draw()
    targets[:] = -100
    loss, cross_entropy = linear_cross_entropy(x, weight, targets, classes, **options)
    assert loss.item() == 0.0 and cross_entropy.item() == 0.0
    assert all((grad == 0).all() for grad in torch.autograd.grad(loss, (x, weight)))


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_token_losses_sum_to_the_loss_and_are_zero_where_not_scored(softcap, monkeypatch):
    x, weight, targets, classes = draw()
    monkeypatch.setattr(module, "_CHUNK_ELEMENTS_CPU", 10 * classes)
    monkeypatch.setattr(module, "_MIN_CHUNK_TOKENS_CPU", 1)
    losses = token_losses(x, weight, targets, classes, softcap)
    assert losses.dtype == torch.float32 and not losses.requires_grad
    assert (losses[targets == -100] == 0).all()
    logits = soft_cap(x @ weight[:classes].T, softcap)
    expected = F.cross_entropy(logits, targets, ignore_index=-100, reduction="none")
    torch.testing.assert_close(losses, expected.detach())
    with torch.no_grad():
        options = {"z_loss": 1e-2, "label_smoothing": 0.1, "softcap": softcap}
        objective, cross_entropy = linear_cross_entropy(x, weight, targets, classes, **options)
        torch.testing.assert_close(cross_entropy, losses.sum())
        torch.testing.assert_close(objective, linear_cross_entropy_truth(x, weight, targets, classes, **options)[0])


def test_large_logits_do_not_overflow():
    x, weight, targets, classes = draw()
    loss, _ = linear_cross_entropy(x * 1e3, weight, targets, classes)
    torch.testing.assert_close(loss, linear_cross_entropy_truth(x * 1e3, weight, targets, classes)[0])
    assert loss.isfinite()


def test_a_frozen_input_gets_no_gradient():
    x, weight, targets, classes = draw()
    linear_cross_entropy(x.detach(), weight, targets, classes)[0].backward()
    assert weight.grad is not None


def test_soft_cap_is_the_same_with_and_without_gradients():
    logits = torch.linspace(-100, 100, 101)
    capped = soft_cap(logits.clone().requires_grad_(), 5.0)
    assert capped.abs().max() <= 5.0 and torch.equal(capped.detach(), soft_cap(logits.clone(), 5.0))
    assert soft_cap(logits, None) is logits


def test_triton_in_the_interpreter():
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/kernels/interpreter_loss.py"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout, done.stdout


def test_the_program_compiles_for_ampere_and_hopper_without_spills_or_fp64(tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "tests/kernels/compile_loss.py", "50257", "262144"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    reports = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(reports) == 2 * 2 * 4  # GPUs, classes, variants
    for report in reports:
        assert report["spilled_bytes"] == 0 and report["f64"] == 0, report
        assert report["wide_loads"] > 0, report
        writes = report["variant"] != "evaluation"
        assert (report["wide_stores"] > 0) == writes, report
        assert report["cached_loads"] == 0, report  # what is read is overwritten: no cache may hold on to it


@pytest.mark.parametrize("num_classes", [1, 31, 100, 4096, 4097, 50257, 262144])
def test_blocks_and_rows_of_logits(num_classes):
    block, num_warps = vocabulary_block(num_classes)
    assert block & (block - 1) == 0 and (block >= num_classes or block == 4096)
    assert num_warps & (num_warps - 1) == 0 and num_warps <= 16 and block <= 256 * num_warps
    assert num_classes <= row_stride(num_classes) < num_classes + 32 and row_stride(num_classes) * 4 % 128 == 0


def test_chunks_are_large_and_logits_a_sixth_of_the_unfused():
    for num_tokens, num_classes, rows in (
        (8192, 128256, 2048),
        (16384, 128256, 4096),
        (65536, 128256, 4096),
        (8192, 32000, 8192),
        (32768, 50257, 4682),
        (5000, 128256, 1667),
        (1, 2**40, 1),
    ):
        assert chunk_rows(num_tokens, num_classes) == rows
    assert chunk_rows(0, 100) == 0
    # 8192 tokens of width 2048: logits and the fp32 gradients against 12 bytes a logit
    ours = 4 * (chunk_rows(8192, 128256) * row_stride(128256) + 128256 * 2048 + 8192 * 2048) + 8 * 8192
    assert ours < 12 * 8192 * 128256 / 5.7
