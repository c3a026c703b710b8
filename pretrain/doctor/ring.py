"""One rank of the collectives that are tried: `python -m pretrain.doctor.ring FILE`, with a launcher's variables."""

from __future__ import annotations

import json
import os
import platform
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from pretrain.ranks.distributed import join_for_evaluation, join_process_group, leave_distributed, read_rank_variables
from pretrain.ranks.link_speeds import measure_links

_SECONDS = 60.0  # that ranks wait for each other


def main(file: str) -> None:
    """Meet the other ranks as training does, sum, measure; rank 0 writes what was found."""
    ranks = join_for_evaluation(_SECONDS)
    if ranks.world_size == 1:
        join_process_group(read_rank_variables(os.environ), ranks.device, _SECONDS)
    own = torch.arange(1000, dtype=torch.float32, device=ranks.device) + ranks.rank
    dist.all_reduce(own)
    num = ranks.world_size
    wanted = num * torch.arange(1000, dtype=torch.float32, device=ranks.device) + num * (num - 1) / 2
    content = {"backend": dist.get_backend(), "is_right": torch.equal(own, wanted), "num_ranks": num, "speeds": ""}
    if num > 1:
        content["speeds"] = str(measure_links(ranks, [platform.node()] * num))
    if ranks.device.type == "cuda":
        content["version"] = ".".join(map(str, torch.cuda.nccl.version()))
    if ranks.is_first:
        Path(file).write_text(json.dumps(content), encoding="utf-8")
    leave_distributed()


if __name__ == "__main__":
    main(sys.argv[1])
