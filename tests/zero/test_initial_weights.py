"""A run begins with the same weights at every stage and number of ranks, and at stage 3 no rank holds them all."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.helpers.rank_helpers import start_ranks

FAMILIES = {
    "llama": {"family": "llama", "dim": 64, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2},
    "gpt2": {"family": "gpt2", "dim": 60, "num_layers": 2, "num_heads": 4, "tie_embeddings": True},
    "qwen3": {"family": "qwen3", "dim": 64, "num_layers": 1, "num_heads": 4, "num_kv_heads": 2, "tie_embeddings": True},
}
BIG = {"family": "llama", "dim": 512, "num_layers": 8, "num_heads": 8, "ffn_dim": 1536}
CHOICES = [(0, "none"), (1, "none"), (2, "none"), (3, "none"), (2, "optimizer"), (3, "optimizer"), (3, "parameters")]


def section(model: dict, precision: str = "fp32", **parallel) -> dict:
    return {
        "run": {"seed": 5},
        "model": model,
        "tokenizer": {"model": "t.model", "vocab_size": 400},
        "data": {"sources": [{"name": "a", "shards": "s"}], "seq_len": 32},
        "optim": {"lr": 1e-3},
        "train": {"num_steps": 4, "global_batch_size": 12, "micro_batch_size": 1, "precision": precision},
        "parallel": parallel,
    }


def start(sections: list[dict], num_ranks: int, folder: Path) -> list[dict]:
    folder.mkdir()
    path = folder / "cases.json"
    path.write_text(json.dumps(sections))
    processes = start_ranks("tests/ranks/starting.py", [str(path)], num_ranks, folder / "output")
    try:
        statuses = [process.wait(400) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert statuses == [0] * num_ranks, "".join(one.read_text()[-3000:] for one in folder.glob("output-*"))
    return json.loads(path.with_suffix(".outcomes").read_text())


@pytest.mark.slow
@pytest.mark.launches
@pytest.mark.timeout(900)
def test_the_initial_weights_are_the_same_however_they_are_divided(tmp_path):
    cases = [
        (name, precision, section(model, precision, zero_stage=stage, offload=offload))
        for name, model in FAMILIES.items() for precision in ("fp32", "bf16") for stage, offload in CHOICES
        if name == "llama" or (precision == "bf16" and stage != 2)
    ]  # fmt: skip
    hashes: dict[tuple[str, str], set[str]] = {}
    for num_ranks in (1, 3):
        notes = start([case for *_, case in cases], num_ranks, tmp_path / str(num_ranks))
        for (name, precision, case), note in zip(cases, notes, strict=True):
            assert note["as_plain"], (num_ranks, case["model"], case["parallel"], precision)
            hashes.setdefault((name, precision), set()).add(note["sha256"])
    assert all(len(found) == 1 for found in hashes.values()), hashes
    assert len(set.union(*hashes.values())) == len(hashes)


@pytest.mark.slow
@pytest.mark.launches
@pytest.mark.timeout(900)
def test_at_stage_3_a_rank_begins_with_its_share_of_the_weights(tmp_path, monkeypatch):
    """Peak of resident memory, which knows no tensor that somebody forgot to count."""
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "65536")  # what is freed goes back to the system
    at_3, at_1 = (section(BIG, "bf16", zero_stage=stage) for stage in (3, 1))
    offloaded = section(BIG, "bf16", zero_stage=3, offload="parameters")
    sections = [section(FAMILIES["llama"], zero_stage=3), at_3, offloaded, at_1, at_3 | {"whole": True}]
    _, divided, offloaded, undivided, whole = start(sections, 4, tmp_path / "ranks")
    num, largest = divided["num_parameters"], divided["largest"]
    slack = 12 * largest + 4_000_000  # two parameters on their way, in fp32 and as they are kept
    for note in (divided, offloaded):
        assert note["drawn"] < 2 * num / 4 + slack, note
    # weights, fp32 masters and fp32 gradients
    assert divided["built"] < (2 + 4 + 4) * num / 4 + slack + 4_000_000, divided
    assert undivided["drawn"] < 2 * num + slack, undivided  # no fp32 copy beside them
    assert whole["drawn"] > 4 * num, whole  # a model that is whole before is noticed
