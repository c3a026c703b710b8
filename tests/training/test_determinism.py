"""What could give other bits on another run: looked for in the sources, and in the operators of a step."""

from __future__ import annotations

import os
import re

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from pretrain.optimizers.optim import make_optimizer, param_groups
from pretrain.options.families import resolve_shape
from pretrain.training.run import set_determinism
from tests.helpers.rank_helpers import ROOT
from tests.helpers.training_agreement import BYTES_VOCAB, backward_once, build, byte_steps, make_config

# Of torch's own list (`torch.use_deterministic_algorithms`): those that add, or overwrite, in any order on a GPU.
ANY_ORDER = {
    "bincount", "bmm_sparse", "cumsum", "embedding_bag", "grid_sampler_2d_backward", "histc", "index_add", "index_copy",
    "index_put", "index_reduce", "index_select_backward", "kthvalue", "median", "nll_loss2d_forward", "put",
    "repeat_interleave", "scatter", "scatter_add", "scatter_reduce", "upsample_bilinear2d_backward",
}  # fmt: skip


class Operators(TorchDispatchMode):
    """Notes the names of operators on numbers with fractions, and whether a scatter has places that collide."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()
        self.widths: set[int] = set()

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        name = operator.overloadpacket.__name__.rstrip("_").removeprefix("_")
        if any(isinstance(value, torch.Tensor) and value.is_floating_point() for value in args):
            self.names.add(name)
            if name == "scatter_add":
                self.widths.add(args[2].shape[1])
        return operator(*args, **(kwargs or {}))


@pytest.mark.parametrize("optimizer", ["adamw", "adam", "muon", "lion", "sgd", "rmsprop"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_no_operator_of_a_step_depends_on_an_order(family, optimizer):
    config = make_config(
        model={"family": family, "dim": 32, "num_layers": 1, "num_heads": 2, "dropout": 0.1},
        data={"seq_len": 64}, train={"global_batch_size": 2, "micro_batch_size": 2},
        optim={"name": optimizer, "lr": 1e-3},
    )  # fmt: skip
    shape = resolve_shape(config.model, BYTES_VOCAB, 64)
    model, (step,) = build(config, shape, "cpu"), byte_steps(config, 1, "cpu")
    update = make_optimizer(param_groups(model, config.optim), config.optim)
    with Operators() as operators:
        backward_once(model, step)
        update.step()
    assert {"embedding", "mm"} <= operators.names  # the step was watched
    assert operators.names & ANY_ORDER <= {"scatter_add"}
    assert operators.widths <= {1}  # one element a row: there is no order


def test_atomic_additions_are_in_attentions_backward_pass_alone():
    found = {
        path.name: len(re.findall(r"\batomic_\w+\(", path.read_text(encoding="utf-8")))
        for path in (ROOT / "kernels").glob("*.py")
    }
    assert {name: number for name, number in found.items() if number} == {"attention_backward.py": 2}


def test_what_is_free_is_always_on(monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "mine")
    set_determinism(False)
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == "mine" and not torch.are_deterministic_algorithms_enabled()
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    try:
        set_determinism(False)
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
        set_determinism(True)
        assert torch.are_deterministic_algorithms_enabled()
    finally:
        set_determinism(False)
