"""`make setup` says what is missing; `make` lists the commands. (That it installs is shown by running the tests.)"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """Return a folder that holds what `make setup` reads before it installs."""
    for name in ("Makefile", "setup.py"):
        shutil.copy(ROOT / name, tmp_path)
    return tmp_path


def make(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if not key.startswith("MAKE")}
    environment.pop("SYSTEM_TORCH", None)
    environment["LC_ALL"] = "C"
    return subprocess.run(["make", *arguments], cwd=folder, env=environment, capture_output=True, text=True, timeout=60)


def python(folder: Path, body: str) -> str:
    """Make a stand-in for Python, which gets its arguments as a shell script; return its path."""
    path = folder / "python"
    path.write_text(f"#!/bin/sh\n{body}\n", encoding="utf-8")
    path.chmod(0o755)
    return str(path)


def test_help_lists_every_target(project: Path) -> None:
    shown = make(project).stdout
    for target in ("setup", "quickstart", "test", "check", "soak", "clean"):
        assert f"  make {target} " in shown


def test_a_missing_python(project: Path) -> None:
    done = make(project, "setup", "PYTHON=absent")
    assert done.returncode == 2
    assert (
        "make setup: absent is not installed. Install Python 3.11 or newer, or name it: make setup PYTHON="
        in done.stderr
    )


def test_an_old_python(project: Path) -> None:
    old = python(project, 'if [ "$1" = -V ]; then echo Python 3.9.2; else exit 1; fi')
    assert (
        f"make setup: {old} is Python 3.9.2; expected 3.11 or newer." in make(project, "setup", f"PYTHON={old}").stderr
    )


def test_no_venv_module(project: Path) -> None:
    without = python(project, f'case "$2" in *ensurepip*) exit 1;; esac\nexec {sys.executable} "$@"')
    error = make(project, "setup", f"PYTHON={without}").stderr
    assert "cannot make virtual environments. On Debian and Ubuntu: apt-get install python3-venv" in error


def test_no_system_torch(project: Path) -> None:
    without = python(project, f'case "$2" in *torch*) exit 1;; esac\nexec {sys.executable} "$@"')
    error = make(project, "setup", "SYSTEM_TORCH=1", f"PYTHON={without}").stderr
    assert f"make setup: SYSTEM_TORCH=1, but {without} has no torch." in error
    assert not (project / ".venv").exists()


def test_the_second_time_is_quick_and_keeps_the_kind(project: Path) -> None:
    (project / ".venv").mkdir()
    (project / ".venv/.installed-with-system-torch").touch()  # newer than setup.py
    assert "Nothing to be done for 'setup'" in make(project, "setup").stdout
    os.utime(project / ".venv/.installed-with-system-torch", (1, 1))  # setup.py changed since
    assert "--system-site-packages" in make(project, "setup", "-n").stdout
