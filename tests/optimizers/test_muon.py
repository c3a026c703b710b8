"""Muon's arithmetic, against the textbook and against torch's own."""

from __future__ import annotations

import pytest
import torch

from pretrain.optimizers.muon import Muon, orthogonalise, update_scale
from pretrain.options.config import OptimSection
from tests.helpers.plain_optimizers import PlainMuon

SHAPES = [(16, 24), (24, 16), (16, 24), (40, 8), (1, 5), (12, 12)]


def problem(section, parts=None):
    """A Muon over matrices of several shapes, with their names and generator of gradients."""
    generator = torch.Generator().manual_seed(3)
    weights = [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]
    names = [f"w{number}" for number in range(len(weights))]
    stacked = {name: (parts or {}).get(name, (len(weight),)) for name, weight in zip(names, weights, strict=True)}
    group = {"params": weights, "names": names, "muon": True, "weight_decay": section.weight_decay,
             "parts": {name: [(rows, weight.shape[1]) for rows in stacked[name]]
                       for name, weight in zip(names, weights, strict=True)}}  # fmt: skip
    optimizer = Muon([group], section.lr, section.betas, section.eps, section.momentum, section.nesterov)
    return weights, dict(zip(weights, stacked.values(), strict=True)), optimizer


def step_both(ours, theirs, weights, copies, num_steps=20):
    generator = torch.Generator().manual_seed(5)
    for _ in range(num_steps):
        for weight, copy in zip(weights, copies, strict=True):
            copy.grad = torch.randn(weight.shape, generator=generator)
            weight.grad = copy.grad.clone()
        ours.step()
        theirs.step()


@pytest.mark.parametrize("nesterov", [True, False])
def test_equals_the_textbook_with_stacked_matrices(nesterov):
    section = OptimSection(name="muon", lr=1e-2, nesterov=nesterov)
    weights, stacked, optimizer = problem(section, {"w1": (10, 14), "w3": (8, 16, 16)})
    copies = [torch.nn.Parameter(weight.detach().clone()) for weight in weights]
    plain = PlainMuon(dict(zip(copies, stacked.values(), strict=True)), section)
    step_both(optimizer, plain, weights, copies)
    for weight, copy in zip(weights, copies, strict=True):
        torch.testing.assert_close(weight, copy, rtol=0, atol=1e-5)


def test_is_near_torchs_own_which_computes_in_bf16():
    section = OptimSection(name="muon", lr=1e-2)
    weights, _, optimizer = problem(section)
    copies = [torch.nn.Parameter(weight.detach().clone()) for weight in weights]
    starts = [copy.detach().clone() for copy in copies]
    theirs = torch.optim.Muon(copies, lr=1e-2, weight_decay=section.weight_decay, momentum=0.95, nesterov=True,
                              adjust_lr_fn="match_rms_adamw")  # fmt: skip
    step_both(optimizer, theirs, weights, copies)
    for weight, copy, start in zip(weights, copies, starts, strict=True):
        assert (weight - copy).norm() < 0.03 * (copy - start).norm()


def test_orthogonalised_matrices_have_singular_values_near_one():
    matrices = torch.randn(3, 24, 16, generator=torch.Generator().manual_seed(0))
    for dtype in (torch.float32, torch.bfloat16):
        values = torch.linalg.svdvals(orthogonalise(matrices.to(dtype)).float())
        assert values.min() > 0.6 and values.max() < 1.3
    assert torch.equal(orthogonalise(torch.zeros(1, 4, 6)), torch.zeros(1, 4, 6))


def test_an_update_has_the_size_of_adamws():
    update = orthogonalise(torch.randn(1, 256, 64)) * update_scale(256, 64)
    assert 0.15 < float(update.square().mean().sqrt()) < 0.25


def test_weights_without_gradients_are_left_alone():
    section = OptimSection(name="muon", lr=1e-2)
    weights, _, optimizer = problem(section)
    before = [weight.detach().clone() for weight in weights]
    optimizer.step()
    assert all(torch.equal(weight, copy) for weight, copy in zip(weights, before, strict=True))
    assert not optimizer.state
