"""Memory: against the model itself on the meta device, and properties that hold for any config."""

from __future__ import annotations

import math
from functools import cache
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain.options.batch_plan import BatchPlan
from pretrain.options.config import Config, OptimSection
from pretrain.options.families import num_parameters
from pretrain.options.settings import load_config
from pretrain.planning.plan import changed
from pretrain.planning.plan_activations import activations, offloaded_bytes
from pretrain.planning.plan_communication import collectives, communication
from pretrain.planning.plan_memory import (
    BYTES,
    checkpoint_bytes,
    host_bytes,
    layout_of,
    memory_of,
    resident,
    shape_of,
)
from pretrain.planning.plan_shapes import (
    adapters_of,
    all_shapes,
    hidden_matrices,
    modules_in_order,
    parameter_shapes,
    trained_shapes,
)
from pretrain.transformer.lora import add_adapters
from pretrain.transformer.model import Transformer
from tests.planning.meta_memory import measure

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
NAMES = sorted(path.stem for path in CONFIGS.glob("*.yaml"))
MODES = ("none", "selective", "full")
TUNED = ("resume={from: base, optimizer: false}", "train.lora={rank: 8}")


@cache
def load(name: str, *overrides: str) -> Config:
    return load_config(CONFIGS / f"{name}.yaml", overrides)


@pytest.mark.parametrize("name", NAMES)
def test_shapes_are_those_of_the_model(name: str) -> None:
    config = load(name, "model.num_layers=2")
    shape = shape_of(config)
    with torch.device("meta"):
        model = Transformer(shape, 1)
    assert parameter_shapes(shape) == {name: tuple(one.shape) for name, one in model.named_parameters()}
    assert sum(math.prod(size) for size in parameter_shapes(shape).values()) == num_parameters(shape)
    hidden = [one for key, one in parameter_shapes(shape).items() if key.startswith("blocks.") and len(one) == 2]
    assert [sum(rows * cols for rows, cols in parts) for parts in hidden_matrices(shape)] == [
        math.prod(one) for one in hidden
    ]
    run = [[p.numel() for p in module.parameters(recurse=False)] for module in model.modules()]
    assert sorted(map(sorted, modules_in_order(shape).values())) == sorted(sorted(sizes) for sizes in run if sizes)


@pytest.mark.parametrize(
    ("name", "targets"), [("llama-70b", "qkv, ffn_down"), ("gpt2-124m", "attention_output, ffn_up")]
)
def test_shapes_of_adapters_are_those_of_the_model(name: str, targets: str) -> None:
    config = load(name, "model.num_layers=2", *TUNED, f"train.lora.targets=[{targets}]")
    shape, adapters = shape_of(config), adapters_of(config)
    assert config.train.lora is not None
    with torch.device("meta"):
        model = Transformer(shape, 1)
        add_adapters(model, config.train.lora)
    named = {name: tuple(one.shape) for name, one in model.named_parameters()}
    assert list(all_shapes(shape, adapters).items()) == list(named.items())
    trained = {name: one for name, one in named.items() if model.get_parameter(name).requires_grad}
    assert list(trained_shapes(shape, adapters).items()) == list(trained.items())
    assert modules_in_order(shape, adapters)["blocks.0.ffn.down"] == [
        one.numel() for one in model.blocks[0].ffn.down.parameters()
    ]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("name", "targets", "overrides"),
    [
        ("llama-350m", "", ["model.num_layers=3"]),
        ("gpt2-124m", "", ["train.micro_batch_size=4"]),
        ("llama-350m", "qkv", ["model.num_layers=3", "tokenizer.vocab_size=384"]),
        ("llama-350m", "attention_output", ["model.num_layers=3", "tokenizer.vocab_size=384"]),
        ("llama-350m", "ffn_up", ["model.num_layers=3", "tokenizer.vocab_size=384"]),
        ("llama-350m", "ffn_down", ["model.num_layers=3", "tokenizer.vocab_size=384"]),
        ("llama-350m", "", ["model.num_layers=6", "tokenizer.vocab_size=384", "parallel.sequence_parallel_size=2"]),
    ],
)  # fmt: skip
def test_activations_beside_adapters_are_those_of_the_operators(
    name: str, targets: str, overrides: list[str], mode: str
) -> None:
    chosen = [f"train.lora.targets=[{targets}]"] if targets else []
    config = load(name, f"train.activation_checkpointing={mode}", *TUNED, *chosen, *overrides)
    found = activations(
        shape_of(config), config.train.micro_batch_size, config.data.seq_len, mode, BYTES["bf16"], False,
        config.parallel.sequence_parallel_size, adapters=adapters_of(config),
    )  # fmt: skip
    at_end, peak, _ = measure(config)
    assert found.kept + found.loss == pytest.approx(at_end, rel=0.001)
    most = max(found.kept + found.loss + found.loss_peak, found.kept + found.block_peak)
    assert most == pytest.approx(peak, rel=0.02)


