"""DeepSpeed, and all that must be known about it: the only file that imports it.

`Engine` runs forward, backward and the update at every ZeRO stage, and shows the fp32 master weights and moments
that this rank owns as `Fragment`s, named by parameter, which is what checkpoints are made of.

Facts of DeepSpeed 0.19.8 that this file respects (each measured; `docs/notes/0001-deepspeed.md`):
- `backward` divides by the accumulation steps and the gradients are averaged over ranks.
- At stage 0 in fp32 `step` neither reports a norm nor skips a non-finite update: norm, clip and skip are done here.
- Stage 0 offers no fp32 accumulation of bf16 or fp16 gradients: those run as stage 1.
- The learning rate is set at every step, since a restored optimizer would silently bring its own.
"""

from __future__ import annotations

import importlib
import logging
import math
import os
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from pretrain.optimizers.matrix_exchange import Held
from pretrain.optimizers.moments import moment_names
from pretrain.optimizers.muon import Muon
from pretrain.optimizers.optim import create_state, make_optimizer, param_groups
from pretrain.options.batch_plan import BatchPlan
from pretrain.options.config import Config
from pretrain.options.run_options import ParallelSection
from pretrain.ranks.communication import CommunicationTimer
from pretrain.ranks.distributed import Ranks, choose_device, export_rank_variables, join_process_group
from pretrain.ranks.profiling import PhaseClock
from pretrain.ranks.sequence_parallel import SequenceGroup, join_sequence_group
from pretrain.ranks.start_clock import StartClock
from pretrain.zero import loss_scale
from pretrain.zero.deepspeed_settings import check_machine, deepspeed_settings, effective_stage
from pretrain.zero.gradient_norms import total_norm
from pretrain.zero.initial_weights import InitialWeights
from pretrain.zero.swapped_states import (
    fill_weights,
    gradient_parts,
    groups_in_memory,
    locate,
    on_disk,
    prepare_folder,
    refill_weights,
    remove_states,
)

MASTER = "master"
_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
_COMMUNICATION = CommunicationTimer()  # one a process, as DeepSpeed's backend is


@dataclass
class Fragment:
    """The part of one parameter that this rank owns: flat elements [start, start + length).

    `tensors` maps `master` and each moment's name to a flat fp32 view into the live optimizer. `weight` are the same
    elements of the model's own weights, None where the masters themselves are these.
    """

    name: str
    shape: tuple[int, ...]
    start: int
    length: int
    tensors: dict[str, torch.Tensor]
    weight: torch.Tensor | None = None


@dataclass(frozen=True)
class StepResult:
    """What an update did: whether the weights moved, and the gradient norm before clipping.

    The norm is a scalar on the device, which has not been waited for; NaN where a gradient was not finite.
    """

    grad_norm: torch.Tensor
    applied: bool


def init_distributed(timeout_seconds: int, clock: StartClock | None = None) -> Ranks:
    """Join the process group (NCCL on GPUs, gloo on CPUs) and return this rank's place in it."""
    clock = clock or StartClock()
    clock.begin("deepspeed")
    variables = export_rank_variables()
    deepspeed = import_deepspeed()  # seconds; only once the launcher's variables are known to be right
    clock.begin("process group")
    device = choose_device(int(variables["LOCAL_RANK"]), os.environ)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        os.environ["LOCAL_RANK"] = str(device.index)  # DeepSpeed takes it for the GPU's number
    if not dist.is_initialized():
        join_process_group(variables, device, timeout_seconds)
        deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False)  # takes the group that there is
    ranks = Ranks(int(variables["RANK"]), int(variables["LOCAL_RANK"]), int(variables["WORLD_SIZE"]), device)
    _COMMUNICATION.heartbeat = ranks.heartbeat
    _COMMUNICATION.watch(deepspeed.comm.comm.cdb)
    return ranks


def import_deepspeed() -> ModuleType:
    """Import DeepSpeed, quietly, and have it compile nothing that training does not need."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else DeepSpeed warns that it found no GPU
    import deepspeed

    _quieten(deepspeed)
    _import_muon_without_compiler()
    # DeepSpeed would compile a shared-memory operator for minutes at the first start on a CPU and leak 66 MiB of
    # /dev/shm a rank with it; training never calls it.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


def sequence_group(section: ParallelSection, ranks: Ranks) -> SequenceGroup:
    """Join the ranks that share rows; their exchanges are timed as DeepSpeed's own collectives are."""
    from deepspeed.comm import comm

    size, timeout_seconds = section.sequence_parallel_size, section.start_timeout_seconds
    return join_sequence_group(size, ranks.rank, ranks.world_size, timeout_seconds, comm.cdb.all_to_all_single)


