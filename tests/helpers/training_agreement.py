"""Whether training with Triton's operators is training with PyTorch's: the losses of the same steps, side by side.

On a CPU `kernels/interpreter_training.py` runs this in Triton's interpreter, on a GPU `gpu/test_training.py`.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.updates import Rows, by_torch
from kernels import activation, attention, dropout, layer_norm, linear_cross_entropy, rms_norm, rope
from pretrain.options.config import Config
from pretrain.options.families import ModelShape
from pretrain.options.schedule import lr_at
from pretrain.transformer.model import Transformer

OPERATORS: dict[str, tuple[ModuleType, ...]] = {
    "attention": (attention,),
    "norms": (layer_norm, rms_norm),
    "rope": (rope,),
    "activations": (activation,),
    "loss": (linear_cross_entropy,),
    "dropout": (dropout,),
}
ALL = tuple(OPERATORS)
FP32_BOUND = 1e-5  # of a loss, relative
BF16_SLACK = 2.0**-11  # nats
BYTES_VOCAB, BEGIN = 300, 256  # a token a byte, and one that begins a document; a config takes no fewer


class Step(NamedTuple):
    """The rows of one update, and how many of their tokens are scored."""

    rows: Rows
    num_targets: int


@contextmanager
def triton_only(names: Collection[str]) -> Iterator[None]:
    """Run these operators as Triton programs, and the others in PyTorch."""
    with ExitStack() as stack:
        for module in itertools.chain(*(modules for name, modules in OPERATORS.items() if name not in names)):
            stack.enter_context(mock.patch.object(module, "use_triton", lambda x: False))
        yield


class Programs(TorchDispatchMode):
    """Collects the names of this project's operators that run as Triton programs."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        namespace, _, name = function._schema.name.partition("::")
        if namespace == "longhaul":
            self.names.add(name)
        return function(*args, **(kwargs or {}))


def make_config(**sections: Any) -> Config:
    """Make a config of a small Llama whose data is never opened; `sections` replace options."""
    options: dict[str, dict[str, Any]] = {
        "run": {"dir": "run", "seed": 7},
        "tokenizer": {"model": "none", "vocab_size": BYTES_VOCAB},
        "data": {"sources": [{"name": "bytes", "shards": "none", "weight": 1}], "seq_len": 32},
        "model": {"family": "llama", "dim": 32, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "ffn_dim": 64},
        "optim": {"lr": 1e-3, "weight_decay": 0.1, "clip_norm": 1.0},
        "schedule": {"warmup_steps": 20},
        "train": {"num_steps": 200, "global_batch_size": 2, "micro_batch_size": 2, "precision": "fp32", "z_loss": 1e-4},
    }
    return Config.model_validate({name: section | sections.get(name, {}) for name, section in options.items()})


def with_train(config: Config, **options: Any) -> Config:
    """Replace options of `train`."""
    return config.model_copy(update={"train": config.train.model_copy(update=options)})


