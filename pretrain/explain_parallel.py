"""What `parallel` means for a config: bytes of each rank in words and figures, and what DeepSpeed is told."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping

import torch

from pretrain.batch_plan import BatchPlan
from pretrain.config import Config
from pretrain.deepspeed_settings import deepspeed_settings, effective_stage
from pretrain.errors import EXIT_DONE
from pretrain.families import num_parameters, resolve_shape
from pretrain.model import Transformer
from pretrain.optim import moment_names, param_groups

PLACES = ("GPU", "host", "disk")
_STAGES = (
    "every rank holds weights, gradients and the optimizer's states whole",
    "each rank holds its share of the masters and moments, which it updates; weights and gradients are whole",
    "each rank holds its share of gradients, masters and moments; weights are whole",
    "each rank holds its share of everything, and gathers the weights of a block before it computes with them",
)
_OFFLOADS = {
    "none": "nothing is kept outside of the GPU",
    "optimizer": "masters and moments are kept in {where}, gradients come to the host's memory, and the CPU updates",
    "parameters": "masters and moments are kept in {where}, gradients and divided weights in the host's memory, and "
    "the CPU updates",
}
_CHOICES = ((0, "none"), (1, "none"), (2, "none"), (2, "optimizer"), (3, "none"), (3, "optimizer"), (3, "parameters"))


def state_bytes(config: Config, num_states: int, num_total: int, ranks: int) -> dict[tuple[str, str], int]:
    """Return the bytes of one rank's states, without activations, buffers and gathered weights.

    Args:
        config: whose `parallel` says where they lie.
        num_states: elements of all moments of the whole model.
        num_total: parameters of the model.
        ranks: number of ranks.
    Returns:
        by (kind, place): `weights`, `gradients` and `optimizer` (masters and moments), in one of `PLACES`.
    Source: Rajbhandari et al. 2020 (ZeRO), section 3; DeepSpeed 0.19.8 keeps no masters beside fp32 weights at stage 3,
        and sums in fp32 beside bf16 gradients at stage 1.
    """
    parallel, precision = config.parallel, config.train.precision
    stage = effective_stage(parallel, precision, ranks)
    weight, gradient = 4 if precision == "fp32" else 2, 2 if config.train.grad_accum_dtype == "bf16" else 4
    share = -(-num_total // ranks)
    weights = share * weight if stage == 3 else num_total * weight
    if stage == 0:
        return {("weights", "GPU"): weights, ("gradients", "GPU"): 4 * num_total, ("optimizer", "GPU"): 4 * num_states}
    gradients = share * gradient if stage > 1 else num_total * gradient
    if stage == 1 and precision == "bf16" and gradient == 4 and parallel.offload == "none":
        gradients += num_total * weight
    masters = 0 if stage == 3 and precision == "fp32" and parallel.offload == "none" else share
    optimizer = 4 * (masters + -(-num_states // ranks))
    is_offloaded = parallel.offload != "none"
    if stage == 3 and parallel.hpz_ranks > 1:
        weights += weight * -(-num_total // parallel.hpz_ranks)
    return {
        ("weights", "host" if parallel.offload == "parameters" else "GPU"): weights,
        ("gradients", "host" if is_offloaded else "GPU"): gradients,
        ("optimizer", "GPU" if not is_offloaded else "disk" if parallel.nvme_dir else "host"): optimizer,
    }


def explain_parallel(config: Config, ranks: int) -> str:
    """Say what a config's `parallel` means on so many ranks, beside its other values; then DeepSpeed's JSON.

    Raises:
        ConfigError: the batch does not divide.
    """
    plan = BatchPlan.of(config, ranks)
    shape = resolve_shape(config.model, config.tokenizer.vocab_size, config.data.max_seq_len)
    with torch.device("meta"):
        groups = param_groups(Transformer(shape, config.run.seed), config.optim)
    num_states = sum(
        parameter.numel() * len(moment_names(config.optim, group)) for group in groups for parameter in group["params"]
    )
    num_total = num_parameters(shape)
    parallel = config.parallel
    lines = [
        f"{num_total:,} parameters on {ranks} ranks, {config.train.precision}, {config.optim.name}. Bytes of one rank, "
        "without activations, buffers and gathered weights:",
        "",
        f"  {'zero_stage offload':<21}{'weights':>12}{'gradients':>12}{'optimizer':>12}"
        + "".join(f"{place:>12}" for place in PLACES),
    ]
    own = parallel.zero_stage, parallel.offload
    for stage, offload in sorted({*_CHOICES, own}):
        other = {"zero_stage": stage, "offload": offload}
        if (stage, offload) != own:
            other |= {"hpz_ranks": 1, "nvme_dir": parallel.nvme_dir if stage == 3 else ""}
        section = parallel.model_copy(update=other)
        found = state_bytes(config.model_copy(update={"parallel": section}), num_states, num_total, ranks)
        mark = "> " if (stage, offload) == own else "  "
        lines.append(f"{mark}{stage:<11}{offload:<10}" + "".join(f"{_short(value):>12}" for value in _columns(found)))
    lines += ["", *_words(config, ranks), "", "DeepSpeed is told:"]
    return "\n".join([*lines, json.dumps(deepspeed_settings(config, plan, num_total), indent=2)])


def show_parallel(config: Config, ranks: int) -> int:
    """Print `explain_parallel`; return the exit status."""
    print(explain_parallel(config, ranks))
    return EXIT_DONE


def _columns(found: Mapping[tuple[str, str], int]) -> Iterator[int]:
    for kind in ("weights", "gradients", "optimizer"):
        yield sum(value for (of, _), value in found.items() if of == kind)
    for place in PLACES:
        yield sum(value for (_, at), value in found.items() if at == place)


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
    yield f"parallel.zero_stage {parallel.zero_stage}{runs}: {_STAGES[stage]}."
    where = f"files in {parallel.nvme_dir}" if parallel.nvme_dir else "the host's memory"
    yield f"parallel.offload {parallel.offload}: {_OFFLOADS[parallel.offload].format(where=where)}."
    if parallel.hpz_ranks > 1:
        yield (
            f"parallel.hpz_ranks {parallel.hpz_ranks}: so many neighbouring ranks hold the weights once more among "
            "them, for the backward pass."
        )
    for what, bits in (("weights", 8), ("gradients", 4)):
        if what in parallel.quantize:
            yield f"parallel.quantize {what}: they are sent in {bits} bits, rounded."
