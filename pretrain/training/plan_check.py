"""What was foreseen of a run beside what it does, once, when its speed is steady."""

from __future__ import annotations

import torch

from pretrain.console import format_count
from pretrain.errors import ConfigError
from pretrain.planning.plan import Plan, choose_machine, make_plan
from pretrain.planning.plan_memory import resident
from pretrain.planning.plan_report import gib
from pretrain.ranks.gpus import gpu_of_device
from pretrain.training.run import Run

STEPS = 20  # of this start
MOST_OFF = 0.1


def compare_with_plan(run: Run, first_step: int) -> None:
    """Record, at the twentieth step of this start, memory, step time and speed as foreseen and as measured."""
    if run.log is None or run.progress.step != first_step + STEPS - 1:
        return
    if run.ranks.device.type == "cpu":
        run.event("plan", on_cpu(resident(run.config, run.ranks.world_size)))
        return
    name = torch.cuda.get_device_name(run.ranks.device)
    if gpu_of_device(name) is None:
        run.event("plan", f"nothing is foreseen for {name}, which is not in pretrain/ranks/gpus.py")
        return
    try:
        plan = make_plan(run.config, choose_machine(run.config, name, run.ranks.world_size, torch.cuda.device_count()))
    except ConfigError as error:  # a precision that the GPU has no units for
        run.event("plan", f"nothing is foreseen: {error}")
        return
    measured = torch.cuda.max_memory_allocated(run.ranks.device), run.log.median_step_seconds()
    text, off = compare(plan, *measured)
    run.event("plan", text, foreseen=[plan.memory.allocated, plan.time.total], measured=list(measured))
    if off:
        run.event(
            "plan_differs",
            f"more than {100 * MOST_OFF:.0f}% from what was foreseen: {', '.join(off)}. docs/planning.md says what is "
            "assumed; train.profile_steps shows where the time goes",
        )


def compare(plan: Plan, memory_bytes: int, step_seconds: float) -> tuple[str, list[str]]:
    """Return foreseen beside measured in words, and the names of what differs by more than a tenth.

    Args:
        plan: of the run.
        memory_bytes: that torch has allocated at most on a GPU.
        step_seconds: of a step.
    """
    rates = plan.tokens_per_second, plan.batch.tokens_per_step / step_seconds
    rows = (
        ("memory", gib, plan.memory.allocated, memory_bytes),
        ("step", lambda seconds: f"{seconds:.3g} s", plan.time.total, step_seconds),
        ("tokens/s", format_count, *rates),
    )
    off = [name for name, _, foreseen, measured in rows if abs(measured / foreseen - 1) > MOST_OFF]
    parts = [
        f"{name} {write(foreseen)} foreseen, {write(measured)} measured ({100 * (measured / foreseen - 1):+.0f}%)"
        for name, write, foreseen, measured in rows
    ]
    return "; ".join(parts), off


def on_cpu(states: dict[str, int]) -> str:
    """Say what is foreseen of a run on CPUs: the sizes of its states, which nothing there measures."""
    parts = [f"{kind} {value / 2**20:.1f} MiB" for kind, value in states.items() if value]
    return f"foreseen of each rank: {', '.join(parts)}; neither time nor activations are foreseen on a CPU"
