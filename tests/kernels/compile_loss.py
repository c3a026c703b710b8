"""Compiles the Triton cross-entropy for GPUs that this machine need not have; prints JSON lines.

Run in a process of its own, without `TRITON_INTERPRET`: `python tests/kernels/compile_loss.py 128256 50257`, numbers of classes.
"""

from __future__ import annotations

import json
import re
import sys
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from kernels.cross_entropy import cross_entropy_kernel, vocabulary_block
from tests.kernels.compile_programs import assemble

OPTIONS: dict[str, Any] = {"Z_LOSS": 1e-4, "SMOOTHING": 0.1, "SOFTCAP": 30.0}
VARIANTS: dict[str, dict[str, Any]] = {
    "bf16": {},
    "bf16 options": OPTIONS,
    "fp32 options": OPTIONS,
    "evaluation": {"HAS_GRAD": False},
}


def compile_kernel(capability: int, num_classes: int, variant: str) -> dict[str, Any]:
    """Compile one variant; return what it uses."""
    block, num_warps = vocabulary_block(num_classes)
    constants = {"CLASSES": num_classes, "BLOCK": block, "Z_LOSS": 0.0, "SMOOTHING": 0.0, "SOFTCAP": 0.0,
                 "HAS_GRAD": True, "GRAD_SCALE": 1.0} | VARIANTS[variant]  # fmt: skip
    names = cross_entropy_kernel.arg_names
    pointers = {"targets_ptr": "*i64", "grad_ptr": "*fp32" if "fp32" in variant else "*bf16"}
    signature = {
        name: "constexpr" if name in constants else pointers.get(name, "*fp32" if name.endswith("_ptr") else "i32")
        for name in names
    }
    source = ASTSource(
        fn=cross_entropy_kernel,
        signature=signature,
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in names if name not in constants},
    )
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": num_warps})
    ptx = compiled.asm["ptx"]
    return {
        "capability": capability,
        "classes": num_classes,
        "variant": variant,
        "f64": len(re.findall(r"\.f64", ptx)),
        "wide_loads": len(re.findall(r"ld\.global\S*\.v4\.b32", ptx)),
        "wide_stores": len(re.findall(r"st\.global\S*\.v4\.b32", ptx)),
        "cached_loads": len(re.findall(r"ld\.global\.nc|cp\.async", ptx)),
        "barriers": len(re.findall(r"bar\.sync", ptx)),
        "shared_bytes": compiled.metadata.shared,
        **assemble(ptx, capability),
    }


def main() -> None:
    """Compile for the numbers of classes given on the command line."""
    for capability in (80, 90):
        for num_classes in map(int, sys.argv[1:]):
            for variant in VARIANTS:
                print(json.dumps(compile_kernel(capability, num_classes, variant)), flush=True)


if __name__ == "__main__":
    main()
