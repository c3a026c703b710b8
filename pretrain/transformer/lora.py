"""LoRA: small matrices beside frozen ones, which are all that is trained.

peft's layers wrap ours, which renames every parameter that a checkpoint, a draw or `optim.groups` knows by name; here
the frozen weights keep their names, and a layer gets two parameters more. `adapter_export` writes peft's format.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pretrain.options.config import LoraSection
from pretrain.transformer.layers import Linear
from pretrain.transformer.lora_layers import adapted_layers, is_adapter, scale_of


class AdaptedLinear(Linear):
    """A frozen linear layer and what is learned beside it: y = x W' + scale (x A') B'.

    Source: Hu et al. 2021, "LoRA", section 4.1.
    """

    def __init__(self, base: nn.Linear, rank: int, scale: float) -> None:
        """Take over a layer's parameters, which are frozen, and allocate A `[rank, in]` and B `[out, rank]`."""
        device, dtype = base.weight.device, base.weight.dtype
        super().__init__(base.in_features, base.out_features, base.bias is not None, device, dtype)
        self.scale = scale
        self.weight, self.bias = base.weight, base.bias
        self.lora_a = nn.Parameter(base.weight.new_empty(rank, base.in_features))
        self.lora_b = nn.Parameter(base.weight.new_empty(base.out_features, rank))

    def forward(self, x: Tensor) -> Tensor:
        """Compute the layer."""
        u, y = F.linear(x, self.lora_a), F.linear(x, self.weight, self.bias)
        # one product that adds: neither what it adds nor a scaled gradient is ever as large as y beside y
        sum_NF = torch.addmm(y.flatten(0, -2), u.flatten(0, -2), self.lora_b.t(), alpha=self.scale)
        return sum_NF.view(y.shape)


def add_adapters(model: nn.Module, section: LoraSection) -> None:
    """Freeze a model and put adapters beside the layers that are to have some; they are drawn as other weights are.

    Args:
        model: a `Transformer`, on any device; its `blocks` have the layers, and its `draw` fills a parameter.
        section: which and how large.
    """
    model.requires_grad_(False)
    wanted = adapted_layers(section.targets)
    for name, layer in list(model.named_modules()):
        path = name.split(".", 2)  # blocks, number, layer
        if path[0] == "blocks" and len(path) == 3 and path[2] in wanted:
            parent = model.get_submodule(name.rpartition(".")[0])
            assert isinstance(layer, nn.Linear)
            setattr(parent, name.rpartition(".")[2], AdaptedLinear(layer, section.rank, scale_of(section)))
    for name, parameter in model.named_parameters():
        if is_adapter(name) and not parameter.is_meta:
            model.draw(name, parameter.data)  # type: ignore[operator]


def delta(rows_of_b: Tensor, a: Tensor, scale: float) -> Tensor:
    """What an adapter adds to rows of its layer's weight, fp32: scale B A."""
    return scale * (rows_of_b.float() @ a.float())
