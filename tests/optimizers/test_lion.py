"""Lion against the textbook."""

from __future__ import annotations

import torch

from pretrain.optimizers.lion import Lion
from pretrain.options.config import OptimSection
from tests.helpers.plain_optimizers import PlainLion


def test_equals_the_textbook():
    generator = torch.Generator().manual_seed(1)
    section = OptimSection(name="lion", lr=1e-2)
    weights = [torch.nn.Parameter(torch.randn(5, 3, generator=generator)) for _ in range(3)]
    copies = [torch.nn.Parameter(weight.detach().clone()) for weight in weights]

    def divide(tensors):
        return [{"params": tensors[:2], "weight_decay": 0.1}, {"params": tensors[2:], "weight_decay": 0.0}]

    ours, theirs = Lion(divide(weights), section.lr, section.betas), PlainLion(divide(copies), section)
    for _ in range(20):
        for weight, copy in zip(weights, copies, strict=True):
            weight.grad = copy.grad = torch.randn(5, 3, generator=generator)
        ours.step()
        theirs.step()
    for weight, copy in zip(weights, copies, strict=True):
        torch.testing.assert_close(weight, copy, rtol=0, atol=1e-6)


def test_weights_without_gradients_are_left_alone():
    weight = torch.nn.Parameter(torch.ones(2))
    Lion([{"params": [weight], "weight_decay": 0.5}], 0.1).step()
    assert torch.equal(weight, torch.ones(2))
