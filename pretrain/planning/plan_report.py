"""A plan in words, and as JSON."""

from __future__ import annotations

from typing import Any

from pretrain.console import counted, format_count, format_duration
from pretrain.options.config import Config
from pretrain.options.families import num_parameters
from pretrain.planning.plan import Plan, Search, more_gpus_help, not_reckoned, overrides
from pretrain.planning.plan_communication import collectives
from pretrain.planning.plan_memory import checkpoint_bytes, disk_bytes, layout_of, shape_of
from pretrain.ranks.gpus import GIB

_SHOWN = 5  # of the best, and of those that do not fit
_TIMES = {
    "matmul": "matrix products",
    "attention": "attention",
    "memory": "norms, activations, loss",
    "update": "update",
    "communication": "communication",
    "host": "waiting for the host",
}


def gib(num_bytes: float) -> str:
    """Write bytes in GiB."""
    return f"{num_bytes / GIB:.1f} GiB"


def as_json(plan: Plan) -> dict[str, Any]:
    """Return all of a plan in plain values: bytes, seconds, tokens, dollars."""
    machine, mfu = plan.machine, plan.mfu
    sent = collectives(plan.config, plan.batch)
    return {
        "gpu": machine.name, "num_gpus": machine.num_gpus, "gpus_per_node": machine.gpus_per_node,
        "network_gbits": machine.network * 8, "price_per_hour": machine.price,
        "zero_stage": plan.config.parallel.zero_stage, "offload": plan.config.parallel.offload,
        "micro_batch_size": plan.batch.micro_batch_size, "num_micro_steps": plan.batch.num_micro_steps,
        "sequence_parallel_size": plan.batch.sequence_parallel_size,
        "ffn_chunk_tokens": plan.config.train.ffn_chunk_tokens,
        "activation_checkpointing": plan.config.train.activation_checkpointing,
        "tokens_per_step": plan.batch.tokens_per_step, "num_steps": plan.batch.num_steps,
        "fits": plan.fits, "memory_bytes": plan.memory.total, "allocated_bytes": plan.memory.allocated,
        "gpu_memory_bytes": machine.gpu.memory_bytes, "peak_is": plan.memory.when,
        "memory": plan.memory.parts | {"allowance": plan.memory.allowance}, "host_memory_of_rank": plan.memory.host,
        "host_memory_of_node": plan.node_bytes, "not_reckoned": not_reckoned(plan.config),
        "step_seconds": plan.time.total, "seconds": vars(plan.time),
        "communication_bytes": {name: sum(one.num_bytes for one in sent if one.name == name)
                                for name in sorted({one.name for one in sent})},
        "tokens_per_second": plan.tokens_per_second,
        "tokens_per_second_per_gpu": plan.tokens_per_second / machine.num_gpus,
        "mfu": mfu[0], "mfu_causal": mfu[1], "days": plan.days, "cost": plan.cost,
    }  # fmt: skip


def report_json(config: Config, plan: Plan, found: Search) -> dict[str, Any]:
    """Return a config's plan and what a search found, in plain values."""
    return {
        "parameters": num_parameters(shape_of(config)), "trained_parameters": layout_of(config, 1).total,
        "checkpoint_bytes": checkpoint_bytes(config), "plan": as_json(plan),
        "best": [as_json(one) | {"overrides": overrides(one, config), "reason": reason(one)}
                 for one in found.best[:_SHOWN]],
        "too_large": [as_json(one) | {"overrides": overrides(one, config)} for one in found.too_large[:_SHOWN]],
    }  # fmt: skip


def render(config: Config, plan: Plan, found: Search) -> str:
    """Write a config's plan and what a search found."""
    machine, size = plan.machine, num_parameters(shape_of(config))
    num_trained = layout_of(config, 1).total
    adapters = f" and {format_count(num_trained)} of adapters, which are trained," if config.train.lora else ""
    lines = [
        f"{format_count(size)} parameters{adapters} on {machine.num_gpus:,} x {machine.name} "
        f"({gib(machine.gpu.memory_bytes)} each), {counted(machine.num_nodes, 'node')} of up to "
        f"{machine.gpus_per_node}, {machine.network * 8:g} Gbit/s a GPU between them",
        "", "As configured: " + settings_of(plan), *_memory_lines(plan), *_time_lines(plan), "",
        *_search_lines(config, plan, found), "",
        *([f"Not reckoned with: {', '.join(left_out)}."] if (left_out := not_reckoned(config)) else []),
        "Foreseen, not measured: docs/planning.md says what is assumed. Step 20 of a run on GPUs compares.",
    ]  # fmt: skip
    return "\n".join(lines)


def settings_of(plan: Plan) -> str:
    """Name what a search changes, of a plan."""
    parallel, batch = plan.config.parallel, plan.batch
    offload = "" if parallel.offload == "none" else f", offload {parallel.offload}"
    shared = "" if batch.sequence_parallel_size == 1 else f", {batch.sequence_parallel_size} ranks share rows"
    chunks = plan.config.train.ffn_chunk_tokens
    return (
        f"ZeRO {parallel.zero_stage}{offload}{shared}, micro-batch {batch.micro_batch_size} x {batch.num_micro_steps} "
        f"micro-step{'s' * (batch.num_micro_steps > 1)}, checkpointing {plan.config.train.activation_checkpointing}"
        + (f", feed-forward by {chunks:,} tokens" if chunks else "")
    )


