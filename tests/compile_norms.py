"""Compiles every shipped variant of the Triton norms for GPUs that this machine need not have; prints JSON lines.

Run in a process of its own, without `TRITON_INTERPRET`.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from typing import Any

import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from kernels import layer_norm, rms_norm
from kernels.dispatch import row_block

STATISTICS = ("rstd_ptr", "mean_ptr", "partial_ptr", "partial_weight_ptr", "partial_bias_ptr")


def compile_kernel(kernel: Any, capability: int, width: int) -> dict[str, Any]:
    """Compile a kernel with everything that it can do switched on; return what it uses."""
    block, num_warps = row_block(width)
    constants = {"WIDTH": width, "BLOCK": block, "EPS": 1e-5}
    constants = {name: constants.get(name, True) for name in kernel.arg_names if name.isupper()}
    signature, aligned = {}, {}
    for index, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        elif name.endswith("_ptr"):
            signature[name] = "*fp32" if name in STATISTICS else "*bf16"
        else:
            signature[name] = "i32"
        if name.endswith(("_ptr", "_stride")) and width % 16 == 0:
            aligned[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(
        fn=kernel,
        signature=signature,
        constexprs={(kernel.arg_names.index(name),): value for name, value in constants.items()},
        attrs=aligned,
    )
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": num_warps})
    ptx = compiled.asm["ptx"]
    return {
        "width": width,
        "capability": capability,
        "f64": len(re.findall(r"\.f64", ptx)),
        "wide_loads": len(re.findall(r"ld\.global\S*\.v[48]\.b32", ptx)),
        **assemble(ptx, capability),
    }


def assemble(ptx: str, capability: int) -> dict[str, int]:
    """Ask ptxas for registers and spills."""
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        architecture = f"--gpu-name=sm_{capability}{'a' if capability >= 90 else ''}"
        command = [knobs.nvidia.ptxas.path, "-v", architecture, file.name, "-o", "/dev/null"]
        report = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    registers = re.search(r"Used (\d+) registers", report)
    spilled = re.search(r"(\d+) bytes spill stores", report)
    assert registers and spilled, report
    return {
        "registers": int(registers[1]),
        "spilled_bytes": int(spilled[1]),
        # ptxas makes every wgmma wait for the one before it where registers do not suffice
        "wgmma_serialized": report.count("wgmma.mma_async instructions are serialized"),
    }


def main() -> None:
    """Compile for the widths given on the command line."""
    for module in (rms_norm, layer_norm):
        for kernel in (module._forward_kernel, module._backward_kernel):
            for capability in (80, 90):
                for width in map(int, sys.argv[1:]):
                    name = f"{module.__name__.split('.')[1]} {kernel.__name__}"
                    print(json.dumps({"kernel": name, **compile_kernel(kernel, capability, width)}), flush=True)


if __name__ == "__main__":
    main()
