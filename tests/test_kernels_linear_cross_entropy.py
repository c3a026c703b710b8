import pytest
import torch
import torch.nn.functional as F

from kernels import linear_cross_entropy as module
from kernels.linear_cross_entropy import linear_cross_entropy, linear_cross_entropy_truth, token_losses


def draw(tokens=37, dim=16, classes=50, padded=64, dtype=torch.float32):
    torch.manual_seed(0)
    x, weight = torch.randn(tokens, dim).to(dtype).requires_grad_(), torch.randn(padded, dim).to(dtype).requires_grad_()
    targets = torch.randint(0, classes, (tokens,))
    targets[::5] = -100
    return x, weight, targets, classes


@pytest.mark.parametrize("function", [linear_cross_entropy, linear_cross_entropy_truth])
def test_sum_equals_pytorch_over_the_classes_that_count(function):
    x, weight, targets, classes = draw()
    expected = F.cross_entropy(x @ weight[:classes].T, targets, ignore_index=-100, reduction="sum")
    torch.testing.assert_close(function(x, weight, targets, classes), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("chunk", [1, 7, 37, 1000])
def test_gradients_equal_those_of_the_truth_for_any_chunk(chunk, dtype, monkeypatch):
    x, weight, targets, classes = draw(dtype=dtype)
    monkeypatch.setattr(module, "_CHUNK_ELEMENTS_CPU", chunk * classes)
    found = torch.autograd.grad(0.1 * linear_cross_entropy(x, weight, targets, classes), (x, weight))
    expected = torch.autograd.grad(0.1 * linear_cross_entropy_truth(x, weight, targets, classes), (x, weight))
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == dtype
        torch.testing.assert_close(
            a, b, rtol=3e-2 if dtype == torch.bfloat16 else 1e-5, atol=4e-3 if dtype == torch.bfloat16 else 1e-6
        )


def test_padding_has_no_gradient_whatever_it_holds():
    x, weight, targets, classes = draw()
    with torch.no_grad():
        weight[classes:] = float("nan")
    loss = linear_cross_entropy(x, weight, targets, classes)
    grad = torch.autograd.grad(loss, weight)[0]
    assert loss.isfinite()
    assert (grad[classes:] == 0).all() and grad[:classes].isfinite().all()


def test_nothing_scored_gives_zero_loss_and_zero_gradients():
    x, weight, targets, classes = draw()
    targets[:] = -100
    loss = linear_cross_entropy(x, weight, targets, classes)
    assert loss.item() == 0.0
    assert all((grad == 0).all() for grad in torch.autograd.grad(loss, (x, weight)))


def test_token_losses_sum_to_the_loss_and_are_zero_where_not_scored(monkeypatch):
    x, weight, targets, classes = draw()
    monkeypatch.setattr(module, "_CHUNK_ELEMENTS_CPU", 10 * classes)
    losses = token_losses(x, weight, targets, classes)
    assert losses.dtype == torch.float32 and not losses.requires_grad
    assert (losses[targets == -100] == 0).all()
    expected = F.cross_entropy(x @ weight[:classes].T, targets, ignore_index=-100, reduction="none")
    torch.testing.assert_close(losses, expected.detach())
    with torch.no_grad():
        torch.testing.assert_close(linear_cross_entropy(x, weight, targets, classes), losses.sum())


def test_large_logits_do_not_overflow():
    x, weight, targets, classes = draw()
    loss = linear_cross_entropy(x * 1e3, weight, targets, classes)
    torch.testing.assert_close(loss, linear_cross_entropy_truth(x * 1e3, weight, targets, classes))
    assert loss.isfinite()


def test_a_frozen_input_gets_no_gradient():
    x, weight, targets, classes = draw()
    linear_cross_entropy(x.detach(), weight, targets, classes).backward()
    assert weight.grad is not None
