"""The attention benchmark and the tuner of its tiles, as far as a CPU goes: counts, plans, masks, tables, choices."""

from __future__ import annotations

import argparse
import inspect
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import varlen

from benchmarks import attention as bench
from benchmarks import table, tune
from benchmarks.record import Record
from benchmarks.tile_candidates import CANDIDATES, FEW_QUERIES
from benchmarks.timing import Timer
from kernels import tile_table
from kernels.tile_table import FOLDER, KERNELS, Tile, read_table

ROOT = Path(__file__).resolve().parents[2]
KEYS = {
    "case", "implementation", "direction", "B", "T", "H", "K", "head_dim", "dtype", "tflops", "microseconds", "scored",
    "picoseconds_per_scored", "relative_error",
}  # fmt: skip
KINDS = ("causal", "documents", "full", "gqa")


def make_case(kind: str, T: int = 48, head_dim: int = 16, tokens: int = 96) -> bench.Case:
    arguments = argparse.Namespace(tokens=tokens, width=64, dtype="bf16")
    return bench.Case(kind, T, head_dim, arguments, Timer(torch.device("cpu"), repeats=1, warm_up=0))


def test_attention_is_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "attention.json"
    assert bench.main(["--shrink", "--head-dims", "64", "--out", str(out)]) == 0
    content = json.loads(out.read_text(encoding="utf-8"))
    assert [failure["part"] for failure in content["failures"]] == ["cudnn", "varlen", "flex"]
    assert all(failure["error"].startswith("left out: ") for failure in content["failures"])
    rows = content["rows"]
    assert all(set(row) == KEYS for row in rows)
    measured = {(row["case"], row["T"], row["implementation"], row["direction"]) for row in rows}
    places = [("causal", 64), ("causal", 128), ("documents", 128), ("full", 128), ("gqa", 128)]
    expected = {
        (*place, name, way) for place in places for name in ("ours", "flash") for way in ("forward", "backward")
    }
    expected |= {(*place, "ours-deterministic", "backward") for place in places}
    assert measured == {place for place in expected if place[0] != "documents" or place[2] != "flash"}
    assert all(row["relative_error"] < 2e-2 and row["microseconds"] > 0 for row in rows)
    for row in rows:
        operations = 4 * row["H"] * row["head_dim"] * row["scored"] * (1 if row["direction"] == "forward" else 2.5)
        assert row["tflops"] == pytest.approx(operations / row["microseconds"] / 1e6)
        assert row["B"] * row["T"] == 256 and row["H"] == 4 and row["K"] == (1 if row["case"] == "gqa" else 4)
    assert "causal T=128 C=64" in capsys.readouterr().out


