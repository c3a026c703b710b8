"""What ranks send each other and hold: counted in real runs, and held to formulas of the number of parameters."""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks.host_tables import ring_bytes
from benchmarks.memory import STATES, bytes_in_theory
from benchmarks.usage import KINDS, MOMENTS, Usage
from pretrain.options.families import resolve_shape
from pretrain.options.settings import load_config
from pretrain.planning.plan_communication import communication
from pretrain.planning.plan_memory import resident
from pretrain.transformer.model import Transformer
from tests.helpers.rank_helpers import run_cases

PERSISTENT = 100_000  # elements of a parameter up to which DeepSpeed's ZeRO-3 leaves it whole
MODEL = ["model.dim=256"]  # with matrices on both sides of that


def test_storages_are_counted_while_they_live():
    usage = Usage()
    with usage:
        layer = torch.nn.Linear(100, 50, bias=False)
        x = torch.randn(30, 100)
        assert sum(storage.nbytes() for storage, _ in usage.live()) == 4 * (100 * 50 + 30 * 100)
        with usage.during("forward"):
            y = layer(x).relu()  # what the product returned is not needed, what the ReLU returned is
            view = y.view(-1)[10:]
        found = sorted((storage.nbytes(), phase) for storage, phase in usage.live())
        assert found == [(6000, "forward"), (12000, "start"), (20000, "start")]
        assert usage.peaks["forward"] == 44000
        with usage.during("backward"):
            y.sum().backward()
        del y
        assert sum(storage.nbytes() for storage, _ in usage.live()) == 32000 + 6000 + 20000  # a view keeps all of it
        del view, x
        assert sorted(storage.nbytes() for storage, _ in usage.live()) == [20000, 20000]
    torch.ones(100)
    assert len(list(usage.live())) == 2


def test_an_all_reduce_goes_round_a_ring_twice():
    traffic = {"all_reduce": [1, 1000], "all_gather_into_tensor": [2, 400]}
    assert ring_bytes(traffic, 4) == 0.75 * 2400 and ring_bytes(traffic, 1) == 0


def sent_in_theory(sizes, stage, precision, num_micro_steps):
    """Payload of a step's large collectives: all-reduce, all-gather, reduce-scatter."""
    width, total = 2 if precision == "bf16" else 4, sum(sizes)
    if stage == 3:  # while the model is so small that weights are kept between forward and backward pass
        whole = sum(size for size in sizes if size <= PERSISTENT)
        return 0, width * (whole + num_micro_steps * (total - whole)), 4 * total * num_micro_steps
    # DeepSpeed's stages 1 and 2 reduce by all-reduce: stage 1 once a step, stage 2 in every micro-step
    gathered = 0 if stage == 0 and precision == "fp32" else width * total
    return 4 * total * (num_micro_steps if stage == 2 else 1), gathered, 0


@pytest.mark.slow
@pytest.mark.launches
@pytest.mark.timeout(900)
@pytest.mark.parametrize("num_ranks", [2, 4])
def test_every_stage_sends_and_holds_what_theory_has(tiny_config, tmp_path, num_ranks):
    kinds = [
        (stage, precision, 1 + (stage + num_ranks // 2) % 2) for stage in range(4) for precision in ("fp32", "bf16")
    ]
    overrides = [*MODEL, "train.micro_batch_size=1", "train.num_steps=4", "eval.every_steps=4", "eval.max_rows=4"]
    cases = [
        {"overrides": [f"run.dir={tmp_path}/{stage}-{precision}", f"parallel.zero_stage={stage}",
                       f"train.precision={precision}", f"train.global_batch_size={num_ranks * num_micro_steps}"],
         "measure": True}
        for stage, precision, num_micro_steps in kinds
    ]  # fmt: skip
    outcomes = run_cases(tiny_config, cases, num_ranks, tmp_path / "ranks", timeout=800, overrides=overrides)
    assert outcomes == ["done"] * len(cases)
    config = load_config(tiny_config, MODEL)
    model = Transformer(resolve_shape(config.model, 512, 32), seed=1)
    sizes = [parameter.numel() for parameter in model.parameters()]
    assert min(sizes) < PERSISTENT < max(sizes)
    for stage, precision, num_micro_steps in kinds:
        every = [
            json.loads((tmp_path / f"{stage}-{precision}" / f"usage-{rank}.json").read_text())
            for rank in range(num_ranks)
        ]
        assert all(found["traffic"]["step"] == every[0]["traffic"]["step"] for found in every)
        where = (stage, precision, num_micro_steps)
        check_traffic(every[0]["traffic"], sent_in_theory(sizes, *where), where)
        for found in every:
            assert found["num_parameters"] == sum(sizes)
            check_memory(found, sizes, stage, precision, num_ranks)
        planned = load_config(tiny_config, [*overrides, *cases[kinds.index(where)]["overrides"]])
        check_plan(every, planned, num_ranks, where)


def check_plan(every, config, num_ranks, where):
    """Whether the planner foresees it: payload within 1%, resident memory of the rank that holds most within 5%."""
    sent = {name: size for name, (_, size) in every[0]["traffic"]["step"].items()}
    foreseen = communication(config, num_ranks, on_cpu=True)
    assert set(foreseen) == set(sent), where
    for name, size in foreseen.items():
        assert size == pytest.approx(sent[name], rel=0.01), (name, *where)
    held = resident(config, num_ranks)
    most = max(sum(found["memory"]["backward"][kind] for kind in held) for found in every)
    assert sum(held.values()) == pytest.approx(most, rel=0.05), where


def check_traffic(traffic, theory, where):
    names = ("all_reduce", "all_gather_into_tensor", "reduce_scatter_tensor")
    found = {name: size for name, (_, size) in traffic["step"].items()}
    assert set(found) <= set(names), where
    for name, wanted in zip(names, theory, strict=True):
        assert found.get(name, 0) == pytest.approx(wanted, rel=1e-3, abs=200), (name, *where)
    evaluation, save = ({name: size for name, (_, size) in traffic[phase].items()} for phase in ("evaluation", "save"))
    weights = {"all_gather_into_tensor"} if where[0] == 3 else set()
    assert {name for name, size in evaluation.items() if size > 4096} == weights  # the rows' losses are less
    assert sum(save.values()) < 5000  # what is saved is not sent


def check_memory(found, sizes, stage, precision, num_ranks):
    memory, total = found["memory"], sum(sizes)
    assert list(memory) == list(MOMENTS) and all(list(kinds) == list(KINDS) for kinds in memory.values())
    theory = bytes_in_theory(total, stage, precision, num_ranks)
    if stage == 3:
        theory["parameters"] += (2 if precision == "bf16" else 4) * sum(size for size in sizes if size <= PERSISTENT)
    elif precision == "bf16" and stage < 2:
        theory["gradients"] += 2 * total  # the weights' own, beside their fp32 sums
    elif stage == 1:
        theory["gradients"] /= num_ranks  # divided as the last micro-step ends
    where = (stage, precision, num_ranks)
    for state in STATES:
        # Cut where it may be, a parameter lies on two ranks: DeepSpeed holds its gradient whole on both.
        slack = 4 * max(sizes) if state == "gradients" and stage in (1, 2) else 0.01 * theory[state]
        assert memory["backward"][state] == pytest.approx(theory[state], abs=slack + 2000), (state, *where)
    assert sum(memory["backward"].values()) - memory["backward"]["other"] <= max(found["peaks"].values())
    assert memory["forward"]["activations"] > 50 * memory["backward"]["activations"], where
    assert max(kinds["other"] for kinds in memory.values()) < 20_000, (memory, *where)
