"""The graph that a GPU compiles, with the Triton programs in it, in a process of its own: `helpers/interpreter_process.py`."""

from __future__ import annotations

import os

os.environ["TRITON_INTERPRET"] = "1"

import pytest
import torch
from torch._dynamo.utils import counters

from tests.transformer.test_compile import DROPOUT, MODELS, batch, build, fresh  # noqa: F401  a fixture

torch.set_num_threads(1)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:The .grad attribute of a Tensor")
@pytest.mark.filterwarnings("ignore:divide by zero encountered in log2", "ignore:overflow encountered in exp2")
@pytest.mark.parametrize(("name", "checkpointing"), [("llama", "none"), ("gpt2", "full"), ("custom", "selective")])
def test_compiled_blocks_run_the_same_programs(name, checkpointing):
    found = []
    for compiles in (False, True):
        model = build(checkpointing, **DROPOUT | MODELS[name])
        if compiles:
            model.compile_blocks("aot_eager")
        for step in range(2):
            objective, loss = model(*batch(), step)
            objective.backward()
        found.append([loss, *(parameter.grad for parameter in model.parameters())])
    assert counters["stats"]["unique_graphs"] == 1
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6 * float(a.abs().max()))