def test_attention_goes_on_when_one_fails(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def broken(backend: object, case: object) -> None:
        raise ValueError("no such backend\nand more")

    monkeypatch.setattr(bench, "_sdpa", broken)
    assert bench.main(["--shrink", "--head-dims", "64", "--lengths", "64"]) == 0
    shown = capsys.readouterr().out
    assert "no number: causal T=64 C=64 flash: ValueError: no such backend\n" in shown
    assert bench.main(["--shrink", "--head-dims", "64", "--lengths", "64", "--seconds", "0"]) == 1
    assert "no number: gqa T=64 C=64 ours: left out: no time left" in capsys.readouterr().out


def test_the_plan_begins_with_what_matters_and_ends_with_what_compiles() -> None:
    plan = bench.plan(bench.LENGTHS, bench.HEAD_DIMS)
    assert len(set(plan)) == len(plan)
    first = plan[:24]
    assert {part.name for part in first} == {"ours", "flash", "cudnn"} and {part.kind for part in first} == {"causal"}
    assert {part.T for part in first} == {2048, 4096, 8192, 16384}
    begin_flex = [part.name for part in plan].index("flex")
    assert {part.name for part in plan[begin_flex:]} == {"flex"}
    assert [str(part) for part in plan[begin_flex : begin_flex + 2]] == [
        "causal T=8192 C=128 flex",
        "causal T=8192 C=64 flex",
    ]
    assert {(part.kind, part.T) for part in plan if part.kind != "causal"} == {
        ("documents", 8192), ("documents", 32768), ("full", 8192), ("gqa", 8192),
    }  # fmt: skip
    assert not [part for part in plan if part.kind == "documents" and part.name in ("flash", "cudnn")]
    assert {part.kind for part in plan if part.name == "varlen"} == {"documents"}


@pytest.mark.parametrize("kind", KINDS)
def test_scored_pairs_are_counted(kind: str) -> None:
    case = make_case(kind)
    assert case.B == 2 and case.H == 4 and case.K == (1 if kind == "gqa" else 4)
    start = case.visible.first_BT.tolist()
    seen = sum(
        start[b][query] <= key and (kind == "full" or key <= query)
        for b in range(2)
        for query in range(48)
        for key in range(48)
    )
    assert seen == int(case.visible.seen_BTS.sum())
    convention = seen if kind in ("documents", "full") else 2 * 48 * 48 // 2  # of published numbers, without T / 2
    assert case.scored == convention
    assert case.flops("forward") == 4 * 4 * 16 * convention and case.flops("backward") == 2.5 * case.flops("forward")


def test_documents_have_a_long_tail_and_a_mean() -> None:
    starts = bench.draw_documents(200, 1024, seed=3)
    assert torch.equal(starts, bench.draw_documents(200, 1024, seed=3))
    assert (starts.diff() >= 0).all() and (starts <= torch.arange(1024)).all()
    num_documents = sum(len(row.unique()) for row in starts)
    assert 100 < 200 * 1024 / num_documents < 156  # 128, less what the ends of rows cut off
    lengths = torch.cat([row.unique(return_counts=True)[1] for row in starts]).float()
    assert lengths.max() > 5 * lengths.median()


@pytest.mark.parametrize("kind", KINDS)
def test_implementations_agree_with_the_truth(kind: str) -> None:
    case = make_case(kind)
    for name in ("ours", "ours-deterministic", "flash"):
        if (kind, name) != ("documents", "flash"):
            errors = case.errors(bench.implementation(name, case))
            assert max(errors.values()) < 2e-2, name
    wrong = case.errors(lambda q, k, v: bench.implementation("ours", case)(q, k, v) * 1.1)
    assert min(wrong.values()) > 0.09
    lost = case.errors(lambda q, k, v: bench.implementation("ours", case)(q, k, v) * float("nan"))
    assert all(error != error for error in lost.values())
    with pytest.raises(ValueError, match="has no documents"):
        bench.implementation("flash", make_case("documents"))


def test_only_the_first_slots_of_a_long_row_are_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "NUM_CHECKED", 20)
    for kind in KINDS:
        case = make_case(kind)
        assert [x.shape[1] for x in case.exact] == [48 if kind == "full" else 20] * 4
        assert max(case.errors(bench.implementation("ours", case)).values()) < 2e-2


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("kind", KINDS)
def test_flex_sees_the_same(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)  # its backward does not run on a CPU
    case = make_case(kind, T=256, tokens=512)
    with torch.no_grad():
        actual = bench.implementation("flex", case)(case.q, case.k, case.v)
        expected = bench.implementation("ours", case)(case.q, case.k, case.v)
    torch.testing.assert_close(actual.float(), expected.float(), rtol=2e-2, atol=2e-2)


def test_varlen_gets_the_same_documents(monkeypatch: pytest.MonkeyPatch) -> None:
    signature = inspect.signature(varlen.varlen_attn)

    def by_document(*arguments: object, **options: object) -> torch.Tensor:
        bound = signature.bind(*arguments, **options).arguments
        assert bound["window_size"] == (-1, 0) and bound["cu_seq_q"].dtype == torch.int32
        bounds = bound["cu_seq_q"].tolist()
        assert torch.equal(bound["cu_seq_q"], bound["cu_seq_k"]) and bound["max_q"] == bound["max_k"]
        parts = []
        for begin, end in zip(bounds[:-1], bounds[1:], strict=True):
            assert 0 < end - begin <= bound["max_q"]
            q, k, v = (bound[name][begin:end].transpose(0, 1) for name in ("query", "key", "value"))
            parts.append(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(0, 1))
        return torch.cat(parts)

    by_document.__signature__ = signature  # type: ignore[attr-defined]
    monkeypatch.setattr(varlen, "varlen_attn", by_document)
    case = make_case("documents")
    assert max(case.errors(bench.implementation("varlen", case)).values()) < 2e-2


