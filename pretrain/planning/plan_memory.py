"""How much memory a training step takes on each rank, and when most.

`size` is bytes of a weight. What DeepSpeed holds is what 0.19.8 does (docs/notes/0026-planner.md).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

from pretrain.optimizers.moments import is_hidden_matrix, moment_names
from pretrain.options.batch_plan import BatchPlan
from pretrain.options.config import Config, OptimSection
from pretrain.options.families import ModelShape, resolve_shape
from pretrain.planning.plan_activations import activations, offloaded_bytes
from pretrain.planning.plan_shapes import Adapters, adapters_of, all_shapes, trained_shapes
from pretrain.zero.deepspeed_settings import (
    MAX_LIVE_ELEMENTS,
    NVME_GROUP_ELEMENTS,
    PERSISTENT_ELEMENTS,
    REUSE_ELEMENTS,
    bucket_elements,
    effective_stage,
    prefetch_elements,
)

CONTEXT_BYTES = 3 * 2**29  # of CUDA, cuBLAS and NCCL, outside of what torch counts: an allowance
FRAGMENTATION = 0.05  # of what torch counts, lost between its blocks: an allowance
_FLATTENED_ELEMENTS = 500_000_000  # stages 0 and 1 reduce up to so many gradients as one copy
BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}


@dataclass(frozen=True)
class Sizes:
    """How many parameters there are of which kind.

    Args:
        total: parameters P that are trained: gradients, masters and moments are of these.
        weights: parameters of the model, with those that adapters stand beside.
        persistent: of these, what stage 3 keeps whole on every rank.
        largest: parameters of the largest tensor of the model.
        largest_trained: of the largest one that is trained.
        num_states: tensors of the optimizer for each trained parameter, on average.
    """

    total: int
    weights: int
    persistent: int
    largest: int
    largest_trained: int
    num_states: float


@dataclass(frozen=True)
class Layout(Sizes):
    """How a run's states lie on the ranks.

    Args:
        kind: `plain` is torch's optimizer (stage 0), `summed` DeepSpeed's for bf16 with fp32 sums at stage 1,
            `divided` its optimizer for stages 1 and 2, `weights` that of stage 3.
        stage: that runs.
        ranks: N.
        size: bytes of a weight in the model.
        grad_size: bytes of a gradient's sum over micro-steps and ranks.
        bucket: gradients that are reduced at once.
        offload: as configured.
    """

    kind: str
    stage: int
    ranks: int
    size: int
    grad_size: int
    bucket: int
    offload: str


@cache
def _sizes(shape: ModelShape, adapters: Adapters | None, section: str) -> Sizes:
    optim = OptimSection.model_validate_json(section)
    numels = [math.prod(size) for size in all_shapes(shape, adapters).values()]
    largest_trained = states = total = 0
    for name, size in trained_shapes(shape, adapters).items():
        numel = math.prod(size)
        by_muon = optim.name == "muon" and is_hidden_matrix(name, len(size))
        largest_trained = max(largest_trained, numel)
        states += numel * len(moment_names(optim, by_muon))
        total += numel
    persistent = sum(numel for numel in numels if numel <= PERSISTENT_ELEMENTS)
    return Sizes(total, sum(numels), persistent, max(numels), largest_trained, states / total)


def shape_of(config: Config) -> ModelShape:
    """The config's model; the tokenizer has as many ids as it says."""
    return resolve_shape(config.model, config.tokenizer.vocab_size, config.data.max_seq_len)


def layout_of(config: Config, ranks: int) -> Layout:
    """Say how DeepSpeed lays this config out on so many ranks."""
    shape, stage = shape_of(config), effective_stage(config.parallel, config.train.precision, ranks)
    precision, offload = config.train.precision, config.parallel.offload
    size = BYTES[precision]
    grad_size = 2 if config.train.grad_accum_dtype == "bf16" else 4
    sizes = _sizes(shape, adapters_of(config), config.optim.model_dump_json(by_alias=True))
    kind = "plain" if stage == 0 else "weights" if stage == 3 else "divided"
    if stage == 1 and precision == "bf16" and grad_size == 4 and offload == "none":
        kind = "summed"
    bucket = min(sizes.total, bucket_elements(ranks))
    return Layout(
        **vars(sizes), kind=kind, stage=stage, ranks=ranks, size=size, grad_size=grad_size, bucket=bucket,
        offload=offload,
    )  # fmt: skip


