"""Greedy text with the key-value cache, beside computing all again for each token and beside transformers' `generate`.

All have the same weights, and must choose the same tokens. They take turns in one process, and their processor time is
taken, so that what else the machine does counts less.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path

if sys.path[0] == str(Path(__file__).resolve().parent):  # run as a file
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch

from benchmarks.record import Record
from pretrain.generation.generate import generate
from pretrain.generation.generate_options import GenerateOptions
from pretrain.options.config import ModelSection
from pretrain.options.families import ModelShape, num_parameters, resolve_shape
from pretrain.transformer.model import Transformer

SHAPES = {"6.5m": (256, 6, 4, 2, 8192), "100m": (768, 12, 12, 4, 32000)}  # width, layers, heads, key heads, vocabulary
CASES = ((1, 100), (16, 100), (1, 900))  # rows and tokens of their prompts
Texts = list[list[int]]


class _Numbers:
    """What `generate` needs of a tokenizer, for prompts that are numbers. No token ends a text."""

    bos_id, eos_id, pad_id = 1, -10, 0

    def encode(self, text: str) -> list[int]:
        return [int(number) for number in text.split()]

    def decode(self, ids: Iterable[int]) -> str:
        return " ".join(map(str, ids))


def _ours(model: Transformer, prompts: Texts, num_new: int) -> Texts:
    options = GenerateOptions(max_new_tokens=num_new, temperature=0.0)
    texts = [" ".join(map(str, prompt[1:])) for prompt in prompts]
    return [item.ids for item in generate(model, _Numbers(), texts, options)]  # type: ignore[arg-type]


def _recomputed(model: Transformer, prompts: Texts, num_new: int) -> Texts:
    ids_BT = torch.tensor(prompts)
    for _ in range(num_new):
        ids_BT = torch.cat((ids_BT, model.logits(ids_BT, last_only=True).argmax(-1)), dim=1)
    return [row[-num_new:] for row in ids_BT.tolist()]


def _theirs(model: torch.nn.Module, prompts: Texts, num_new: int) -> Texts:
    inputs = {"input_ids": torch.tensor(prompts), "attention_mask": torch.ones(len(prompts), len(prompts[0]))}
    made = model.generate(**inputs, max_new_tokens=num_new, do_sample=False)  # type: ignore[operator]
    return [row[-num_new:] for row in made.tolist()]


def measure(ways: dict[str, Callable[[], Texts]], repeats: int) -> dict[str, float]:
    """Return the least processor time of each way, in seconds; a first round is not timed.

    Raises:
        ValueError: they do not give the same tokens.
    """
    seconds: dict[str, float] = {}
    made: dict[str, Texts] = {}
    for repeat in range(repeats + 1):
        for name, run in ways.items():
            begin = time.process_time()
            made[name] = run()
            if repeat > 0:
                seconds[name] = min(time.process_time() - begin, seconds.get(name, float("inf")))
    for name in made:
        if made[name] != made["ours"]:
            raise ValueError(f"{name}: its tokens are not ours")
    return seconds


def _shape(name: str) -> ModelShape:
    dim, num_layers, num_heads, num_kv_heads, vocab_size = SHAPES[name]
    section = ModelSection(
        family="llama", dim=dim, num_layers=num_layers, num_heads=num_heads, num_kv_heads=num_kv_heads,
        tie_embeddings=True,
    )  # fmt: skip
    return resolve_shape(section, vocab_size, 2048)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return its exit status."""
    parser = argparse.ArgumentParser(prog="generation", description=__doc__)
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--models", nargs="+", choices=SHAPES, default=list(SHAPES), help="%(default)s")
    parser.add_argument("--new-tokens", type=int, default=32, help="for each prompt (%(default)s)")
    parser.add_argument("--repeats", type=int, default=3, help="of which the best counts (%(default)s)")
    arguments = parser.parse_args(argv)
    from benchmarks.peers import copy_weights, make_model

    settings = {name: value for name, value in vars(arguments).items() if name != "out"}
    record = Record("generation", arguments.out, settings | {"num_threads": torch.get_num_threads()})
    for name in arguments.models:
        shape = _shape(name)
        model = Transformer(shape, seed=1).eval()
        with torch.no_grad():  # as drawn, a tied model repeats its last token
            model.embedding.weight.normal_(0.0, 0.05, generator=torch.Generator().manual_seed(1))
        peer = make_model(shape, torch.device("cpu")).eval()
        copy_weights(model, peer, shape)
        for num_rows, num_prompt in CASES:
            generator = torch.Generator().manual_seed(2)
            drawn = torch.randint(4, shape.vocab_size, (num_rows, num_prompt - 1), generator=generator)
            inputs = [[1, *row] for row in drawn.tolist()], arguments.new_tokens
            ways: dict[str, Callable[[], Texts]] = {
                "ours": partial(_ours, model, *inputs),
                "recomputed": partial(_recomputed, model, *inputs),
                "transformers": partial(_theirs, peer, *inputs),
            }
            num_tokens = num_rows * arguments.new_tokens
            rates = {
                f"{way}_tokens_per_second": num_tokens / seconds
                for way, seconds in measure(ways, arguments.repeats).items()
            }
            about = {"model": name, "num_parameters": num_parameters(shape)}
            record.add(**about, num_rows=num_rows, num_prompt=num_prompt, **rates)
    from benchmarks.table import render

    print(render([record.content]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
