"""What a step's reports may cost at most, generously: machines that test are busy."""

from __future__ import annotations

import json
import logging

from benchmarks import reporting

MOST_SECONDS = 2e-3  # of the processor


def test_reports_are_a_small_part_of_a_step(tmp_path, capfd):
    before = list(logging.getLogger("longhaul").handlers)
    assert reporting.main(["--steps", "40", "--step-seconds", "0.02", "--out", str(tmp_path / "out.json")]) == 0
    content = json.loads((tmp_path / "out.json").read_text())
    assert [row["part"] for row in content["rows"]] == list(reporting.PARTS)
    assert 0 < content["rows"][0]["cpu_seconds"] and content["rows"][-1]["cpu_seconds"] < MOST_SECONDS
    shown = capfd.readouterr()
    assert "less than 1% of a step of 20 ms" in shown.out and shown.err == ""  # the view went to its own terminal
    assert logging.getLogger("longhaul").handlers == before
