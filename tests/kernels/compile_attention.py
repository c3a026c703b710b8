"""Compiles the attention programs of a tile table for GPUs that this machine need not have; prints JSON lines.

Run in a process of its own, without `TRITON_INTERPRET`: `python tests/kernels/compile_attention.py sm_90 sm_100:long sm_80:128`,
where `:long` leaves all other lengths of the table out, and `:128` all other widths of heads.
Every distinct program of the table is compiled once, with the widest head of its class; those of the class `extra`
with a soft-cap, and with dropout.
"""

from __future__ import annotations

import hashlib
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

from kernels.attention_backward import delta_kernel, grad_kv_kernel, grad_q_kernel
from kernels.attention_forward import forward_kernel
from kernels.tile_table import FOLDER, Tile, read_table
from tests.kernels.compile_programs import assemble

PROGRAMS = {
    "forward": forward_kernel,
    "grad_kv_atomic": grad_kv_kernel,
    "grad_kv": grad_kv_kernel,
    "grad_q": grad_q_kernel,
    "delta": delta_kernel,
}
TARGETS = {"sm_80": 80, "sm_86": 86, "sm_90": 90, "sm_100": 100, "sm_120": 120}
DESCRIBED = ("sm_90", "sm_100")  # as `kernels.attention_op` decides
FLOATS = ("scale", "softcap", "keep_scale")
QUERY_TILES, KEY_TILES = ("q_x", "grad_out_x", "grad_q_x"), ("k_x", "v_x")


def constants_of(name: str, tile: Tile, head_dim: int, described: bool, **flags: bool) -> dict[str, Any]:
    """Return the compile-time arguments of a program; GROUP is 2, so that the loop over query heads is compiled."""
    everything = {
        "H": 16, "GROUP": 2, "SPLITS": 1, "C": head_dim, "BLOCK_Q": tile.block_q, "BLOCK_K": tile.block_k, "BLOCK": 64,
        "BLOCK_C": triton.next_power_of_2(head_dim), "HAS_SOFTCAP": flags.get("softcap", False),
        "HAS_DROPOUT": flags.get("dropout", False), "DESCRIPTORS": described,
        "ATOMIC_GRAD_Q": name == "grad_kv_atomic", "DESCRIPTOR_ADD": described and name == "grad_kv_atomic",
        "CLEAR_GRAD_Q": True,
    }  # fmt: skip
    return {argument: everything[argument] for argument in PROGRAMS[name].arg_names if argument.isupper() and
            len(argument) > 1 or argument in ("C", "H")}  # fmt: skip


def source_of(name: str, constants: dict[str, Any], dtype: str) -> ASTSource:
    """Describe a program as the launches of `kernels.attention_op` specialise it."""
    kernel = PROGRAMS[name]
    signature: dict[str, Any] = {}
    aligned = {}
    for index, argument in enumerate(kernel.arg_names):
        if argument in constants:
            signature[argument] = "constexpr"
        elif argument.endswith("_strides"):
            signature[argument] = ("i32", "i32", "i32")
            aligned |= {(index, axis): [["tt.divisibility", 16]] for axis in range(3)}
        elif argument in FLOATS:
            signature[argument] = "fp32"
        elif argument.endswith("_x") and constants["DESCRIPTORS"] and _described(argument, constants):
            rows = constants["BLOCK_K"] if argument in KEY_TILES else constants["BLOCK_Q"]
            kind = "fp32" if argument == "grad_q_x" else dtype
            signature[argument] = f"tensordesc<{kind}[1, 1, {rows}, {constants['BLOCK_C']}]>"
        elif argument.endswith(("_x", "_ptr")):
            signature[argument] = _pointer(argument, name, dtype)
            aligned[(index,)] = [["tt.divisibility", 16]]
        else:
            signature[argument] = "i32"
    numbered = {(kernel.arg_names.index(argument),): value for argument, value in constants.items()}
    return ASTSource(fn=kernel, signature=signature, constexprs=numbered, attrs=aligned)


def _described(argument: str, constants: dict[str, Any]) -> bool:
    return argument != "grad_q_x" or constants["DESCRIPTOR_ADD"]


def _pointer(argument: str, name: str, dtype: str) -> str:
    if argument in ("first_ptr", "end_ptr"):
        return "*i32"
    if argument == "seeds_ptr":
        return "*i64"
    fp32 = argument in ("lse_ptr", "delta_ptr") or (
        argument.startswith("grad_q_") and name in ("grad_kv_atomic", "delta")
    )
    return "*fp32" if fp32 else f"*{dtype}"


