"""What a rank uses in a real run: payload of its collectives by phase, and resident tensors by kind.

`Usage` sees every operator that its thread dispatches, those of the backward pass and torch's collectives too, so it
does not matter whether DeepSpeed or this project called them. `measure` trains a config under it.
"""

from __future__ import annotations

import gc
import math
import time
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from pretrain.options.config import Config
from pretrain.ranks.distributed import Ranks
from pretrain.ranks.start_clock import StartClock
from pretrain.training import train as train_module
from pretrain.training.guard import StopRequest
from pretrain.training.run import Run
from pretrain.zero.engine import Engine

# torch's operators, by the names of torch.distributed
COLLECTIVES = {
    "allreduce_": "all_reduce", "allreduce_coalesced_": "all_reduce", "reduce_": "reduce", "broadcast_": "broadcast",
    "allgather_": "all_gather", "_allgather_base_": "all_gather_into_tensor",
    "allgather_into_tensor_coalesced_": "all_gather_into_tensor", "allgather_coalesced_": "all_gather",
    "reduce_scatter_": "reduce_scatter", "_reduce_scatter_base_": "reduce_scatter_tensor",
    "reduce_scatter_tensor_coalesced_": "reduce_scatter_tensor", "alltoall_base_": "all_to_all_single",
    "exchange_parts": "all_to_all_single",  # an operator of ours: what it calls is not dispatched again
    "alltoall_": "all_to_all", "gather_": "gather", "scatter_": "scatter", "send": "send", "recv_": "recv",
}  # fmt: skip
KINDS = ("parameters", "masters", "moments", "gradients", "buckets", "activations", "other")
MOMENTS = ("start", "forward", "backward", "between")  # of a run, at which memory is looked at

# Where DeepSpeed's optimizers of all stages keep what has no other name
_GRADIENTS = (
    "averaged_gradients", "all_grad_tensors", "grads_in_partition", "accumulated_grads_in_cpu",
    "fp32_groups_gradients_flat", "grad_partitions_flat_buffer",
)  # fmt: skip
_BUCKETS = ("ipg_buckets", "temp_grad_buffer_for_cpu_offload", "temp_grad_buffer_for_gpu_offload")


class Usage(TorchDispatchMode):
    """Counts, while it is entered, what this thread dispatches.

    Attributes:
        phase: of the run, as whoever measures calls it.
        traffic: calls and bytes by (phase, collective). Bytes are the larger of what the rank gives and what it gets,
            so the whole tensor that is reduced, scattered or gathered; of an all-to-all, what it gives.
        peaks: most bytes that lived at the end of an operator, by phase.
    """

    def __init__(self) -> None:
        super().__init__()
        self.phase = "start"
        self.traffic: dict[tuple[str, str], list[int]] = {}
        self.peaks: Counter[str] = Counter()
        self._live: dict[int, tuple[weakref.ref, str]] = {}
        self._live_bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call the operator, and note what it did."""
        result = func(*args, **(kwargs or {}))
        if func.namespace in ("c10d", "longhaul"):
            self._count(func._schema.name.partition("::")[2], args)
        for tensor in _tensors((args, kwargs, result)):
            self._note(tensor.untyped_storage())
        self.peaks[self.phase] = max(self.peaks[self.phase], self._live_bytes)
        return result

    @contextmanager
    def during(self, phase: str) -> Iterator[None]:
        """Enclose a phase, which may lie in another."""
        outer, self.phase = self.phase, phase
        try:
            yield
        finally:
            self.phase = outer

    def settle(self, seconds: float = 0.05, at_most: int = 20) -> None:
        """Wait until other threads have let go of what they no longer need: until nothing was freed for `seconds`."""
        for _ in range(at_most):
            before = self._live_bytes
            time.sleep(seconds)
            if self._live_bytes == before:
                return

    def live(self) -> Iterator[tuple[torch.UntypedStorage, str]]:
        """Yield every storage that was met and lives, and the phase that it was met in first."""
        for reference, phase in list(self._live.values()):
            storage = reference()
            if storage is not None:
                yield storage, phase

    def _count(self, operator: str, args: Iterable[Any]) -> None:
        if operator not in COLLECTIVES:
            return  # a barrier, or no collective
        name = COLLECTIVES[operator]
        sides = [sum(tensor.nbytes for tensor in _tensors(arg)) for arg in args]
        size = sides[1] if operator == "alltoall_base_" else max(sides)
        entry = self.traffic.setdefault((self.phase, name), [0, 0])
        entry[0] += 1
        entry[1] += size

    def _note(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._live or storage.device.type == "meta":
            return
        size = storage.nbytes()

        def forget(_: object) -> None:
            del self._live[key]
            self._live_bytes -= size

        self._live[key] = weakref.ref(storage, forget), self.phase
        self._live_bytes += size


def _tensors(found: Any) -> Iterator[Tensor]:
    """Yield the tensors in nested lists, tuples and dictionaries."""
    if isinstance(found, Tensor):
        yield found
    elif isinstance(found, (list, tuple, dict)):
        for part in found.values() if isinstance(found, dict) else found:
            yield from _tensors(part)


def resident(engine: Engine, usage: Usage) -> dict[str, int]:
    """Sum the bytes of all storages that live, each once, by kind.

    `activations` are what the last forward pass left and nothing else owns: what the backward pass will need, and the
    gradients that the loss has computed already. `other` is what remains, such as rows and scalars. Python's cycles are
    collected first: DeepSpeed's hold a bucket now and then, until Python looks for them. So does a thread of gloo's
    for a moment after a collective is done.
    """
    gc.collect()
    usage.settle()
    optimizer, module = engine._optimizer, engine._engine.module
    parameters = list(module.parameters())
    masters = engine._flat_masters()
    owned: list[tuple[str, Any]] = [
        ("parameters", [(parameter, getattr(parameter, "ds_tensor", None)) for parameter in parameters]),
        ("masters", masters),
        ("moments", [list(state.values()) for state in engine._torch_optimizer.state.values()]),
        ("gradients", [(owner.grad, getattr(owner, "grad_accum", None)) for owner in (*parameters, *masters)]),
        ("gradients", [getattr(optimizer, name, None) for name in _GRADIENTS]),
        ("buckets", [_contents(getattr(optimizer, name, None)) for name in _BUCKETS]),
    ]
    kinds: dict[int, str] = {}
    for kind, holders in owned:
        for tensor in _tensors(holders):
            kinds.setdefault(tensor.untyped_storage()._cdata, kind)
    found = dict.fromkeys(KINDS, 0)
    for storage, phase in usage.live():
        kind = kinds.get(storage._cdata) or ("activations" if phase == "forward" else "other")
        found[kind] += storage.nbytes()
    return found


def _contents(holder: Any) -> Any:
    """What DeepSpeed's buckets, one for each dtype, hold."""
    return [vars(bucket) for bucket in holder.values()] if isinstance(holder, dict) else holder


