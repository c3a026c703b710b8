"""What ranks send each other in a training step, by DeepSpeed 0.19.8 and by ourselves.

Bytes are the payload of a collective on one rank: of the tensor for `all_reduce`, of the gathered one for
`all_gather_into_tensor`, of the one before it is scattered for `reduce_scatter_tensor`, of what this rank gives for
`all_to_all_single`. On the wire an all-reduce takes 2 (N - 1) / N of it, the others (N - 1) / N.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

from pretrain.optimizers.matrix_owners import Matrix, assign_owners
from pretrain.options.batch_plan import BatchPlan
from pretrain.options.config import Config
from pretrain.options.families import ModelShape
from pretrain.planning.plan_memory import Layout, kept_elements, layout_of, shape_of
from pretrain.planning.plan_shapes import adapters_of, all_shapes, hidden_matrices, modules_in_order, trained_shapes
from pretrain.zero.deepspeed_settings import MAX_LIVE_ELEMENTS, PERSISTENT_ELEMENTS, REUSE_ELEMENTS, prefetch_elements

METRICS_BYTES = 3 * 8  # objective, cross-entropy and gradient norm of a step, fp64
ROWS_BYTES = 6 * 8  # what ranks tell each other about the next step's rows


@dataclass(frozen=True)
class Collective:
    """Collectives of one kind in a step.

    Args:
        name: torch.distributed's.
        num_bytes: payload of all of them.
        count: how many there are, about.
        when: `passes` while forward and backward pass run, `gradients` when the last one is over, `update` after it;
            `waited` while they run, which wait for it.
        sharers: that take part, where not all ranks do.
    """

    name: str
    num_bytes: float
    count: int
    when: str
    sharers: int | None = None

    def wire_bytes(self, ranks: int) -> float:
        """Bytes that each rank of a run of so many sends."""
        ranks = self.sharers or ranks
        return self.num_bytes * (2 if self.name == "all_reduce" else 1) * (ranks - 1) / ranks


def collectives(config: Config, plan: BatchPlan, on_cpu: bool = False) -> list[Collective]:
    """Return the collectives of a step, from the third one on, without evaluation, saving and checks of replicas.

    Args:
        config: of the run.
        plan: its rows on the ranks.
        on_cpu: Muon's matrices travel in fp32.
    """
    ranks = plan.world_size
    if ranks == 1:
        return []
    at, trained = layout_of(config, ranks), trained_shapes(shape_of(config), adapters_of(config))
    sizes = [math.prod(size) for size in trained.values()]
    groups = groups_of(config)
    found = [Collective("all_reduce", METRICS_BYTES + ROWS_BYTES, 2, "update")]
    if at.kind == "weights":
        found += _divided_weights(config, plan, at, sizes)
        found.append(Collective("all_reduce", 8 * groups, groups, "update"))
    else:
        whole = sum(sizes)
        repeats = plan.num_micro_steps if at.stage == 2 else 1
        when = "passes" if at.stage == 2 else "gradients"
        count = repeats * max(1, -(-whole // at.bucket)) if at.kind == "divided" else max(1, whole // 500_000_000)
        found.append(Collective("all_reduce", at.grad_size * whole * repeats, count, when))
        if at.kind == "divided":
            found.append(Collective("all_reduce", 4 * groups + (at.size == 2), groups + (at.size == 2), "update"))
        if at.stage > 0:
            found.append(Collective("all_gather_into_tensor", at.size * whole, groups, "update"))
    if plan.sequence_parallel_size > 1:
        found.append(_exchanges(config, plan, at.size))
    if config.optim.name == "muon":
        found.append(_muon(config, at, 4 if on_cpu else 2))
    return found


def communication(config: Config, ranks: int, on_cpu: bool = False) -> dict[str, float]:
    """Return the payload of a rank's collectives in a training step, in bytes by torch.distributed's name.

    Args: as of `collectives`.

    Raises:
        ConfigError: the batch does not divide over the ranks.
    """
    totals: dict[str, float] = {}
    for one in collectives(config, BatchPlan.of(config, ranks), on_cpu):
        totals[one.name] = totals.get(one.name, 0.0) + one.num_bytes
    return totals


def _exchanges(config: Config, plan: BatchPlan, size: int) -> Collective:
    """What ranks that share rows send each other around attention: queries, keys and values there, its result back."""
    shape, sharers = shape_of(config), plan.sequence_parallel_size
    heads = 2 * shape.num_heads + 2 * max(shape.num_kv_heads, sharers)
    passes = 3 if config.train.activation_checkpointing in ("full", "offload") else 2  # backward is the way back
    count = 2 * passes * shape.num_layers * plan.num_micro_steps
    elements = heads * shape.head_dim * plan.tokens_of_micro_step * count / 2
    return Collective("all_to_all_single", size * elements, count, "waited", sharers)


def _divided_weights(config: Config, plan: BatchPlan, at: Layout, sizes: list[int]) -> list[Collective]:
    """Stage 3: weights are gathered for each pass, gradients scattered after each backward pass."""
    ranks, steps = plan.world_size, plan.num_micro_steps
    weights = gathered_weights(config, ranks)
    every = [math.prod(size) for size in all_shapes(shape_of(config), adapters_of(config)).values()]
    persistent = sum(_padded(numel, ranks) for numel in every if numel <= PERSISTENT_ELEMENTS)
    gradients = sum(_padded(numel, ranks) for numel in sizes)
    ahead = min(prefetch_elements(at.weights, config.model.num_layers), MAX_LIVE_ELEMENTS)
    return [
        Collective("all_gather_into_tensor", at.size * weights * steps, steps * -(-weights // ahead), "passes"),
        Collective("all_gather_into_tensor", at.size * persistent, groups_of(config), "update"),
        Collective("reduce_scatter_tensor", at.grad_size * gradients * steps, steps * -(-at.total // at.bucket),
                   "passes"),
    ]  # fmt: skip


def gathered_weights(config: Config, ranks: int) -> int:
    """Count the weights that stage 3 brings together in one micro-step, on each of so many ranks."""
    recomputes = config.train.activation_checkpointing != "none"
    adapters = adapters_of(config)
    modules = modules_in_order(shape_of(config), adapters)
    order = [sum(_padded(numel, ranks) for numel in module if numel > PERSISTENT_ELEMENTS)
             for module in modules.values()]  # fmt: skip
    first = 0  # module that the backward pass comes to: nothing before the first adapter has gradients
    if adapters is not None:
        with_adapters = {name.rpartition(".")[0] for name in trained_shapes(shape_of(config), adapters)}
        first = next(number for number, name in enumerate(modules) if name in with_adapters)
    return gathered_elements(order, kept_elements(recomputes), shape_of(config).tie_embeddings, first)


def _padded(numel: int, ranks: int) -> int:
    """Elements of a tensor that is divided into equal parts."""
    return -(-numel // ranks) * ranks


def groups_of(config: Config) -> int:
    """Groups of parameters that the update handles one after the other, where `optim.groups` names none."""
    if config.train.lora is not None:
        return 1  # adapters are all matrices
    return 1 + (config.optim.weight_decay > 0) + (config.optim.name == "muon")


def gathered_elements(modules: list[int], kept: int, is_tied: bool, first: int = 0) -> int:
    """Count the weights that stage 3 gathers in one micro-step.

    All in the forward pass, and in the backward pass again those after which more than `kept` came.

    Args:
        modules: weights that are divided of each module, in the order of the forward pass.
        kept: elements at the end of the model that stay gathered.
        is_tied: the last module holds the first one's weights.
        first: module that the backward pass ends with.
    """
    total, after, again = sum(modules), 0, 0
    for number, numel in reversed(list(enumerate(modules))):
        again += numel if after >= kept and number >= first else 0
        after += numel
    if is_tied and total < REUSE_ELEMENTS:
        total -= modules[-1]  # the embedding's are still there
        again -= modules[0] if after - modules[0] >= kept else 0
    return total + again


def _muon(config: Config, at: Layout, size: int) -> Collective:
    """Matrices that are brought together to be orthogonalised, and their updates back; an average of all ranks."""
    travels = _travelling_elements(shape_of(config), at.stage, at.ranks)
    return Collective("all_to_all_single", size * travels / at.ranks, 2, "update")


@cache
def _travelling_elements(shape: ModelShape, stage: int, ranks: int) -> int:
    """Elements of matrices that all ranks together send each other: to whoever works on them, and back."""
    weights = hidden_matrices(shape)
    numels = [sum(rows * cols for rows, cols in parts) for parts in weights]
    if stage == 0:
        return sum(numels) * (ranks - 1)  # every rank has the momentum; the updates go to all
    matrices, held, begins = [], [], 0
    flat = -(-sum(numels) // ranks)  # of all together, that a rank has at stages 1 and 2
    for number, (parts, numel) in enumerate(zip(weights, numels, strict=True)):
        share, place = (-(-numel // ranks), 0) if stage == 3 else (flat, begins)
        for rows, cols in parts:
            matrices.append(Matrix(str(number), place, rows, cols))
            end = place + rows * cols
            held.append({rank: min(end, (rank + 1) * share) - max(place, rank * share)
                         for rank in range(place // share, (end - 1) // share + 1)})  # fmt: skip
            place = end
        begins += numel
    owners = assign_owners(matrices, [set(on) for on in held], ranks)
    return sum(2 * (sum(on.values()) - on.get(owner, 0)) for on, owner in zip(held, owners, strict=True))
