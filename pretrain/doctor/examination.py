"""The checks, one after the other, each in a process of its own and not longer than its time."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from typing import IO

from pretrain.doctor.findings import Line, Request, failure, last_line, python_command, skipped
from pretrain.redaction import redact

_GRACE_SECONDS = 2.0  # between asking a check to end and ending it
_COMPILING_SECONDS = 1800.0


@dataclass(frozen=True)
class Check:
    """One of the checks.

    Attributes:
        group: heading of its lines.
        module: of this package, whose function `check` yields them.
        seconds: that it may take.
        mend: what to do if it does not come to its end.
        needs: attribute of the request without which it has nothing to do.
        is_slow: `--quick` leaves it out.
        variables: of its environment.
    """

    group: str
    module: str
    seconds: float
    mend: str
    needs: str = ""
    is_slow: bool = False
    variables: dict[str, str] = field(default_factory=dict)


_INSTALL = "Run `make setup` again, in the environment of this Python: a package is missing or broken."
_SPACE = "Free space in /tmp, or set TMPDIR to a folder that has some."
_AGAIN = "Run `make setup` again, or in an environment of your own `pip install --force-reinstall"
CHECKS = (
    Check("packages", "package_check", 30, "Run `make setup` again."),
    Check("machine", "machine_check", 20, "Report it with the line above: this reads files of /proc and /sys only."),
    Check("GPU", "gpu_check", 120, f"{_AGAIN} torch`, and look whether `nvidia-smi` answers."),
    Check("compiler", "compiler_check", 60, "Install a C compiler (Debian, Ubuntu: apt-get install build-essential)."),
    Check("kernels", "kernel_check", 300, f"{_AGAIN} triton` in the version that belongs to torch's."),
    Check("kernels, interpreted", "kernel_check", 240, f"{_AGAIN} triton` in the version that belongs to torch's.",
          is_slow=True, variables={"TRITON_INTERPRET": "1"}),
    Check("network", "network_check", 40, "Have the name server or /etc/hosts mended: a name was asked for in vain."),
    Check("collectives", "collective_check", 180, "Look at NCCL_DEBUG=INFO, and at firewalls between local ports.",
          is_slow=True),
    Check("DeepSpeed", "deepspeed_check", 120, f"{_AGAIN} deepspeed==0.19.8`."),
    Check("disk", "disk_check", 120, "Use another folder: this one's file system hangs or fails."),
    Check("SLURM", "slurm_check", 90, "Look whether `scontrol ping` answers."),
    Check("store", "remote_check", 90, "Look at the URL, its credentials and the network.", needs="store"),
    Check("run", "run_check", 180, "Report it with the line above.", needs="config"),
)  # fmt: skip


def chosen(request: Request) -> list[Check]:
    """Return the checks that a request asks for, in their order."""
    return [
        replace(check, seconds=_COMPILING_SECONDS) if request.compiles and check.module == "deepspeed_check" else check
        for check in CHECKS
        if not check.needs or getattr(request, check.needs)
    ]


def run_check(check: Check, request: Request) -> list[Line]:
    """Run one check in a process of its own; what it had found before it failed is kept."""
    if check.is_slow and request.is_quick:
        return [skipped(check.group, "left out by --quick")]
    # in memory, for disks may be what is wrong
    with open(os.memfd_create("lines"), "w+b") as results, open(os.memfd_create("errors"), "w+b") as errors:
        file = f"/dev/fd/{results.fileno()}"
        command = python_command("pretrain.doctor.child", check.module, json.dumps(asdict(request)), file)
        process = subprocess.Popen(
            command, env=os.environ | check.variables, stdin=subprocess.DEVNULL, stdout=errors, stderr=errors,
            start_new_session=True, pass_fds=(results.fileno(),),
        )  # fmt: skip
        try:
            status: int | None = process.wait(check.seconds)
        except subprocess.TimeoutExpired:
            status = None
        finally:
            _end(process)
        lines, said = _read(results).splitlines(), _read(errors)
    found = []
    for text in lines:
        with suppress(ValueError):  # the last one may be cut off
            found.append(Line(**json.loads(text)))
    if status != 0:
        found.append(_broken(check, status, said))
    return [replace(line, text=redact(line.text), mend=redact(line.mend)) for line in found]


def _read(file: IO[bytes]) -> str:
    file.seek(0)
    return file.read().decode(errors="replace")


def _broken(check: Check, status: int | None, said: str) -> Line:
    if status is None:
        return failure(check.group, f"no answer in {check.seconds:g} s", check.mend)
    ended = signal.Signals(-status).name if status < 0 else f"status {status}"
    reason = last_line(said)
    if status < 0:  # faulthandler's first line is the reason, its last one the outermost function
        reason = next((line for line in said.splitlines() if line.startswith("Fatal")), reason)
    mend = _INSTALL if reason.startswith(("ModuleNotFoundError", "ImportError")) else check.mend
    mend = _SPACE if "No space left" in reason or "No usable temporary directory" in reason else mend
    return failure(check.group, f"the check ended with {ended}: {reason or 'it said nothing'}", mend)


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a check and all that it has started."""
    if process.poll() is None:
        with suppress(ProcessLookupError):
            process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(_GRACE_SECONDS)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    with suppress(subprocess.TimeoutExpired):  # what hangs in a file system cannot be ended at all
        process.wait(_GRACE_SECONDS)