def test_adapters_alone_have_gradients_masters_and_moments() -> None:
    plain, tuned = load("llama-7b"), load("llama-7b", *TUNED)
    P, A = num_parameters(shape_of(plain)), layout_of(tuned, 8).total
    assert A == 32 * 8 * ((4096 + 12288) + (4096 + 4096) + (4096 + 2 * 11008) + (11008 + 4096))  # of rank 8
    assert checkpoint_bytes(plain) == 12 * P and checkpoint_bytes(tuned) == 12 * A
    assert host_bytes(tuned, 8)["snapshot"] == 12 * A // 8
    for stage in (1, 2, 3):
        full, lora = (resident(changed(config, zero_stage=stage), 8) for config in (plain, tuned))
        assert lora["masters"] == 4 * A // 8 and lora["moments"] == 8 * A // 8
        assert lora["gradients"] / full["gradients"] == pytest.approx(A / P, rel=0.01)
        weights = P + A if stage < 3 else (P + A) / 8
        assert lora["parameters"] == pytest.approx(2 * weights, rel=0.02)
    sent, of_all = (communication(changed(one, zero_stage=3), 8) for one in (tuned, plain))
    assert sent["reduce_scatter_tensor"] / of_all["reduce_scatter_tensor"] == pytest.approx(A / P, rel=0.01)
    assert sent["all_gather_into_tensor"] == pytest.approx(of_all["all_gather_into_tensor"], rel=0.02)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("name", "overrides"),
    [
        ("llama-350m", ["model.num_layers=3"]),
        ("llama-70b", ["model.num_layers=8"]),
        ("gpt2-124m", ["train.micro_batch_size=4"]),
        ("qwen3-0.6b", ["model.num_layers=6", "data.seq_len=512"]),
        ("stablelm-1.6b", ["model.num_layers=3", "train.micro_batch_size=2"]),
        ("llama-1.3b", ["model.num_layers=3", "model.family=olmo2", "model.num_kv_heads=4"]),
        ("starcoder2-3b", ["model.num_layers=5", "data.seq_len=5000"]),
        ("llama-1.3b", ["model.num_layers=2", "train.z_loss=1e-4", "model.tie_embeddings=true"]),
    ],
)
def test_activations_are_those_of_the_operators(name: str, overrides: list[str], mode: str) -> None:
    config = load(name, f"train.activation_checkpointing={mode}", *overrides)
    train = config.train
    found = activations(
        shape_of(config), train.micro_batch_size, config.data.seq_len, mode, BYTES["bf16"], masked=False
    )
    at_end, peak, _ = measure(config)
    assert found.kept + found.loss == pytest.approx(at_end, rel=0.001)
    most = max(found.kept + found.loss + found.loss_peak, found.kept + found.block_peak)
    assert most == pytest.approx(peak, rel=0.02)


