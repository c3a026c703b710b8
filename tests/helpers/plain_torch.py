"""The reference that training is compared with: torch alone, written as a textbook would."""

from __future__ import annotations

import fnmatch
from pathlib import Path

import torch

from pretrain.data.stream import TokenStream
from pretrain.options.batch_plan import BatchPlan
from pretrain.options.families import resolve_shape
from pretrain.options.schedule import lr_at
from pretrain.options.settings import load_config
from pretrain.tokenizers.tokenizer_files import open_tokenizer
from pretrain.transformer.model import Transformer
from tests.helpers.plain_optimizers import PlainLion, plain_muon


def plain_optimizer(model: torch.nn.Module, section):
    """torch's own optimizer in its plainest form, or ours from a textbook."""
    if section.name == "muon":
        return plain_muon(model, section)
    groups = []
    for name, parameter in model.named_parameters():
        decay, ratio = section.weight_decay if parameter.dim() >= 2 else 0.0, 1.0
        for rule in reversed(section.groups):
            if fnmatch.fnmatchcase(name, rule.match):
                decay = decay if rule.weight_decay is None else rule.weight_decay
                ratio = rule.lr_ratio
        groups.append({"params": [parameter], "weight_decay": decay, "lr_ratio": ratio})
    if section.name == "lion":
        return PlainLion(groups, section)
    if section.name == "sgd":
        return torch.optim.SGD(groups, lr=section.lr, momentum=section.momentum, nesterov=section.nesterov,
                               foreach=False)  # fmt: skip
    if section.name == "rmsprop":
        return torch.optim.RMSprop(groups, lr=section.lr, alpha=section.alpha, eps=section.eps,
                                   momentum=section.momentum, foreach=False)  # fmt: skip
    kind = {"adamw": torch.optim.AdamW, "adam": torch.optim.Adam}[section.name]
    return kind(groups, lr=section.lr, betas=section.betas, eps=section.eps, foreach=False, fused=False)


def train_plainly(config_path: Path, overrides: list[str]) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Train on one process with whole batches; return the losses and the final weights."""
    torch.set_num_threads(1)  # as the ranks: with more, a busy machine makes these tiny matrices ten times slower
    config = load_config(config_path, overrides)
    tokenizer = open_tokenizer(config.tokenizer)
    plan = BatchPlan.of(config, 1)
    stream = TokenStream(config, plan, 0, tokenizer.fingerprint)
    shape = resolve_shape(config.model, tokenizer.vocab_size, config.data.seq_len)
    model = Transformer(shape, config.run.seed, "none", config.train.z_loss, config.train.label_smoothing)
    optimizer = plain_optimizer(model, config.optim)
    losses = []
    for step in range(plan.num_steps):
        rows = stream.next_step()
        model.zero_grad()
        total = 0.0
        for batch in rows.micro_batches:
            inputs = batch.tokens_BT, batch.targets_BT, batch.doc_start_BT, batch.row_ids_B
            objective, loss = (part / rows.num_targets for part in model(*inputs, step))
            objective.backward()
            total += float(loss)
        if config.optim.clip_norm > 0:
            torch.nn.utils.clip_grad_norm_(model.parameters(), config.optim.clip_norm)
        for group in optimizer.param_groups:
            group["lr"] = lr_at(step, plan.num_steps, config.optim.lr, config.schedule) * group.get("lr_ratio", 1.0)
        optimizer.step()
        losses.append(total)
    stream.close()
    return losses, {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
