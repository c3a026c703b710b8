"""What a run will need and take, foreseen on a machine without a GPU, and which settings are best."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from pretrain.errors import ConfigError
from pretrain.options.batch_plan import BatchPlan
from pretrain.options.config import Config
from pretrain.options.parallel_checks import parallel_problems
from pretrain.planning.plan_memory import Memory, memory_of
from pretrain.planning.plan_time import Machine, StepTime, step_time, utilisation
from pretrain.planning.scaling_laws import SECONDS_PER_DAY
from pretrain.ranks.gpus import GIB, find_gpu
from pretrain.zero.deepspeed_settings import check_hpz, effective_stage

DEFAULT_GPU, DEFAULT_NUM_GPUS, MOST_GPUS = "H100", 8, 16_384
HOST_GIB = 1800.0  # of a node with eight GPUs and 2 TB
_CHECKPOINTING = ("none", "selective", "full", "offload")
_NOISE = 0.03  # far less than these times are off by
_SHARED_BY = (1, 2, 4, 8)  # ranks of a node that may share rows
# (stage, offload), in the order in which equally fast ones are preferred
_DIVISIONS = ((0, "none"), (1, "none"), (2, "none"), (3, "none"), (1, "optimizer"), (2, "optimizer"), (3, "optimizer"),
              (3, "parameters"))  # fmt: skip


@dataclass(frozen=True)
class Plan:
    """A config on a number of GPUs: what it takes of each and how long.

    Args:
        config: of the run.
        batch: its rows on the ranks.
        machine: the GPUs.
        memory: of one rank at its most.
        time: of a step.
    """

    config: Config
    batch: BatchPlan
    machine: Machine
    memory: Memory
    time: StepTime

    @property
    def free_bytes(self) -> int:
        """Memory of the GPU that is left; below 0 where it does not fit."""
        return self.machine.gpu.memory_bytes - self.memory.total

    @property
    def node_bytes(self) -> int:
        """Memory of a node's host that its ranks take, beside their processes."""
        return min(self.machine.gpus_per_node, self.machine.num_gpus) * sum(self.memory.host.values())

    @property
    def fits(self) -> bool:
        """Whether the GPU has enough memory, and the host."""
        return self.free_bytes >= 0 and self.node_bytes <= self.machine.host_bytes

    @property
    def tokens_per_second(self) -> float:
        """Of all GPUs."""
        return self.batch.tokens_per_step / self.time.total

    @property
    def days(self) -> float:
        """Of all steps, without evaluation, saves, failures and waiting in a queue."""
        return self.batch.num_steps * self.time.total / SECONDS_PER_DAY

    @property
    def cost(self) -> float | None:
        """Dollars for these days."""
        price = self.machine.price
        return None if price is None else price * 24 * self.days * self.machine.num_gpus

    @property
    def mfu(self) -> tuple[float, float]:
        """Model FLOPs utilisation: by the peers' convention, and with causal attention counted once."""
        return utilisation(self.config, self.batch, self.machine, self.time.total)


def make_plan(config: Config, machine: Machine) -> Plan:
    """Foresee a config as it is.

    Raises:
        ConfigError: the batch does not divide over the GPUs, or they are no whole groups.
    """
    batch = BatchPlan.of(config, machine.num_gpus)
    check_hpz(config.parallel, machine.num_gpus)
    memory = memory_of(config, batch, machine.masks_attention)
    return Plan(config, batch, machine, memory, step_time(config, batch, machine))


def not_reckoned(config: Config) -> list[str]:
    """Name the options of a config that change memory or time, and are not part of a plan."""
    parallel, found = config.parallel, []
    if config.train.compile:
        found.append("train.compile")
    if parallel.quantize:
        found.append("parallel.quantize")
    if parallel.nvme_dir:
        found.append("the time of parallel.nvme_dir")
    if parallel.hpz_ranks > 1:
        found.append("the time that parallel.hpz_ranks saves")
    return [*found, *(["data.phases"] if config.data.phases else [])]


def more_gpus_help(plan: Plan) -> bool:
    """Say whether a plan that does not fit would on many times as many GPUs, each with the same rows."""
    times = 64
    machine = replace(plan.machine, num_gpus=times * plan.machine.num_gpus)
    config = changed(plan.config, global_batch_size=times * plan.config.train.global_batch_size)
    return make_plan(config, machine).fits


def choose_machine(
    config: Config, gpu: str = DEFAULT_GPU, num_gpus: int | None = None, gpus_per_node: int = 8,
    network_gbits: float | None = None, price: float | None = None, host_gib: float = HOST_GIB,
) -> Machine:  # fmt: skip
    """Return the machine that is meant.

    Args:
        config: of the run.
        gpu: name of the GPU.
        num_gpus: ranks; None: 8, or as many more as the config needs to fit.
        gpus_per_node: at most.
        network_gbits: Gbit/s to other nodes for each GPU; None: as machines with this GPU usually have.
        price: dollars an hour for each GPU; None: the table's.
        host_gib: memory of each node's host.

    Raises:
        ConfigError: the GPU is not known, or cannot compute in the config's precision.
    """
    name, found = find_gpu(gpu)
    if config.train.precision == "bf16" and not found.has_bf16:
        raise ConfigError(
            f"--gpu: train.precision is bf16; expected fp16 or fp32 on {name}, whose matrix units have no bf16. "
            "Use train.precision=fp16."
        )
    network = found.network if network_gbits is None else network_gbits / 8
    price = found.price if price is None else price

    def machine(number: int) -> Machine:
        return Machine(name, found, number, gpus_per_node, network, price, host_gib * GIB)

    if num_gpus is not None:
        return machine(num_gpus)
    number = DEFAULT_NUM_GPUS
    while number <= MOST_GPUS and _divides(config, number):
        if make_plan(config, machine(number)).fits:
            return machine(number)
        number *= 2
    return machine(DEFAULT_NUM_GPUS)


