"""DeepSpeed's JSON, generated from the config: users never write it. The engine hands it to DeepSpeed."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from types import ModuleType

from pretrain.errors import ConfigError
from pretrain.options.batch_plan import BatchPlan
from pretrain.options.config import Config
from pretrain.options.run_options import ParallelSection

# DeepSpeed's own defaults for stage 3, in elements: a smaller tensor stays whole on every rank; what is used again
# within so many is kept gathered; and so much is gathered at most.
PERSISTENT_ELEMENTS, REUSE_ELEMENTS, MAX_LIVE_ELEMENTS = 100_000, 1_000_000_000, 1_000_000_000
NVME_GROUP_ELEMENTS = 100_000_000  # whose states are in memory at once where they lie on a disk; four buffers of 400 MB


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


def check_hpz(parallel: ParallelSection, world_size: int) -> None:
    """Check that the ranks are whole groups that hold the weights once more.

    Raises:
        ConfigError: they are not.
    """
    if world_size % parallel.hpz_ranks:
        text = (
            f"on {world_size} ranks: parallel.hpz_ranks is {parallel.hpz_ranks}; expected a divisor of {world_size}. "
        )
        raise ConfigError(text + "Use the number of GPUs of a node, or 1.")


def prefetch_elements(num_parameters: int, num_layers: int) -> int:
    """Weights that stage 3 gathers ahead of their use: those of a block, or more."""
    return max(50_000_000, num_parameters // num_layers)


def deepspeed_settings(config: Config, plan: BatchPlan, num_trained: int, num_frozen: int = 0) -> dict:
    """Generate DeepSpeed's JSON for this config, number of ranks, parameters that are trained and others."""
    stage = effective_stage(config.parallel, config.train.precision, plan.world_size)
    settings: dict = {
        # DeepSpeed knows nothing of ranks that share rows: it averages over all of them, which is what is wanted, and
        # takes each for one that has rows of its own.
        "train_batch_size": plan.micro_batch_size * plan.num_micro_steps * plan.world_size,
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
            "reduce_bucket_size": min(num_trained, bucket_elements(plan.world_size)),
            # Even, as DeepSpeed wants it; nothing is allocated for it where the backend gathers into one tensor.
            "allgather_bucket_size": 500_000_000,
            "stage3_prefetch_bucket_size": prefetch_elements(num_trained + num_frozen, config.model.num_layers),
            "stage3_param_persistence_threshold": PERSISTENT_ELEMENTS,
            "stage3_max_reuse_distance": REUSE_ELEMENTS,
            "stage3_max_live_parameters": MAX_LIVE_ELEMENTS,
        },
        "data_types": {"grad_accum_dtype": config.train.grad_accum_dtype},
        "communication_data_type": config.train.grad_accum_dtype,  # else bf16 and fp16 gradients are rounded to be sent
    }
    settings["zero_optimization"] |= _offload_settings(config) | _plus_settings(config.parallel)
    if config.parallel.offload != "none":
        # torch's fused Adam runs on CPUs too, and every other optimizer; DeepSpeed's own is compiled at the start.
        settings["zero_force_ds_cpu_optimizer"] = False
    if "gradients" in config.parallel.quantize:
        settings["communication_data_type"] = "fp16"
    if config.train.precision == "bf16":
        settings["bf16"] = {"enabled": True}
    elif config.train.precision == "fp16":
        settings["fp16"] = {"enabled": True, "initial_scale_power": 16, "loss_scale_window": 1000}
    return settings


def _offload_settings(config: Config) -> dict:
    """Say where masters, moments and divided weights are kept, if not on the GPU."""
    parallel = config.parallel
    if parallel.offload == "none":
        return {}
    settings: dict = {"offload_optimizer": {"device": "cpu"}}
    if parallel.nvme_dir:
        # A part at a time is brought to memory and updated: master, gradient and at most two moments.
        settings["offload_optimizer"] = {"device": "nvme", "nvme_path": str(nvme_folder(config)), "buffer_count": 4}
        settings["sub_group_size"] = NVME_GROUP_ELEMENTS
    if parallel.offload == "parameters":
        settings["offload_param"] = {"device": "cpu"}
    return settings


def _plus_settings(parallel: ParallelSection) -> dict:
    """Say what of ZeRO++ is used."""
    settings: dict = {"zero_hpz_partition_size": parallel.hpz_ranks} if parallel.hpz_ranks > 1 else {}
    return settings | {f"zero_quantized_{what}": True for what in parallel.quantize}


def nvme_folder(config: Config) -> Path | None:
    """Where a run's states lie on a node's disk, if they do: under a name of its own, since two runs may use one."""
    if not config.parallel.nvme_dir:
        return None
    name = hashlib.sha256(os.path.abspath(config.run.dir).encode()).hexdigest()[:12]
    return Path(config.parallel.nvme_dir) / f"longhaul-{name}"


def check_machine(config: Config, world_size: int, device_type: str, builders: ModuleType) -> None:
    """Check what a config alone cannot tell: whether this machine has what is asked for.

    Args:
        config: the config.
        world_size: number of ranks.
        device_type: `cpu` or `cuda`.
        builders: DeepSpeed's, of the operators that it compiles.
    Raises:
        ConfigError: it has not.
    """
    parallel = config.parallel
    if device_type == "cpu" and config.train.precision == "fp16":
        raise ConfigError("train.precision is fp16; expected bf16 or fp32 on a CPU. Use train.precision=fp32.")
    if device_type == "cpu" and parallel.quantize:
        text = f"parallel.quantize is [{', '.join(parallel.quantize)}]; expected [] on a CPU: the kernels are CUDA's. "
        raise ConfigError(text + "Leave it out.")
    check_hpz(parallel, world_size)
    if parallel.quantize and not builders.QuantizerBuilder().is_compatible():
        text = (
            f"parallel.quantize is [{', '.join(parallel.quantize)}]; expected DeepSpeed's operator `quantizer`, which "
        )
        raise ConfigError(
            text + "is compiled by CUDA's nvcc. Install the CUDA toolkit of torch's version, or leave it out."
        )
    if parallel.nvme_dir and not builders.AsyncIOBuilder().is_compatible():
        text = (
            f"parallel.nvme_dir is {parallel.nvme_dir}; expected DeepSpeed's operator `async_io`, which needs libaio's "
        )
        fix = "headers and g++. Install libaio-dev (Debian, Ubuntu) or libaio-devel (Fedora, RHEL), or leave it out."
        raise ConfigError(text + fix)
