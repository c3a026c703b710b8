"""`.ci/run` installs what is missing, and fails where it cannot: nothing is skipped in silence."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from tests.helpers.rank_helpers import ROOT

NEEDED = [
    "make",
    "gcc",
    "g++",
    "slurmctld",
    "slurmd",
    "srun",
    "munged",
    "ip",
    "faketime",
    "sshd",
    "ssh",
    "pdsh",
    "chromium",
]


@pytest.fixture
def machine(tmp_path: Path) -> Path:
    """Return a folder that is all of `PATH`: what every machine has, and an apt-get that does what the test says."""
    commands = tmp_path / "commands"
    commands.mkdir()
    for name in ("bash", "env", "dirname", "id", "sort", "touch", "chmod", "cat"):
        (commands / name).symlink_to(shutil.which(name) or name)
    add(commands, "python3", "exit 0")  # has venv
    (tmp_path / ".ci").mkdir()
    script = (ROOT / ".ci/run").read_text(encoding="utf-8")
    (tmp_path / ".ci/run").write_text(script.replace(":/usr/sbin:/sbin", ""))  # this machine's daemons are not there
    return tmp_path


def add(commands: Path, name: str, body: str) -> None:
    (commands / name).write_text(f"#!{shutil.which('bash')}\n{body}\n")
    (commands / name).chmod(0o755)


def ci(machine: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["bash", ".ci/run"], cwd=machine, env={"PATH": str(machine / "commands")},
                          capture_output=True, text=True, timeout=60)  # fmt: skip


def test_nothing_is_installed_where_nothing_is_missing(machine: Path) -> None:
    for name in NEEDED:
        add(machine / "commands", name, 'echo "$0 $* $LONGHAUL_REQUIRE_SLURM"')
    done = ci(machine)
    assert done.returncode == 0 and done.stdout.strip().endswith("make test 1")


def test_what_is_missing_is_installed(machine: Path) -> None:
    commands = machine / "commands"
    add(commands, "sudo", '"$@"')
    creates = "".join(f'echo "#!$(command -v bash)" >{commands}/{name}; chmod +x {commands}/{name};' for name in NEEDED)
    add(commands, "apt-get", f'echo "apt-get $*"; [ "$1" = update ] || {{ {creates} }}')
    done = ci(machine)
    assert done.returncode == 0, done.stderr
    assert (
        "apt-get install -y -qq --no-install-recommends chromium faketime g++ gcc iproute2 make munge openssh-client openssh-server pdsh slurm-wlm\n"
        in done.stdout
    )


def test_an_installation_that_fails_fails(machine: Path) -> None:
    add(machine / "commands", "sudo", '"$@"')
    add(machine / "commands", "apt-get", "exit 100")  # no network
    done = ci(machine)
    assert done.returncode == 1
    assert (
        ".ci/run: apt-get could not install chromium faketime g++ gcc iproute2 make munge openssh-client openssh-server pdsh slurm-wlm; the tests need them"
        in done.stderr
    )


def test_an_installation_that_does_nothing_fails(machine: Path) -> None:
    add(machine / "commands", "sudo", '"$@"')
    add(machine / "commands", "apt-get", "exit 0")
    done = ci(machine)
    assert (
        done.returncode == 1
        and ".ci/run: still missing after apt-get: chromium faketime g++ gcc iproute2 make munge openssh-client openssh-server pdsh slurm-wlm"
        in done.stderr
    )


def test_another_distribution(machine: Path) -> None:
    done = ci(machine)
    assert (
        done.returncode == 1
        and ".ci/run: install chromium faketime g++ gcc iproute2 make munge openssh-client openssh-server pdsh slurm-wlm"
        in done.stderr
    )
