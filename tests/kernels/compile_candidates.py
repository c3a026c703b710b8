"""Compiles the tile shapes that `benchmarks/tune.py` tries, for compute capability 9.0; prints those that do not fit.

Run by hand after a change of the attention programs, without `TRITON_INTERPRET`: `python tests/kernels/compile_candidates.py`
takes minutes; an argument `grad_q` takes that program only.
"""

from __future__ import annotations

import sys

from benchmarks.tile_candidates import CANDIDATES, FEW_QUERIES
from kernels.tile_table import Tile
from tests.kernels.compile_attention import compile_program

SHARED_BYTES = 232_448  # of a program on an H100
SPILLED_BYTES = 128


def main() -> None:
    """Compile the candidates of the programs named on the command line, or of all."""
    for program in sys.argv[1:] or CANDIDATES:
        for head_dim, tiles in CANDIDATES[program].items():
            for numbers in (*tiles, *(FEW_QUERIES if program == "forward" else ())):
                used = compile_program("sm_90", program, Tile(*numbers), head_dim)
                fits = used["shared_bytes"] <= SHARED_BYTES and used["spilled_bytes"] <= SPILLED_BYTES
                # tiles of few queries are too small for wgmma
                quick = not used["wgmma_serialized"] and (used["wgmma"] or numbers in FEW_QUERIES)
                if not (fits and quick):
                    print(program, head_dim, numbers, used, flush=True)


if __name__ == "__main__":
    main()
