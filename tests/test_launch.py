"""Every way to start a command finds the library, although `launch/pretrain.py` has its name."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
COMMANDS = sorted(path.stem for path in (ROOT / "launch").glob("*.py") if path.stem != "__init__")
WITHOUT_TORCH = "import sys, pretrain.prepare; sys.exit('torch' in sys.modules)"


def run(folder: Path, *command: str) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    return subprocess.run(
        [sys.executable, *command], cwd=folder, env=environment, capture_output=True, text=True, timeout=120
    )


@pytest.mark.launches
@pytest.mark.parametrize("name", COMMANDS)
def test_file_module_and_link(name: str, tmp_path: Path) -> None:
    link = tmp_path / f"{name}.py"
    link.symlink_to(ROOT / "launch" / link.name)
    file = str(ROOT / "launch" / link.name)
    for folder, command in [(ROOT, [f"launch/{name}.py"]), (ROOT, ["-m", f"launch.{name}"]), (tmp_path, [file]),
                            (tmp_path, [str(link)])]:  # fmt: skip
        done = run(folder, *command, "--help")
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout.startswith("usage: ")


@pytest.mark.launches
@pytest.mark.parametrize("form", [["-m", "launch.pretrain"], ["launch/pretrain.py"]], ids=["module", "file"])
def test_the_library_is_found(form: list[str]) -> None:
    done = run(ROOT, *form, "none.yaml")
    assert done.returncode == 2
    assert done.stderr == "error: none.yaml: cannot be read: No such file or directory.\n"


@pytest.mark.launches
def test_text_is_prepared_without_torch() -> None:
    assert run(ROOT, "-c", WITHOUT_TORCH).returncode == 0


@pytest.mark.launches
def test_transformers_imports_beside_our_kernels() -> None:
    # its `is_kernels_available` finds our folder of that name
    assert run(ROOT, "-c", "import kernels, transformers; transformers.AutoModelForCausalLM").returncode == 0