def made_up(device: str) -> Record:
    record = Record("attention", None, {"tokens": 16384, "width": 2048, "dtype": "bf16"})
    record.content["device"] = {"kind": "cuda", "name": device, "memory_bytes": 80 * 2**30}
    base = {"B": 2, "H": 16, "K": 16, "head_dim": 128, "dtype": "bf16", "scored": 1000, "relative_error": 3e-3}
    for case, T, name, direction, tflops, per_pair in (
        ("causal", 8192, "ours", "forward", 500.0, 2.0),
        ("causal", 8192, "flash", "forward", 350.0, 2.5),
        ("causal", 8192, "cudnn", "forward", 510.0, 2.0),
        ("causal", 8192, "ours", "backward", 410.0, 5.0),
        ("causal", 8192, "ours-deterministic", "backward", 300.0, 6.0),
        ("causal", 32768, "ours", "forward", 555.0, 2.0),
        ("documents", 8192, "ours", "forward", 430.0, 2.24),
        ("documents", 8192, "varlen", "forward", 300.0, 3.0),
    ):
        record.add(
            **base, case=case, T=T, implementation=name, direction=direction, tflops=tflops, microseconds=1.0,
            picoseconds_per_scored=per_pair,
        )  # fmt: skip
    return record


def test_the_table_shows_attention_beside_its_targets() -> None:
    lines = [line.split() for line in table.render([made_up("NVIDIA H100 80GB HBM3").content]).splitlines()]
    assert ["forward", "ours", "flash", "cudnn", "varlen", "target", "ours", "/", "best", "of", "torch's"] in lines
    assert ["causal", "T=8192", "C=128", "500", "350", "510", "-", "540", "0.98"] in lines
    assert ["causal", "T=32768", "C=128", "555", "-", "-", "-", "-", "-"] in lines
    assert ["documents", "T=8192", "C=128", "430", "-", "-", "300", "-", "1.43"] in lines
    assert ["backward", "ours", "ours-deterministic", "target", "ours", "/", "best", "of", "torch's"] in lines
    assert ["causal", "T=8192", "C=128", "410", "300", "420", "-"] in lines
    assert ["documents", "T=8192", "C=128", "forward", "ours", "1.12"] in lines
    assert "target: at most 1.15" in table.render([made_up("NVIDIA A100").content])
    assert "540" not in table.render([made_up("NVIDIA A100").content])


def test_an_empty_record_of_attention_is_shown() -> None:
    record = Record("attention", None, {"tokens": 1, "width": 1, "dtype": "bf16"})
    assert "attention: no rows" in table.render([record.content])


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.json")), ids=lambda path: path.stem)
def test_tables_are_written_as_they_are(path: Path) -> None:
    assert tune.table_text(json.loads(path.read_text(encoding="utf-8"))) == path.read_text(encoding="utf-8")


def test_every_entry_of_a_table_is_tuned_with_sound_candidates() -> None:
    tiles = read_table("sm_90")["tiles"]
    everything = tune.list_entries(KERNELS, tune.list_classes())
    assert sorted(everything) == sorted((kernel, name) for kernel in tiles for name in tiles[kernel])
    assert everything[:4] == [
        ("forward", "128 long"), ("grad_kv_atomic", "128 long"), ("forward", "64 long"), ("grad_kv_atomic", "64 long"),
    ]  # fmt: skip
    assert tune.list_entries(["grad_q"], ["64 short"]) == [("grad_q", "64 short")]
    for kernel, name in everything:
        current = Tile(*tiles[kernel][name])
        found = tune.list_candidates(kernel, name, current)
        assert found[0] == current and len(set(found)) == len(found) >= 4
    for numbers in (
        *FEW_QUERIES,
        *(tile for widths in CANDIDATES.values() for tiles in widths.values() for tile in tiles),
    ):
        assert all(number & (number - 1) == 0 for number in numbers[:3]) and min(numbers[:2]) >= 16


