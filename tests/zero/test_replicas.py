"""Corrupted memory is noticed: by a hash that misses no flipped bit, on every rank, before anything is saved."""

from __future__ import annotations

import json

import pytest
import torch

from pretrain.checkpoints.checkpoint_files import list_steps
from pretrain.zero import replicas
from pretrain.zero.replicas import _describe, hash_tensor
from tests.helpers.rank_helpers import losses, metric_lines, run_cases

SIZE = 3 * replicas._ROW + 1001  # whole rows and a rest


def random_bits(size: int, kind: torch.dtype) -> torch.Tensor:
    limits = torch.iinfo(kind)
    return torch.randint(limits.min, limits.max, (size,), dtype=kind, generator=torch.Generator().manual_seed(1))


def plain_hash(numbers: list[int]) -> int:
    """The same with Python's whole numbers, one after the other."""

    def odd(number: int) -> int:
        x = (number + 1) * 0x9E3779B97F4A7C15 % 2**64
        x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        x = (x ^ x >> 27) * 0x94D049BB133111EB % 2**64
        return x ^ x >> 31 | 1

    row = replicas._ROW
    total = sum(number * odd(2**32 + place % row) * odd(place // row) for place, number in enumerate(numbers))
    return (total + 2**63) % 2**64 - 2**63


@pytest.mark.parametrize("kind", [torch.int16, torch.int32])
def test_the_hash_is_what_whole_numbers_give_however_it_is_summed(kind, monkeypatch):
    bits = random_bits(SIZE, kind)
    expected = plain_hash(bits.tolist())
    for at_once in (1, 2, 4):
        monkeypatch.setitem(replicas._ROWS_AT_ONCE, "cpu", at_once)
        assert int(hash_tensor(bits)) == expected
    float_kind = torch.float32 if kind == torch.int32 else torch.bfloat16
    assert int(hash_tensor(bits.view(float_kind))) == expected  # NaN and -0.0 have bits too
    assert int(hash_tensor(bits[:0])) == 0


@pytest.mark.parametrize("kind", [torch.int16, torch.int32])
def test_no_flipped_bit_is_missed(kind):
    bits = random_bits(SIZE, kind)
    expected = int(hash_tensor(bits))
    places = [0, replicas._ROW - 1, replicas._ROW, SIZE - 1, *range(7, SIZE, SIZE // 40)]
    for place in places:
        whole = bits[place].item()
        for bit in range(torch.iinfo(kind).bits):
            bits[place] ^= 1 << bit if bit < torch.iinfo(kind).bits - 1 else torch.iinfo(kind).min
            assert int(hash_tensor(bits)) != expected, (place, bit)
            bits[place] = whole
    assert int(hash_tensor(bits)) == expected


def test_what_is_at_another_place_is_noticed():
    bits = random_bits(SIZE, torch.int32)
    row, expected = replicas._ROW, int(hash_tensor(bits))
    swapped_rows = torch.cat((bits[row : 2 * row], bits[:row], bits[2 * row :]))
    swapped_blocks = torch.cat((bits[64:128], bits[:64], bits[128:]))
    swapped_neighbours = bits[[1, 0, *range(2, SIZE)]]
    others = [swapped_rows, swapped_blocks, swapped_neighbours, bits.roll(1), bits.flip(0), bits.sort().values, -bits]
    assert expected not in [int(hash_tensor(other)) for other in others]
    # sums that are equal though everything is elsewhere
    pattern = torch.arange(1024, dtype=torch.int32)
    assert int(hash_tensor(torch.cat((pattern, pattern.flip(0))))) != int(
        hash_tensor(torch.cat((pattern.flip(0), pattern)))
    )


def test_the_message_names_the_minority_or_says_that_there_is_none():
    hosts = ["a", "b", "c"]
    text = _describe(300, {"one": [5, 6, 5], "two": [1, 2, 1], "3": [1, 2, 1], "4": [1, 2, 1]}, [[]] * 3, hosts)
    assert text == (
        "step 300: memory is corrupted. 'one', 'two', '3' and 1 more should be equal on all ranks, and rank 1 on b has "
        "others than most ranks."
    )
    text = _describe(7, {"one": [5, 6]}, [[], []], hosts[:2])
    assert text.endswith(
        "'one' should be equal on all ranks, and which of the ranks (rank 0 on a, rank 1 on b) are wrong cannot be told."
    )
    text = _describe(7, {}, [[], [], ["one"]], hosts)
    assert text.endswith("On rank 2 on c the weights are not the rounded fp32 masters of 'one'.")
    text = _describe(7, {"one": [5, 6, 5, 9, 5]}, [[]] * 5, list("abcde"))
    assert "rank 1 on b, rank 3 on d have others than most ranks" in text


MATRIX, NORM = "blocks.1.ffn.down.weight", "blocks.0.attention_norm.weight"
# name, stage, precision, what is flipped, on which rank, what the error says
FLIPS = [
    ("weights", 0, "fp32", MATRIX, 2, f"'{MATRIX}' should be equal on all ranks, and rank 2 on"),
    ("moment", 0, "fp32", f"{MATRIX}/exp_avg_sq", 1, f"'{MATRIX}/exp_avg_sq' should be equal on all ranks, and rank 1"),
    ("weights", 1, "bf16", MATRIX, 0, f"'{MATRIX}' should be equal on all ranks, and rank 0 on"),
    ("weights", 1, "fp32", MATRIX, 1, f"'{MATRIX}' should be equal on all ranks, and rank 1 on"),
    ("weights", 2, "bf16", NORM, 2, f"'{NORM}' should be equal on all ranks, and rank 2 on"),
    ("master", 1, "fp32", f"{MATRIX}/master", -1, f"weights are not the rounded fp32 masters of '{MATRIX}'"),
    ("master", 2, "fp32", f"{MATRIX}/master", -1, f"weights are not the rounded fp32 masters of '{MATRIX}'"),
    ("master", 3, "fp32", f"{MATRIX}/master", 1, f"weights are not the rounded fp32 masters of '{MATRIX}'"),
    ("persistent", 3, "bf16", NORM, 1, f"'{NORM}' should be equal on all ranks, and rank 1 on"),
]


@pytest.mark.slow
@pytest.mark.launches
@pytest.mark.timeout(300)
def test_a_flipped_bit_ends_the_start_before_it_is_saved(tiny_config, tmp_path):
    common = ["train.global_batch_size=12", "train.micro_batch_size=4", "train.num_steps=6",
              "checkpoint={every_steps: 2, asynchronous: false}"]  # fmt: skip
    cases = []
    for name, stage, precision, tensor, rank, _ in FLIPS:
        own = [f"parallel.zero_stage={stage}", f"train.precision={precision}", *common]
        run = f"run.dir={tmp_path}/{name}-{stage}-{precision}"
        cases.append({"overrides": [run, *own, "guard.check_replicas_every=5"], "flip": [5, rank, tensor]})
    # what a checkpoint would hold is compared before it is written, whenever the next comparison were due
    own = ["parallel.zero_stage=0", *common]
    saved = [f"run.dir={tmp_path}/save", *own]
    cases += [{"overrides": saved, "flip": [3, 1, MATRIX]}, {"overrides": saved}]
    cases.append({"overrides": [f"run.dir={tmp_path}/unchecked", *own, "guard.check_replicas_every=0"],
                  "flip": [3, 1, MATRIX]})  # fmt: skip
    # divided weights are made anew by every update: what was wrong between two comparisons is not there any more
    own = ["parallel.zero_stage=1", "guard.check_replicas_every=5", *common]
    cases.append({"overrides": [f"run.dir={tmp_path}/between", *own], "flip": [3, 1, MATRIX]})
    outcomes = run_cases(tiny_config, cases, 3, tmp_path / "ranks")
    for (name, stage, precision, _, _, expected), outcome in zip(FLIPS, outcomes, strict=False):
        assert outcome.startswith("CorruptionError: step 4: memory is corrupted."), (name, stage, outcome)
        assert expected in outcome, (name, stage, outcome)
        run = tmp_path / f"{name}-{stage}-{precision}"
        status = json.loads((run / "status.json").read_text())
        assert (status["status"], status["exit_status"], status["step"]) == ("failed", 69, 4)
        assert list_steps(run / "checkpoints") == [2, 4]
    stopped, resumed, unchecked, between = outcomes[len(FLIPS) :]
    assert "step 4: memory is corrupted" in stopped and "CorruptionError" in stopped
    assert [resumed, unchecked, between] == ["done"] * 3
    events = [line["message"] for line in metric_lines(tmp_path / "save") if line.get("event") == "start"]
    assert events[-1].startswith("going on after step 2, and doing steps 3 to 4 again:")  # 4 was not saved
    assert len(losses(tmp_path / "save")) == 6
    assert losses(tmp_path / "unchecked") != losses(tmp_path / "save")
