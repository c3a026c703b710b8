"""Rules between the options that say how a model lies on its ranks, and is computed there."""

from __future__ import annotations

from collections.abc import Iterator

from pretrain.errors import Problem
from pretrain.options.batch_plan import sharing_problem
from pretrain.options.config import Config
from pretrain.options.config_docs import yaml_value


def parallel_problems(config: Config) -> Iterator[Problem]:
    """Yield what is wrong between these options."""
    yield from _compile_problems(config)
    yield from _offload_problems(config)
    yield from _long_row_problems(config)


def _compile_problems(config: Config) -> Iterator[Problem]:
    """Check that what is compiled is whole: ZeRO-3 gathers weights in hooks inside of a block, autograd's keep less."""
    train, excluded = config.train, None
    if train.ffn_chunk_tokens:
        excluded = f"train.ffn_chunk_tokens {train.ffn_chunk_tokens}", "train.ffn_chunk_tokens=0"
    elif train.activation_checkpointing == "offload":
        excluded = "train.activation_checkpointing offload", "train.activation_checkpointing=full"
    if train.compile and excluded:
        text = (
            f"train.compile is true; expected false or null with {excluded[0]}, which compiled code does not heed. Use "
        )
        yield Problem("train.compile", f"{text}train.compile=false, or {excluded[1]}.")
    if config.train.compile and config.parallel.zero_stage == 3:
        text = "train.compile is true; expected false or null with parallel.zero_stage 3, which gathers weights inside "
        yield Problem("train.compile", text + "of a block. Use train.compile=false, or parallel.zero_stage=2.")


def _long_row_problems(config: Config) -> Iterator[Problem]:
    """Check that ranks can share rows evenly, and that a feed-forward by chunks keeps less than a whole one."""
    if text := sharing_problem(config):
        yield Problem("parallel.sequence_parallel_size", text)
    name, train = "train.ffn_chunk_tokens", config.train
    if train.ffn_chunk_tokens and train.activation_checkpointing == "selective":
        text = (
            f"{name} is {train.ffn_chunk_tokens}; expected 0 with train.activation_checkpointing selective, which keeps"
        )
        yield Problem(name, text + " what is model.ffn_dim wide. Use train.activation_checkpointing=full, or drop it.")


def _offload_problems(config: Config) -> Iterator[Problem]:
    """Check that what is to be kept elsewhere, or sent otherwise, is divided: DeepSpeed does so with nothing else."""
    parallel, stage = config.parallel, config.parallel.zero_stage
    offload = parallel.offload
    least = {"none": 0, "optimizer": 1, "parameters": 3}[offload]
    if stage < least:
        text = f"parallel.offload is {offload}; expected none with parallel.zero_stage {stage}, which does not divide "
        what = "weights" if least == 3 else "anything"
        yield Problem("parallel.offload", f"{text}{what}. Use parallel.zero_stage={least}.")
    for name, default in (("nvme_dir", ""), ("hpz_ranks", 1), ("quantize", [])):
        value = getattr(parallel, name)
        if value != default and stage < 3:
            text = f"parallel.{name} is {yaml_value(value)}; expected to be left out with parallel.zero_stage {stage}. "
            yield Problem(f"parallel.{name}", text + "DeepSpeed has it at stage 3 only: use parallel.zero_stage=3.")
    if parallel.nvme_dir and config.log.layer_norms_every:
        text = f"log.layer_norms_every is {config.log.layer_norms_every}; expected 0 with parallel.nvme_dir, where "
        yield Problem("log.layer_norms_every", text + "gradients lie on a disk. Drop one of them.")
    if parallel.hpz_ranks > 1 and offload == "parameters":
        text = f"parallel.hpz_ranks is {parallel.hpz_ranks}; expected 1 with parallel.offload parameters, which takes "
        yield Problem("parallel.hpz_ranks", text + "weights from the GPU. Use parallel.offload=optimizer.")
    if "gradients" in parallel.quantize and config.train.precision != "fp16":
        text = f"parallel.quantize has gradients; expected train.precision fp16 with it, not {config.train.precision}: "
        yield Problem("parallel.quantize", text + "DeepSpeed's kernel takes any gradient's bits for fp16. Drop it.")
