"""What is said of `parallel`: the figures are ZeRO's, and the JSON is what DeepSpeed is told."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from launch.pretrain import main
from pretrain.options.batch_plan import BatchPlan
from pretrain.options.families import num_parameters, resolve_shape
from pretrain.options.settings import load_config
from pretrain.planning.plan_memory import disk_bytes, host_bytes, resident
from pretrain.training.explain_parallel import explain_parallel
from pretrain.zero.deepspeed_settings import deepspeed_settings

ROOT = Path(__file__).resolve().parents[2]
CONFIG = ROOT / "configs/llama-7b.yaml"
TOTAL = 6_738_415_616
KINDS = ("parameters", "gradients", "masters", "moments", "buckets")
UNITS = {"TB": 1e12, "GB": 1e9, "MB": 1e6, "kB": 1e3}


def test_a_disk_and_hpz_move_what_they_say():
    def places(*overrides: str) -> tuple[dict[str, int], int, int]:
        config = load_config(CONFIG, ["train.micro_batch_size=1", "parallel.zero_stage=3", *overrides])
        return resident(config, 64), host_bytes(config, 64)["offload"], disk_bytes(config, 64)

    plain, no_host, no_disk = places()
    in_memory, host, _ = places("parallel.offload=optimizer")
    on_disk, less_host, disk = places("parallel.offload=optimizer", "parallel.nvme_dir=/nvme")
    assert (no_host, no_disk) == (0, 0) and in_memory == on_disk
    assert disk == pytest.approx(12 * TOTAL / 64)  # a master and two moments
    assert host - less_host == pytest.approx(disk - 4 * 4 * 100_000_000)  # but for the buffers
    twice, *_ = places("parallel.hpz_ranks=8")
    assert twice["parameters"] - plain["parameters"] == pytest.approx(2 * TOTAL / 8)


def test_the_json_is_what_deepspeed_is_told():
    config = load_config(CONFIG, ["parallel={zero_stage: 3, offload: optimizer, nvme_dir: /nvme, hpz_ranks: 8}"])
    text = explain_parallel(config, 64)
    words, _, settings = text.partition("DeepSpeed is told:\n")
    shape = resolve_shape(config.model, config.tokenizer.vocab_size, config.data.seq_len)
    assert json.loads(settings) == deepspeed_settings(config, BatchPlan.of(config, 64), num_parameters(shape))
    assert "6,738,415,616 parameters on 64 ranks, bf16, adamw." in words
    [own] = [line.split() for line in words.splitlines() if line.startswith("> ")]
    assert own[:3] == [">", "3", "optimizer"] and own[-2:] == ["1.26", "GB"]  # on disk: 12 bytes a parameter / 64
    assert "masters and moments are kept in files in /nvme, gradients come to the host's memory" in words
    assert "parallel.hpz_ranks 8: so many neighbouring ranks hold the weights once more" in words
    assert "A checkpoint has 80.86 GB." in words
    lora = load_config(CONFIG, ["resume={from: x, optimizer: false}", "train.lora={}"])
    assert (
        "6,755,258,368 parameters, of which 16,842,752, the adapters, are trained, on 64 ranks, bf16, adamw. "
        "A checkpoint has 202.11 MB."
    ) in explain_parallel(lora, 64)
    assert "runs as 1 here" in explain_parallel(load_config(CONFIG, ["parallel.zero_stage=0"]), 64)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    ("stage", "offload"),
    [(0, "none"), (1, "none"), (1, "optimizer"), (2, "none"), (2, "optimizer"), (3, "none"), (3, "parameters")],
)
def test_words_and_figures_are_the_planners(precision: str, stage: int, offload: str):
    config = load_config(
        CONFIG, [f"parallel={{zero_stage: {stage}, offload: {offload}}}", f"train.precision={precision}"]
    )
    text, held = explain_parallel(config, 64), resident(config, 64)
    assert "64 ranks" in text and "Bytes of one rank when the last backward pass of a step is over, without" in text
    [own] = [line for line in text.splitlines() if line.startswith("> ")]
    cells = [own[24 + 12 * number : 36 + 12 * number].strip() for number in range(6)]
    for cell, value in zip(cells, [*(held[kind] for kind in KINDS), sum(held.values())], strict=True):
        shown = 0 if cell == "-" else float(cell.split()[0]) * UNITS[cell.split()[1]]
        assert shown == pytest.approx(value, rel=0.006)
    [words] = [line for line in text.splitlines() if line.startswith("parallel.zero_stage")]
    says_whole = "gradients and the optimizer's states whole" in words or "gradients, these in fp32 too" in words
    assert says_whole == (held["gradients"] >= 4 * TOTAL)
    assert ("each rank then keeps its share" in words) == (stage == 1 and (precision, offload) != ("bf16", "none"))


def test_ranks_that_share_rows_are_mentioned():
    overrides = ["parallel.sequence_parallel_size=4", "train.global_batch_size=64", "train.micro_batch_size=1"]
    text = explain_parallel(load_config(CONFIG, overrides), 64)
    assert "parallel.sequence_parallel_size 4: so many neighbouring ranks share each row, and its activations;" in text


def test_the_command_says_it_and_starts_nothing(capsys):
    assert main(["--explain", "64", str(CONFIG)]) == 0
    assert capsys.readouterr().out == explain_parallel(load_config(CONFIG), 64) + "\n"
    assert main(["--explain", "64", str(CONFIG), "parallel={zero_stage: 3, hpz_ranks: 3}"]) == 2
    assert "on 64 ranks: parallel.hpz_ranks is 3; expected a divisor of 64." in capsys.readouterr().err
    assert main(["--explain", "7", str(CONFIG)]) == 2
    assert "on 7 ranks: train.global_batch_size is" in capsys.readouterr().err
