"""What one update of each optimizer costs, alone, on one device: no ranks, no forward, no backward."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

if sys.path[0] == str(Path(__file__).resolve().parent):  # run as a file
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch

from benchmarks.record import describe_device
from benchmarks.timing import Timer
from pretrain.optimizers.optim import make_optimizer, param_groups
from pretrain.options.config import OptimSection
from pretrain.options.families import resolve_shape
from pretrain.options.settings import load_config
from pretrain.transformer.model import Transformer

EXAMPLES = """examples:
  python benchmarks/optimizers.py configs/quickstart.yaml
  python benchmarks/optimizers.py configs/llama-350m.yaml --repeats 20"""
NAMES = ("adamw", "muon", "lion", "sgd", "rmsprop")


def median_seconds(name: str, model: Transformer, repeats: int) -> float:
    """Return the median time of an update of the model's fp32 weights by the named optimizer."""
    section = OptimSection(name=name, lr=1e-3)
    optimizer = make_optimizer(param_groups(model, section), section)
    gradients = [torch.randn_like(parameter) for parameter in model.parameters()]

    def give_gradients() -> None:
        for parameter, gradient in zip(model.parameters(), gradients, strict=True):
            parameter.grad = gradient.clone()  # Muon overwrites them

    timer = Timer(gradients[0].device, repeats, warm_up=2)
    return timer.median_seconds(lambda _: optimizer.step(), give_gradients)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return its exit status."""
    parser = argparse.ArgumentParser(
        prog="optimizers", description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", type=Path, help="YAML file whose model is updated")
    parser.add_argument("overrides", nargs="*", help="option=value")
    parser.add_argument("--repeats", type=int, default=10, help="timed updates")
    arguments = parser.parse_args(argv)
    config = load_config(arguments.config, arguments.overrides)
    shape = resolve_shape(config.model, config.tokenizer.vocab_size, config.data.seq_len)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = Transformer(shape, 1).to(device)
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    about = describe_device()
    print(f"{num_parameters:,} parameters in fp32; {about['name']}, {about['num_processors']} processors")
    for name in NAMES:
        print(f"{name:8} {1e3 * median_seconds(name, model, arguments.repeats):10.2f} ms")
    return 0


if __name__ == "__main__":
    sys.exit(main())
