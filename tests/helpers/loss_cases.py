"""What is checked of the Triton cross-entropy: by `kernels/interpreter_loss.py` in the interpreter, by `gpu/test_loss.py`."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from kernels.linear_cross_entropy import linear_cross_entropy
from kernels.matmul import matmul_fp32
from tests.helpers.norm_cases import poisoned_memory, worst_ratio

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
OPTIONS = (
    {},
    {"z_loss": 1e-2},
    {"label_smoothing": 0.1},
    {"softcap": 3.0},
    {"z_loss": 1e-2, "label_smoothing": 0.2, "softcap": 2.0},
)

Loss = Callable[..., tuple[Tensor, Tensor]]


def draw(
    num_tokens: int, num_classes: int, dtype: torch.dtype, device: str = "cpu", width: int = 24, padding: int = 13
) -> tuple[Tensor, Tensor, Tensor]:
    """Draw x, weights with rows of NaN as padding, and targets of which each fifth is not scored."""
    generator = torch.Generator(device).manual_seed(num_tokens * 10007 + num_classes)
    fp32 = {"generator": generator, "device": device}
    x = torch.randn(num_tokens, width, **fp32).to(dtype)
    weight = (torch.randn(num_classes + padding, width, **fp32) * 0.5).to(dtype)
    weight[num_classes:] = float("nan")
    targets = torch.randint(0, num_classes, (num_tokens,), generator=generator, device=device)
    targets[1::5] = -100
    return x, weight, targets


def results(loss: Loss, x: Tensor, weight: Tensor, targets: Tensor, grad: float, **options: float) -> list[Tensor]:
    """Return objective, cross-entropy and the gradients by x and weight of `grad` times the objective."""
    x, weight = x.detach().requires_grad_(), weight.detach().requires_grad_()
    objective, cross_entropy = loss(x, weight, targets, **options)
    assert not cross_entropy.requires_grad
    (grad * objective).backward()
    assert x.grad is not None and weight.grad is not None
    return [objective.detach(), cross_entropy, x.grad, weight.grad]


def eager(x: Tensor, weight: Tensor, targets: Tensor, num_classes: int, grad: float, **options: float) -> list[Tensor]:
    """Compute the same in plain PyTorch: fp32 logits, their gradient rounded to x.dtype, two products from it."""
    used = weight[:num_classes]
    logits = matmul_fp32(x, used.t()).requires_grad_()
    objective, cross_entropy = loss_of_logits(logits, targets, **options)
    objective.backward()
    assert logits.grad is not None
    grad_logits = logits.grad.to(x.dtype)
    grad_weight = torch.zeros(weight.shape, device=x.device)
    grad_weight[:num_classes] = matmul_fp32(grad_logits.t(), x)
    grads = [(grad * g).to(x.dtype) for g in (matmul_fp32(grad_logits, used), grad_weight)]
    return [objective.detach(), cross_entropy.detach(), *grads]


def loss_of_logits(
    logits: Tensor,
    targets: Tensor,
    z_loss: float = 0.0,
    label_smoothing: float = 0.0,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Return objective and cross-entropy of logits in their own precision, written independently of the truth."""
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    scored = targets != -100
    index = torch.where(scored, targets, 0)[:, None]
    log_p, log_sum = logits.log_softmax(-1), logits.logsumexp(-1)
    cross_entropy = -log_p.gather(1, index)[:, 0]
    objective = (1 - label_smoothing) * cross_entropy - label_smoothing * log_p.mean(-1) + z_loss * log_sum**2
    return torch.where(scored, objective, 0.0).sum(), torch.where(scored, cross_entropy, 0.0).sum()


def measure(inputs: tuple[Tensor, Tensor, Tensor], num_classes: int, grad: float = 0.37, **options: float) -> float:
    """Run one case in poisoned memory and return its worst ratio, by the rule of `worst_ratio`."""

    def fused(x: Tensor, weight: Tensor, targets: Tensor, **options: float) -> tuple[Tensor, Tensor]:
        return linear_cross_entropy(x, weight, targets, num_classes, **options)

    def exact(x: Tensor, weight: Tensor, targets: Tensor, **options: float) -> tuple[Tensor, Tensor]:
        objective, cross_entropy = loss_of_logits(x @ weight[:num_classes].t(), targets, **options)
        return objective, cross_entropy.detach()

    x, weight, targets = inputs
    with poisoned_memory():
        actual = results(fused, x, weight, targets, grad, **options)
    assert (actual[3][num_classes:] == 0).all() and (actual[2][targets == -100] == 0).all()
    reference = results(exact, x.double(), weight.double(), targets, grad, **options)
    plain = eager(x, weight, targets, num_classes, grad, **options)
    used = weight[:num_classes]
    # The factors of the gradients, by which one unit in the last place of a probability of 1 is multiplied.
    factors = [torch.ones(1), torch.ones(1), grad * used, grad * x]
    worst = 0.0
    for a, e, r, factor in zip(actual, plain, reference, factors, strict=True):
        if a.numel() > 0:
            unit = 2.0**-23 * (factor.abs().max().item() if factor.numel() > 0 else 1.0)
            worst = max(worst, worst_ratio([a], [e], [r], unit))
    return worst