def measure(config: Config, ranks: Ranks, step: int = 3) -> dict[str, Any]:
    """Train a config from its start to its end; return this rank's traffic, memory and peaks.

    Args:
        config: of more than `step` steps: the last one has nothing to prepare.
        ranks: all, which call this together.
        step: that is looked at. ZeRO-3 finds out in the first two what it may keep, and goes on like the third.
    Returns:
        `num_parameters`: of the model;
        `traffic`: calls and bytes by collective, by phase: `start`, `step`, `evaluation`, `save`;
        `memory`: bytes by kind at each of `MOMENTS`: before the first step, after the last forward and the last
        backward pass of the step, and after it; `peaks`: most bytes in the step, by phase.
    """
    usage = Usage()
    memory: dict[str, dict[str, int]] = {}
    sizes: list[int] = []
    with _watched(usage, memory, sizes, step), usage, StopRequest() as stop:
        train_module.train_on(config, ranks, stop, StartClock())
    traffic: dict[str, dict[str, list[int]]] = {phase: {} for phase in ("start", "step", "evaluation", "save")}
    for (phase, name), (calls, size) in usage.traffic.items():
        if phase != "rest":
            entry = traffic["step" if phase in ("forward", "backward", "optimizer") else phase]
            before = entry.get(name, [0, 0])
            entry[name] = [before[0] + calls, before[1] + size]
    peaks = {phase: usage.peaks[phase] for phase in ("forward", "backward", "optimizer")}
    return {"num_parameters": sum(sizes), "traffic": traffic, "memory": memory, "peaks": peaks}


@contextmanager
def _watched(usage: Usage, memory: dict[str, dict[str, int]], sizes: list[int], step: int) -> Iterator[None]:
    """Have the training loop say which phase it is in, and look at memory at its turns."""
    names = {"judge": "evaluation", "save": "save", "finish_save": "save"}
    kept = {name: getattr(train_module, name) for name in ("open_run", "train_step", *names)}

    def within(phase: str, function: Callable[..., Any], engine: Engine | None = None, moment: str = "") -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            if engine and usage.phase != "step":  # of another step, or of evaluation
                return function(*args, **kwargs)
            with usage.during(phase):
                result = function(*args, **kwargs)
            if engine:
                memory[moment] = resident(engine, usage)  # the last micro-step's stays
            return result

        return call

    def open_run(*args: Any) -> Run:
        run = kept["open_run"](*args)
        engine = run.engine
        memory["start"] = resident(engine, usage)
        sizes.extend(math.prod(shape) for shape in engine.parameter_shapes().values())
        usage.phase = "rest"
        turns = (("forward", "forward", "forward"), ("backward", "backward", "backward"),
                 ("step", "optimizer", "between"), ("end_micro_step", "optimizer", "between"))  # fmt: skip
        for name, phase, moment in turns:
            setattr(engine, name, within(phase, getattr(engine, name), engine, moment))
        return run

    def train_step(run: Run) -> bool:
        if run.progress.step + 1 != step:
            return kept["train_step"](run)
        with usage.during("step"):
            return kept["train_step"](run)

    replaced = {"open_run": open_run, "train_step": train_step}
    replaced |= {name: within(phase, kept[name]) for name, phase in names.items()}
    for name, function in replaced.items():
        setattr(train_module, name, function)
    try:
        yield
    finally:
        for name, function in kept.items():
            setattr(train_module, name, function)
