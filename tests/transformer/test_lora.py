"""Adapters: what they add, what they leave alone, how they are drawn and divided into groups."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from kernels.linear_cross_entropy import linear_cross_entropy
from pretrain.errors import ConfigError
from pretrain.optimizers.optim import param_groups
from pretrain.options.config import LoraSection, ModelSection, OptimSection
from pretrain.options.families import flops_per_token, resolve_shape
from pretrain.options.settings import load_config
from pretrain.transformer.lora import AdaptedLinear, add_adapters, delta
from pretrain.transformer.lora_layers import is_adapter
from pretrain.transformer.model import Transformer
from tests.helpers.tuning_helpers import write_task


def make(section: LoraSection, family: str = "llama", meta: bool = False) -> Transformer:
    shape = resolve_shape(ModelSection(family=family, dim=32, num_layers=2, num_heads=4), 300, 16)
    with torch.device("meta" if meta else "cpu"):
        model = Transformer(shape, 1)
        add_adapters(model, section)
    return model


def test_layers_that_are_meant_get_adapters_and_all_else_is_frozen():
    model = make(LoraSection(rank=3, targets=["qkv", "ffn_up"]))
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {f"blocks.{i}.{layer}.lora_{which}" for i in range(2)
                       for layer in ("attention.qkv", "ffn.gate_up") for which in "ab"}  # fmt: skip
    assert trained == {name for name, _ in model.named_parameters() if is_adapter(name)}
    gpt2 = {name for name, one in make(LoraSection(), "gpt2").named_parameters() if one.requires_grad}
    assert "blocks.1.ffn.up.lora_a" in gpt2 and len(gpt2) == 2 * 2 * 4
    assert {name for name, _ in Transformer(model.shape, 1).named_parameters()} == {
        name for name, _ in model.named_parameters() if not is_adapter(name)
    }


def test_an_adapter_adds_its_product_and_nothing_at_first():
    section = LoraSection(rank=4, alpha=8)
    model, plain = make(section), Transformer(make(section).shape, 1)
    tokens_BT = torch.randint(300, (2, 16))
    assert torch.equal(model.logits(tokens_BT), plain.logits(tokens_BT))
    layer = model.blocks[0].attention.qkv
    assert isinstance(layer, AdaptedLinear) and layer.lora_a.std() > 0 and not layer.lora_b.any()
    torch.nn.init.normal_(layer.lora_b)
    x = torch.randn(5, 32)
    merged = F.linear(x, layer.weight + delta(layer.lora_b, layer.lora_a, 8 / 4))
    torch.testing.assert_close(layer(x), merged)


def test_adapters_are_drawn_by_seed_and_name():
    on_meta, drawn = make(LoraSection(), meta=True), make(LoraSection())
    for name, parameter in drawn.named_parameters():
        if is_adapter(name):
            again = torch.empty(parameter.shape, device="cpu")
            on_meta.draw(name, again)
            assert torch.equal(again, parameter)
    a = {name: one for name, one in drawn.named_parameters() if name.endswith("qkv.lora_a")}
    first, second = a.values()
    assert not torch.equal(first, second) and first.std().item() == pytest.approx((3 * 32) ** -0.5, rel=0.15)


def test_the_optimizer_has_the_adapters_alone():
    [group] = param_groups(make(LoraSection()), OptimSection(lr=0.1))
    assert all(is_adapter(name) for name in group["names"]) and group["weight_decay"] == 0.1
    with pytest.raises(ConfigError, match=r"match is embedding.\*; expected a pattern that some parameter's name"):
        param_groups(make(LoraSection()), OptimSection(lr=0.1, groups=[{"match": "embedding.*"}]))


@pytest.mark.parametrize("softcap", [None, 5.0])
def test_the_loss_has_no_gradient_of_a_weight_that_is_not_trained(softcap):
    x, weight, targets = torch.randn(7, 8), torch.randn(12, 8), torch.randint(10, (7,))
    grads = []
    for is_trained in (True, False):
        x_N, weight_V = x.clone().requires_grad_(), weight.clone().requires_grad_(is_trained)
        linear_cross_entropy(x_N, weight_V, targets, 10, softcap=softcap)[0].backward()
        grads.append((x_N.grad, weight_V.grad))
    assert torch.equal(grads[0][0], grads[1][0]) and grads[0][1] is not None and grads[1][1] is None


def test_a_frozen_weight_costs_two_thirds():
    shape = make(LoraSection()).shape
    whole, frozen = flops_per_token(shape, causal=True), flops_per_token(shape, causal=True, frozen=True)
    attention = 6 * 2 * 32 * 16
    assert (frozen - attention) / (whole - attention) == pytest.approx(2 / 3)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["resume=null"], 'resume.from is ""; expected the run or checkpoint whose weights are adapted. Name it.'),
        (
            ["resume.optimizer=true"],
            "resume.optimizer is true; expected to be left out. Adapters have moments of their own, which begin anew.",
        ),
        (["optim.name=muon"], "optim.name is muon; expected another with train.lora"),
        (["train.lora.targets=[mlp]"], "train.lora.targets"),
        (["train.lora.rank=0"], "train.lora.rank is 0; expected a whole number of at least 1"),
        (["eval.metric=exact"], "eval.metric is exact; expected null, because eval.every_steps is 0."),
    ],
)
def test_configs_that_mean_nothing(tmp_path, overrides, message):
    folder = write_task(tmp_path, 20)
    load_config(folder / "tune.yaml", ["train.lora={}"])
    with pytest.raises(ConfigError) as refused:
        load_config(folder / "tune.yaml", ["train.lora={}", *overrides])
    assert message in str(refused.value)
