"""Compiles the Triton norms, RoPE, activations and dropout for GPUs that this machine need not have; prints JSON lines.

Run in a process of its own, without `TRITON_INTERPRET`: `python tests/kernels/compile_programs.py 768 8192`, where the numbers
are widths of rows.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from typing import Any

import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from kernels import activation, dropout, layer_norm, rms_norm, rope
from kernels.dispatch import row_block

FP32 = ("rstd_ptr", "mean_ptr", "partial_ptr", "partial_weight_ptr", "partial_bias_ptr", "cos_ptr", "sin_ptr")
INT64 = ("rows_ptr", "step_ptr", "layer_ptr")
HEADS = ((20, 128), (24, 64), (12, 80), (136, 128), (1, 256))  # heads turned together, and the width of one


def compile_kernel(kernel: Any, capability: int, constants: dict[str, Any], num_warps: int) -> dict[str, Any]:
    """Compile a kernel with everything that it can do switched on; return what it uses.

    Pointers, and sizes but for `num_rows`, are multiples of 16, as Triton finds at each launch of training.

    Args:
        kernel: with pointers called `..._ptr`, to bf16 but for `FP32` and `INT64`, and compile-time arguments in capitals.
        capability: 80 or 90.
        constants: compile-time arguments; those left out are True.
        num_warps: warps of one program.
    """
    # T is a number of tokens, given at each launch
    names = [name for name in kernel.arg_names if name.isupper() and name != "T"]
    constants = {name: constants.get(name, True) for name in names}
    signature, multiples = {}, {}
    for index, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        elif name.endswith("_ptr"):
            signature[name] = "*fp32" if name in FP32 else "*i64" if name in INT64 else "*bf16"
        elif name == "seed":
            signature[name] = "i64"
        else:
            signature[name] = "i32"
        if name not in constants and name not in ("num_rows", "seed", "step_ptr", "layer_ptr", "first_group"):
            multiples[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(
        fn=kernel,
        signature=signature,
        constexprs={(kernel.arg_names.index(name),): value for name, value in constants.items()},
        attrs=multiples,
    )
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": num_warps})
    ptx = compiled.asm["ptx"]
    return {
        "kernel": f"{kernel.fn.__module__.split('.')[1]} {kernel.fn.__name__}",
        "capability": capability,
        "f64": len(re.findall(r"\.f64", ptx)),
        "loads": len(re.findall(r"ld\.global", ptx)),
        "wide_loads": len(re.findall(r"ld\.global\S*\.v[48]\.b32", ptx)),
        "stores": len(re.findall(r"st\.global", ptx)),
        "wide_stores": len(re.findall(r"st\.global\S*\.v[48]\.b32", ptx)),
        **assemble(ptx, capability),
    }


def assemble(ptx: str, capability: int) -> dict[str, int]:
    """Ask ptxas for registers and spills."""
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        architecture = f"--gpu-name=sm_{capability}{'a' if capability >= 90 else ''}"
        assembler = knobs.nvidia.ptxas_blackwell if capability >= 100 else knobs.nvidia.ptxas
        command = [assembler.path, "-v", architecture, file.name, "-o", "/dev/null"]
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


def programs(widths: list[int]) -> Iterator[tuple[str, Any, dict[str, Any], int]]:
    """Yield the shape, kernel, compile-time arguments and warps of each program.

    Args:
        widths: of rows.
    """
    for width in widths:
        block, num_warps = row_block(width)
        for module in (rms_norm, layer_norm):
            for kernel in (module._forward_kernel, module._backward_kernel):
                yield str(width), kernel, {"WIDTH": width, "BLOCK": block, "EPS": 1e-5}, num_warps
        constants = {"WIDTH": width, "BLOCK": activation.width_block(width)}
        for kernel in (activation._swiglu_kernel, activation._swiglu_backward_kernel):
            yield str(width), kernel, constants, activation.NUM_WARPS
    for kernel in (activation._gelu_kernel, activation._gelu_backward_kernel):
        yield "any", kernel, {"BLOCK": activation.BLOCK}, activation.NUM_WARPS
    constants = {"SITE": 3, "SITES_PER_LAYER": 8, "THRESHOLD": 429496730, "SCALE": 1 / 0.9, "BLOCK": dropout.BLOCK,
                 "SKIPPED": 0}  # fmt: skip
    yield "any", dropout._dropout_kernel, constants, dropout.NUM_WARPS
    for heads, head_dim in HEADS:
        block_t, block_h, block_r, num_warps = rope.rope_tile(heads, head_dim)
        blocks = {"BLOCK_T": block_t, "BLOCK_H": block_h, "BLOCK_R": block_r}
        yield f"{heads}x{head_dim}", rope._rope_kernel, {"HEADS": heads, "PAIRS": head_dim // 2, **blocks}, num_warps


def main() -> None:
    """Compile the programs, those of rows for the widths given on the command line."""
    for shape, kernel, constants, num_warps in programs([int(width) for width in sys.argv[1:]]):
        for capability in (80, 90):
            used = compile_kernel(kernel, capability, constants, num_warps)
            print(json.dumps({"shape": shape, **used}), flush=True)


if __name__ == "__main__":
    main()