def _divides(config: Config, num_gpus: int) -> bool:
    together = config.train.micro_batch_size * num_gpus
    return config.train.global_batch_size * config.parallel.sequence_parallel_size % together == 0


_PARALLEL = ("zero_stage", "offload", "sequence_parallel_size")


def changed(config: Config, **options: Any) -> Config:
    """Return the config with other values of options of `parallel` and `train`, by their names."""
    sections: dict[str, dict[str, Any]] = {"parallel": {}, "train": {}}
    for name, value in options.items():
        sections["parallel" if name in _PARALLEL else "train"][name] = value
    return config.model_copy(
        update={name: getattr(config, name).model_copy(update=update) for name, update in sections.items()}
    )


def overrides(plan: Plan, config: Config) -> list[str]:
    """Return what to put on the command line to get from a config to a plan's."""
    names = ("parallel.zero_stage", "parallel.offload", "parallel.sequence_parallel_size", "train.micro_batch_size",
             "train.activation_checkpointing")  # fmt: skip
    found = []
    for name in names:
        section, _, key = name.partition(".")
        value = getattr(getattr(plan.config, section), key)
        if value != getattr(getattr(config, section), key):
            found.append(f"{name}={value}")
    return found


@dataclass(frozen=True)
class Search:
    """What a search found.

    Args:
        best: of each way to divide and to compute again, the fastest batch that fits; the fastest way first, but the
            config as it is before it where it is as fast within 3%.
        too_large: of those ways where nothing fits, the smallest batch, the least that the GPU lacks first.
    """

    best: list[Plan]
    too_large: list[Plan]


def search(config: Config, machine: Machine) -> Search:
    """Try ZeRO stages, offload, checkpointing, ranks that share rows and micro-batches, with the same global batch.

    Raises:
        ConfigError: no micro-batch divides the batch over the GPUs.
    """
    best, too_large = [], []
    for stage, offload in _divisions(config, machine.num_gpus):
        for mode in _CHECKPOINTING:
            way = changed(config, zero_stage=stage, offload=offload, activation_checkpointing=mode)
            plans = [make_plan(one, machine) for one in _batches(way, machine)]
            fitting = [plan for plan in plans if plan.fits]
            if fitting:
                best.append(min(fitting, key=lambda plan: (plan.time.total, plan.memory.total)))
            elif plans:
                too_large.append(max(plans, key=lambda plan: plan.free_bytes))
    if not best and not too_large:
        BatchPlan.of(config, machine.num_gpus)  # says what does divide
    configured = make_plan(config, machine) if best and _divides(config, machine.num_gpus) else None
    return Search(
        _in_order(best, configured if configured and configured.fits else None),
        sorted(too_large, key=lambda plan: -plan.free_bytes),
    )


def _in_order(plans: list[Plan], configured: Plan | None) -> list[Plan]:
    """Order plans by their speed; but a config that fits and is as fast as the best, about, comes first as it is."""
    ordered = sorted(plans, key=lambda plan: plan.time.total)
    if configured is None or configured.time.total > (1 + _NOISE) * ordered[0].time.total:
        return ordered
    return [configured, *(plan for plan in ordered if _way(plan) != _way(configured))]


def _way(plan: Plan) -> tuple[int, str, str]:
    parallel = plan.config.parallel
    return parallel.zero_stage, parallel.offload, plan.config.train.activation_checkpointing


def _batches(config: Config, machine: Machine) -> Iterator[Config]:
    """Yield a config with each number of ranks of a node that may share rows, and micro-batches that double."""
    batch, asked = config.train.global_batch_size, config.parallel.sequence_parallel_size
    for shared_by in sorted({*_SHARED_BY, asked}):
        readers, rest = divmod(machine.num_gpus, shared_by)
        shared = changed(config, sequence_parallel_size=shared_by)
        if rest or batch % readers or (shared_by > machine.gpus_per_node and shared_by != asked):
            continue
        if any(parallel_problems(shared)):
            continue
        for size in _micro_batches(batch // readers, config.train.micro_batch_size):
            yield changed(shared, micro_batch_size=size)


def _divisions(config: Config, ranks: int) -> Iterator[tuple[int, str]]:
    """Yield ways to divide that are allowed and differ from each other."""
    asked = config.parallel
    seen: set[tuple[int, str]] = set()
    for stage, offload in ((asked.zero_stage, asked.offload), *_DIVISIONS):
        parallel = asked.model_copy(update={"zero_stage": stage, "offload": offload})
        runs_as = effective_stage(parallel, config.train.precision, ranks), offload
        if runs_as not in seen and (not seen or runs_as[0] == stage):
            seen.add(runs_as)
            yield stage, offload


def _micro_batches(rows: int, configured: int) -> list[int]:
    """Return micro-batches that divide a rank's rows, the smallest first: those that double, about."""
    chosen: list[int] = []
    for size in (size for size in range(1, rows + 1) if rows % size == 0):
        if not chosen or size >= 2 * chosen[-1] or size == configured:
            chosen.append(size)
    return chosen
