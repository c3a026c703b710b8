"""The page of results: current, complete, and what it says of ours beside its peers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from benchmarks import operators_cpu, plot, summary
from benchmarks.comparisons import BOUNDS, Comparison, comparisons
from benchmarks.record import Record
from benchmarks.table import TABLES
from benchmarks.timing import median_ratio

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"


def record_of(benchmark: str, *rows: dict[str, Any], **settings: Any) -> dict[str, Any]:
    record = Record(benchmark, None, settings)
    for row in rows:
        record.add(**row)
    return record.content


def test_the_page_is_current(capsys: pytest.CaptureFixture[str]) -> None:
    assert summary.main(["--check"]) == 0, capsys.readouterr().err


def test_every_benchmark_and_every_script_is_on_the_page() -> None:
    text = (FOLDER / "README.md").read_text(encoding="utf-8")
    assert sorted(match[2] for match in summary.BLOCK.finditer(text) if match[2]) == sorted(TABLES)
    scripts = [path.name for path in FOLDER.glob("*.py") if "__main__" in path.read_text(encoding="utf-8")]
    assert [name for name in scripts if name != "data_peers.py" and f"benchmarks/{name}" not in text] == []


@pytest.mark.parametrize(
    ("benchmark", "rows", "found"),
    [
        (
            "attention",
            [
                {
                    "case": "causal",
                    "T": 64,
                    "head_dim": 8,
                    "direction": "forward",
                    "implementation": name,
                    "tflops": rate,
                }
                for name, rate in (("ours", 100.0), ("ours-deterministic", 900.0), ("flash", 50.0), ("cudnn", 200.0))
            ],
            Comparison("causal T=64 C=8 forward", "cudnn", 2.0),
        ),
        (
            "norms",
            [
                {
                    "operation": "rmsnorm",
                    "width": 768,
                    "direction": "backward",
                    "implementation": name,
                    "microseconds": n,
                }
                for name, n in (("ours", 10.0), ("eager", 40.0), ("compiled", 20.0))
            ],
            Comparison("rmsnorm D=768 backward", "compiled", 0.5),
        ),
        (
            "step",
            [
                {"variant": name, "tokens_per_second": rate}
                for name, rate in (("ours-deepspeed", 200.0), ("ours-torch", 300.0), ("baseline-compiled", 100.0))
            ],
            Comparison("step", "baseline-compiled", 0.5),
        ),
        (
            "checkpoint",
            [
                {"what": name, "seconds": seconds}
                for name, seconds in (("longhaul save", 6.0), ("torch dcp save", 3.0), ("longhaul blocked", 1.0))
            ],
            Comparison("save", "torch dcp", 2.0),
        ),
    ],
)
def test_ours_is_compared_with_the_best_peer(benchmark: str, rows: list[dict[str, Any]], found: Comparison) -> None:
    assert comparisons(record_of(benchmark, *rows)) == [found]


def test_the_page_says_where_a_peer_is_quicker(tmp_path: Path) -> None:
    text = "".join(f"<!-- {name} -->\nold\n<!-- end -->\nkept\n" for name in ("losses", "devices", "results: step"))
    rows = [{"variant": "ours-deepspeed", "tokens_per_second": 100.0}, {"variant": "peer", "tokens_per_second": 150.0}]
    common = {"num_parameters": 1, "seq_len": 8, "micro_batch_size": 1, "num_micro_steps": 1, "step_seconds": 0.1}
    common |= {"mfu": None, "mfu_causal": None, "peak_memory_bytes": None}
    results = {"step-x": record_of("step", *(common | row for row in rows), config="configs/a.yaml")}
    results["step-x"]["device"] |= {"kind": "cuda", "name": "Chip"}
    written = summary.page(text, results)
    assert "in 1 of 1 comparisons" in written and "| step | peer | 1.50 |" in written and written.count("kept") == 3
    assert "| `step` | " in written and "No GPU" not in written and "![step](plots/step-x.svg)" in written
    assert summary.page(written, results) == written and "old" not in written
    results["step-x"]["device"]["kind"] = "cpu"
    assert "No GPU has run any of them" in summary.page(text, results)
    with pytest.raises(ValueError, match="README.md has no part `<!-- results: step -->`, and there are results of it"):
        summary.page(text.replace("results: step", "results: norms"), results)
    (tmp_path / "a.json").write_text(json.dumps(record_of("step", shrink=True)))
    with pytest.raises(ValueError, match="a.json was made with --shrink"):
        summary.read_results(tmp_path)
    (tmp_path / "a.json").write_text(json.dumps(record_of("setp")))
    with pytest.raises(ValueError, match="a.json is of setp; expected one of generation, attention"):
        summary.read_results(tmp_path)


def test_bars_go_left_where_ours_is_quicker() -> None:
    found = [Comparison("a < b", "c & d", 0.5), Comparison("e", "f", 2.0), Comparison("g", "h", 1.0)]
    root = ElementTree.fromstring(plot.draw_ratios("t", found))
    bars = [element.attrib for element in root if element.tag.endswith("rect")][1:]
    middle = plot.LABEL_WIDTH + plot.BARS_WIDTH / 2
    assert [bar["fill"] for bar in bars[:2]] == [plot.QUICKER, plot.SLOWER]
    assert float(bars[0]["x"]) + float(bars[0]["width"]) == middle == float(bars[1]["x"])
    assert float(bars[0]["width"]) == float(bars[1]["width"]) > 0 and float(bars[2]["width"]) == 0
    assert "a < b / c & d" in [element.text for element in root]


def test_what_has_no_peer_has_no_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "startup.json"
    path.write_text(json.dumps(record_of("startup")), encoding="utf-8")
    with pytest.raises(SystemExit):
        plot.main([str(path), str(tmp_path / "a.svg")])
    assert "compares ours with nothing: there is nothing to draw" in capsys.readouterr().err


def test_operators_on_a_cpu_are_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "operators.json"
    assert operators_cpu.main(["--sizes", "40x128x300", "--seconds", "0", "--out", str(out)]) == 0
    content = json.loads(out.read_text(encoding="utf-8"))
    assert [row["operator"] for row in content["rows"]] == list(operators_cpu.OPERATORS)
    assert all(row["ours_seconds"] > 0 and row["cpu_ratio"] > 0 for row in content["rows"])
    assert "loss" in capsys.readouterr().out and len(comparisons(content)) == len(operators_cpu.OPERATORS)
    assert not {one.peer for one in comparisons(content)} & BOUNDS


def test_operators_that_do_not_agree_are_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(operators_cpu, "gelu", lambda x: 1.01 * x)
    with pytest.raises(AssertionError, match="Tensor-likes are not close"):
        operators_cpu.measure("gelu", (40, 128, 300), 0)


def test_a_ratio_is_the_median_over_the_rounds() -> None:
    ours, others = [(1.0, 1.0), (9.0, 2.0), (3.0, 3.0)], [(1.0, 2.0), (3.0, 2.0), (1.5, 1.0)]
    assert (median_ratio(ours, others, 0), median_ratio(ours, others, 1)) == (2.0, 1.0)
