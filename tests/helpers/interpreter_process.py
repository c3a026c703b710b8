"""Runs a file of tests in Triton's interpreter.

`TRITON_INTERPRET` is read when a kernel is defined, so it cannot be set in a process that has imported `kernels`.
"""

from __future__ import annotations

import os
import subprocess
import sys

from tests.helpers.rank_helpers import ROOT


def run_interpreted(file: str, selected: str) -> None:
    """Run the tests of `file` whose names match `selected`; fail with what they printed."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", file, "-k", selected]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout, done.stdout
