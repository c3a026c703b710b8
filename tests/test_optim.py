"""Parameter groups and the optimizers' state."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from pretrain.config import OptimSection
from pretrain.optim import create_state, make_optimizer, moment_names, param_groups


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(10, 4)
        self.position_embedding = nn.Embedding(6, 4)
        self.linear = nn.Linear(4, 3)
        self.norm = nn.LayerNorm(3)


def test_only_matrices_decay():
    model = Model()
    decaying, plain = param_groups(model, 0.1)
    assert {id(p) for p in decaying["params"]} == {id(model.embedding.weight), id(model.linear.weight)}
    assert decaying["weight_decay"] == 0.1 and plain["weight_decay"] == 0.0
    assert len(decaying["params"]) + len(plain["params"]) == len(list(model.parameters()))


SECTIONS = [
    OptimSection(name="adamw", lr=1e-2),
    OptimSection(name="adam", lr=1e-2),
    OptimSection(name="rmsprop", lr=1e-2),
    OptimSection(name="rmsprop", lr=1e-2, momentum=0.9),
]


@pytest.mark.parametrize("section", SECTIONS, ids=lambda s: f"{s.name}-{s.momentum}")
def test_created_state_is_what_the_optimizer_creates(section):
    stepped, created = nn.Parameter(torch.ones(3, 2)), nn.Parameter(torch.ones(3, 2))
    lazy, eager = make_optimizer([{"params": [stepped]}], section), make_optimizer([{"params": [created]}], section)
    create_state(eager, [created], section)
    assert set(moment_names(section)) == set(eager.state[created]) - {"step"}
    for optimizer, parameter in ((lazy, stepped), (eager, created)):
        for _ in range(3):
            parameter.grad = torch.full((3, 2), 0.5)
            optimizer.step()
    assert torch.equal(stepped, created)
    assert {k: v.dtype for k, v in lazy.state[stepped].items() if torch.is_tensor(v)} == {
        k: v.dtype for k, v in eager.state[created].items() if torch.is_tensor(v)
    }


def test_optimizers_are_the_named_ones():
    parameter = [{"params": [nn.Parameter(torch.ones(2))]}]
    kinds = [type(make_optimizer(parameter, section)) for section in SECTIONS[:3]]
    assert kinds == [torch.optim.AdamW, torch.optim.Adam, torch.optim.RMSprop]
    assert make_optimizer(parameter, OptimSection(name="rmsprop", lr=0.1, alpha=0.9, eps=1e-3)).defaults["alpha"] == 0.9
