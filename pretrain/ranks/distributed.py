"""Who this process is among the ranks, and the few collectives that training needs.

Rank variables come from torchrun or the `deepspeed` launcher (RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR,
MASTER_PORT), from `srun` (SLURM_PROCID and its kin), or there is one process.
"""

from __future__ import annotations

import os
import re
import resource
import socket
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import timedelta
from functools import cache
from typing import Any, Protocol, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from pretrain.errors import ConfigError, LonghaulError, PeerError, TrainingError
from pretrain.ranks.heartbeat import Heartbeat
from pretrain.ranks.network import GLOO, NCCL, find_route, interface_variables

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """This process among `world_size`: its global and node-local rank, its device, and what it is doing."""

    rank: int
    local_rank: int
    world_size: int
    device: torch.device
    heartbeat: Heartbeat = field(default_factory=Heartbeat, compare=False)

    @property
    def is_first(self) -> bool:
        """Whether this is rank 0, which writes what all ranks share."""
        return self.rank == 0

    def sum(self, values: Sequence[float]) -> list[float]:
        """Return the sum over ranks of each value, computed in fp64 and equal on every rank."""
        return self.start_sum(values).result()

    def start_sum(self, values: Sequence[float] | Tensor) -> PendingSum:
        """Begin `sum`; what the device was given to do before this goes on, and what comes after need not wait.

        Args:
            values: numbers, or a tensor `[N]` on this rank's device, which may still have to be computed and does not
                change after that.
        """
        return (_SumOnGPU if self.device.type == "cuda" else _SumOnCPU)(values, self)

    def barrier(self) -> None:
        """Wait for all ranks."""
        with self.heartbeat.waiting():
            dist.barrier()

    def agree(self, action: Callable[[], T]) -> T:
        """Run `action` on every rank; if it fails on any, raise that error on all.

        Start-up goes through this, so that one rank's problem is everybody's message and nobody waits for ever.

        Raises:
            LonghaulError: the first rank's error.
        """
        result, problem = None, None
        try:
            result = action()
        except LonghaulError as error:
            problem = error
        problems = [(rank, found) for rank, found in enumerate(self.gather(problem)) if found is not None]
        if problems:
            rank, first = problems[0]
            agreed = type(first)(str(first) if rank == 0 else f"rank {rank}: {first}")
            agreed.agreed = True
            raise agreed
        return result  # type: ignore[return-value]

    def gather(self, value: Any) -> list[Any]:
        """Return every rank's value, on every rank, in rank order."""
        values: list[Any] = [None] * self.world_size
        with self.heartbeat.waiting():
            dist.all_gather_object(values, value)
        return values

    def gather_tensor(self, tensor: Tensor) -> Tensor:
        """Return every rank's tensor of one shape and dtype, on this rank's device: `[world_size, *shape]`."""
        tensors = [torch.empty_like(tensor) for _ in range(self.world_size)]
        dist.all_gather(tensors, tensor)
        return torch.stack(tensors)

    def take_first(self, tensor: Tensor) -> Tensor:
        """Overwrite a tensor on this rank's device by rank 0's, and return it."""
        return self.take_from(0, tensor)

    def take_from(self, source: int, tensor: Tensor) -> Tensor:
        """Overwrite a tensor on this rank's device by that of rank `source`, and return it."""
        if self.world_size > 1:
            with self.heartbeat.waiting():
                dist.broadcast(tensor, src=source)
        return tensor

    def from_first(self, value: Any) -> Any:
        """Return rank 0's value on every rank."""
        values = [value]
        with self.heartbeat.waiting():
            dist.broadcast_object_list(values, src=0)
        return values[0]


class PendingSum(Protocol):
    """A sum over ranks that is under way."""

    def is_ready(self) -> bool:
        """Whether `result` would not wait."""

    def result(self) -> list[float]:
        """Wait for the sum, and return it."""


class _SumOnCPU:
    def __init__(self, values: Sequence[float] | Tensor, ranks: Ranks) -> None:
        self._heartbeat = ranks.heartbeat
        self._sums = torch.as_tensor(values, dtype=torch.float64).clone()
        self._work = dist.all_reduce(self._sums, async_op=True) if ranks.world_size > 1 else None

    def is_ready(self) -> bool:
        return self._work is None or self._work.is_completed()

    def result(self) -> list[float]:
        if self._work is not None:
            with self._heartbeat.waiting():
                self._work.wait()
        return self._sums.tolist()


