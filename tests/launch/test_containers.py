"""The recipes of images: what they copy exists, and what they install is `make setup` with the image's torch."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.rank_helpers import ROOT

CONTAINERS = ROOT / "launch/containers"
DOCKERFILE = (CONTAINERS / "Dockerfile").read_text(encoding="utf-8")
DEFINITION = (CONTAINERS / "longhaul.def").read_text(encoding="utf-8")


def copied_by_docker() -> dict[str, str]:
    """Where each file or folder comes to lie."""
    (folder,) = re.findall(r"^WORKDIR (\S+)$", DOCKERFILE, re.MULTILINE)
    copies = [line.split()[1:] for line in DOCKERFILE.splitlines() if line.startswith("COPY ")]
    found = {}
    for *sources, target in copies:
        for source in sources:
            found[source] = f"{folder}/{source}"
            assert target == ("./" if len(sources) > 1 else source)  # a folder's content goes into what is named
    return found


def test_both_recipes_copy_the_same_and_all_of_it_exists() -> None:
    section = DEFINITION.partition("%files\n")[2].partition("\n\n")[0]
    copied = dict(line.split() for line in section.splitlines())
    assert copied == copied_by_docker()
    assert [source for source in copied if not (ROOT / source).exists()] == []
    assert {"Makefile", "setup.py", "configs", "kernels", "launch", "pretrain"} <= set(copied)


def test_docker_is_sent_what_is_copied_and_not_what_is_large() -> None:
    ignored = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if not line.startswith("#")]
    assert {".git", ".venv", "data", "runs"} <= set(ignored)
    files = [
        path.relative_to(ROOT) for source in copied_by_docker() for path in [ROOT / source, *(ROOT / source).rglob("*")]
    ]
    left_out = {
        str(path) for path in files for pattern in ignored
        if str(path) == pattern or (pattern.startswith("**/") and path.match(pattern[3:]))
    }  # fmt: skip
    assert [name for name in left_out if not name.endswith(("__pycache__", ".pyc"))] == []


def test_both_recipes_install_by_the_same_script_and_ask_for_a_base() -> None:
    call = "sh launch/containers/install.sh"
    assert f"RUN {call}\n" in DOCKERFILE and f"    {call}\n" in DEFINITION
    assert re.findall(r"^(?:ARG|FROM) .*", DOCKERFILE, re.MULTILINE) == ["ARG BASE", "FROM ${BASE}"]  # no default
    assert "From: {{ BASE }}\n" in DEFINITION and DOCKERFILE.rstrip().endswith("USER longhaul")


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """Return a folder with what is copied, and `bin/`, all of PATH: a python3 with torch, and no apt-get."""
    for source in ("Makefile", "setup.py"):
        shutil.copy(ROOT / source, tmp_path)
    shutil.copytree(CONTAINERS, tmp_path / "launch/containers")
    (tmp_path / "bin").mkdir()
    for name in ("sh", "id", "rm", "touch", "make", "cc", "env", "test"):
        (tmp_path / "bin" / name).symlink_to(shutil.which(name) or name)
    return tmp_path


def write(path: Path, body: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)


def install(image: Path, torch_after: str = "2.12.0 /usr/lib/torch") -> subprocess.CompletedProcess[str]:
    """Run the script with a Python that notes what it is to do; `make setup` is the real one."""
    venv = f"""\
case "$*" in
  *"print(torch"*) echo "{torch_after}" ;;
  *pip*) echo "SYSTEM_TORCH=$SYSTEM_TORCH PIP_CONSTRAINT=$PIP_CONSTRAINT $*" >>"{image}/calls" ;;
esac"""
    write(image / "venv-python", venv)
    python = f"""\
case "$*" in
  *"print(torch"*) echo "2.12.0 /usr/lib/torch" ;;
  "-m venv"*) echo "$*" >>"{image}/calls"; /bin/mkdir -p .venv/bin; /bin/cp "{image}/venv-python" .venv/bin/python ;;
esac"""
    write(image / "bin/python3", python)
    for name in ("useradd", "chown"):
        write(image / "bin" / name, f'echo "{name} $*" >>"{image}/calls"')
    return subprocess.run(["sh", "launch/containers/install.sh"], cwd=image, capture_output=True, text=True, timeout=60,
                          env={"PATH": f"{image}/bin", "PIP_CONSTRAINT": "/etc/pip/constraint.txt"})  # fmt: skip


@pytest.mark.skipif(shutil.which("make") is None or shutil.which("cc") is None, reason="make or cc is not installed")
def test_the_script_does_what_make_setup_does_and_keeps_torch(image: Path) -> None:
    done = install(image)
    assert done.returncode == 0, done.stderr
    assert (image / "calls").read_text().splitlines() == [
        "-m venv --system-site-packages .venv",
        "SYSTEM_TORCH=1 PIP_CONSTRAINT= -m pip install --quiet --disable-pip-version-check -e .[test]",
        "useradd --create-home --uid 10001 longhaul",
        "chown longhaul .",
    ]


@pytest.mark.skipif(shutil.which("make") is None or shutil.which("cc") is None, reason="make or cc is not installed")
def test_another_torch_than_the_images_fails(image: Path) -> None:
    done = install(image, torch_after="2.13.0 /opt/longhaul/.venv/lib/torch")
    assert done.returncode == 1
    assert "torch was 2.12.0 /usr/lib/torch and is 2.13.0 /opt/longhaul/.venv/lib/torch; expected the image's." in (
        done.stderr
    )


def test_with_the_images_torch_nothing_asks_for_another_one() -> None:
    code = "import runpy, setuptools\nsetuptools.setup = lambda **given: print('\\n'.join(given['install_requires']))\n"
    names = {}
    for kept in ("", "1"):
        done = subprocess.run([sys.executable, "-c", code + "runpy.run_path('setup.py')"],
                              cwd=ROOT, env=os.environ | {"SYSTEM_TORCH": kept}, capture_output=True, text=True,
                              timeout=60)  # fmt: skip
        names[kept] = {re.split(r"[^\w-]", line)[0] for line in done.stdout.splitlines()}
    assert names[""] - names["1"] == {"torch", "triton"} and "deepspeed" in names["1"]
