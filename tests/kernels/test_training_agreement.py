from __future__ import annotations

import importlib
import itertools
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from pretrain.options.families import resolve_shape
from pretrain.transformer.model import Transformer
from tests.helpers.interpreter_process import run_interpreted
from tests.helpers.training_agreement import (
    BEGIN,
    BYTES_VOCAB,
    OPERATORS,
    Difference,
    Programs,
    Rows,
    Step,
    backward_once,
    bf16_excess,
    build,
    byte_steps,
    compare,
    make_config,
    train,
    with_train,
)

KERNELS = Path(__file__).resolve().parents[2] / "kernels"


@pytest.mark.launches
def test_a_few_steps_in_the_interpreter():
    run_interpreted("tests/kernels/interpreter_training.py", "each_operator or few_steps")


@pytest.mark.slow
@pytest.mark.launches
@pytest.mark.timeout(1800)
def test_200_steps_in_the_interpreter():
    cases = ("200_steps_of_llama_in_fp32", "200_steps_of_gpt2_in_bf16")  # minutes each, on a core each
    with ThreadPoolExecutor() as pool:
        list(pool.map(lambda case: run_interpreted("tests/kernels/interpreter_training.py", case), cases))


def test_every_operator_can_be_switched():
    modules = [importlib.import_module(f"kernels.{path.stem}") for path in sorted(KERNELS.glob("*.py"))]
    asking = {module for module in modules if hasattr(module, "use_triton") and module.__name__ != "kernels.dispatch"}
    assert asking == {*itertools.chain(*OPERATORS.values())}


def test_rows_of_bytes_are_packed_documents():
    config = make_config(data={"seq_len": 512})
    steps = byte_steps(config, 40, "cpu")
    tokens_BT, targets_BT, doc_start_BT, row_ids_B = (
        torch.cat(parts) for parts in zip(*(vars(step.rows).values() for step in steps), strict=True)
    )
    assert torch.equal(tokens_BT[:, 1:], targets_BT[:, :-1]) and tokens_BT.max() == BEGIN < BYTES_VOCAB
    begins_BT = doc_start_BT == torch.arange(512)
    assert torch.equal(begins_BT[:, 1:], tokens_BT[:, 1:] == BEGIN) and begins_BT[:, 0].all()
    assert 1 < begins_BT[:, 1:].sum() < len(tokens_BT)
    assert torch.equal(row_ids_B, torch.arange(80)) and (doc_start_BT.diff(dim=1) >= 0).all()


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_another_order_of_sums_is_the_same_training(family):
    config = make_config(model={"family": family, "num_kv_heads": None}, schedule={"warmup_steps": 2})
    shape, steps = resolve_shape(config.model, BYTES_VOCAB, 32), byte_steps(config, 12, "cpu")
    plain = train(config, shape, steps)
    losses, found, torchs = compare(config, shape, steps, (), plain, num_roundings=1)
    assert losses == plain and found.relative == 0.0 and torchs[0].relative < 1e-6
    weights = [build(config, shape, "cpu", number).output.weight for number in (0, 1)]
    assert not torch.equal(*weights) and torch.equal(*(weight.sort().values for weight in weights))
    _, found, torchs = compare(with_train(config, precision="bf16"), shape, steps, (), plain, num_roundings=1)
    assert found == torchs[0] and 1e-6 < found.relative < 1e-2 and bf16_excess(found, torchs) < 1.0


def test_the_rule_for_bf16_tells_a_worse_rounding():
    torchs = [Difference(0.01, 0.02, 0.004, 0.001), Difference(0.01, 0.03, 0.003, -0.001)]
    assert bf16_excess(Difference(0.01, 0.04, 0.005, -0.003), torchs) < 1.0
    for worse in (Difference(0.03, 0.07, 0.004, 0.0), Difference(0.01, 0.03, 0.009, 0.0),
                  Difference(0.01, 0.03, 0.006, 0.006), Difference.of([1.0, float("nan")], [1.0, 1.0])):  # fmt: skip
        assert bf16_excess(worse, torchs) > 1.0


@pytest.mark.parametrize(("family", "checkpointing"), [("llama", "none"), ("qwen3", "selective"), ("gpt2", "full")])
def test_forward_and_backward_read_nothing_on_the_host(family, checkpointing, monkeypatch):
    # Tensors without values: what would wait for a value of a GPU's has nothing to read here.
    model = {"family": family, "num_kv_heads": None, "dropout": 0.1, "attention_dropout": 0.1}
    config = make_config(model=model | ({"sliding_window": 9} if family == "qwen3" else {}))
    shape, step = resolve_shape(config.model, BYTES_VOCAB, 32), byte_steps(config, 1, "cpu")[0]
    monkeypatch.setattr(Transformer, "initialise", lambda self: None)
    for module in itertools.chain(*OPERATORS.values()):
        monkeypatch.setattr(module, "use_triton", lambda x: True)
    with FakeTensorMode() as mode, Programs() as seen:
        model = Transformer(shape, 1, checkpointing, 1e-4).train()
        loss = backward_once(model, Step(Rows(*map(mode.from_tensor, vars(step.rows).values())), step.num_targets))
        with pytest.raises(DataDependentOutputException):
            float(loss)
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert {"attention", "attention_backward", "linear_cross_entropy"} <= seen.names
