"""Before the first step: does the optimizer that was asked for really move the weights its way?

DeepSpeed has trained plain SGD for Muon without a word (DeepSpeed #8441) and dropped micro-steps (#7718). A tiny
module runs through the run's own stage, precision, accumulation and clipping, and is compared with torch alone.
"""

from __future__ import annotations

import torch
from torch import nn

from pretrain.errors import TrainingError
from pretrain.optimizers.optim import make_optimizer, param_groups
from pretrain.options.batch_plan import BatchPlan
from pretrain.options.config import Config
from pretrain.ranks.distributed import Ranks
from pretrain.zero.engine import MASTER, Engine

_SCALES = (1.0, -0.5, 0.25)  # of the gradients of the test's steps: exact in bf16 and fp16


class _Probe(nn.Module):
    """A matrix and a vector whose gradients are constants times the input.

    Muon takes the matrix for one within a block, made of two that are stacked.
    """

    stacked_rows = (4, 12)

    def __init__(self) -> None:
        super().__init__()
        pattern = torch.arange(16 * 24, dtype=torch.float32)
        self.weight = nn.Parameter((pattern % 7 - 3).reshape(16, 24) / 8)
        self.bias = nn.Parameter((pattern[:24] % 5 - 2) / 4)

    def constants(self) -> tuple[torch.Tensor, torch.Tensor]:
        pattern = torch.arange(16 * 24, dtype=torch.float32)
        return (pattern % 5 - 2).reshape(16, 24) / 4, (pattern[:24] % 3 - 1) / 2

    def forward(self, scale: float) -> torch.Tensor:
        weight_gradient, bias_gradient = (c.to(self.weight.device, self.weight.dtype) for c in self.constants())
        return scale * ((self.weight * weight_gradient).float().sum() + (self.bias * bias_gradient).float().sum())


def _with_own_groups(config: Config) -> Config:
    """Replace the patterns of `optim.groups`, which name the model's parameters, by one of the probe's."""
    groups = [rule.model_copy(update={"match": "bias"}) for rule in config.optim.groups[:1]]
    return config.model_copy(update={"optim": config.optim.model_copy(update={"groups": groups})})


def _reference(config: Config, device: torch.device) -> dict[str, torch.Tensor]:
    """The same steps by the optimizer alone, in fp32 on one device, without DeepSpeed."""
    probe = _Probe().to(device)
    optimizer = make_optimizer(param_groups(probe, config.optim), config.optim)
    for scale in _SCALES:
        for parameter, gradient in zip((probe.weight, probe.bias), probe.constants(), strict=True):
            parameter.grad = gradient.to(device) * scale
        if config.optim.clip_norm > 0:
            torch.nn.utils.clip_grad_norm_(probe.parameters(), config.optim.clip_norm)
        optimizer.step()
    return {name: parameter.detach().reshape(-1).cpu() for name, parameter in probe.named_parameters()}


def check_optimizer(config: Config, plan: BatchPlan, ranks: Ranks) -> None:
    """Step a tiny module as the run will step its model, and compare its master weights with torch's.

    Raises:
        TrainingError: on all ranks, if any weight is elsewhere.
    """
    config = _with_own_groups(config)
    engine = Engine(_Probe(), config, plan, ranks)
    for scale in _SCALES:
        for micro_step in range(plan.num_micro_steps):
            engine.backward(engine.forward(scale))
            if micro_step < plan.num_micro_steps - 1:
                engine.end_micro_step()
        engine.step(config.optim.lr)
    expected = _reference(config, ranks.device)
    worst = 0.0
    for fragment in engine.fragments():
        own = fragment.tensors[MASTER].cpu()
        wanted = expected[fragment.name][fragment.start : fragment.start + fragment.length]
        worst = max(worst, float((own - wanted).abs().max()))
    engine.close()
    # Muon orthogonalises in bf16 on a GPU; one rounding there moves a weight by up to 0.01 of the rate.
    is_coarse = config.optim.name == "muon" and ranks.device.type == "cuda"
    tolerance = (5e-2 if is_coarse else 1e-3) * config.optim.lr + 1e-6

    def complain() -> None:
        if worst > tolerance:
            raise TrainingError(
                f"self-test: after {len(_SCALES)} steps of {config.optim.name} at ZeRO stage {engine.stage} a weight "
                f"is {worst:.3g} from where torch's {config.optim.name} moves it; expected at most {tolerance:.3g}. "
                "The installed DeepSpeed does not do what was asked: use the pinned version."
            )

    ranks.agree(complain)
