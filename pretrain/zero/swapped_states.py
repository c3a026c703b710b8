"""Where DeepSpeed's optimizers keep masters and moments: in flat tensors, or on a disk (`parallel.nvme_dir`).

On a disk: between two updates a state's tensor is empty, and a file has its elements. Who only reads them, as a save
does, gets the file mapped into memory; who changes them goes through the groups of parameters, each in memory until the
next is asked for. So nobody needs the memory that the disk is there to spare. A group that is too small for a file
stays in memory.
"""

from __future__ import annotations

import math
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from pretrain.console import write_patiently
from pretrain.errors import ConfigError
from pretrain.options.config import Config
from pretrain.ranks.distributed import Ranks
from pretrain.zero.deepspeed_settings import nvme_folder


def locate(
    optimizer: Any, parameter: Tensor, num_elements: int, rank: int, flats: list[Tensor]
) -> tuple[Tensor, int, int, int] | None:
    """Find what a rank has of a parameter at stages 1 to 3.

    Args:
        optimizer: DeepSpeed's.
        parameter: of the model.
        num_elements: of the parameter when it is whole.
        rank: this one.
        flats: this rank's flat masters.
    Returns:
        (flat master, offset in it, first element of the parameter, number of elements), or None.
    """
    if hasattr(parameter, "ds_id"):  # stage 3
        group, offset, size = optimizer.grad_position[optimizer.get_param_id(parameter)]
        length = min(size, num_elements - rank * size)  # the last partitions may be padding
        return (flats[group], offset, rank * size, length) if length > 0 else None
    mapping = parameter._hp_mapping  # type: ignore[attr-defined]
    if mapping is None:
        return None
    master, weight = mapping.hp_fragment_address, mapping.lp_fragment_address
    return flats[mapping.param_group_index], master.start, weight.start, weight.numel


def gradient_parts(
    optimizer: Any, named: Sequence[tuple[str, Any]], stage: int, is_first: bool
) -> Iterator[tuple[str, Tensor]]:
    """Yield what a rank has of a step's averaged gradients, every element on one rank alone; before the update.

    Args:
        optimizer: DeepSpeed's.
        named: the model's parameters that are trained, by name.
        stage: of ZeRO.
        is_first: whether this is rank 0, which at stage 0 has the gradients that all ranks have.
    """
    scale = getattr(optimizer, "loss_scale", 1.0)  # fp16's
    for name, parameter in named:
        if stage == 0:
            part = parameter.grad if is_first else None
        elif stage == 3:
            part = optimizer.get_local_fp32_grad_for_param(parameter)
        elif (mapping := parameter._hp_mapping) is not None:
            part, own = mapping.get_lp_grad_fragment(parameter._index_in_param_group), mapping.lp_fragment_address
            if part.numel() != own.numel:  # bf16 at stage 1: each rank has whole gradients
                part = part.view(-1).narrow(0, own.start, own.numel)
        else:
            continue
        if part is not None:
            yield name, part if scale == 1.0 else part.float() / scale


def prepare_folder(config: Config, builders: ModuleType, ranks: Ranks) -> Path | None:
    """Make the folder of a run's states on this node's disk, empty, if the config has one; all ranks together.

    Args:
        config: the config.
        builders: DeepSpeed's, of the operators that it compiles.
        ranks: all of them.
    Raises:
        ConfigError: it cannot be made, its file system has no direct access, which DeepSpeed reads and writes by, or
            the operators that do so cannot be compiled.
    """
    folder = nvme_folder(config)
    if folder is None:
        return None
    if ranks.is_first:
        write_patiently(
            sys.stderr, "loading async_io and pin_memory; the first time DeepSpeed compiles them, minutes\n"
        )
    ranks.agree(lambda: _load_operators(config, builders))
    if ranks.local_rank == 0:  # what a start that was killed left, of more ranks perhaps
        shutil.rmtree(folder / "zero_stage_3", ignore_errors=True)
    ranks.agree(lambda: _check_folder(config, folder))
    return folder


