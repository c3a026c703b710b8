"""Training with every operator in Triton's interpreter, beside PyTorch's: run by `test_training_agreement.py`.

By hand, with more of it: `python tests/kernels/interpreter_training.py --each` trains 200 steps of two families in fp32 and
bf16 with all operators and with each alone, and prints how the losses differ.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

os.environ["TRITON_INTERPRET"] = "1"
if sys.path[0] == str(Path(__file__).resolve().parent):  # run as a file
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import argparse
import json
import tempfile
import time
from collections.abc import Sequence

import pytest
import torch

from pretrain.data.stream import TokenStream
from pretrain.options.batch_plan import BatchPlan
from pretrain.options.config import Config
from pretrain.options.families import ModelShape, resolve_shape
from pretrain.options.settings import load_config
from pretrain.tokenizers.tokenizer_files import open_tokenizer
from tests.helpers.training_agreement import (
    ALL,
    FP32_BOUND,
    Difference,
    Programs,
    Rows,
    Step,
    bf16_excess,
    build,
    compare,
    train,
    triton_only,
    with_train,
)
from tests.kernels import interpreter_bf16, interpreter_speed

interpreter_bf16.install()
interpreter_speed.install()
torch.set_num_threads(1)
pytestmark = [
    pytest.mark.filterwarnings("ignore:divide by zero encountered in log2:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:overflow encountered in exp2:RuntimeWarning"),  # what is not seen
]

# Small, since a step of this takes half a second, and a rate at which losses do not part by themselves (note 0012).
SIZES = ("model.num_layers=1", "model.num_heads=2", "train.global_batch_size=1", "train.micro_batch_size=1",
         "train.z_loss=1e-4", "optim.lr=1e-3")  # fmt: skip
FAMILIES = {
    "llama": ("model.num_kv_heads=1",),
    "gpt2": ("model.family=gpt2", "model.num_kv_heads=null"),
}
PROGRAMS = {
    "llama": {"attention", "rms_norm", "add_rms_norm", "rope", "swiglu", "linear_cross_entropy"},
    "gpt2": {"attention", "layer_norm", "add_layer_norm", "gelu", "linear_cross_entropy"},
}
OF_OPERATOR = {"attention": "attention", "norms": "norm", "rope": "rope", "activations": "lu", "loss": "cross_entropy",
               "dropout": "dropout"}  # fmt: skip  # no model here drops: another order of features has another mask
NUM_ROUNDINGS = 3  # of PyTorch's own, beside the plain one


def prepared(path: Path, num_steps: int, *overrides: str) -> tuple[Config, ModelShape, list[Step]]:
    """Open a prepared corpus as training does; return its config, the model's shape and the steps' rows."""
    warmup = max(num_steps // 10, 1)
    config = load_config(path, [f"train.num_steps={num_steps}", f"schedule.warmup_steps={warmup}", *SIZES, *overrides])
    tokenizer = open_tokenizer(config.tokenizer)
    stream = TokenStream(config, BatchPlan.of(config, 1), 0, tokenizer.fingerprint)
    drawn = [stream.next_step() for _ in range(num_steps)]
    stream.close()
    steps = [Step(Rows(*vars(rows.micro_batches[0]).values()), rows.num_targets) for rows in drawn]
    return config, resolve_shape(config.model, tokenizer.vocab_size, config.data.seq_len), steps


@pytest.mark.parametrize("family", FAMILIES)
def test_each_operator_runs_where_it_is_switched_on(family, tiny_config):
    config, shape, (step, _) = prepared(tiny_config, 2, *FAMILIES[family])
    model = build(config, shape, "cpu")
    for on in [(), ALL, *((name,) for name in ALL)]:
        with triton_only(on), Programs() as seen:
            sum(model(*vars(step.rows).values())).backward()
        wanted = {name for name in PROGRAMS[family] if any(OF_OPERATOR[each] in name for each in on)}
        backward = {f"{name.removeprefix('add_')}_backward" for name in wanted - {"rope", "linear_cross_entropy"}}
        assert seen.names - {"scaled"} == wanted | backward, on


def test_a_few_steps_in_fp32(tiny_config):
    config, shape, steps = prepared(tiny_config, 10, *FAMILIES["llama"])
    off, on = train(config, shape, steps), train(config, shape, steps, ALL)
    assert Difference.of(on, off).relative <= 1e-6
    frozen, _, _ = prepared(tiny_config, 10, *FAMILIES["llama"], "optim.lr=1e-12")
    assert off[-1] < train(frozen, shape, steps)[-1] - 1e-3  # on the same row


@pytest.mark.timeout(1500)
def test_200_steps_of_llama_in_fp32(tiny_config):
    config, shape, steps = prepared(tiny_config, 200, *FAMILIES["llama"])
    losses, found, torchs = compare(config, shape, steps, ALL, train(config, shape, steps))
    assert found.relative <= FP32_BOUND, (found, torchs)
    assert sum(losses[-20:]) < 0.85 * sum(losses[:20])


@pytest.mark.timeout(1500)
def test_200_steps_of_gpt2_in_bf16(tiny_config):
    config, shape, steps = prepared(tiny_config, 200, *FAMILIES["gpt2"])
    truth = train(config, shape, steps)
    losses, found, torchs = compare(with_train(config, precision="bf16"), shape, steps, ALL, truth)
    assert bf16_excess(found, torchs) <= 1.0, (found, torchs)
    assert sum(losses[-20:]) < 0.85 * sum(losses[:20])


def report(family: str, precision: str, what: str, difference: Difference, seconds: float) -> None:
    """Print a line of JSON."""
    line = {"family": family, "precision": precision, "what": what, **difference._asdict()}
    rounded = {key: float(f"{value:.3g}") if isinstance(value, float) else value for key, value in line.items()}
    print(json.dumps(rounded | {"seconds": round(seconds)}), flush=True)


def tell(path: Path, family: str, precision: str, num_steps: int, cases: Sequence[tuple[str, ...]]) -> None:
    """Train in PyTorch in several roundings, then with operators on; print how losses differ from plain fp32's."""
    config, shape, steps = prepared(path, num_steps, *FAMILIES[family])
    truth = train(config, shape, steps)
    config = with_train(config, precision=precision)
    for number in range(precision == "fp32", 1 + NUM_ROUNDINGS):
        losses = train(config, shape, steps, shuffled=number)
        report(family, precision, f"PyTorch, rounding {number}", Difference.of(losses, truth), 0.0)
    for on in cases:
        begin = time.process_time()
        losses = train(config, shape, steps, on)
        report(family, precision, " ".join(on), Difference.of(losses, truth), time.process_time() - begin)


def main() -> None:
    """Run what the arguments say."""
    from tests.conftest import write_tiny_corpus
    from tests.helpers.rank_helpers import prepare

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200, help="updates (%(default)s)")
    parser.add_argument("--each", action="store_true", help="each operator alone too")
    parser.add_argument("--families", nargs="*", default=list(FAMILIES), choices=FAMILIES)
    parser.add_argument("--precisions", nargs="*", default=["fp32", "bf16"], choices=("fp32", "bf16"))
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = write_tiny_corpus(Path(folder) / "corpus")
        prepare(path)
        for family in arguments.families:
            used = [name for name in ALL if any(OF_OPERATOR[name] in program for program in PROGRAMS[family])]
            cases = [ALL, *((name,) for name in used if arguments.each)]
            for precision in arguments.precisions:
                tell(path, family, precision, arguments.steps, cases)


if __name__ == "__main__":
    main()
