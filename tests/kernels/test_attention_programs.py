"""The attention programs of every tile table, compiled ahead of time: what they use, held against a baseline."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import triton

from kernels.tile_table import FOLDER, KERNELS, Tile, read_table
from tests.kernels.compile_attention import sources_digest

ROOT = Path(__file__).resolve().parents[2]
BASELINE = ROOT / "tests/kernels/attention_resources.json"
VERSION = ".".join(triton.__version__.split(".")[:2])
COLUMNS = ("registers", "spilled_bytes", "loop_spills", "shared_bytes")
# Shared memory that one program can have, in bytes.
SHARED_BYTES = {"sm_80": 166912, "sm_86": 101376, "sm_90": 232448, "sm_100": 232448, "gfx942": 65536}
WIDTHS = (32, 64, 128, 256)
LENGTHS = {"forward": ("few", "short", "long", "extra")} | dict.fromkeys(KERNELS[1:], ("short", "long", "extra"))


@pytest.mark.parametrize("table", sorted(path.stem for path in FOLDER.glob("*.json")))
def test_a_table_has_a_tile_for_every_shape(table):
    content = read_table(table)
    assert content["gpu"] and (content["tuned"] is None or {"date", "torch", "triton"} <= set(content["tuned"]))
    assert set(content["tiles"]) == set(KERNELS)
    for kernel, tiles in content["tiles"].items():
        assert set(tiles) == {f"{width} {length}" for width in WIDTHS for length in LENGTHS[kernel]}
        for numbers in tiles.values():
            tile = Tile(*numbers)
            assert all(block in (16, 32, 64, 128, 256) for block in (tile.block_q, tile.block_k))
            assert tile.num_warps in (4, 8, 16) and 1 <= tile.num_stages <= 5


def name_of(report: dict) -> str:
    """Name a program as the baseline does."""
    flags = "".join(f" {flag}" for flag in ("softcap", "dropout") if report.get(flag))
    tile = f"{report['block_q']}x{report['block_k']} {report['num_warps']} {report['num_stages']}"
    return f"{report['target']} {report['program']} {report['head_dim']} {tile}{flags}"


def baseline() -> dict:
    """The baseline of this Triton; empty if there is none."""
    return json.loads(BASELINE.read_text(encoding="utf-8")).get(VERSION, {})


@pytest.fixture(scope="module")
def reports(tmp_path_factory) -> list[dict]:
    """What the programs use: all of them, or where nothing changed since the baseline was made, heads of 128."""
    tables = [["sm_90"], ["sm_80", "sm_86", "sm_100:long", "gfx942:long"]]
    if baseline().get("sources") == sources_digest():
        tables = [["sm_90:128"], ["sm_80:128"]]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("cache")), "PYTHONPATH": str(ROOT)}
    commands = [[sys.executable, "tests/kernels/compile_attention.py", *names] for names in tables]
    running = [
        subprocess.Popen(c, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for c in commands
    ]
    found = []
    for process in running:
        out, errors = process.communicate()
        assert process.returncode == 0, errors
        found += [json.loads(line) for line in out.splitlines()]
    return found


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_programs_fit_and_use_the_matrix_units(reports):
    for report in reports:
        target, name = report["target"], name_of(report)
        assert report["shared_bytes"] <= SHARED_BYTES[target], name
        assert report["f64"] == 0 and report["scratch_bytes"] == 0, name
        assert not report["wgmma_serialized"], name
        if report["program"] == "delta":
            continue
        assert report["tma" if target in ("sm_90", "sm_100") else "shared_bytes"] > 0, name
        few = report["block_k" if report["program"].startswith("grad_kv") else "block_q"] < 64  # rows of a product
        units = {"sm_90": "mma" if few else "wgmma", "sm_100": "mma" if few else "tcgen05", "gfx942": "mfma"}
        if target != "sm_100" or report["head_dim"] < 256:
            assert report[units.get(target, "mma")] > 0, name
        if report["program"] == "grad_kv_atomic":
            assert report["tma_add" if target in ("sm_90", "sm_100") else "atomics"] > 0 or target == "gfx942", name


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_programs_use_no_more_than_they_did(reports):
    expected = baseline()
    if not expected:
        pytest.skip(f"no baseline of Triton {VERSION}")
    for report in reports:
        if report["target"].startswith("sm_8") or report["target"] == "sm_90":
            name = name_of(report)
            assert name in expected, f"{name} has no baseline: run python tests/kernels/test_attention_programs.py"
            for column, most in zip(COLUMNS, expected[name], strict=True):
                assert report[column] <= most, f"{name}: {column} {report[column]}, was {most}"


def main() -> None:
    """Write what the installed Triton makes into the baseline: `python tests/kernels/test_attention_programs.py FILE...`.

    The files are what `tests/kernels/compile_attention.py` printed.
    """
    lines = [line for path in sys.argv[1:] for line in Path(path).read_text(encoding="utf-8").splitlines()]
    found = {name_of(report): [report[column] for column in COLUMNS] for report in map(json.loads, lines)}
    baselines = json.loads(BASELINE.read_text(encoding="utf-8")) if BASELINE.exists() else {}
    baselines[VERSION] = {"sources": sources_digest()} | dict(sorted(found.items()))
    parts = []
    for version, programs in sorted(baselines.items()):
        rows = ",\n".join(f"  {json.dumps(name)}: {json.dumps(numbers)}" for name, numbers in programs.items())
        parts.append(f" {json.dumps(version)}: {{\n{rows}\n }}")
    BASELINE.write_text("{\n" + ",\n".join(parts) + "\n}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