def test_a_shape_has_to_be_two_percent_quicker() -> None:
    a, b, c = Tile(128, 128, 8, 2), Tile(64, 64, 4, 2), Tile(32, 64, 4, 2)
    assert tune.choose(a, {a: 1.0, b: 0.99}) == a
    assert tune.choose(a, {a: 1.0, b: 0.97, c: 0.96}) == c
    assert tune.choose(a, {b: 2.0, c: 1.0}) == c  # the current one does not run
    assert tune.choose(a, {}) == a


class FakeWorkload:
    """Times and refusals of shapes by number of queries; counts its runs."""

    def __init__(self, refused: dict[int, str]) -> None:
        self.refused = refused

    def prepare(self, kernel: str) -> None:
        pass

    def launch(self, kernel: str, tile: Tile) -> Tile:
        return tile

    def attempt(self, kernel: str, tile: Tile) -> str | None:
        return self.refused.get(tile.block_q)


def fake_timer(rounds: list[dict[int, float]]) -> SimpleNamespace:
    """Take the seconds of a shape from the first round, and from the next one when it is timed again."""
    times = {queries: [round[queries] for round in rounds if queries in round] for queries in rounds[0]}
    return SimpleNamespace(median_seconds=lambda run, prepare: times[run(prepare()).block_q].pop(0))


def test_the_tuner_chooses_and_says_what_it_left_out() -> None:
    tiles = [Tile(queries, 64, 4, 2) for queries in (128, 64, 32, 16)]
    workload = FakeWorkload({16: "OutOfResources: out of resource: shared memory"})
    timer = fake_timer([{128: 1e-3, 64: 0.9e-3, 32: 1.2e-3}, {128: 1e-3, 64: 0.95e-3}])
    outcome = tune.tune_entry(workload, "forward", tiles, timer, num_workers=2)
    assert outcome.best == tiles[1]
    assert outcome.describe().splitlines() == [
        "  [128, 64, 4, 2] (1000 us) -> [64, 64, 4, 2] (950 us), of 3",
        "  left out [16, 64, 4, 2]: OutOfResources: out of resource: shared memory",
    ]
    lucky = fake_timer([{128: 1e-3, 64: 0.9e-3, 32: 1.2e-3}, {128: 0.9e-3, 64: 0.9e-3}])
    assert "stays" in tune.tune_entry(workload, "forward", tiles, lucky, 2).describe()
    failing = tune.tune_entry(FakeWorkload({128: "wrong"}), "forward", tiles[:2], fake_timer([{64: 1.0}]), 2)
    assert failing.best == tiles[1] and "[128, 64, 4, 2] (fails) -> [64, 64, 4, 2]" in failing.describe()
    nothing = tune.tune_entry(FakeWorkload({128: "wrong"}), "forward", tiles[:1], fake_timer([{}]), 2)
    assert nothing.best == tiles[0] and "no shape ran" in nothing.describe()


