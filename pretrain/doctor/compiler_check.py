"""The C compiler that Triton builds its launchers with."""

from __future__ import annotations

import ctypes
import os
import shutil
import sysconfig
import tempfile
from collections.abc import Iterator
from pathlib import Path

from pretrain.doctor.findings import FAILURE, WARNING, Line, Request, answer_of, last_line, ok
from pretrain.doctor.gpu_check import has_gpus

_SOURCE = "#include <Python.h>\nint longhaul(void) { return 42; }\n"
_MEND = "Install it (Debian, Ubuntu: apt-get install build-essential; conda install gcc_linux-64; or module load gcc)"
_HEADERS = "Install Python's headers (Debian, Ubuntu: apt-get install python3-dev; conda's Python has them)."


def check(request: Request) -> Iterator[Line]:
    """Compile, link and load what Triton would."""
    yield judge(os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang"), needed=has_gpus())


def judge(compiler: str | None, needed: bool) -> Line:
    """Try a C compiler on a file that includes Python's header.

    Args:
        compiler: path or name, as Triton chooses it; None if there is none.
        needed: there is a GPU, so that training fails without it.
    """
    outcome = FAILURE if needed else WARNING
    why = "" if needed else ": no GPU is here, and only DeepSpeed's operators on a disk would need one"
    if compiler is None:
        return Line("C compiler", outcome, f"none is found on PATH, and CC is not set{why}", f"{_MEND}, or set CC.")
    include = sysconfig.get_paths()["include"]
    with tempfile.TemporaryDirectory(prefix="longhaul-doctor-") as folder:
        source, library = Path(folder, "probe.c"), Path(folder, "probe.so")
        source.write_text(_SOURCE, encoding="utf-8")
        built = answer_of(*compiler.split(), str(source), "-shared", "-fPIC", "-o", str(library), f"-I{include}",
                          seconds=40)  # fmt: skip
        if built[0]:
            error = next((line for line in built[2].splitlines() if "error" in line), last_line(built[2]))
            mend = _HEADERS if "Python.h" in built[2] else f"{_MEND}, or set CC to one that works."
            return Line("C compiler", outcome, f"{compiler} fails: {error}{why}", mend)
        if ctypes.CDLL(str(library)).longhaul() != 42:
            return Line("C compiler", outcome, f"{compiler} builds what does not run here", f"{_MEND}.")
    words = answer_of(*compiler.split(), "--version")[1].splitlines()
    return ok("C compiler", f"{compiler}: {words[0] if words else 'version unknown'}; Python.h is found")