def _load_operators(config: Config, builders: ModuleType) -> None:
    try:
        builders.AsyncIOBuilder().load()  # pin_memory too
    except (RuntimeError, ImportError, OSError) as error:
        text = str(error)
        line = re.search(r"^.*(?:error: |not found|cannot find ).*$", text, re.MULTILINE)
        reason = line.group() if line else text.partition("\n")[0]
        raise ConfigError(
            f"parallel.nvme_dir is {config.parallel.nvme_dir}; expected DeepSpeed's operators `async_io` and "
            f"`pin_memory`, which cannot be compiled here ({reason.strip()}). Install g++, ninja and libaio-dev (on "
            "Fedora and RHEL gcc-c++, ninja-build and libaio-devel), or leave it out."
        ) from None


def _check_folder(config: Config, folder: Path) -> None:
    probe = folder / f".probe-{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        os.close(os.open(probe, os.O_CREAT | os.O_RDWR | os.O_DIRECT, 0o600))
        probe.unlink()
    except OSError as error:
        raise ConfigError(
            f"parallel.nvme_dir is {config.parallel.nvme_dir}, which cannot be used ({error}); expected a folder on a "
            "disk of each node, writable and not in memory. Name one, such as a folder of the node's NVMe disk."
        ) from None


def remove_states(folder: Path, rank: int) -> None:
    """Remove the files of one rank, and with the last ones the folder."""
    states = folder / "zero_stage_3" / "optimizer" / f"rank{rank}"
    shutil.rmtree(states, ignore_errors=True)
    for above in (states.parent, states.parent.parent, folder):
        with suppress(OSError):  # others have something there, or removed it
            above.rmdir()


def groups_in_memory(optimizer: Any) -> Iterator[int]:
    """Yield the number of each group of DeepSpeed's stage-3 optimizer, while its masters and moments are in memory.

    What is on a disk is read before, and written back after.
    """
    for group in range(len(optimizer.fp32_partitioned_groups_flat)):
        is_swapped = optimizer._swappable_optimizer_subgroup(group)
        if is_swapped:
            optimizer._optimizer_states_and_gradient_swap_in(group)
        yield group
        if is_swapped:
            optimizer._optimizer_states_and_gradient_swap_out(group)


def refill_weights(optimizer: Any) -> None:
    """Round the masters of DeepSpeed's stage-3 optimizer, once filled, to the weights; all ranks together."""
    for group in groups_in_memory(optimizer):
        optimizer._reassign_or_swap_out_partitioned_parameters(group)
    gather_small_weights(optimizer)


def fill_weights(
    optimizer: Any, named: Sequence[tuple[str, Any]], shapes: Mapping[str, tuple[int, ...]],
    read: Callable[[str, int, int], Tensor], ranks: Ranks,
) -> None:  # fmt: skip
    """Fill weights that have no master; all ranks together.

    Args:
        optimizer: DeepSpeed's at stage 3, where each rank has a part of them; else None.
        named: their names and parameters.
        shapes: of each when it is whole.
        read: gives flat elements [start, start + length) of one, by name, start and length.
        ranks: all of them.
    """
    for name, parameter in named:
        weight = parameter.data if optimizer is None else parameter.ds_tensor.data
        start = 0 if optimizer is None else ranks.rank * weight.numel()
        length = min(weight.numel(), math.prod(shapes[name]) - start)  # what the last ranks have beyond is padding
        if length > 0:
            weight.view(-1)[:length].copy_(read(name, start, length))
        ranks.heartbeat.beat()
    if optimizer is not None:
        gather_small_weights(optimizer)


def gather_small_weights(optimizer: Any) -> None:
    """Put together anew, after the parts were changed, the weights that stage 3 keeps whole; all ranks together."""
    if small := optimizer.persistent_parameters:
        small[0].partition(small)
        small[0].all_gather(small)
    optimizer.invalidate_secondary_tensor()  # hpZ's copies are of the weights before


def on_disk(optimizer: Any, flat: Tensor, states: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return states of a flat master for reading: those that are empty, because a file has them, as that file.

    Args:
        optimizer: DeepSpeed's.
        flat: the master that the states are of.
        states: by name; the master itself is `flat.data`.
    Returns:
        fp32, as long as the master; a mapped file must be read before the next update.
    """
    if flat.numel():
        return states
    info = optimizer.optimizer_swapper.swap_params_info[flat.ds_id]  # type: ignore[attr-defined]
    path_of = {id(one.compute_tensor): one.swap_path for one in info.tensors}
    return {
        name: torch.from_file(path_of[id(flat if index == 0 else tensor)], size=info.numel(), dtype=flat.dtype)
        for index, (name, tensor) in enumerate(states.items())
    }