class _SumOnGPU:
    """On a stream of its own, so that the host waits for this sum alone and not for what was given to the device."""

    def __init__(self, values: Sequence[float] | Tensor, ranks: Ranks) -> None:
        self._heartbeat = ranks.heartbeat
        stream = _sum_stream(ranks.device)
        if isinstance(values, Tensor):
            stream.wait_stream(torch.cuda.current_stream(ranks.device))
            values.record_stream(stream)
        with torch.cuda.stream(stream):
            if isinstance(values, Tensor):
                sums = values.double()
            else:
                on_host = torch.tensor(values, dtype=torch.float64, pin_memory=True)
                sums = on_host.to(ranks.device, non_blocking=True)
            if ranks.world_size > 1:
                dist.all_reduce(sums)
            self._sums = torch.empty(sums.shape, dtype=torch.float64, pin_memory=True)
            self._sums.copy_(sums, non_blocking=True)
            self._arrived = torch.cuda.Event()
            self._arrived.record(stream)

    def is_ready(self) -> bool:
        return self._arrived.query()

    def result(self) -> list[float]:
        with self._heartbeat.waiting():
            self._arrived.synchronize()
        return self._sums.tolist()


@cache
def _sum_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


def set_timeouts(seconds: float) -> None:
    """Give every process group this time limit for a collective; the default group's does not reach the others."""
    for group in list(dist.distributed_c10d._world.pg_map):
        dist.distributed_c10d._set_pg_timeout(timedelta(seconds=seconds), group)


def is_communication_failure(error: BaseException) -> bool:
    """Tell whether an error of torch says that other ranks were not reached: lost, too late, or the network.

    gloo's are plain RuntimeErrors that begin with the place in its sources.
    """
    if isinstance(error, dist.DistError):
        return "nvalid usage" not in str(error)  # NCCL's word for what no retry mends, such as two ranks on one GPU
    return isinstance(error, RuntimeError) and "gloo/" in str(error)


def read_rank_variables(environment: Mapping[str, str]) -> dict[str, str]:
    """Return RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT for this process.

    Args:
        environment: the process's environment variables.
    Raises:
        ConfigError: the launcher set some of the variables and not others, or SLURM's tasks were not started by srun.
    """
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    if "RANK" in environment:
        missing = [name for name in names if name not in environment]
        if missing:
            raise ConfigError(
                f"environment: RANK is set and {', '.join(missing)} not; expected all of {', '.join(names)}. "
                "Start with deepspeed, torchrun or srun, or unset RANK for one process."
            )
        return {name: environment[name] for name in names}
    num_tasks = int(environment.get("SLURM_STEP_NUM_TASKS") or environment.get("SLURM_NTASKS") or 1)
    if num_tasks > 1 and "SLURM_PROCID" in environment:
        return _slurm_rank_variables(environment, num_tasks)
    return {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": _free_port()}


def _slurm_rank_variables(environment: Mapping[str, str], num_tasks: int) -> dict[str, str]:
    """Return the rank variables of a process that `srun` started as one of `num_tasks`."""
    if "SLURM_STEP_ID" not in environment:  # SLURM calls the batch script itself task 0
        raise ConfigError(
            f"environment: SLURM_NTASKS is {num_tasks} and this process was not started by srun; expected srun, which "
            f"starts all {num_tasks}. Write srun before python, or unset SLURM_NTASKS for one process."
        )
    # One port for each job and step: two of them on one node must not meet. It is below the ports that Linux gives
    # to outgoing connections (32768 and up), which would sometimes have taken it.
    port = 10000 + (int(environment["SLURM_JOB_ID"]) * 16 + int(environment["SLURM_STEP_ID"])) % 20000
    nodes = environment.get("SLURM_STEP_NODELIST") or environment["SLURM_JOB_NODELIST"]
    return {
        "RANK": environment["SLURM_PROCID"],
        "LOCAL_RANK": environment["SLURM_LOCALID"],
        "WORLD_SIZE": str(num_tasks),
        "MASTER_ADDR": environment.get("MASTER_ADDR") or first_host(nodes),
        "MASTER_PORT": environment.get("MASTER_PORT") or str(port),
    }


def first_host(nodes: str) -> str:
    """Return the first host of SLURM's compressed list: `rack1n03` of `rack[1-2]n[03-04,07],login1`.

    Read here, because a container has no `scontrol show hostnames`.
    """
    first = re.match(r"(?:[^,\[]|\[[^]]*\])+", nodes)
    return re.sub(r"\[([^],-]*)[^]]*\]", r"\1", first.group()) if first else nodes


def choose_device(local_rank: int, environment: Mapping[str, str]) -> torch.device:
    """Return this rank's GPU, or the CPU where there is none.

    Args:
        local_rank: number of this process on its node.
        environment: the process's environment variables.
    Raises:
        ConfigError: there are GPUs, but fewer than ranks on this node.
    """
    if not torch.cuda.is_available():
        return torch.device("cpu")
    num_gpus = torch.cuda.device_count()
    # `srun --gpus-per-task=1` and `--gpu-bind` show each task its own GPU only, which it then calls 0. If instead all
    # tasks were shown the same one, NCCL says so ("Duplicate GPU detected").
    if num_gpus == 1 and environment.get("SLURM_LOCALID") == str(local_rank):
        return torch.device("cuda", 0)
    if local_rank >= num_gpus:
        raise ConfigError(
            f"launch: local rank is {local_rank}; expected less than {num_gpus}, the number of this node's GPUs. "
            "Start one process a GPU (deepspeed --num_gpus, torchrun --nproc-per-node, srun --ntasks-per-node)."
        )
    return torch.device("cuda", local_rank)


def _free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def export_rank_variables() -> dict[str, str]:
    """Set the rank variables that torch and DeepSpeed read; return them."""
    variables = read_rank_variables(os.environ)
    os.environ.update(variables)
    return variables


def join_process_group(variables: Mapping[str, str], device: torch.device, timeout_seconds: float) -> None:
    """Meet the other ranks, over an interface that leads to them: by NCCL on GPUs, by gloo on CPUs.

    Args:
        variables: the rank variables, which the environment has too.
        device: of this rank.
        timeout_seconds: how long ranks wait for each other, here and in collectives.
    Raises:
        ConfigError: the environment names an address or interface that cannot be right.
        PeerError: the others were not met.
        TrainingError: the port is taken, or ranks share a GPU.
    """
    limit = timedelta(seconds=timeout_seconds)
    allow_open_files()
    route = find_route(variables, os.environ)
    try:
        store, rank, world_size = next(dist.rendezvous("env://", timeout=limit))
        store.set_timeout(limit)
        os.environ.update(interface_variables(route, variables, os.environ, store))
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo", store=dist.PrefixStore("default_pg", store), rank=rank,
            world_size=world_size, timeout=limit,
            # Known from the start, NCCL connects at once, and an error is one of the start.
            device_id=device if device.type == "cuda" and world_size > 1 else None,
        )  # fmt: skip
    except RuntimeError as error:  # torch's network and store errors are such
        raise _cannot_meet(error, variables, device) from None


