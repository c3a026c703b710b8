"""DeepSpeed's JSON, generated from the config: users never write it. The engine hands it to DeepSpeed."""

from __future__ import annotations

from pretrain.batch_plan import BatchPlan
from pretrain.config import Config
from pretrain.run_options import ParallelSection

# DeepSpeed's own defaults for stage 3, in elements: a smaller tensor stays whole on every rank; what is used again
# within so many is kept gathered; and so much is gathered at most.
PERSISTENT_ELEMENTS, REUSE_ELEMENTS, MAX_LIVE_ELEMENTS = 100_000, 1_000_000_000, 1_000_000_000


def effective_stage(parallel: ParallelSection, precision: str, world_size: int) -> int:
    """The stage that runs, where two would compute the same.

    DeepSpeed accumulates bf16 and fp16 gradients in fp32 from stage 1 on only. And one rank has nothing to divide: in
    fp32 stage 1 would but copy all gradients twice, which was 2% of a step on a CPU (docs/notes/0012).
    """
    if precision != "fp32":
        return max(parallel.zero_stage, 1)
    divides_nothing = parallel.zero_stage == 1 and world_size == 1 and parallel.offload == "none"
    return 0 if divides_nothing else parallel.zero_stage


def bucket_elements(world_size: int) -> int:
    """Gradients that are reduced at once: more where each rank's share would else be too small to fill the network.

    DeepSpeed allocates them whatever the model's size, in fp32 (stage 1) or the weights' type; its own default is 500
    million, which is the most here: 10,000 ranks would else hold 40 GB of them at stage 3.

    Source: Megatron-LM's distributed data parallel, max(40 million, 1 million x ranks).
    """
    return min(max(40_000_000, 1_000_000 * world_size), 500_000_000)


def prefetch_elements(num_parameters: int, num_layers: int) -> int:
    """Weights that stage 3 gathers ahead of their use: those of a block, or more."""
    return max(50_000_000, num_parameters // num_layers)


def deepspeed_settings(config: Config, plan: BatchPlan, num_parameters: int) -> dict:
    """Generate DeepSpeed's JSON for this config, number of ranks and size of model."""
    stage = effective_stage(config.parallel, config.train.precision, plan.world_size)
    settings: dict = {
        "train_batch_size": plan.global_batch_size,
        "train_micro_batch_size_per_gpu": plan.micro_batch_size,
        "gradient_accumulation_steps": plan.num_micro_steps,
        # At stage 0 DeepSpeed clips and steps in one go, before anybody could look at the norm: done here instead.
        "gradient_clipping": config.optim.clip_norm if stage > 0 else 0.0,
        "steps_per_print": 10**12,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {
            "stage": stage,
            "overlap_comm": config.parallel.overlap_comm,
            "contiguous_gradients": True,
            "reduce_bucket_size": min(num_parameters, bucket_elements(plan.world_size)),
            # Even, as DeepSpeed wants it; nothing is allocated for it where the backend gathers into one tensor.
            "allgather_bucket_size": 500_000_000,
            "stage3_prefetch_bucket_size": prefetch_elements(num_parameters, config.model.num_layers),
            "stage3_param_persistence_threshold": PERSISTENT_ELEMENTS,
            "stage3_max_reuse_distance": REUSE_ELEMENTS,
            "stage3_max_live_parameters": MAX_LIVE_ELEMENTS,
        },
        "data_types": {"grad_accum_dtype": config.train.grad_accum_dtype},
        "communication_data_type": config.train.grad_accum_dtype,  # else bf16 and fp16 gradients are rounded to be sent
    }
    if config.parallel.offload != "none":
        settings["zero_optimization"]["offload_optimizer"] = {"device": "cpu"}
        # torch's fused Adam runs on CPUs too, and every other optimizer; DeepSpeed's own is compiled at the start.
        settings["zero_force_ds_cpu_optimizer"] = False
    if config.parallel.offload == "parameters":
        settings["zero_optimization"]["offload_param"] = {"device": "cpu"}
    if config.train.precision == "bf16":
        settings["bf16"] = {"enabled": True}
    elif config.train.precision == "fp16":
        settings["fp16"] = {"enabled": True, "initial_scale_power": 16, "loss_scale_window": 1000}
    return settings
