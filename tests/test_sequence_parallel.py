"""Ranks that share rows: the same batches, losses and checkpoints as ranks that do not."""

from __future__ import annotations

import pytest

from tests.rank_helpers import losses, metric_lines, newest, run_cases

pytestmark = [pytest.mark.slow, pytest.mark.launches, pytest.mark.timeout(900)]

GPT2 = "model={family: gpt2, dim: 32, num_layers: 2, num_heads: 4, dropout: 0.1, attention_dropout: 0.1}"
MODELS = {
    "llama": [],  # grouped queries: two key heads for four ranks
    "gpt2": [GPT2],
    "qwen3": ["model={family: qwen3, dim: 32, num_layers: 2, num_heads: 4, num_kv_heads: 4, ffn_dim: 64, "
              "sliding_window: 9, dropout: 0.1}", "train.activation_checkpointing=selective"],
    "custom": ["model={family: custom, dim: 24, num_layers: 2, num_heads: 4, num_kv_heads: 1, ffn_dim: 52, "
               "qk_norm: true, attention_softcap: 3.0, dropout: 0.1}", "data.packing=concat",
               "train={num_steps: 20, global_batch_size: 16, micro_batch_size: 16, precision: fp32, "
               "z_loss: 1e-3, ffn_chunk_tokens: 7, activation_checkpointing: full}"],
}  # fmt: skip
# ranks that share a row, ZeRO stage, micro-batch; by number of ranks
TOPOLOGIES = {1: [(1, 0, 16)], 2: [(2, 0, 16), (2, 1, 8), (2, 2, 8), (2, 3, 8)], 4: [(4, 1, 8), (4, 3, 16), (2, 2, 4), (2, 3, 8), (2, 0, 8)]}  # fmt: skip


def cases_of(num_ranks, folder):
    return [
        {"overrides": [f"run.dir={folder}/{name}-r{num_ranks}-s{size}-z{stage}", *own, "eval={every_steps: 10}",
                       f"parallel={{sequence_parallel_size: {size}, zero_stage: {stage}}}",
                       f"train.micro_batch_size={micro}"]}
        for size, stage, micro in TOPOLOGIES[num_ranks] for name, own in MODELS.items()
    ]  # fmt: skip
