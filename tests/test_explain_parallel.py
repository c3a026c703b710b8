"""What is said of `parallel`: the figures are ZeRO's, and the JSON is what DeepSpeed is told."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from launch.pretrain import main
from pretrain.batch_plan import BatchPlan
from pretrain.deepspeed_settings import deepspeed_settings
from pretrain.explain_parallel import explain_parallel, state_bytes
from pretrain.families import num_parameters, resolve_shape
from pretrain.settings import load_config

ROOT = Path(__file__).resolve().parents[1]
CONFIG = ROOT / "configs/llama-7b.yaml"
TOTAL = 6_738_415_616


def bytes_of(ranks: int, *overrides: str) -> dict[tuple[str, str], int]:
    return state_bytes(load_config(CONFIG, ["train.micro_batch_size=1", *overrides]), 2 * TOTAL, TOTAL, ranks)


@pytest.mark.parametrize(
    ("stage", "precision", "weights", "gradients", "optimizer"),
    # P parameters on 8 ranks; ZeRO's table with sums of gradients in fp32
    [(0, "fp32", 4, 4, 8), (1, "bf16", 2, 4 + 2, 12 / 8), (2, "bf16", 2, 4 / 8, 12 / 8), (3, "bf16", 2 / 8, 4 / 8, 12 / 8),
     (3, "fp32", 4 / 8, 4 / 8, 8 / 8)],
)  # fmt: skip
def test_each_stage_divides_more(stage, precision, weights, gradients, optimizer):
    found = bytes_of(8, f"parallel.zero_stage={stage}", f"train.precision={precision}")
    wanted = {"weights": weights, "gradients": gradients, "optimizer": optimizer}
    assert found == {(kind, "GPU"): pytest.approx(each * TOTAL) for kind, each in wanted.items()}


def test_what_is_offloaded_lies_elsewhere():
    stage_3 = "parallel.zero_stage=3"
    assert set(bytes_of(8, stage_3, "parallel.offload=optimizer")) == {
        ("weights", "GPU"), ("gradients", "host"), ("optimizer", "host"),
    }  # fmt: skip
    on_disk = bytes_of(8, stage_3, "parallel.offload=parameters", "parallel.nvme_dir=/nvme")
    assert set(on_disk) == {("weights", "host"), ("gradients", "host"), ("optimizer", "disk")}
    assert on_disk["optimizer", "disk"] == pytest.approx(12 / 8 * TOTAL)
    twice = bytes_of(64, stage_3, "parallel.hpz_ranks=8")
    assert twice["weights", "GPU"] == pytest.approx((2 / 64 + 2 / 8) * TOTAL)


def test_the_json_is_what_deepspeed_is_told():
    config = load_config(CONFIG, ["parallel={zero_stage: 3, offload: optimizer, nvme_dir: /nvme, hpz_ranks: 8}"])
    text = explain_parallel(config, 64)
    words, _, settings = text.partition("DeepSpeed is told:\n")
    shape = resolve_shape(config.model, config.tokenizer.vocab_size, config.data.seq_len)
    assert json.loads(settings) == deepspeed_settings(config, BatchPlan.of(config, 64), num_parameters(shape))
    assert "6,738,415,616 parameters on 64 ranks, bf16, adamw." in words
    [own] = [line.split() for line in words.splitlines() if line.startswith("> ")]
    assert own == "> 3 optimizer 1.90 GB 421.15 MB 1.26 GB 1.90 GB 421.15 MB 1.26 GB".split()
    assert "masters and moments are kept in files in /nvme, gradients come to the host's memory" in words
    assert "parallel.hpz_ranks 8: so many neighbouring ranks hold the weights once more" in words
    assert "runs as 1 here" in explain_parallel(load_config(CONFIG, ["parallel.zero_stage=0"]), 64)


def test_the_command_says_it_and_starts_nothing(capsys):
    assert main(["--explain", "64", str(CONFIG)]) == 0
    assert capsys.readouterr().out == explain_parallel(load_config(CONFIG), 64) + "\n"
    assert main(["--explain", "7", str(CONFIG)]) == 2
    assert "on 7 ranks: train.global_batch_size is" in capsys.readouterr().err