def compile_program(
    target: str, name: str, tile: Tile, head_dim: int, dtype: str = "bf16", **flags: bool
) -> dict[str, Any]:
    """Compile one program; return what it uses."""
    constants = constants_of(name, tile, head_dim, target in DESCRIBED, **flags)
    options = {"num_warps": tile.num_warps, "num_stages": tile.num_stages}
    amd = target.startswith("gfx")
    machine = GPUTarget("hip", target, 64) if amd else GPUTarget("cuda", TARGETS[target], 32)
    compiled = triton.compile(source_of(name, constants, dtype), target=machine, options=options)
    code = compiled.asm["amdgcn" if amd else "ptx"]

    def count(pattern: str) -> int:
        return len(re.findall(pattern, code))

    if amd:
        spilled = re.search(r"vgpr_spill_count:\s*(\d+)", code)
        assert spilled, "no count of spilled registers"
        used = {"spilled_bytes": 4 * int(spilled[1]), "loop_spills": 0, "wgmma_serialized": 0, "mfma": count("v_mfma")}
    else:
        used = assemble(code, TARGETS[target])
        used["loop_spills"] = spills_in_loops(compiled.asm["cubin"]) if used["spilled_bytes"] else 0
    return {
        "target": target, "program": name, "head_dim": head_dim, **vars(tile), **flags, "dtype": dtype,
        **used, "shared_bytes": compiled.metadata.shared,
        "scratch_bytes": getattr(compiled.metadata, "global_scratch_size", 0), "f64": count(r"\.f64|_f64"),
        "wgmma": count("wgmma.mma_async"), "mma": count(r"mma\.sync"), "tcgen05": count(r"tcgen05\.mma"),
        "tma": count(r"cp\.async\.bulk\.tensor"), "tma_add": count(r"cp\.reduce\.async\.bulk"),
        "cp_async": count(r"cp\.async\.c[ag]"), "atomics": count(r"\s(?:red|atom)\.global"),
    }  # fmt: skip


def spills_in_loops(cubin: bytes) -> int:
    """Count the stores to local memory in the innermost loops that multiply matrices."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [knobs.nvidia.nvdisasm.path, "-c", file.name]
        listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    labels: dict[str, int] = {}
    loops = []
    instructions: list[str] = []
    for line in listing.splitlines():
        if label := re.match(r"(\.L_x_\d+):", line.strip()):
            labels[label[1]] = len(instructions)
        elif re.match(r"\s*/\*[0-9a-f]{4,}\*/", line):
            instructions.append(line)
            target = re.search(r"BRA.*`\((\.L_x_\d+)\)", line)
            if target and target[1] in labels:
                loops.append((labels[target[1]], len(instructions)))
    inner = [(a, b) for a, b in loops if not any(a <= c and d < b for c, d in loops)]
    bodies = [instructions[a:b] for a, b in inner]
    bodies = [body for body in bodies if any(re.search(r"[HG]MMA|FFMA", line) for line in body)]
    assert bodies, "no loop with a matrix product was found"
    return sum("STL" in line for body in bodies for line in body)


def programs_of(table: str, only: str = "") -> list[tuple[str, Tile, int, dict[str, bool]]]:
    """List the distinct programs of a table: name, tile, width of heads, and soft-cap or dropout.

    Args:
        table: its name.
        only: a length, `few`, `short`, `long` or `extra`, or a width of heads; empty: all.
    """
    found = []
    for name, tiles in read_table(table)["tiles"].items():
        for shape_class, numbers in tiles.items():
            width, length = shape_class.split()
            variants = ({"softcap": True}, {"dropout": True}) if length == "extra" else ({},)
            found += [(name, Tile(*numbers), int(width), flags) for flags in variants if only in ("", length, width)]
    return [program for index, program in enumerate(found) if program not in found[:index]]


def sources_digest() -> str:
    """All that the programs depend on: what the kernels are made of, the tables, and Triton itself."""
    parts = [triton.__version__, *(kernel.cache_key for kernel in PROGRAMS.values())]
    parts += [path.read_text(encoding="utf-8") for path in sorted(FOLDER.glob("*.json"))]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def main() -> None:
    """Compile the programs of the tables named on the command line."""
    for argument in sys.argv[1:]:
        table, _, only = argument.partition(":")
        print(json.dumps(compile_program(table, "delta", Tile(64, 64, 4, 2), 128)), flush=True)
        for name, tile, width, flags in programs_of(table, only):
            print(json.dumps(compile_program(table, name, tile, width, **flags)), flush=True)


if __name__ == "__main__":
    main()
