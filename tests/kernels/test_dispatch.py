import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kernels.dispatch import num_programs, row_block, rows_of, use_triton

ROOT = Path(__file__).resolve().parents[2]


def test_a_cpu_tensor_takes_the_truth_unless_interpreted(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert not use_triton(torch.zeros(1))
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert use_triton(torch.zeros(1))


@pytest.mark.parametrize("width", [1, 31, 64, 760, 8192, 8193, 32768, 65536])
def test_a_tile_holds_the_row(width):
    block, num_warps = row_block(width)
    assert block >= width and block & (block - 1) == 0
    assert num_warps in (1, 2, 4, 8, 16, 32)
    assert block <= 16 * 32 * num_warps or block > 8192


def test_rows_are_viewed_where_they_can_be():
    wide = torch.randn(4, 6, 10)
    assert rows_of(wide[:, :, 2:7]).data_ptr() == wide[0, 0, 2:].data_ptr()
    transposed = wide.transpose(1, 2)
    assert rows_of(transposed).stride(-1) == 1
    assert torch.equal(rows_of(transposed), transposed.contiguous().view(-1, 6))


def test_no_more_programs_than_rows():
    assert num_programs(torch.zeros(1), 2, 4) == 2
    assert num_programs(torch.zeros(1), 0, 4) == 0


def test_programs_are_numbered_along_one_axis():  # the others end at 65535: Fast-LLM#386
    axes = re.findall(r"program_id\((.*?)\)", "".join(p.read_text() for p in sorted(ROOT.glob("kernels/*.py"))))
    assert len(axes) >= 15 and set(axes) == {"0"}


def test_programs_compile_for_ampere_and_hopper_without_spills_or_fp64(tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "tests/kernels/compile_programs.py", "768", "8192"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    reports = [json.loads(line) for line in done.stdout.splitlines()]
    rows = 2 * 2 + 2  # norms and SwiGLU, forward and backward
    assert len(reports) == 2 * (2 * rows + 2 + 1 + 5)  # GPUs; widths, GELU, dropout, and five shapes of heads
    for report in reports:
        assert report["spilled_bytes"] == 0, report
        assert report["f64"] == 0, report
        assert report["wide_loads"] > 0, report
        if "norm" not in report["kernel"]:
            assert report["registers"] <= 64, report
            assert report["wide_stores"] == report["stores"], report
            # the angles of heads of 80 are read one by one and spread through shared memory; dropout reads three numbers
            few = 2 if report["shape"] == "12x80" else 3 if report["kernel"].startswith("dropout") else 0
            assert report["loads"] - report["wide_loads"] <= few, report
