"""What `parallel` means for a config: bytes of each rank in words and figures, and what DeepSpeed is told."""

from __future__ import annotations

import json
from collections.abc import Iterator

from pretrain.console import counted
from pretrain.errors import EXIT_DONE
from pretrain.options.batch_plan import BatchPlan
from pretrain.options.config import Config
from pretrain.planning.plan_memory import checkpoint_bytes, disk_bytes, host_bytes, layout_of, resident
from pretrain.zero.deepspeed_settings import check_hpz, deepspeed_settings, effective_stage

_KINDS = ("parameters", "gradients", "masters", "moments", "buckets")
_STAGES = {  # by the kind of optimizer, and the stage
    ("plain", 0): "every rank holds weights, gradients and the optimizer's states whole",
    ("summed", 1): "each rank holds its share of the masters and moments, which it updates; weights are whole, and "
    "gradients, these in fp32 too",
    ("divided", 1): "each rank holds its share of the masters and moments, which it updates; weights are whole, and "
    "gradients until the last backward pass of a step is over, of which each rank then keeps its share",
    ("divided", 2): "each rank holds its share of gradients, masters and moments; weights are whole",
    ("weights", 3): "each rank holds its share of everything, and gathers the weights of a block before it computes "
    "with them",
}
_OFFLOADS = {
    "none": "nothing is kept outside of the GPU",
    "optimizer": "masters and moments are kept in {where}, gradients come to the host's memory, and the CPU updates",
    "parameters": "masters and moments are kept in {where}, gradients and divided weights in the host's memory, and "
    "the CPU updates",
}
_CHOICES = ((0, "none"), (1, "none"), (2, "none"), (2, "optimizer"), (3, "none"), (3, "optimizer"), (3, "parameters"))


def explain_parallel(config: Config, ranks: int) -> str:
    """Say what a config's `parallel` means on so many ranks, beside its other values; then DeepSpeed's JSON.

    Raises:
        ConfigError: the batch does not divide, or `parallel.hpz_ranks` does not.
    """
    plan, at, parallel = BatchPlan.of(config, ranks), layout_of(config, ranks), config.parallel
    check_hpz(parallel, ranks)
    trained = "" if at.total == at.weights else f", of which {at.total:,}, the adapters, are trained,"
    lines = [
        f"{at.weights:,} parameters{trained} on {counted(ranks, 'rank')}, {config.train.precision}, "
        f"{config.optim.name}. A checkpoint has {_short(checkpoint_bytes(config))}.",
        "Bytes of one rank when the last backward pass of a step is over, without activations and gathered weights;",
        "`python launch/plan.py` says when in a step it holds most:",
        "",
        f"  {'zero_stage offload':<22}" + "".join(f"{name:>12}" for name in (*_KINDS, "on GPU", "on host", "on disk")),
    ]
    own = parallel.zero_stage, parallel.offload
    for stage, offload in sorted({*_CHOICES, own}):
        other: dict = {"zero_stage": stage, "offload": offload}
        if (stage, offload) != own:
            other |= {"hpz_ranks": 1, "nvme_dir": parallel.nvme_dir if stage == 3 and offload != "none" else ""}
        row = _row(config.model_copy(update={"parallel": parallel.model_copy(update=other)}), ranks)
        mark = "> " if (stage, offload) == own else "  "
        lines.append(f"{mark}{stage:<11}{offload:<11}" + "".join(f"{_short(value):>12}" for value in row))
    lines += ["", *_words(config, ranks), "", "DeepSpeed is told:"]
    return "\n".join([*lines, json.dumps(deepspeed_settings(config, plan, at.total, at.weights - at.total), indent=2)])


def _row(config: Config, ranks: int) -> list[int]:
    """What is on a rank's GPU, by kind and in all, in the host's memory for it, and on a disk."""
    on_gpu = resident(config, ranks)
    on_host = host_bytes(config, ranks)["offload"]
    return [*(on_gpu[kind] for kind in _KINDS), sum(on_gpu.values()), on_host, disk_bytes(config, ranks)]


def show_parallel(config: Config, ranks: int) -> int:
    """Print `explain_parallel`; return the exit status."""
    print(explain_parallel(config, ranks))
    return EXIT_DONE


def _short(value: int) -> str:
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if value >= size:
            return f"{value / size:.2f} {unit}"
    return f"{value / 1e3:.1f} kB" if value else "-"


def _words(config: Config, ranks: int) -> Iterator[str]:
    """Say in a sentence each what the options that are set do."""
    parallel = config.parallel
    stage = effective_stage(parallel, config.train.precision, ranks)
    runs = "" if stage == parallel.zero_stage else f" runs as {stage} here"
    yield f"parallel.zero_stage {parallel.zero_stage}{runs}: {_STAGES[layout_of(config, ranks).kind, stage]}."
    where = f"files in {parallel.nvme_dir}" if parallel.nvme_dir else "the host's memory"
    yield f"parallel.offload {parallel.offload}: {_OFFLOADS[parallel.offload].format(where=where)}."
    if (size := parallel.sequence_parallel_size) > 1:
        yield (
            f"parallel.sequence_parallel_size {size}: so many neighbouring ranks share each row, and its activations; "
            "states are divided by all ranks as without it."
        )
    if parallel.hpz_ranks > 1:
        yield (
            f"parallel.hpz_ranks {parallel.hpz_ranks}: so many neighbouring ranks hold the weights once more among "
            "them, for the backward pass."
        )
    for what, bits in (("weights", 8), ("gradients", 4)):
        if what in parallel.quantize:
            yield f"parallel.quantize {what}: they are sent in {bits} bits, rounded."
