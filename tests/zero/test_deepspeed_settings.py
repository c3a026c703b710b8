"""What DeepSpeed is told; that it does it is in test_topology.py."""

from __future__ import annotations

import pytest

from pretrain.errors import ConfigError
from pretrain.options.batch_plan import BatchPlan
from pretrain.options.run_options import ParallelSection
from pretrain.options.settings import parse_config
from pretrain.zero.deepspeed_settings import check_machine, deepspeed_settings, effective_stage


def config_of(**sections):
    base = {
        "model": {"dim": 32, "num_layers": 1, "num_heads": 2},
        "tokenizer": {"model": "t.model", "vocab_size": 400},
        "data": {"sources": [{"name": "a", "shards": "s"}], "seq_len": 32},
        "optim": {"lr": 1e-3},
        "train": {"num_steps": 4, "global_batch_size": 16, "micro_batch_size": 2, "precision": "fp32"},
    }
    return parse_config({name: base.get(name, {}) | sections.get(name, {}) for name in base | sections})


@pytest.mark.parametrize(
    ("stage", "precision", "num_ranks", "offload", "runs"),
    [(0, "fp32", 2, "none", 0), (0, "bf16", 2, "none", 1), (0, "fp16", 1, "none", 1), (3, "bf16", 2, "none", 3),
     (1, "fp32", 2, "none", 1), (1, "fp32", 1, "none", 0), (1, "bf16", 1, "none", 1), (2, "fp32", 1, "none", 2),
     (1, "fp32", 1, "optimizer", 1)],
)  # fmt: skip
def test_low_precision_runs_from_stage_1_on_and_one_rank_below_it(stage, precision, num_ranks, offload, runs):
    assert effective_stage(ParallelSection(zero_stage=stage, offload=offload), precision, num_ranks) == runs


def test_what_is_offloaded_goes_to_the_hosts_memory():
    def offloaded(stage: int, offload: str) -> tuple:
        config = config_of(parallel={"zero_stage": stage, "offload": offload})
        settings = deepspeed_settings(config, BatchPlan.of(config, 2), 1000)
        zero = settings["zero_optimization"]
        return zero.get("offload_optimizer"), zero.get("offload_param"), settings.get("zero_force_ds_cpu_optimizer")

    host = {"device": "cpu"}
    assert offloaded(3, "none") == (None, None, None)
    assert offloaded(1, "optimizer") == offloaded(3, "optimizer") == (host, None, False)
    assert offloaded(3, "parameters") == (host, host, False)


def test_states_on_a_disk_have_a_folder_of_their_run():
    def folder(run: str) -> str:
        config = config_of(run={"dir": run}, parallel={"zero_stage": 3, "offload": "parameters", "nvme_dir": "/nvme"})
        zero = deepspeed_settings(config, BatchPlan.of(config, 2), 1000)["zero_optimization"]
        assert zero["sub_group_size"] == 100_000_000 and zero["offload_param"] == {"device": "cpu"}
        assert zero["offload_optimizer"] | {"nvme_path": ""} == {"device": "nvme", "nvme_path": "", "buffer_count": 4}
        return zero["offload_optimizer"]["nvme_path"]

    assert folder("runs/a") == folder("runs/../runs/a") != folder("runs/b")
    assert folder("runs/a").startswith("/nvme/longhaul-")


def test_zero_plus_is_passed_on():
    config = config_of(
        parallel={"zero_stage": 3, "hpz_ranks": 8, "quantize": ["weights", "gradients"]}, train={"precision": "fp16"}
    )
    settings = deepspeed_settings(config, BatchPlan.of(config, 8), 1000)
    zero = settings["zero_optimization"]
    assert zero["zero_hpz_partition_size"] == 8
    assert zero["zero_quantized_weights"] and zero["zero_quantized_gradients"]
    assert settings["communication_data_type"] == "fp16"  # whose bits the kernel reads
    plain = deepspeed_settings(config_of(parallel={"zero_stage": 3}), BatchPlan.of(config, 8), 1000)
    assert not [name for name in plain["zero_optimization"] if name.startswith("zero_")]


class Builders:
    """DeepSpeed's builders of operators, which can or cannot build."""

    def __init__(self, can_build: bool) -> None:
        builder = type("Builder", (), {"is_compatible": lambda _: can_build})
        self.QuantizerBuilder = self.AsyncIOBuilder = builder