def _quieten(deepspeed: ModuleType) -> None:
    """Silence what DeepSpeed prints at every start for its own developers, and torch's notes to DeepSpeed's."""
    import deepspeed.runtime.bf16_optimizer as bf16_optimizer

    deepspeed.utils.logging.logger.setLevel(logging.WARNING)
    bf16_optimizer.see_memory_usage = lambda *_, **__: None  # also collects garbage and resets the memory peak
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")


def _trust(optimizer: type) -> None:
    """Keep DeepSpeed from warning of an optimizer that is not on its list; that each is right is tested here."""
    from deepspeed.runtime.zero.utils import ZERO_SUPPORTED_OPTIMIZERS

    if optimizer not in ZERO_SUPPORTED_OPTIMIZERS:
        ZERO_SUPPORTED_OPTIMIZERS.append(optimizer)


def _import_muon_without_compiler() -> None:
    """Import DeepSpeed's Muon, which never runs here, without torch's compiler: 1.2 s a start (docs/notes/0010)."""
    original = torch.compile
    torch.compile = lambda function=None, **_: function or (lambda inner: inner)  # type: ignore[assignment]
    try:
        importlib.import_module("deepspeed.runtime.zero.muon.original_muon")
    finally:
        torch.compile = original


class Engine:
    """A model under DeepSpeed; fragments of one with a `disk` are read from there, and good until the next update."""

    def __init__(self, model: nn.Module, config: Config, plan: BatchPlan, ranks: Ranks) -> None:
        """Wrap `model`, which is moved to this rank's device, cast and divided as the config says.

        What of it is on the meta device is drawn here, and at stage 3 divided parameter by parameter.

        Raises:
            ConfigError: this machine lacks what is asked for; an entry of `optim.groups` that applies to nothing.
        """
        import deepspeed

        check_machine(config, ranks.world_size, ranks.device.type, deepspeed.ops.op_builder)
        self.disk = prepare_folder(config, deepspeed.ops.op_builder, ranks)
        self.ranks = ranks
        self.stage = effective_stage(config.parallel, config.train.precision, plan.world_size)
        self.optim = config.optim
        self.precision = config.train.precision
        self._names = {id(parameter): name for name, parameter in model.named_parameters()}
        self._shapes, self.untrained_shapes = (
            {name: tuple(one.shape) for name, one in model.named_parameters() if one.requires_grad is is_trained}
            for is_trained in (True, False)
        )
        numbers = (sum(map(math.prod, shapes.values())) for shapes in (self._shapes, self.untrained_shapes))
        self.settings = settings = deepspeed_settings(config, plan, *numbers)
        groups = param_groups(model, config.optim)
        self.states = {
            name: (MASTER, *moment_names(config.optim, group["muon"])) for group in groups for name in group["names"]
        }
        self.frozen = [name for group in groups if group["lr_ratio"] == 0 for name in group["names"]]
        weights = InitialWeights(model, _DTYPES[self.precision], ranks)
        if self.stage == 3:
            neighbours = deepspeed.utils.groups._get_zero_param_intra_parallel_group()  # hpZ's, from the second on
            deepspeed.zero.Init(weights, config_dict_or_path=settings, zero_param_parallel_group=neighbours)
        else:
            list(weights.parameters())
        optimizer = make_optimizer(groups, config.optim)
        _trust(type(optimizer))
        self._engine, self._optimizer, _, _ = deepspeed.initialize(
            model=model, optimizer=optimizer, config=settings, dist_init_required=False
        )
        if plan.world_size == 1 and self.stage < 2 and not hasattr(self._optimizer, "reduce_gradients"):
            self._engine.enable_backward_allreduce = False  # it would copy all gradients to and from one more buffer
        self._torch_optimizer = optimizer
        named = list(self._engine.module.named_parameters())
        self._parameters = [(name, parameter) for name, parameter in named if name in self._shapes]
        self._untrained = [(name, parameter) for name, parameter in named if name not in self._shapes]
        self._num_updates = 0
        if isinstance(optimizer, Muon):
            optimizer.place(self._flat_masters(), ranks.gather(self._held()), ranks.rank, ranks.device)

    def time_communication(self, clock: PhaseClock | None) -> None:
        """Count what is waited for collectives from now on as the phase `communication` of this clock."""
        _COMMUNICATION.clock = clock

    def forward(self, *args: Any) -> torch.Tensor:
        """Run the model."""
        return self._engine(*args)

    def train(self, mode: bool = True) -> None:
        """Switch the model between training and evaluation."""
        self._engine.train(mode)

    def backward(self, loss: torch.Tensor) -> None:
        """Add the gradients of one micro-step; DeepSpeed divides `loss` by the micro-steps of a step."""
        self._engine.backward(loss)

    def end_micro_step(self) -> None:
        """Tell DeepSpeed that a micro-step that is not the last one of its step is over."""
        self._engine.step()

    def step(self, lr: float) -> StepResult:
        """Do the update after the step's last micro-step; a non-finite gradient on any rank skips it on all."""
        for group in self._torch_optimizer.param_groups:
            group["lr"] = lr * group["lr_ratio"]
        result = self._step_plain() if self.stage == 0 else self._step_divided()
        self._num_updates += result.applied
        return result

    def _step_divided(self) -> StepResult:
        with loss_scale.exhaustion_explained():
            self._engine.step()
        applied = self._engine.was_step_applied()
        norm = self._engine.get_global_grad_norm() if applied else math.nan
        return StepResult(torch.as_tensor(norm, dtype=torch.float32, device=self.ranks.device), applied)

    def _step_plain(self) -> StepResult:
        parameters = [parameter for _, parameter in self._parameters]
        norm = total_norm([p.grad for p in parameters if p.grad is not None])  # averaged already: alike on all ranks
        applied = bool(torch.isfinite(norm))
        if not applied:
            for parameter in parameters:
                parameter.grad = None  # torch's optimizers leave parameters without gradient alone
        elif self.optim.clip_norm > 0:
            torch.nn.utils.clip_grads_with_norm_(parameters, self.optim.clip_norm, norm)
        self._engine.step()
        return StepResult(norm if applied else torch.full_like(norm, math.nan), applied)

    def gradients(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield this rank's parts of a step's gradients by parameter, as `swapped_states.gradient_parts`."""
        return gradient_parts(self._optimizer, self._parameters, self.stage, self.ranks.is_first)

    def fragments(self) -> Iterator[Fragment]:
        """Yield what this rank owns, in the model's order; every element belongs to exactly one rank."""
        self._create_state()
        yield from self._fragments_of(None)

    def _fragments_of(self, wanted: torch.Tensor | None) -> Iterator[Fragment]:
        """Yield the fragments of one flat master, or all."""
        for index, (name, parameter) in enumerate(self._parameters):
            located = self._locate(index, parameter)
            if located is None or (wanted is not None and located[0] is not wanted):
                continue
            flat, offset, start, length = located
            tensors = {
                state: tensor.view(-1).narrow(0, offset, length) for state, tensor in self._state_of(name, flat).items()
            }
            weight = None
            if self.stage == 3:
                weight = parameter.ds_tensor.data.view(-1)[:length]
            elif self.stage > 0:
                weight = parameter.data.view(-1)[start : start + length]
            yield Fragment(name, self._shapes[name], start, length, tensors, weight)

    def _create_state(self) -> None:
        """Create the optimizer's state before its first update, so that it can be saved or filled."""
        if self._num_updates:
            return  # what is missing now was lost, and must not be saved as zeros
        groups = self._torch_optimizer.param_groups
        if self.stage == 0:
            tensors = [(parameter, group) for group in groups for parameter in group["params"]]
        elif self.stage == 3:  # a group may be cut into several flat tensors
            flats, of_flat = self._flat_masters(), self._optimizer.sub_group_to_group_id
            for number in groups_in_memory(self._optimizer):
                create_state(self._torch_optimizer, [(flats[number], groups[of_flat[number]])], self.optim)
            return
        else:
            tensors = list(zip(self._flat_masters(), groups, strict=True))
        create_state(self._torch_optimizer, tensors, self.optim)

    def _state_of(self, name: str, flat: torch.Tensor) -> dict[str, torch.Tensor]:
        """The tensors of a flat master that a parameter's states lie in; a missing one is left for the save to find."""
        moments = self._torch_optimizer.state[flat]
        found = {MASTER: flat.data} | {state: moments[state] for state in self.states[name] if state in moments}
        return on_disk(self._optimizer, flat, found) if self.disk else found

    def _held(self) -> list[Held]:
        """Where this rank's flat masters hold the parameters, in whole or in part."""
        number = {id(flat): index for index, flat in enumerate(self._flat_masters())}
        held = []
        for index, (name, parameter) in enumerate(self._parameters):
            located = (parameter, 0, 0, parameter.numel()) if self.stage == 0 else self._locate(index, parameter)
            if located is not None:
                flat, offset, start, length = located
                held.append(Held(name, start, length, number[id(flat)], offset))
        return held

    def _flat_masters(self) -> list[torch.Tensor]:
        if self.stage == 0:
            return [parameter for _, parameter in self._parameters]
        if self.stage == 3:
            return list(self._optimizer.fp32_partitioned_groups_flat)
        if hasattr(self._optimizer, "single_partition_of_fp32_groups"):
            return list(self._optimizer.single_partition_of_fp32_groups)
        return list(self._optimizer.fp32_groups_flat_partition)  # BF16_Optimizer: bf16 at stage 1

    def _locate(self, index: int, parameter: torch.Tensor) -> tuple[torch.Tensor, int, int, int] | None:
        """Return (flat master, offset in it, first element of the parameter, number of elements), or None."""
        if self.stage == 0:  # all ranks hold all: divide the saving between them
            owner = index % self.ranks.world_size
            return (parameter, 0, 0, parameter.numel()) if owner == self.ranks.rank else None
        shape = self._shapes[self._names[id(parameter)]]
        return locate(self._optimizer, parameter, math.prod(shape), self.ranks.rank, self._flat_masters())

    def replicated_fragments(self) -> Iterator[Fragment]:
        """Yield what this rank must be given when a checkpoint is loaded: its own part, or all at stage 0."""
        self._create_state()
        if self.stage == 3:
            for number in groups_in_memory(self._optimizer):
                yield from self._fragments_of(self._flat_masters()[number])
            return
        if self.stage > 0:
            yield from self._fragments_of(None)
            return
        for name, parameter in self._parameters:
            tensors = {state: tensor.view(-1) for state, tensor in self._state_of(name, parameter).items()}
            yield Fragment(name, self._shapes[name], 0, parameter.numel(), tensors)

    def replicas(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield the names and tensors of what all ranks hold alike, bit for bit, between two updates.

        At stage 0 everything that a checkpoint holds, at 1 and 2 the weights, at 3 those that are too small to divide.
        """
        if self.stage == 0:
            for fragment in self.replicated_fragments():
                for state, tensor in fragment.tensors.items():
                    yield fragment.name if state == MASTER else f"{fragment.name}/{state}", tensor
            return
        for name, parameter in self._parameters + self._untrained:
            if self.stage < 3 or parameter.ds_persist:
                yield name, parameter.data

    def fill_untrained(self, read: Callable[[str, int, int], torch.Tensor]) -> None:
        """Fill the weights that are not trained, of which there is no master, as `swapped_states.fill_weights`."""
        fill_weights(self._optimizer if self.stage == 3 else None, self._untrained, self.untrained_shapes, read,
                     self.ranks)  # fmt: skip

    def parameter_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every parameter that is trained, undivided."""
        return dict(self._shapes)

    def optimizer_step(self) -> int:
        """Updates that the optimizer has done: skipped steps are not among them."""
        return self._num_updates

    def finish_loading(self, optimizer_step: int) -> None:
        """After the fragments were filled: set the optimizer's own step and rebuild the weights from the masters."""
        self._num_updates = optimizer_step
        for flat in self._flat_masters():
            state = self._torch_optimizer.state[flat]
            if "step" in state:  # Adam and its kin count
                state["step"].fill_(optimizer_step)
        if self.stage in (1, 2):
            self._optimizer.update_lp_params()
        elif self.stage == 3:
            refill_weights(self._optimizer)

    def loss_scale_state(self) -> dict | None:
        """State of fp16's dynamic loss scale; None in other precisions."""
        return loss_scale.read_state(self._optimizer) if self.precision == "fp16" else None

    def load_loss_scale_state(self, state: dict | None) -> None:
        """Restore what `loss_scale_state` returned."""
        if self.precision == "fp16" and state is not None:
            loss_scale.write_state(self._optimizer, state)

    def close(self) -> None:
        """Remove DeepSpeed's hooks and buffers; the model can be wrapped again afterwards."""
        self._engine.destroy()
        if self.disk:
            remove_states(self.disk, self.ranks.rank)