@pytest.mark.parametrize("mode", [*MODES, "offload"])
@pytest.mark.parametrize(
    ("name", "overrides"),
    [
        ("llama-350m", ["model.num_layers=3", "train.micro_batch_size=8"]),
        ("llama-70b", ["model.num_layers=8"]),
        ("gpt2-124m", ["train.micro_batch_size=4"]),
        ("qwen3-0.6b", ["model.num_layers=6", "data.seq_len=4096"]),
        ("starcoder2-3b", ["model.num_layers=5", "data.seq_len=5000"]),
    ],
)
def test_activations_of_long_rows_are_those_of_the_operators(name: str, overrides: list[str], mode: str) -> None:
    for shared_by, chunk in ((2, 0), (4, 0), (1, 512), (2, 128)):
        if mode == "selective" and chunk:
            continue
        config = load(
            name, f"train.activation_checkpointing={mode}", f"parallel.sequence_parallel_size={shared_by}",
            f"train.ffn_chunk_tokens={chunk}", "tokenizer.vocab_size=1024", *overrides,
        )  # fmt: skip
        B, T, shape = config.train.micro_batch_size, config.data.seq_len, shape_of(config)
        found = activations(shape, B, T, mode, BYTES["bf16"], False, shared_by, chunk)
        at_end, peak, on_host = measure(config)
        assert found.kept + found.loss == pytest.approx(at_end, rel=0.002)
        ahead = 4 * shape.dim * B * T // shared_by if mode == "offload" else 0  # which the meta device does not fetch
        most = max(found.kept + found.loss + found.loss_peak, found.kept + found.block_peak - ahead)
        # of what `selective` kept, some has gone by then
        assert 0.96 * peak < most < (1.035 if mode == "selective" else 1.02) * peak, (shared_by, chunk)
        assert on_host == (offloaded_bytes(shape, B * T // shared_by, 2) if mode == "offload" else 0)


def test_states_of_a_rank_add_up_to_those_of_theory() -> None:
    config = load("llama-7b")
    P = num_parameters(shape_of(config))
    for stage, ranks, per_parameter in (
        (1, 8, 2 + 2 + 4 + 12 / 8), (2, 8, 2 + 16 / 8), (3, 8, (2 + 4 + 12) / 8), (3, 512, (2 + 4 + 12) / 512),
    ):  # fmt: skip
        states = resident(changed(config, zero_stage=stage), ranks)
        del states["buckets"]
        assert sum(states.values()) == pytest.approx(per_parameter * P, rel=0.02), (stage, ranks)


def test_precision_changes_what_is_held() -> None:
    config = load("llama-1.3b", "parallel.zero_stage=2")
    P = num_parameters(shape_of(config))
    fp32, half = (changed(config, precision=name) for name in ("fp32", "fp16"))
    assert resident(fp32, 4)["parameters"] == 4 * P and resident(half, 4)["parameters"] == 2 * P
    sums = changed(config, grad_accum_dtype="bf16")
    halves = 2 * resident(sums, 4)["gradients"]
    assert resident(config, 4)["gradients"] <= halves < 1.1 * resident(config, 4)["gradients"]  # of whole tensors


def test_offload_moves_to_the_host() -> None:
    config = load("llama-7b", "parallel.zero_stage=3")
    batch = BatchPlan.of(config, 8)
    kept, moved = (memory_of(changed(config, offload=name), batch) for name in ("none", "optimizer"))
    gone = kept.parts["masters"] + kept.parts["moments"] + kept.parts["gradients"]
    assert moved.allocated == pytest.approx(kept.allocated - gone, rel=0.01)
    assert moved.host["offload"] >= gone and kept.host["offload"] == 0
    weights = memory_of(changed(config, offload="parameters"), batch)
    assert weights.allocated < moved.allocated and weights.host["offload"] > moved.host["offload"]
    assert kept.host["snapshot"] == kept.parts["masters"] + kept.parts["moments"]
    waits = config.model_copy(update={"checkpoint": config.checkpoint.model_copy(update={"asynchronous": False})})
    assert memory_of(changed(waits, offload="optimizer"), batch).host["snapshot"] == 0  # written from where it is
    assert memory_of(waits, batch).host["snapshot"] == kept.host["snapshot"]


def test_old_gpus_hold_a_mask_and_repeated_heads() -> None:
    shape = shape_of(load("llama-70b"))
    plain, masked = (activations(shape, 1, 4096, "none", 2, flag).kept for flag in (False, True))
    per_layer = 2 * shape.num_heads * shape.head_dim * 4096 * 2
    assert masked - plain == shape.num_layers * per_layer + 2 * 4096**2


sizes = st.sampled_from([1, 2, 4, 8, 16, 64])
stages = st.sampled_from([0, 1, 2, 3])


@settings(deadline=None, max_examples=40)
@given(st.sampled_from(["llama-350m", "llama-7b", "gpt2-124m"]), stages, sizes, sizes, st.sampled_from(MODES),
       st.sampled_from(["adamw", "muon", "lion"]))  # fmt: skip
def test_memory_is_monotone(name: str, stage: int, ranks: int, micro: int, mode: str, optimizer: str) -> None:
    config = load(name, "train.global_batch_size=8192")
    config = config.model_copy(update={"optim": OptimSection(name=optimizer, lr=1e-3)})
    config = changed(config, zero_stage=stage, activation_checkpointing=mode, micro_batch_size=micro)

    def memory(config: Config, ranks: int) -> int:
        return memory_of(config, BatchPlan.of(config, ranks)).allocated

    here = memory(config, ranks)
    assert memory(changed(config, micro_batch_size=2 * micro), ranks) >= here, "a larger micro-batch takes no less"
    assert memory(changed(config, activation_checkpointing="none"), ranks) >= here or mode == "none"
    if mode == "selective":
        assert memory(changed(config, activation_checkpointing="full"), ranks) <= here
    states = resident(config, ranks)
    for more in (2 * ranks, 8 * ranks):
        other = resident(config, more)
        assert all(other[kind] <= states[kind] for kind in ("parameters", "masters", "moments"))


@settings(deadline=None, max_examples=40)
@given(st.sampled_from(["llama-350m", "llama-70b", "qwen3-0.6b"]), stages, st.sampled_from([2, 4, 8, 64, 512]))
def test_states_and_traffic_are_conserved(name: str, stage: int, ranks: int) -> None:
    config = changed(load(name), zero_stage=stage, micro_batch_size=1, global_batch_size=8 * ranks)
    at, states = layout_of(config, ranks), resident(config, ranks)
    if at.stage > 0:  # what the ranks own together is one optimizer
        assert states["masters"] * ranks == pytest.approx(4 * at.total, rel=1e-6)
        assert states["moments"] * ranks == pytest.approx(4 * at.num_states * at.total, rel=1e-6)
    sent = communication(config, ranks)
    assert sum(one.num_bytes for one in collectives(config, BatchPlan.of(config, ranks))) == pytest.approx(
        sum(sent.values())
    )
    fewer = changed(config, micro_batch_size=8)  # the same rows in one micro-step
    assert sum(communication(fewer, ranks).values()) <= sum(sent.values())
    assert communication(config, 1) == {}
    bf16 = changed(config, grad_accum_dtype="bf16")
    if at.stage in (2, 3):
        name = "all_reduce" if at.stage == 2 else "reduce_scatter_tensor"
        assert communication(bf16, ranks)[name] == pytest.approx(sent[name] / 2, rel=0.01)


def test_stage_3_keeps_what_comes_again_soon() -> None:
    config = changed(load("llama-70b"), micro_batch_size=2)
    P = num_parameters(shape_of(config))
    gathered = communication(config, 512)["all_gather_into_tensor"]
    assert 1.98 * 2 * P < gathered < 2 * 2 * P  # twice, but for the last 330 million
    small = communication(changed(load("llama-350m"), zero_stage=3, micro_batch_size=4), 8)
    P = num_parameters(shape_of(load("llama-350m")))
    assert small["all_gather_into_tensor"] == pytest.approx(2 * P * 8, rel=0.01)  # once in each of 8 micro-steps