@cache
def _held_whole(shape: ModelShape, adapters: Adapters | None, ranks: int) -> int:
    """Elements of the trained matrices in a rank's part of all, each counted whole; of the rank that has most."""
    ends, total = [0], 0
    for size in trained_shapes(shape, adapters).values():
        total += math.prod(size) if len(size) == 2 else 0
        ends += [total] if len(size) == 2 else []
    share, first, last, most = -(-total // ranks), 0, 0, 0
    for rank in range(ranks):
        while first + 1 < len(ends) - 1 and ends[first + 1] <= rank * share:
            first += 1
        while last < len(ends) - 1 and ends[last] < (rank + 1) * share:
            last += 1
        most = max(most, ends[last] - ends[first])
    return most


def _own_gradients(at: Layout, config: Config) -> int:
    """Bytes of the sums that a rank keeps, where they are divided."""
    if at.kind == "divided" and at.grad_size == at.size:  # the gradients themselves stay, whole
        return at.grad_size * _held_whole(shape_of(config), adapters_of(config), at.ranks)
    return at.grad_size * at.total // at.ranks


def resident(config: Config, ranks: int) -> dict[str, int]:
    """Bytes that a rank's device holds when a step's last backward pass is over, by kind, without activations.

    Of the rank that holds most, where parts differ.

    Returns:
        `parameters` (the model's), `gradients`, `masters` (fp32), `moments` (fp32) and `buckets`; what is offloaded is
        not on the device.
    """
    at, share = layout_of(config, ranks), layout_of(config, ranks).total / ranks
    if at.kind == "plain":
        found = {"parameters": 4 * at.weights, "gradients": 4 * at.total, "masters": 0, "buckets": 0,
                 "moments": 4 * at.num_states * at.total}  # fmt: skip
    else:
        found = {"parameters": at.size * at.weights, "gradients": _own_gradients(at, config),
                 "masters": 4 * share, "moments": 4 * at.num_states * share, "buckets": 0}  # fmt: skip
    if at.kind == "summed":
        found["gradients"] = (4 + at.size) * at.total  # whole in fp32 all the time, and as the backward pass gave them
    if at.kind == "weights":
        found["parameters"] = at.size * (at.weights / ranks + at.persistent)
        found["buckets"] = at.grad_size * at.bucket
    if at.offload != "none":
        found |= {"masters": 0, "moments": 0, "gradients": 0}
    if at.offload == "parameters":
        found["parameters"] = at.size * at.persistent
    if at.kind == "weights" and config.parallel.hpz_ranks > 1:
        found["parameters"] += at.size * at.weights / config.parallel.hpz_ranks
    return {kind: int(value) for kind, value in found.items()}


def host_bytes(config: Config, ranks: int) -> dict[str, int]:
    """Bytes of the host's memory that a rank takes beside its process: `offload`, and `snapshot` of saving."""
    at = layout_of(config, ranks)
    states, on_disk = 4 * (1 + at.num_states) * at.total / ranks, bool(config.parallel.nvme_dir)
    offload = 0.0
    if at.offload != "none":  # on a disk, a part is in four buffers
        offload = 4 * 4 * min(NVME_GROUP_ELEMENTS, at.total / ranks) if on_disk else states
        offload += at.grad_size * at.total / ranks
        # stages 1 and 2 bring weights back through one more buffer, and gradients through one of the largest tensor's
        offload += at.size * at.largest_trained + at.size * at.total / ranks if at.stage < 3 else 0
    if at.offload == "parameters":
        offload += at.size * at.weights / ranks
    # what the host has and a save is waited for is written as it is
    is_copied = (config.checkpoint.asynchronous and not on_disk) or at.offload == "none"
    return {"offload": int(offload), "snapshot": int(states if is_copied else 0)}


def checkpoint_bytes(config: Config) -> int:
    """Bytes of a checkpoint, of all ranks together, without what describes it."""
    at = layout_of(config, 1)
    return int(4 * (1 + at.num_states) * at.total)


def disk_bytes(config: Config, ranks: int) -> int:
    """Bytes of a rank's masters and moments on a disk."""
    at = layout_of(config, ranks)
    return int(4 * (1 + at.num_states) * at.total / ranks) if config.parallel.nvme_dir else 0


@dataclass(frozen=True)
class Memory:
    """Bytes on one rank's GPU at the moment of a step when they are most.

    Args:
        when: the moment, in words.
        parts: by kind; they add up to `allocated`.
        allowance: for what torch does not count, and for what it cannot use.
        host: of each rank, by kind.
    """

    when: str
    parts: dict[str, int]
    allowance: int
    host: dict[str, int]

    @property
    def allocated(self) -> int:
        """What torch allocates at most: `max_memory_allocated`."""
        return sum(self.parts.values())

    @property
    def total(self) -> int:
        """What the GPU must have."""
        return self.allocated + self.allowance


def memory_of(config: Config, plan: BatchPlan, masked: bool = False) -> Memory:
    """Foresee the memory of a training step.

    Args:
        config: of the run.
        plan: its rows on the ranks.
        masked: as in `activations`.
    """
    at, shape = layout_of(config, plan.world_size), shape_of(config)
    states = resident(config, plan.world_size)
    mode = config.train.activation_checkpointing
    acts = activations(
        shape, plan.micro_batch_size, plan.seq_len, mode, at.size, masked or at.size == 4,
        plan.sequence_parallel_size, config.train.ffn_chunk_tokens, adapters_of(config),
    )  # fmt: skip
    gathered = _gathered(at, shape, mode != "none")
    early, sums = _held_gradients(at, _own_gradients(at, config), plan.num_micro_steps)
    bucket, copies = _reduction(at, at.bucket)
    output = 0 if shape.tie_embeddings or config.train.lora else shape.padded_vocab_size * shape.dim
    fixed = {kind: states[kind] for kind in ("parameters", "masters", "moments")} | {"gathered weights": gathered}
    filled = max(bucket, states["buckets"])
    moments = {
        "in the loss": {"gradients": early, "activations": acts.kept, "loss": acts.loss + acts.loss_peak,
                        "communication": states["buckets"]},
        # a tensor that is larger than the bucket is sent by itself
        "when the output layer's gradient is summed": {
            "gradients": early, "activations": acts.kept, "loss": acts.handed_on,
            "communication": filled + (_reduction(at, output)[1] if output > at.bucket else copies),
        },
        "in the backward pass": {"gradients": early, "activations": acts.kept + acts.block_peak,
                                 "communication": filled + copies},
        "when all gradients are summed": {"gradients": sums,
                                          "communication": _sum_copy(at, states["buckets"], bucket)},
        "in the update": {"gradients": states["gradients"], "communication": states["buckets"],
                          "optimizer": _update(at), "gathered weights": 0},
    }  # fmt: skip
    when = max(moments, key=lambda name: sum((fixed | moments[name]).values()))
    parts = {kind: int(value) for kind, value in (fixed | moments[when]).items() if value}
    allowance = CONTEXT_BYTES + int(FRAGMENTATION * sum(parts.values()))
    host = host_bytes(config, plan.world_size)
    if mode == "offload":
        host["activations"] = offloaded_bytes(shape, plan.tokens_of_micro_step, at.size)
    return Memory(when, parts, allowance, host)


def kept_elements(recomputes: bool) -> int:
    """Weights at the end of the model that stage 3 keeps from the forward pass for the backward pass.

    DeepSpeed keeps what comes again within so many elements: the modules after it, there and back, and once more where
    they are computed again.
    """
    return REUSE_ELEMENTS // (3 if recomputes else 2)


def _gathered(at: Layout, shape: ModelShape, recomputes: bool) -> int:
    """Bytes of whole weights beside a rank's share, at stage 3."""
    if at.kind != "weights":
        return 0
    ahead = min(prefetch_elements(at.weights, shape.num_layers), MAX_LIVE_ELEMENTS - kept_elements(recomputes))
    return at.size * min(at.weights - at.persistent, kept_elements(recomputes) + ahead + at.largest)


def _held_gradients(at: Layout, own: int, num_micro_steps: int) -> tuple[int, int]:
    """Bytes of gradients that are there during the forward pass of the last micro-step, and when it is over."""
    accumulates = num_micro_steps > 1
    whole = at.grad_size * at.total
    if at.kind == "plain":
        return whole * accumulates, whole
    if at.kind == "summed":
        lowly = at.size * at.total
        return 4 * at.total + lowly * accumulates, 4 * at.total + lowly
    on_gpu = 0 if at.offload != "none" else own
    if at.kind == "weights":
        return on_gpu, on_gpu
    if at.stage == 1:
        return whole * accumulates, whole + on_gpu
    return on_gpu * accumulates, on_gpu


def _reduction(at: Layout, elements: int) -> tuple[int, int]:
    """Bytes of the bucket, and of the copies of one reduction of so many elements, while the backward pass runs."""
    if at.kind in ("plain", "summed"):
        return 0, 0
    if at.kind == "weights":
        return at.grad_size * at.bucket, int(at.grad_size * elements * (1 + 1 / at.ranks))
    if at.stage == 1:
        return at.grad_size * at.bucket, 0
    return at.size * at.bucket, (at.size + (at.grad_size if at.grad_size != at.size else 0)) * elements


def _sum_copy(at: Layout, buckets: int, bucket: int) -> int:
    """Bytes of what is copied to be sent when all gradients of a step are summed."""
    if at.kind in ("plain", "summed"):
        alone = at.ranks == 1 or at.total > _FLATTENED_ELEMENTS
        return 0 if alone else 4 * at.total
    return 2 * bucket if at.stage == 1 else buckets + bucket


def _update(at: Layout) -> int:
    """Bytes that the update takes beside states and gradients."""
    share = at.total // at.ranks
    if at.offload != "none" or at.kind in ("plain", "summed"):
        return 0
    if at.stage == 2 and at.grad_size != at.size:
        return 8 * min(at.largest_trained, share)  # the norm in fp64 of one tensor at a time
    return 4 * share  # gradients as one flat fp32 tensor
