"""The references that our own optimizers are compared with: one parameter after the other, as a textbook would."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch


class PlainMuon:
    """Muon over whole matrices, each a stack of parts, in fp32."""

    def __init__(self, parameters: dict[torch.nn.Parameter, Sequence[int]], section) -> None:
        self.parts, self.section = parameters, section
        self.momenta = {parameter: torch.zeros_like(parameter) for parameter in parameters}
        self.param_groups = [{"lr": section.lr}]

    @torch.no_grad()
    def step(self) -> None:
        lr, mu = self.param_groups[0]["lr"], self.section.momentum
        for parameter, rows in self.parts.items():
            momentum = self.momenta[parameter]
            momentum.copy_(mu * momentum + (1 - mu) * parameter.grad)
            update = mu * momentum + (1 - mu) * parameter.grad if self.section.nesterov else momentum
            parameter.mul_(1 - lr * self.section.weight_decay)
            for part, target in zip(update.split(list(rows)), parameter.split(list(rows)), strict=True):
                target -= lr * 0.2 * math.sqrt(max(part.shape)) * self.newton_schulz(part)

    @staticmethod
    def newton_schulz(x: torch.Tensor) -> torch.Tensor:
        x = x / max(float(x.norm()), 1e-7)
        for _ in range(5):
            if x.shape[0] <= x.shape[1]:
                gram = x @ x.T
                x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
            else:
                gram = x.T @ x
                x = 3.4445 * x + x @ (-4.7750 * gram + 2.0315 * gram @ gram)
        return x


class PlainLion:
    """Lion, line by line of the paper's algorithm 2."""

    def __init__(self, groups: list[dict], section) -> None:
        self.param_groups, self.betas = [group | {"lr": section.lr} for group in groups], section.betas
        self.momenta = {parameter: torch.zeros_like(parameter) for group in groups for parameter in group["params"]}

    @torch.no_grad()
    def step(self) -> None:
        beta1, beta2 = self.betas
        for group in self.param_groups:
            for parameter in group["params"]:
                momentum, gradient = self.momenta[parameter], parameter.grad
                direction = torch.sign(beta1 * momentum + (1 - beta1) * gradient)
                parameter -= group["lr"] * (direction + group["weight_decay"] * parameter)
                momentum.copy_(beta2 * momentum + (1 - beta2) * gradient)


class Several:
    """Optimizers of different parameters, stepped together."""

    def __init__(self, *optimizers) -> None:
        self.optimizers = optimizers
        self.param_groups = [group for optimizer in optimizers for group in optimizer.param_groups]

    def step(self) -> None:
        for optimizer in self.optimizers:
            optimizer.step()


def plain_muon(model: torch.nn.Module, section) -> Several:
    """Muon for the matrices of a Transformer's blocks, AdamW of torch for the rest."""
    shape = model.shape
    qkv = [shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim]
    matrices, others = {}, []
    for name, parameter in model.named_parameters():
        if name.startswith("blocks.") and parameter.dim() == 2:
            stacked = qkv if ".qkv." in name else [shape.ffn_dim] * 2 if ".gate_up." in name else [len(parameter)]
            matrices[parameter] = stacked
        else:
            others.append(parameter)
    adamw = torch.optim.AdamW(
        [{"params": [p for p in others if p.dim() >= 2], "weight_decay": section.weight_decay},
         {"params": [p for p in others if p.dim() < 2], "weight_decay": 0.0}],
        lr=section.lr, betas=section.betas, eps=section.eps, foreach=False, fused=False,
    )  # fmt: skip
    return Several(PlainMuon(matrices, section), adamw)
