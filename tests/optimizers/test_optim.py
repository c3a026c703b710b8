"""Parameter groups and the optimizers' state."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from pretrain.errors import ConfigError
from pretrain.optimizers.lion import Lion
from pretrain.optimizers.moments import moment_names
from pretrain.optimizers.muon import Muon
from pretrain.optimizers.optim import create_state, make_optimizer, param_groups
from pretrain.options.config import OptimSection


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.output = nn.Linear(4, 3)
        self.output.stacked_rows = (1, 2)
        self.norm = nn.LayerNorm(3)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(10, 4)
        self.position_embedding = nn.Embedding(6, 4)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.output = nn.Linear(4, 10, bias=False)


NAMES = [name for name, _ in Model().named_parameters()]


def groups_of(**options):
    section = OptimSection(lr=1e-2, **options)
    groups = param_groups(Model(), section)
    assert sorted(name for group in groups for name in group["names"]) == sorted(NAMES)
    assert all(len(group["names"]) == len(group["params"]) for group in groups)
    return groups


def of(groups, name):
    [group] = [group for group in groups if name in group["names"]]
    return group


def test_only_matrices_decay():
    decaying, plain = groups_of(weight_decay=0.1)
    assert decaying["names"] == [
        "embedding.weight",
        "blocks.0.output.weight",
        "blocks.1.output.weight",
        "output.weight",
    ]
    assert decaying["weight_decay"] == 0.1 and plain["weight_decay"] == 0.0


def test_muon_has_the_matrices_of_the_blocks():
    groups = groups_of(name="muon")
    [muon] = [group for group in groups if group["muon"]]
    assert muon["names"] == ["blocks.0.output.weight", "blocks.1.output.weight"]
    assert muon["parts"] == {name: [(1, 4), (2, 4)] for name in muon["names"]}
    assert muon["weight_decay"] == 0.1
    assert not any(group["muon"] for group in groups_of(name="adamw"))


def test_groups_set_rate_and_decay_and_the_first_match_counts():
    groups = groups_of(
        groups=[
            {"match": "blocks.0.norm.*", "weight_decay": 0.3},
            {"match": "blocks.0.*", "lr_ratio": 0.5},
            {"match": "*embedding*", "lr_ratio": 2.0, "weight_decay": 0.0},
        ]
    )
    found = {name: (of(groups, name)["lr_ratio"], of(groups, name)["weight_decay"]) for name in NAMES}
    assert found["blocks.0.norm.weight"] == (1.0, 0.3)
    assert found["blocks.0.output.weight"] == (0.5, 0.1) and found["blocks.0.output.bias"] == (0.5, 0.0)
    assert found["embedding.weight"] == (2.0, 0.0) == found["position_embedding.weight"]
    assert found["blocks.1.output.weight"] == (1.0, 0.1) == found["output.weight"]
    assert of(groups, "embedding.weight")["lr"] == 2e-2


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        (
            ["embeddings.weight"],
            "optim.groups.0.match is embeddings.weight; expected a pattern that some parameter's name matches first. "
            "Near it: embedding.weight, position_embedding.weight",
        ),
        (["*", "blocks.*"], "optim.groups.1.match is blocks.*; .* All that it matches belongs to earlier entries"),
        (["zzz"], r"There are: embedding.weight, position_embedding.weight, blocks.\*.output.weight,"),
    ],
)
def test_an_entry_that_applies_to_nothing_is_an_error(patterns, message):
    with pytest.raises(ConfigError, match=message):
        groups_of(groups=[{"match": pattern} for pattern in patterns])


SECTIONS = {
    "adamw": OptimSection(name="adamw", lr=1e-2),
    "adam": OptimSection(name="adam", lr=1e-2),
    "rmsprop": OptimSection(name="rmsprop", lr=1e-2),
    "rmsprop-momentum": OptimSection(name="rmsprop", lr=1e-2, momentum=0.9),
    "sgd": OptimSection(name="sgd", lr=1e-2),
    "sgd-nesterov": OptimSection(name="sgd", lr=1e-2, momentum=0.9, nesterov=True),
    "lion": OptimSection(name="lion", lr=1e-2),
    "muon": OptimSection(name="muon", lr=1e-2),
    "muon-plain": OptimSection(name="muon", lr=1e-2, momentum=0.9, nesterov=False),
}


@pytest.mark.parametrize("section", SECTIONS.values(), ids=SECTIONS)
def test_created_state_is_what_the_optimizer_creates(section):
    models = [Model(), Model()]
    models[1].load_state_dict(models[0].state_dict())
    lazy, eager = (make_optimizer(param_groups(model, section), section) for model in models)
    tensors = [(tensor, group) for group in eager.param_groups for tensor in group["params"]]
    create_state(eager, tensors, section)
    for tensor, group in tensors:
        assert set(moment_names(section, group["muon"])) == set(eager.state.get(tensor, {})) - {"step"}
    for _ in range(3):
        for optimizer, model in ((lazy, models[0]), (eager, models[1])):
            for number, parameter in enumerate(model.parameters()):
                parameter.grad = torch.sin(torch.arange(parameter.numel()) + number).view(parameter.shape)
            optimizer.step()
    for one, other in zip(*(model.parameters() for model in models), strict=True):
        assert torch.equal(one, other)
        kinds = [{key: value.dtype for key, value in optimizer.state[parameter].items() if torch.is_tensor(value)}
                 for optimizer, parameter in ((lazy, one), (eager, other))]  # fmt: skip
        assert kinds[0] == kinds[1]


def test_optimizers_are_the_named_ones():
    kinds = {name: type(make_optimizer(param_groups(Model(), section), section)) for name, section in SECTIONS.items()}
    assert issubclass(kinds["adamw"], torch.optim.AdamW) and kinds["adam"].__mro__[1] is torch.optim.Adam
    assert issubclass(kinds["rmsprop"], torch.optim.RMSprop) and issubclass(kinds["sgd"], torch.optim.SGD)
    assert kinds["lion"] is Lion and kinds["muon"] is Muon
    section = OptimSection(name="rmsprop", lr=0.1, alpha=0.9, eps=1e-3)
    assert make_optimizer(param_groups(Model(), section), section).defaults["alpha"] == 0.9
