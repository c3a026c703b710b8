"""Optimizers: which parameters get which rate and decay, and the torch optimizer that DeepSpeed drives."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn

from pretrain.errors import ConfigError
from pretrain.optimizers.lion import Lion
from pretrain.optimizers.moments import is_hidden_matrix, moment_names
from pretrain.optimizers.muon import Muon
from pretrain.optimizers.torch_optimizers import SGD, Adam, AdamW, RMSprop
from pretrain.options.config import OptimGroupSection, OptimSection


def param_groups(model: nn.Module, section: OptimSection) -> list[dict[str, Any]]:
    """Divide the parameters that are trained into groups of the same rate, decay and rule of update.

    Matrices decay; norms, biases and learned positions do not, unless `optim.groups` says so. With Muon the matrices
    within the blocks are groups of their own, and `parts` tells of which matrices they are stacks.

    Returns:
        groups for `make_optimizer`, with `names` beside `params`; every one of these parameters is in exactly one.
    Raises:
        ConfigError: an entry of `optim.groups` applies to no parameter.
    """
    trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    _check_patterns(section.groups, [name for name, _ in trained])
    stacks = {f"{name}.weight".lstrip("."): module.stacked_rows for name, module in model.named_modules()
              if getattr(module, "stacked_rows", ())}  # fmt: skip
    groups: dict[tuple, dict[str, Any]] = {}
    for name, parameter in trained:
        rule = _rule_of(name, section.groups)
        is_matrix = parameter.dim() == 2
        decay = section.weight_decay if is_matrix and not name.startswith("position_embedding.") else 0.0
        if rule and rule.weight_decay is not None:
            decay = rule.weight_decay
        lr_ratio = rule.lr_ratio if rule else 1.0
        by_muon = section.name == "muon" and is_hidden_matrix(name, parameter.dim())
        group = groups.setdefault((by_muon, lr_ratio, decay), {
            "params": [], "names": [], "weight_decay": decay, "lr_ratio": lr_ratio, "lr": section.lr * lr_ratio,
            "muon": by_muon, "parts": {},
        })  # fmt: skip
        group["params"].append(parameter)
        group["names"].append(name)
        if by_muon:
            rows, cols = parameter.shape
            parts = stacks.get(name, (rows,))
            assert sum(parts) == rows, f"{name} has {rows} rows, and its parts {parts}"
            group["parts"][name] = [(part, cols) for part in parts]
    return list(groups.values())


def _rule_of(name: str, rules: Sequence[OptimGroupSection]) -> OptimGroupSection | None:
    """Return the first entry of `optim.groups` whose pattern matches the parameter's name."""
    return next((rule for rule in rules if fnmatchcase(name, rule.match)), None)


def _check_patterns(rules: Sequence[OptimGroupSection], names: Sequence[str]) -> None:
    """Raise where an entry is the first to match for no parameter."""
    used = [id(_rule_of(name, rules)) for name in names]
    problems = []
    for number, rule in enumerate(rules):
        if id(rule) in used:
            continue
        if any(fnmatchcase(name, rule.match) for name in names):
            advice = "All that it matches belongs to earlier entries: the first that matches counts. Move it up."
        else:
            kinds = list(dict.fromkeys(re.sub(r"^blocks\.\d+\.", "blocks.*.", name) for name in names))
            near = difflib.get_close_matches(rule.match, kinds, n=3)
            advice = f"Near it: {', '.join(near)}." if near else f"There are: {', '.join(kinds)}."
        problems.append(
            f"optim.groups.{number}.match is {rule.match}; expected a pattern that some parameter's name matches "
            f"first. {advice}"
        )
    if problems:
        raise ConfigError("\n".join(problems))


def make_optimizer(groups: list[dict[str, Any]], section: OptimSection) -> torch.optim.Optimizer:
    """Return the optimizer of that name over the groups: torch's own, except Muon and Lion.

    torch's fused Adam runs one kernel a group on CPU and GPU alike and needs no compiler at start-up, unlike
    DeepSpeed's own.
    """
    lr, betas, eps = section.lr, section.betas, section.eps
    match section.name:
        case "adamw":
            return AdamW(groups, lr=lr, betas=betas, eps=eps, fused=True)
        case "adam":
            return Adam(groups, lr=lr, betas=betas, eps=eps, fused=True)
        case "muon":
            return Muon(groups, lr, betas, eps, section.momentum, section.nesterov)
        case "lion":
            return Lion(groups, lr, betas)
        case "sgd":
            return SGD(groups, lr=lr, momentum=section.momentum, nesterov=section.nesterov, foreach=True)
        case "rmsprop":
            return RMSprop(groups, lr=lr, alpha=section.alpha, eps=eps, momentum=section.momentum, foreach=True)


def create_state(
    optimizer: torch.optim.Optimizer, tensors: Iterable[tuple[torch.Tensor, dict[str, Any]]], section: OptimSection
) -> None:
    """Create the state of every tensor as the optimizer itself would at its first step.

    torch creates it lazily, so before the first step there is nothing that a checkpoint could be loaded into.

    Args:
        optimizer: whose state is filled in where there is none.
        tensors: what it updates, each with its group.
        section: the config's `optim`.
    """
    for tensor, group in tensors:
        state = optimizer.state[tensor]
        if state:
            continue
        names = moment_names(section, group["muon"])
        if "exp_avg_sq" in names:  # the fused ones count their steps beside the parameter
            state["step"] = torch.zeros((), dtype=torch.float32, device=tensor.device)
        elif section.name == "rmsprop":
            state["step"] = torch.zeros((), dtype=torch.float32)
        for name in names:
            state[name] = torch.zeros_like(tensor, memory_format=torch.preserve_format)
