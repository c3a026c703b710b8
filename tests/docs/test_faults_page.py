"""The page of faults has a row for each fault, and names tests that exist."""

from __future__ import annotations

import re
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
PAGE = (TESTS.parent / "docs/faults.md").read_text(encoding="utf-8")


def test_every_fault_has_a_row():
    assert [int(number) for number in re.findall(r"^\| (\d+) \|", PAGE, re.MULTILINE)] == list(range(1, 35))


def test_the_tests_that_it_names_exist():
    named = re.findall(r"([\w/]+\.py)?(?:…)?(?:::(test_\w+))?`", PAGE)
    files = {path for path, _ in named if path and path != "tests/fault/conftest.py"}
    assert len(files) > 8 and [path for path in files if not (TESTS / path).is_file()] == []
    defined = set(
        re.findall(r"^def (test_\w+)\(", "".join(p.read_text("utf-8") for p in TESTS.rglob("*.py")), re.MULTILINE)
    )
    tests = {name for _, name in named if name}
    assert len(tests) > 25 and tests - defined == set()