def byte_steps(config: Config, num_steps: int, device: str) -> list[Step]:
    """Pack the standard library's own sources, a token a byte, into rows, one file after another, in a fixed order."""
    B, T = config.train.global_batch_size, config.data.seq_len
    needed, ids, starts = num_steps * B * T + 1, [], []
    for path in sorted(Path(os.__file__).parent.glob("*.py")):
        text = path.read_bytes()[:4096]  # several documents a row, now and then
        starts += [len(ids)] * (1 + len(text))
        ids += [BEGIN, *text]
    times = -(-needed // len(ids))
    ids_N = torch.tensor(ids).repeat(times)[:needed]
    start_N = torch.cat([torch.tensor(starts) + index * len(ids) for index in range(times)])[: needed - 1]
    row_first_B1 = torch.arange(num_steps * B)[:, None] * T
    doc_start_BT = (start_N.view(-1, T) - row_first_B1).clamp(min=0).int()
    tokens_BT, targets_BT = ids_N[:-1].view(-1, T), ids_N[1:].view(-1, T)
    order = torch.randperm(num_steps * B, generator=torch.Generator().manual_seed(1))
    tensors = (tokens_BT[order], targets_BT[order], doc_start_BT[order], torch.arange(num_steps * B))
    parts = zip(*(tensor.to(device).split(B) for tensor in tensors), strict=True)
    return [Step(Rows(*part), B * T) for part in parts]


def build(config: Config, shape: ModelShape, device: str, shuffled: int = 0) -> Transformer:
    """Build the model with weights that bf16 holds, so that every precision starts from the same.

    Args:
        config: its seed, recomputing and z-loss are used.
        shape: of the model.
        device: that runs it.
        shuffled: above 0: put the features of the residual stream in another order, by this seed. The same function,
            but nearly every sum adds in another order: what two roundings of one training may differ by.
    """
    model = Transformer(shape, config.run.seed, config.train.activation_checkpointing, config.train.z_loss)
    if shuffled:
        order_D = torch.randperm(shape.dim, generator=torch.Generator().manual_seed(shuffled))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.rpartition(".")[0].endswith(("_norm", "attention.output", "ffn.down")):
                    parameter.copy_(parameter[order_D].clone())
                elif parameter.dim() == 2:
                    parameter.copy_(parameter[:, order_D].clone())
    return model.bfloat16().float().to(device).train()


def train(
    config: Config,
    shape: ModelShape,
    steps: Sequence[Step],
    on: Collection[str] = (),
    device: str = "cpu",
    shuffled: int = 0,
) -> list[float]:
    """Train over the steps, with warm-up and decay over all of them; return the loss of each.

    Args:
        config: its optimizer, schedule, precision and z-loss are used.
        shape: of the model.
        steps: one update each.
        on: what runs as Triton programs, of `OPERATORS`.
        device: of the rows.
        shuffled: as in `build`.
    """
    update = by_torch(build(config, shape, device, shuffled), config, torch.device(device))
    losses = []
    with triton_only(on):
        for number, step in enumerate(steps):
            lr = lr_at(number, len(steps), config.optim.lr, config.schedule)
            losses.append(update([step.rows], lr, step.num_targets, number))
    return losses


def backward_once(model: Transformer, step: Step) -> torch.Tensor:
    """Run forward and backward; return the cross-entropy, which nothing has waited for."""
    objective, cross_entropy = model(*vars(step.rows).values(), 3)
    (objective / step.num_targets).backward()
    return cross_entropy


class Difference(NamedTuple):
    """How the losses of a run differ from others: relative to them at most, and in nats."""

    relative: float
    largest: float
    mean_size: float
    mean: float

    @classmethod
    def of(cls, losses: Sequence[float], others: Sequence[float]) -> Difference:
        """Compare step by step; NaN counts as infinite."""
        pairs = list(zip(losses, others, strict=True))
        if not all(a == a and b == b for a, b in pairs):
            return cls(*[float("inf")] * 4)
        sizes = [abs(a - b) for a, b in pairs]
        relative = max(size / b for size, (_, b) in zip(sizes, pairs, strict=True))
        return cls(relative, max(sizes), sum(sizes) / len(pairs), sum(a - b for a, b in pairs) / len(pairs))


class Comparison(NamedTuple):
    """The losses of a run with operators on, and how they, and those of PyTorch's roundings, differ from fp32's."""

    losses: list[float]
    found: Difference
    torchs: list[Difference]


def compare(
    config: Config,
    shape: ModelShape,
    steps: Sequence[Step],
    on: Collection[str],
    truth: Sequence[float],
    device: str = "cpu",
    num_roundings: int = 3,
) -> Comparison:
    """Train with operators on, and in PyTorch in several roundings.

    Args:
        config, shape, steps, on, device: as in `train`.
        truth: losses of plain PyTorch in fp32.
        num_roundings: of PyTorch's, beside the plain one, which in fp32 is the truth.
    """
    numbers = range(config.train.precision == "fp32", 1 + num_roundings)
    runs = [train(config, shape, steps, (), device, number) for number in numbers]
    losses = train(config, shape, steps, on, device)
    return Comparison(losses, Difference.of(losses, truth), [Difference.of(run, truth) for run in runs])


def bf16_excess(found: Difference, torchs: Sequence[Difference]) -> float:
    """Compare the error of a bf16 run with those of PyTorch's in bf16; up to 1 is as good as PyTorch's.

    By the rule of the operators' own tests: at most twice PyTorch's error, at its largest and on average, and what
    two roundings may differ by where errors are tiny. A bias must not be larger than PyTorch's error is on average.

    Args:
        found: its losses, compared with fp32's.
        torchs: those of PyTorch's runs, each rounded its own way.
    """
    largest, mean_size = (max(getattr(one, name) for one in torchs) for name in ("largest", "mean_size"))
    return max(
        found.largest / (2 * largest + BF16_SLACK), found.mean_size / (2 * mean_size + BF16_SLACK / 8),
        abs(found.mean) / (mean_size + BF16_SLACK / 8),
    )  # fmt: skip
