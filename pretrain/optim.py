"""Optimizers: which parameters decay, and the torch optimizer that DeepSpeed drives."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from pretrain.config import OptimSection


def param_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Divide the parameters into those that decay (matrices) and those that do not (norms, biases, positions).

    Every parameter is in exactly one group; a group without parameters is left out.
    """
    decaying: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        is_matrix = parameter.dim() >= 2 and not name.startswith("position_embedding.")
        (decaying if is_matrix else plain).append(parameter)
    groups = [
        {"params": decaying, "weight_decay": weight_decay},
        {"params": plain, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def make_optimizer(groups: list[dict], section: OptimSection) -> torch.optim.Optimizer:
    """Return torch's optimizer of that name over the groups.

    torch's fused Adam runs one kernel a group on CPU and GPU alike and needs no compiler at start-up, unlike
    DeepSpeed's own.
    """
    if section.name == "adamw":
        return torch.optim.AdamW(groups, lr=section.lr, betas=section.betas, eps=section.eps, fused=True)
    if section.name == "adam":
        return torch.optim.Adam(groups, lr=section.lr, betas=section.betas, eps=section.eps, fused=True)
    return torch.optim.RMSprop(
        groups, lr=section.lr, alpha=section.alpha, eps=section.eps, momentum=section.momentum, foreach=True
    )


def moment_names(section: OptimSection) -> tuple[str, ...]:
    """Names of the state tensors that the optimizer keeps for each weight, each of the weight's shape, fp32."""
    if section.name in ("adamw", "adam"):
        return ("exp_avg", "exp_avg_sq")
    return ("square_avg", "momentum_buffer") if section.momentum > 0 else ("square_avg",)


def create_state(optimizer: torch.optim.Optimizer, parameters: Iterable[torch.Tensor], section: OptimSection) -> None:
    """Create the state of every parameter as the optimizer itself would at its first step.

    torch creates it lazily, so before the first step there is nothing that a checkpoint could be loaded into.
    """
    on_device = section.name in ("adamw", "adam")  # the fused ones keep `step` beside the parameter
    for parameter in parameters:
        state = optimizer.state[parameter]
        if state:
            continue
        state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device if on_device else "cpu")
        for name in moment_names(section):
            state[name] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