def allow_open_files(number: int = 1 << 16) -> None:
    """Raise the limit of open files, as far as this user may: rank 0 has two connections to every other rank.

    Many systems begin with 1,024, beyond which other ranks would not be heard.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = number if hard == resource.RLIM_INFINITY else min(number, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def join_for_evaluation(timeout_seconds: float) -> Ranks:
    """Meet the other ranks, if a launcher has started several, without what training needs.

    Raises:
        LonghaulError: as `join_process_group` and `choose_device`.
    """
    variables = read_rank_variables(os.environ)
    device = choose_device(int(variables["LOCAL_RANK"]), os.environ)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if int(variables["WORLD_SIZE"]) > 1:
        os.environ.update(variables)
        join_process_group(variables, device, timeout_seconds)
    return Ranks(int(variables["RANK"]), int(variables["LOCAL_RANK"]), int(variables["WORLD_SIZE"]), device)


def leave_distributed() -> None:
    """Part from the other ranks, if there are any, so that the process ends without a warning."""
    if dist.is_initialized():
        dist.barrier()  # rank 0 keeps the store that the others still need to say goodbye
        dist.destroy_process_group()


def _cannot_meet(error: RuntimeError, variables: Mapping[str, str], device: torch.device) -> LonghaulError:
    """What to say where the ranks do not find each other: a port that is taken stays so, a late node may come."""
    text = str(error).splitlines()[0]
    is_taken = "address already in use" in text.lower() or "EADDRINUSE" in text
    is_final = is_taken or (isinstance(error, dist.DistBackendError) and not is_communication_failure(error))
    name = NCCL if device.type == "cuda" else GLOO
    interface = f"; {name} is {os.environ[name]}" if name in os.environ else ""
    return (TrainingError if is_final else PeerError)(
        f"launch: rank {variables['RANK']} of {variables['WORLD_SIZE']} cannot meet the others at "
        f"{variables['MASTER_ADDR']}:{variables['MASTER_PORT']}; expected a free port there that all nodes reach, and "
        f"all ranks within parallel.start_timeout_seconds ({text}{interface}). Look whether all were started, or "
        "choose another port (deepspeed --master_port, torchrun --master-port, MASTER_PORT)."
    )
