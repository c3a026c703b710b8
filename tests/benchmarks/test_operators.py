"""benchmarks/operators.py at tiny sizes on a CPU: that what it compares is the same, and what it writes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks import operators, table
from benchmarks.operators import OPERATORS, SHRUNK, Case, implementation
from benchmarks.record import Record

CPU = torch.device("cpu")


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("name", ["ours", "eager", "compiled"])
def test_implementations_agree_with_the_truth(operator: str, name: str) -> None:
    error = Case(operator, SHRUNK, CPU).error(implementation(name, operator, "aot_eager"))
    assert 0 < error < 0.01


def test_torchs_chunked_loss_is_the_same_loss() -> None:
    if not hasattr(torch.nn.functional, "linear_cross_entropy"):
        with pytest.raises(ValueError, match="no F.linear_cross_entropy"):
            implementation("chunked", "loss", "aot_eager")
        return
    assert 0 < Case("loss", SHRUNK, CPU).error(implementation("chunked", "loss", "aot_eager")) < 0.01


def test_what_is_wrong_is_seen() -> None:
    for operator in OPERATORS:
        right = implementation("ours", operator, "aot_eager")
        assert Case(operator, SHRUNK, CPU).error(lambda *a, right=right: 1.05 * right(*a)) > 0.04


def test_operators_are_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "operators.json"
    assert operators.main(["--shrink", "--operators", "loss,swiglu", "--out", str(out)]) == 0
    content = json.loads(out.read_text(encoding="utf-8"))
    rows = content["rows"]
    assert {(row["operator"], row["implementation"]) for row in rows} >= {
        ("loss", "ours"), ("loss", "eager"), ("loss", "compiled"), ("swiglu", "ours"), ("swiglu", "compiled"),
    }  # fmt: skip
    assert all(row["microseconds"] > 0 and row["relative_error"] < 0.01 for row in rows)
    assert all((row["percent_of_copy"] is None) == (row["operator"] == "loss") for row in rows)
    assert content["failures"][0]["part"] == "liger"
    shown = capsys.readouterr().out
    assert "operators: 64 tokens, 300 classes, width 32" in shown and "swiglu backward" in shown


def test_one_that_fails_does_not_stop_the_others(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    def fail(*inputs: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("out of order")

    monkeypatch.setitem(operators.OURS, "loss", fail)
    assert operators.main(["--shrink", "--operators", "loss,gelu"]) == 0
    shown = capsys.readouterr().out
    assert "no number: loss ours: RuntimeError: out of order" in shown and "gelu forward" in shown
    with pytest.raises(SystemExit):
        operators.main(["--operators", "conv"])
    assert "--operators has conv; expected some of loss, swiglu, rope, gelu" in capsys.readouterr().err


def test_memory_is_shown_where_it_is_counted() -> None:
    record = Record("operators", None, dict(SHRUNK))
    row = {"operator": "loss", "relative_error": 0.001, "percent_of_copy": None, "direction": "forward"}
    record.add(**row, implementation="ours", microseconds=1500.0, peak_bytes=2_170_000_000)
    record.add(**row, implementation="eager", microseconds=2500.0, peak_bytes=12_600_000_000)
    assert "1500 (2.17)  2500 (12.60)" in table.render([record.content])