def test_a_tuned_table_is_written_and_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    better = Tile(64, 32, 4, 2)

    def tune_entry(workload: object, kernel: str, tiles: list[Tile], *_: object) -> tune.Outcome:
        if kernel == "grad_q":
            raise RuntimeError("CUDA error")
        return tune.Outcome(tiles[0], better if kernel == "forward" else tiles[0], {tiles[0]: 2.0, better: 1.0})

    monkeypatch.setattr(tune, "tune_entry", tune_entry)
    monkeypatch.setattr(tune, "representative", lambda shape_class, device: None)
    monkeypatch.setattr(tune, "Timer", lambda *_, **__: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    out = tmp_path / "tiles/nvidia-h100-80gb-hbm3.json"
    asked = ["--classes", "128 long, 64 short", "--out", str(out)]
    assert tune.main([*asked, "--dry-run"]) == 0 and not out.exists()
    assert tune.main([*asked, "--seconds", "-1"]) == 0 and not out.exists()
    assert "grad_q, 64 short: not reached, stays as it is" in capsys.readouterr().out
    assert tune.main(asked) == 0
    shown = capsys.readouterr().out
    assert (
        "grad_q, 128 long:\n  stays as it is: RuntimeError: CUDA error\n" in shown and "2 entries are new in" in shown
    )
    generation = read_table("sm_90")
    monkeypatch.setattr(tile_table, "FOLDER", out.parent)
    assert tile_table.table_name(torch.device("cuda", 0)) == out.stem
    found = read_table(out.stem)
    read_table.cache_clear()
    assert found["gpu"] == "NVIDIA H100 80GB HBM3" and set(found["tuned"]) == {"date", "torch", "triton", "device"}
    changed = [
        (kernel, name) for kernel, tiles in found["tiles"].items() for name in tiles
        if tiles[name] != generation["tiles"][kernel][name]
    ]  # fmt: skip
    assert changed == [("forward", "64 short"), ("forward", "128 long")]
    assert out.read_text(encoding="utf-8") == tune.table_text(found)


def test_the_tuner_says_what_it_needs(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert tune.main([]) == 1
    assert capsys.readouterr().err == (
        "tune: torch.cuda.is_available() is False; expected a GPU of the kind that the table is for.\n"
    )
    with pytest.raises(SystemExit):
        tune.main(["--classes", "128 wide"])
    assert "--classes has 128 wide; expected some of 128 long, 64 long" in capsys.readouterr().err


INTERPRETED = """
import torch
from benchmarks.timing import Timer
from benchmarks.tune import Workload, tune_entry
from kernels.tile_table import KERNELS, Tile

timer = Timer(torch.device("cpu"), repeats=1, warm_up=0)
for sizes in ((1, 40, 40, 2, 16), (1, 1, 40, 2, 16)):
    workload = Workload(sizes, torch.device("cpu"), torch.float32)
    for kernel in KERNELS if sizes[1] > 1 else ("forward",):
        outcome = tune_entry(workload, kernel, [Tile(16, 32, 4, 1), Tile(32, 16, 4, 1)], timer, 1)
        assert not outcome.refused and len(outcome.seconds) == 2, outcome
        workload.expected[kernel][-1] = 1.05 * workload.expected[kernel][-1]
        assert workload.attempt(kernel, Tile(16, 32, 4, 1)) == "its result is off by 0.048"
print("fine")
"""


def test_the_tuner_launches_every_program_alone() -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-W", "ignore", "-c", INTERPRETED]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200)
    assert done.stdout == "fine\n", done.stderr


def test_the_script_on_a_gpu(tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\necho "called: $*"\n', encoding="utf-8")  # has a GPU and every package
    python.chmod(0o755)
    called = {}
    for parts in ("", "tune attention", "launches"):
        out = tmp_path / f"out {parts}"
        environment = os.environ | {"PYTHON": str(python), "OUT": str(out), "PARTS": parts}
        command = ["bash", str(ROOT / "benchmarks/gpu.sh")]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0 and done.stderr == "", done.stderr
        log = (out / "log.txt").read_text(encoding="utf-8")
        called[parts] = [line.split()[1] for line in log.splitlines() if line.startswith("called: benchmarks/")]
        assert (f"called: benchmarks/tune.py --seconds 160 --out {out}/tiles.json" in log) == ("tune" in parts)
        attention = f"called: benchmarks/attention.py --out {out}/attention.json --seconds 90\n"
        assert (attention in log) == (parts != "launches")
        tests = [line for line in log.splitlines() if line.startswith("called: -m pytest tests/gpu")]
        marks = {"": ["-m not launches"], "launches": ["-m launches"], "tune attention": []}[parts]
        assert [re.findall("-m (?:not )?launches", line) for line in tests] == [[mark] for mark in marks]
    assert called[""] == ["benchmarks/attention.py", "benchmarks/norms.py", *["benchmarks/step.py"] * 3]
    assert called["tune attention"] == ["benchmarks/tune.py", "benchmarks/attention.py"] and called["launches"] == []
