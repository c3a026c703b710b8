"""Steps engines and counts what the planner foresees: `planned.py CASES.json OUT.json`, started on every rank.

CASES.json holds a list of {"overrides": [...], and by choice "reuse": elements that ZeRO-3 keeps}; OUT.json gets for
each the payload of the collectives of the third step and the bytes that the rank with most of a kind holds when its last backward pass is over;
on a GPU also the most that torch allocated, and the seconds of a step.
"""

from __future__ import annotations

import gc
import json
import os
import statistics
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parents[2])

import torch

from benchmarks.usage import Usage
from pretrain.options.batch_plan import BatchPlan
from pretrain.options.settings import load_config
from pretrain.planning.plan_memory import shape_of
from pretrain.ranks.distributed import Ranks
from pretrain.transformer.lora import add_adapters
from pretrain.transformer.model import Transformer
from pretrain.zero import engine as engine_module
from pretrain.zero.engine import Engine, init_distributed, sequence_group

GRADIENTS = ("averaged_gradients", "fp32_groups_gradients_flat", "grad_partitions_flat_buffer")


def storages(*holders: Any) -> dict[int, int]:
    """Bytes of every storage that these tensors, or nested containers of tensors, lie in."""
    found = {}
    for holder in holders:
        if isinstance(holder, torch.Tensor):
            found[holder.untyped_storage().data_ptr()] = holder.untyped_storage().nbytes()
        elif isinstance(holder, (list, tuple, dict)):  # DeepSpeed's kinds of lists too, which torch's trees take whole
            found |= storages(*(holder.values() if isinstance(holder, dict) else holder))
    return found


def resident(engine: Engine) -> dict[str, int]:
    """Bytes by the planner's kinds; a storage belongs to the first kind that has it."""
    parameters, optimizer = list(engine._engine.module.parameters()), engine._optimizer
    masters = engine._flat_masters()
    buckets = [vars(bucket).get("buffer") for bucket in getattr(optimizer, "ipg_buckets", {}).values()]
    kinds = {
        "parameters": storages(parameters, [getattr(one, "ds_tensor", None) for one in parameters]),
        "masters": storages(masters),
        "moments": storages([list(state.values()) for state in engine._torch_optimizer.state.values()]),
        "buckets": storages(buckets),
        "gradients": storages(
            [one.grad for one in (*parameters, *masters)], [getattr(one, "grad_accum", None) for one in parameters],
            [getattr(optimizer, name, None) for name in GRADIENTS],
        ),
    }  # fmt: skip
    seen: set[int] = set()
    found = {}
    for kind, held in kinds.items():
        found[kind] = sum(size for place, size in held.items() if place not in seen)
        seen |= held.keys()
    return found


def run_case(case: dict[str, Any], config_path: str, ranks: Ranks) -> dict[str, Any]:
    """Do three steps on random rows; return what the third took."""
    config = load_config(config_path, case["overrides"])
    plan, shape = BatchPlan.of(config, ranks.world_size), shape_of(config)
    settings = engine_module.deepspeed_settings
    if "reuse" in case:

        def with_less_reuse(*args: Any) -> dict[str, Any]:
            found = settings(*args)
            found["zero_optimization"] |= {"stage3_max_reuse_distance": case["reuse"],
                                           "stage3_max_live_parameters": case["reuse"]}  # fmt: skip
            return found

        engine_module.deepspeed_settings = with_less_reuse
    group = sequence_group(config.parallel, ranks)
    model = Transformer(
        shape, 1, config.train.activation_checkpointing, group=group, ffn_chunk_tokens=config.train.ffn_chunk_tokens
    )
    if config.train.lora is not None:
        add_adapters(model, config.train.lora)
    engine = Engine(model, config, plan, ranks)
    engine_module.deepspeed_settings = settings
    engine.train()
    held: dict[str, int] = {}
    seconds, device = [], ranks.device
    for step in range(3 if device.type == "cpu" else 12):
        begin = time.perf_counter()
        with Usage() if step == 2 else nullcontext() as usage:
            for index in range(plan.num_micro_steps):
                size = plan.micro_batch_size, plan.seq_len // plan.sequence_parallel_size
                tokens_BT = torch.randint(0, shape.vocab_size, size, device=device)
                doc_start_BT = torch.zeros(plan.micro_batch_size, plan.seq_len, dtype=torch.int64, device=device)
                rows = (tokens_BT, tokens_BT, doc_start_BT,
                        torch.arange(plan.micro_batch_size, device=device), step)  # fmt: skip
                engine.backward(engine.forward(*rows)[0])
                if index < plan.num_micro_steps - 1:
                    engine.end_micro_step()
            if usage is not None:
                held = resident(engine)
            engine.step(1e-3)
            if usage is not None:
                counted = {name: num_bytes for (_, name), (_, num_bytes) in usage.traffic.items()}
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - begin)
        if step == 0 and device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()  # the model was whole in fp32 at the start
    total = ranks.sum([counted.pop("all_to_all_single", 0)])[0]  # ranks give different amounts
    peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else 0
    engine.close()
    del engine
    gc.collect()
    sent = dict(counted) | ({"all_to_all_single": total / ranks.world_size} if total else {})
    most = {kind: max(one[kind] for one in ranks.gather(held)) for kind in held}
    return {"sent": sent, "resident": most, "peak": peak, "step_seconds": statistics.median(seconds)}


def main() -> None:
    """Run all cases; rank 0 writes what they took."""
    ranks = init_distributed(300)
    config_path, cases, out = sys.argv[1], json.loads(Path(sys.argv[2]).read_text()), Path(sys.argv[3])
    found = [run_case(case, config_path, ranks) for case in cases]
    if ranks.is_first:
        out.write_text(json.dumps(found))
    ranks.barrier()


if __name__ == "__main__":
    main()
    os._exit(0)  # gloo's threads can abort a process that is done