def lack(plan: Plan) -> str:
    """Say how much too much a plan takes that does not fit."""
    lacking = [f"{gib(-plan.free_bytes)} too many"] if plan.free_bytes < 0 else []
    if plan.node_bytes > plan.machine.host_bytes:
        lacking.append(f"{gib(plan.node_bytes)} of each node's host, which has {gib(plan.machine.host_bytes)}")
    return ", and ".join(lacking)


def reason(plan: Plan) -> str:
    """Say what speaks for a plan, and what it pays."""
    stage, steps = plan.config.parallel.zero_stage, plan.batch.num_micro_steps
    said = {
        0: "gradients are summed once a step, nothing is divided", 1: "gradients are summed once a step",
        2: "gradients are summed after every micro-step" if steps > 1 else "gradients are summed once a step",
        3: "weights are gathered for every pass",
    }[stage]  # fmt: skip
    if plan.config.parallel.offload != "none":
        said += f", the CPU updates ({100 * plan.time.update / plan.time.total:.0f}% of the step)"
    if (sharers := plan.batch.sequence_parallel_size) > 1:
        said += f", {sharers} ranks share each row"
    again = {
        "none": "nothing is computed twice", "selective": "norms and activations are computed twice",
        "full": "each forward pass is computed twice",
        "offload": "each forward pass is computed twice, from inputs that the host keeps",
    }[plan.config.train.activation_checkpointing]  # fmt: skip
    return f"{said}; {again}; {100 * plan.time.communication / plan.time.total:.0f}% of a step is communication"


def _memory_lines(plan: Plan) -> list[str]:
    verdict = f"fits, {gib(plan.free_bytes)} free" if plan.fits else f"does NOT fit: {lack(plan)}"
    lines = [f"  memory   {gib(plan.memory.total)} a GPU, most {plan.memory.when}; {verdict}"]
    parts = [f"{kind} {gib(value)}" for kind, value in plan.memory.parts.items() if value >= GIB / 20]
    lines.append(f"           {', '.join(parts)}, allowance {gib(plan.memory.allowance)}")
    ranks = min(plan.machine.gpus_per_node, plan.machine.num_gpus)
    host = [f"{kind} {gib(ranks * value)}" for kind, value in plan.memory.host.items() if value]
    if host:
        lines.append(f"           of each node's host: {', '.join(host)}")
    lines.append(f"           a checkpoint on disk: {gib(checkpoint_bytes(plan.config))}")
    if on_disk := disk_bytes(plan.config, plan.machine.num_gpus):
        lines.append(f"           of parallel.nvme_dir of each node: {gib(ranks * on_disk)}")
    return lines


def _time_lines(plan: Plan) -> list[str]:
    time, mfu = plan.time, plan.mfu
    parts = [f"{name} {100 * getattr(time, kind) / time.total:.0f}%" for kind, name in _TIMES.items()
             if getattr(time, kind) >= 0.005 * time.total]  # fmt: skip
    cost = "" if plan.cost is None else f", about ${plan.cost:,.0f} at ${plan.machine.price:g} an hour"
    steps, rate = plan.batch.num_steps, plan.tokens_per_second
    return [
        f"  step     {time.total:.3g} s: {', '.join(parts)}",
        f"  speed    {format_count(rate)} tokens/s, {rate / plan.machine.num_gpus:,.0f} a GPU, MFU {100 * mfu[0]:.1f}% "
        f"({100 * mfu[1]:.1f}% with causal attention counted once)",
        f"  run      {counted(steps, 'step')}, {format_count(steps * plan.batch.tokens_per_step)} tokens: "
        f"{format_duration(plan.days * 86_400)}{cost}",
    ]


def _search_lines(config: Config, plan: Plan, found: Search) -> list[str]:
    if found.best:
        lines = [f"The best of {len(found.best)} ways that fit:"]
    elif any(map(more_gpus_help, found.too_large)):
        lines = ["Nothing fits: use more GPUs, or ones with more memory."]
    else:
        lines = [
            "Nothing fits, and more GPUs do not help: each holds its part of a row's activations and of the weights.",
            "Use GPUs with more memory, shorter rows, or train.ffn_chunk_tokens (docs/training.md, Long rows).",
        ]
    for number, one in enumerate(found.best[:_SHOWN], 1):
        change = " ".join(overrides(one, config)) or "as configured"
        faster = f", {plan.time.total / one.time.total:.2f} x as fast" if change != "as configured" else ""
        lines += [
            f"  {number}. {change}",
            f"     {one.time.total:.3g} s a step{faster}, MFU {100 * one.mfu[0]:.1f}%, {gib(one.memory.total)} a GPU",
            f"     {reason(one)}",
        ]  # fmt: skip
    if found.too_large:
        lines.append("Nothing fits of:")
    for one in found.too_large[:_SHOWN]:
        lines.append(f"  {settings_of(one)}: {lack(one)}")
    return lines