@pytest.mark.parametrize(
    ("parallel", "train", "device", "can_build", "message"),
    [
        ({}, {"precision": "fp16"}, "cpu", True,
         "train.precision is fp16; expected bf16 or fp32 on a CPU. Use train.precision=fp32."),
        ({"quantize": ["weights"]}, {}, "cpu", True,
         "parallel.quantize is [weights]; expected [] on a CPU: the kernels are CUDA's. Leave it out."),
        ({"quantize": ["weights"]}, {}, "cuda", False,
         "parallel.quantize is [weights]; expected DeepSpeed's operator `quantizer`, which is compiled by CUDA's nvcc. "
         "Install the CUDA toolkit of torch's version, or leave it out."),
        ({"hpz_ranks": 3}, {}, "cpu", True,
         "on 4 ranks: parallel.hpz_ranks is 3; expected a divisor of 4. Use the number of GPUs of a node, or 1."),
        ({"offload": "optimizer", "nvme_dir": "/nvme"}, {}, "cpu", False,
         "parallel.nvme_dir is /nvme; expected DeepSpeed's operator `async_io`, which needs libaio's headers and g++. "
         "Install libaio-dev (Debian, Ubuntu) or libaio-devel (Fedora, RHEL), or leave it out."),
    ],
)  # fmt: skip
def test_what_this_machine_lacks_is_an_error(parallel, train, device, can_build, message):
    config = config_of(parallel={"zero_stage": 3} | parallel, train=train)
    with pytest.raises(ConfigError) as caught:
        check_machine(config, 4, device, Builders(can_build))
    assert str(caught.value) == message
    good = config_of(parallel={"zero_stage": 3, "hpz_ranks": 2, "quantize": ["weights"]})
    check_machine(good, 4, "cuda", Builders(True))


def test_settings_follow_the_batch_plan():
    config = config_of(parallel={"zero_stage": 2}, train={"precision": "bf16"})
    settings = deepspeed_settings(config, BatchPlan.of(config, 2), 1000)
    assert settings["train_batch_size"] == 16
    assert settings["train_micro_batch_size_per_gpu"] == 2
    assert settings["gradient_accumulation_steps"] == 4
    assert settings["zero_optimization"]["stage"] == 2 and not settings["zero_optimization"]["overlap_comm"]
    assert settings["data_types"]["grad_accum_dtype"] == settings["communication_data_type"] == "fp32"
    assert settings["bf16"] == {"enabled": True} and "fp16" not in settings
    assert settings["gradient_clipping"] == 1.0
    assert settings["zero_optimization"]["reduce_bucket_size"] == 1000


def test_gradients_are_summed_as_asked():
    config = config_of(train={"precision": "bf16", "grad_accum_dtype": "bf16"})
    settings = deepspeed_settings(config, BatchPlan.of(config, 2), 1000)
    assert settings["data_types"] == {"grad_accum_dtype": "bf16"} and settings["communication_data_type"] == "bf16"


def test_buckets_grow_with_the_ranks_and_stop_at_the_model():
    config = config_of(parallel={"zero_stage": 2}, train={"global_batch_size": 1024})

    def buckets(num_ranks: int, num_parameters: int) -> tuple[int, int, int]:
        found = deepspeed_settings(config, BatchPlan.of(config, num_ranks), num_parameters)["zero_optimization"]
        assert found["allgather_bucket_size"] % 2 == 0  # DeepSpeed asserts it
        return found["reduce_bucket_size"], found["stage3_prefetch_bucket_size"], found["allgather_bucket_size"]

    assert buckets(1, 999_999)[0] == 999_999
    assert buckets(8, 10**9)[0] == 40_000_000
    assert buckets(256, 10**9)[0] == 256_000_000
    assert buckets(8, 8 * 10**9)[1] == 8 * 10**9 // config.model.num_layers
    tuned = deepspeed_settings(config, BatchPlan.of(config, 8), 1000, 8 * 10**9 - 1000)["zero_optimization"]
    assert tuned["reduce_bucket_size"] == 1000  # gradients are of adapters, weights of all
    assert tuned["stage3_prefetch_bucket_size"] == 8 * 10**9 // config.model.num_layers


def test_communication_overlaps_only_if_asked():
    config = config_of(parallel={"zero_stage": 2, "overlap_comm": True})
    assert deepspeed_settings(config, BatchPlan.of(config, 2), 1000)["zero_optimization"]["overlap_comm"]


def test_stage_0_clips_here_and_not_in_deepspeed():
    config = config_of(parallel={"zero_stage": 0})
    assert deepspeed_settings(config, BatchPlan.of(config, 1), 10**10)["gradient_clipping"] == 0.0


def test_fp16_scales_its_loss():
    config = config_of(train={"precision": "fp16"})
    assert deepspeed_settings(config, BatchPlan.of(config, 1), 10**10)["fp16"]["enabled"]
