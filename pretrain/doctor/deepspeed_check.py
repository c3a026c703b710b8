"""Whether DeepSpeed can be imported, and which of the operators that it compiles could be built here."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from typing import Any

import torch

from pretrain.doctor.findings import Line, Request, ok, skipped, warning
from pretrain.zero.engine import import_deepspeed

# operator: (its builder, which option needs it, what it needs)
_AIO = "g++, ninja and libaio's headers (Debian, Ubuntu: apt-get install build-essential ninja-build libaio-dev)"
OPERATORS = {
    "async_io": ("AsyncIOBuilder", "parallel.nvme_dir", _AIO),
    "cpu_adam": ("CPUAdamBuilder", "", "g++ and ninja (Debian, Ubuntu: apt-get install build-essential ninja-build)"),
    "quantizer": ("QuantizerBuilder", "parallel.quantize", "the CUDA toolkit with nvcc, of torch's version"),
}
_NOT_USED = "no option needs it: offload updates by torch's fused Adam"


def check(request: Request) -> Iterator[Line]:
    """Import DeepSpeed as training does, and ask for each operator; with `compiles` build it."""
    begin = time.monotonic()
    deepspeed = import_deepspeed()
    yield ok("import", f"deepspeed {deepspeed.__version__}, {time.monotonic() - begin:.1f} s")
    missing = [program for program in ("g++", "ninja") if shutil.which(program) is None]
    for name, (builder, option, needs) in OPERATORS.items():
        operator = getattr(deepspeed.ops.op_builder, builder, None)
        if name == "quantizer" and not torch.cuda.is_available():
            yield skipped(name, f"its kernels are CUDA's, and there is no GPU; for {option}")
        elif operator is None:
            yield skipped(name, f"not offered for this kind of machine; for {option}" if option else _NOT_USED)
        else:
            yield judge(name, operator(), option, needs, missing, request.compiles)


def judge(name: str, builder: Any, option: str, needs: str, missing: list[str], compiles: bool) -> Line:
    """Say whether an operator can be built here.

    Args:
        name: of the operator.
        builder: DeepSpeed's.
        option: that needs it; empty if none does.
        needs: what building it takes.
        missing: programs that are not on PATH.
        compiles: build it.
    """
    use = f"for {option}" if option else _NOT_USED
    mend = f"If wanted, install {needs}." if option else f"Nothing is to be done; to build it, install {needs}."
    is_compatible = builder.is_compatible(verbose=False)
    if not is_compatible or missing:
        lacking = f"{' and '.join(missing)} not on PATH" if missing else "what it needs is not found"
        return skipped(name, f"cannot be built here ({lacking}); {use}", mend)
    if not compiles:
        return ok(name, f"could be built here (--compile does); {use}")
    begin = time.monotonic()
    try:
        builder.load(verbose=False)
    except (RuntimeError, ImportError, OSError) as error:
        lines = [line for line in str(error).splitlines() if "error" in line.lower()] or [str(error)]
        return warning(name, f"does not compile: {lines[0].strip()}; {use}", mend)
    return ok(name, f"built and loaded in {time.monotonic() - begin:.0f} s; {use}")
