"""One whole update of the weights (forward, backward, clip, fused AdamW) in each of the ways that are compared.

- `ours-deepspeed`: Longhaul's Transformer as training runs it, by `pretrain.zero.engine.Engine` on one rank
- `ours-compiled`: the same with `train.compile`
- `ours-torch`: the same Transformer with bf16 weights and fp32 master copies, by torch alone
- `baseline-eager`, `baseline-compiled`: plain PyTorch under bf16 autocast, without and with `torch.compile`
- `transformers`, `transformers-liger`: transformers' model and Trainer, without and with Liger's operators in them
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from benchmarks.baseline import Baseline
from pretrain.optimizers.optim import make_optimizer, param_groups
from pretrain.options.config import Config
from pretrain.options.families import ModelShape
from pretrain.transformer.model import Transformer

VARIANTS = (  # the most important first: time may run out
    "ours-deepspeed",
    "baseline-compiled",
    "transformers",
    "transformers-liger",
    "ours-compiled",
    "ours-torch",
    "baseline-eager",
)


@dataclass(frozen=True)
class Rows:
    """One micro-batch of packed documents, in the order of `Transformer.forward`."""

    tokens_BT: Tensor
    targets_BT: Tensor
    doc_start_BT: Tensor
    row_ids_B: Tensor


@dataclass(frozen=True)
class Update:
    """A model with its optimizer.

    Args:
        run: does one update from one micro-batch after another; returns the mean loss, so it waits for the device.
        device: where the rows must be.
        compile: is called once the micro-batch is chosen, since every size would be compiled again.
    """

    run: Callable[[list[Rows]], float]
    device: torch.device
    compile: Callable[[], None] = lambda: None


def draw_rows(shape: ModelShape, num_rows: int, device: torch.device, seed: int = 0) -> Rows:
    """Draw rows of random tokens in documents of random lengths, a third of a row on average; every slot is scored."""
    generator = torch.Generator().manual_seed(seed)
    size = (num_rows, shape.seq_len)
    tokens_BT = torch.randint(shape.vocab_size, (num_rows, shape.seq_len + 1), generator=generator)
    begins_BT = torch.rand(size, generator=generator) < 3 / shape.seq_len
    slot_BT = torch.arange(shape.seq_len).expand(size)
    doc_start_BT = torch.where(begins_BT, slot_BT, 0).cummax(1).values.int()
    tensors = (tokens_BT[:, :-1], tokens_BT[:, 1:], doc_start_BT, torch.arange(num_rows))
    return Rows(*(tensor.contiguous().to(device) for tensor in tensors))


def make_ours(shape: ModelShape, device: torch.device, dtype: torch.dtype) -> Transformer:
    """Build Longhaul's Transformer on the device with random weights, without the detour over the CPU's generator.

    The weights are drawn in fp32, so that every dtype starts from the same ones.
    """
    with torch.device("meta"):
        model = Transformer(shape, seed=1)
    model = model.to_empty(device=device)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(0.0, shape.init_std)
            else:
                parameter.fill_(0.0 if name.endswith("bias") else 1.0)
    return model.to(dtype).train()


def make_update(variant: str, config: Config, shape: ModelShape, compile_backend: str) -> Update:
    """Build a model with its optimizer.

    Args:
        variant: one of `VARIANTS`.
        config: its optimizer and clipping are used; precision is bf16.
        shape: of the model.
        compile_backend: of `torch.compile`.
    """
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    if variant in ("ours-deepspeed", "ours-compiled"):
        return _by_engine(config, shape, compile_backend if variant == "ours-compiled" else None)
    if variant == "ours-torch":
        step = by_torch(make_ours(shape, device, torch.float32), config, device)
        return Update(lambda batches: _mean_loss(batches, step, config.optim.lr), device)
    if variant.startswith("transformers"):
        return _by_trainer(config, shape, device, with_liger=variant == "transformers-liger")
    with device:
        model = Baseline(shape)
    return _by_autocast(model, config, device, compile_backend if variant == "baseline-compiled" else None)


def _by_trainer(config: Config, shape: ModelShape, device: torch.device, with_liger: bool) -> Update:
    from benchmarks.peers import TrainerLoop, make_model, use_liger  # seconds, and it needs accelerate

    if with_liger:
        use_liger(shape)
    loop = TrainerLoop(make_model(shape, device), config)
    return Update(lambda batches: loop.step(batches, config.optim.lr), device)


def _by_engine(config: Config, shape: ModelShape, compile_backend: str | None) -> Update:
    from pretrain.options.batch_plan import BatchPlan
    from pretrain.zero.engine import Engine, init_distributed

    ranks = init_distributed(config.parallel.start_timeout_seconds)
    model = make_ours(shape, ranks.device, torch.float32)
    engine = Engine(model, config, BatchPlan.of(config, ranks.world_size), ranks)
    engine.train()

    def update(batches: list[Rows]) -> float:
        num_targets = sum(rows.targets_BT.numel() for rows in batches)
        loss_sum = torch.zeros((), device=ranks.device)
        for index, rows in enumerate(batches):
            loss, _ = engine.forward(rows.tokens_BT, rows.targets_BT, rows.doc_start_BT, rows.row_ids_B, 0)
            engine.backward(loss * (len(batches) / num_targets))  # DeepSpeed divides by the micro-steps
            loss_sum += loss.detach()
            if index < len(batches) - 1:
                engine.end_micro_step()
        if not engine.step(config.optim.lr).applied:
            raise FloatingPointError("a gradient is not finite: the update was skipped")
        return float(loss_sum) / num_targets

    if compile_backend is None:
        return Update(update, ranks.device)
    return Update(update, ranks.device, lambda: model.compile_blocks(compile_backend))


def _mean_loss(batches: list[Rows], step: Callable[[list[Rows], float, int, int], float], lr: float) -> float:
    return step(batches, lr, sum(rows.targets_BT.numel() for rows in batches), 0)


def by_torch(
    model: Transformer, config: Config, device: torch.device
) -> Callable[[list[Rows], float, int, int], float]:
    """Return a bare training step: forward, backward, clip, fused update, with fp32 masters of bf16 weights.

    It takes the micro-batches, the learning rate, the number of scored targets and of the step (for dropout), and
    returns the mean loss.
    """
    if config.train.precision == "bf16":
        model.bfloat16()
    weights: list[Tensor] = list(model.parameters())
    groups = param_groups(model, config.optim)
    has_masters = config.train.precision != "fp32"
    masters = {weight: nn.Parameter(weight.detach().float()) if has_masters else weight for weight in weights}
    for group in groups:
        group["params"] = [masters[weight] for weight in group["params"]]
    optimizer = make_optimizer(groups, config.optim)

    @torch.no_grad()
    def gather_gradients() -> None:
        for weight, master in masters.items():
            assert weight.grad is not None
            if master.grad is None:
                master.grad = weight.grad.float()
            else:
                master.grad += weight.grad
            weight.grad = None

    def step(batches: list[Rows], lr: float, num_targets: int, number: int) -> float:
        optimizer.zero_grad()
        loss_sum = torch.zeros((), device=device)
        for rows in batches:
            objective, loss = model(rows.tokens_BT, rows.targets_BT, rows.doc_start_BT, rows.row_ids_B, number)
            (objective / num_targets).backward()
            if has_masters:
                gather_gradients()
            loss_sum += loss
        if config.optim.clip_norm > 0:
            nn.utils.clip_grad_norm_(list(masters.values()), config.optim.clip_norm)
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
        if has_masters:
            with torch.no_grad():
                torch._foreach_copy_(weights, [*masters.values()])
        return float(loss_sum) / num_targets

    return step


def _by_autocast(model: Baseline, config: Config, device: torch.device, compile_backend: str | None) -> Update:
    step = plain_step(model, config, device)

    def update(batches: list[Rows]) -> float:
        return step(batches, config.optim.lr)

    if compile_backend is None:
        return Update(update, device)
    return Update(update, device, lambda: model.compile_parts(compile_backend))


def plain_step(model: Baseline, config: Config, device: torch.device) -> Callable[[list[Rows], float], float]:
    """Return a step of plain PyTorch, under autocast where the config's precision is bf16.

    It takes the micro-batches, each of whose targets count the same, and the learning rate; it returns the mean loss.
    """
    parameters = list(model.parameters())
    optimizer = make_optimizer(param_groups(model, config.optim), config.optim)

    def step(batches: list[Rows], lr: float) -> float:
        optimizer.zero_grad()
        loss_sum = torch.zeros((), device=device)
        for rows in batches:
            with torch.autocast(device.type, dtype=torch.bfloat16, enabled=config.train.precision == "bf16"):
                loss = model(rows.tokens_BT, rows.targets_BT) / len(batches)
            loss.backward()
            loss_sum += loss.detach()
        nn.utils.clip_grad_norm_(parameters, config.optim.clip_norm)
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
        return float(loss_sum)

    return step
