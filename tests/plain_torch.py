"""The reference that training is compared with: torch alone, written as a textbook would."""

from __future__ import annotations

from pathlib import Path

import torch

from pretrain.batch_plan import BatchPlan
from pretrain.families import resolve_shape
from pretrain.model import Transformer
from pretrain.schedule import lr_at
from pretrain.settings import load_config
from pretrain.stream import TokenStream
from pretrain.tokenizer import Tokenizer


def plain_optimizer(model: torch.nn.Module, section) -> torch.optim.Optimizer:
    """torch's own optimizer in its plainest form."""
    groups = [
        {"params": [p for p in model.parameters() if p.dim() >= 2], "weight_decay": section.weight_decay},
        {"params": [p for p in model.parameters() if p.dim() < 2], "weight_decay": 0.0},
    ]
    if section.name == "rmsprop":
        return torch.optim.RMSprop(groups, lr=section.lr, alpha=section.alpha, eps=section.eps,
                                   momentum=section.momentum, foreach=False)  # fmt: skip
    kind = {"adamw": torch.optim.AdamW, "adam": torch.optim.Adam}[section.name]
    return kind(groups, lr=section.lr, betas=section.betas, eps=section.eps, foreach=False, fused=False)


def train_plainly(config_path: Path, overrides: list[str]) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Train on one process with whole batches; return the losses and the final weights."""
    config = load_config(config_path, overrides)
    tokenizer = Tokenizer(config.tokenizer.model)
    plan = BatchPlan.of(config, 1)
    stream = TokenStream(config, plan, 0, tokenizer.fingerprint)
    shape = resolve_shape(config.model, tokenizer.vocab_size, config.data.seq_len)
    model = Transformer(shape, config.run.seed, "none", config.train.z_loss, config.train.label_smoothing)
    optimizer = plain_optimizer(model, config.optim)
    losses = []
    for step in range(plan.num_steps):
        rows = stream.next_step()
        optimizer.zero_grad()
        total = 0.0
        for batch in rows.micro_batches:
            inputs = batch.tokens_BT, batch.targets_BT, batch.doc_start_BT, batch.row_ids_B
            objective, loss = (part / rows.num_targets for part in model(*inputs, step))
            objective.backward()
            total += float(loss)
        if config.optim.clip_norm > 0:
            torch.nn.utils.clip_grad_norm_(model.parameters(), config.optim.clip_norm)
        for group in optimizer.param_groups:
            group["lr"] = lr_at(step, plan.num_steps, config.optim.lr, config.schedule)
        optimizer.step()
        losses.append(total)
    stream.close()
    return losses, {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
