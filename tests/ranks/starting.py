"""Builds engines as a run does, one after the other, and notes what each began with and what memory that took.

Started by the tests on every rank: `starting.py CASES.json`. CASES.json holds a list of configs without data. What each
engine's ranks hold together, and their memory, is in CASES.outcomes.
"""

from __future__ import annotations

import gc
import hashlib
import json
import os
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[2])

import torch

from pretrain.optimizers.optim import make_optimizer
from pretrain.options.batch_plan import BatchPlan
from pretrain.options.families import resolve_shape
from pretrain.options.settings import parse_config
from pretrain.ranks.distributed import leave_distributed
from pretrain.transformer.model import Transformer
from pretrain.zero import engine as engine_module
from pretrain.zero.engine import MASTER, Engine, init_distributed


def resident(field: str) -> int:
    """Bytes of this process: `VmRSS` now, or `VmHWM` at most since `forget_peak`."""
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field)]
    return int(line.split()[1]) * 1024


def forget_peak() -> None:
    """Count `VmHWM` from here. Source: proc(5), /proc/pid/clear_refs."""
    Path("/proc/self/clear_refs").write_text("5")


def whole(engine, ranks) -> dict[str, torch.Tensor]:
    """All master weights of a small model, put together from what the ranks hold."""
    own = [(one.name, one.start, one.tensors[MASTER].detach().clone()) for one in engine.fragments()]
    found: dict[str, torch.Tensor] = {}
    for name, start, values in (one for part in ranks.gather(own) for one in part):
        target = found.setdefault(name, torch.full((torch.Size(engine.parameter_shapes()[name]).numel(),), torch.nan))
        target[start : start + len(values)] = values
    return found


def start(section: dict, ranks) -> dict:
    """Build one engine, by choice of a model that is `whole` before; return what it is made of."""
    is_whole = section.pop("whole", False)
    config = parse_config(section)
    shape = resolve_shape(config.model, config.tokenizer.vocab_size, config.data.seq_len)
    gc.collect()
    forget_peak()
    before = resident("VmRSS")
    peaks = []

    def make_noted(*arguments):  # the engine's next step once the weights are drawn
        peaks.append(resident("VmHWM") - before)
        return make_optimizer(*arguments)

    engine_module.make_optimizer = make_noted
    with torch.device("cpu" if is_whole else "meta"):
        model = Transformer(shape, config.run.seed)
    engine = Engine(model, config, BatchPlan.of(config, ranks.world_size), ranks)
    peaks = ranks.gather((*peaks, resident("VmHWM") - before))
    numels = [torch.Size(one).numel() for one in engine.parameter_shapes().values()]
    note = {
        "drawn": max(one for one, _ in peaks),
        "built": max(one for _, one in peaks),
        "num_parameters": sum(numels),
        "largest": max(numels),
        "stage": engine.stage,
    }
    if sum(numels) < 1_000_000:
        weights = whole(engine, ranks)
        note["sha256"] = hashlib.sha256(
            b"".join(weights[name].numpy().tobytes() for name in sorted(weights))
        ).hexdigest()
        plain = Transformer(shape, config.run.seed)
        dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[config.train.precision]
        note["as_plain"] = all(
            torch.equal(weights[name], one.detach().to(dtype).float().view(-1))
            for name, one in plain.named_parameters()
        )
    engine.close()
    return note


def main() -> None:
    """Build all engines; rank 0 writes the notes beside CASES.json."""
    path = Path(sys.argv[1])
    ranks = init_distributed(120)
    notes = [start(section, ranks) for section in json.loads(path.read_text())]
    if ranks.is_first:
        path.with_suffix(".outcomes").write_text(json.dumps(notes))
    leave_distributed()


if __name__ == "__main__":
    main()
    os._exit(0)  # as in cases.py
