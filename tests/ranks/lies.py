"""What the last rank has other than the rest, for the tests of `preflight`."""

from __future__ import annotations

import platform
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from unittest.mock import patch

from pretrain.ranks import link_speeds
from pretrain.ranks.distributed import Ranks
from pretrain.training import preflight
from pretrain.training import run as run_module


@contextmanager
def told(lie: str, ranks: Ranks) -> Iterator[None]:
    """Let every rank be on a node of its own, and the last one tell a lie: a word that is handled below."""
    with ExitStack() as stack:

        def replace(holder: object, name: str, value: object) -> None:
            stack.enter_context(patch.object(holder, name, value))

        replace(platform, "node", lambda: f"node{ranks.rank}")
        replace(preflight, "SEEN_SECONDS", 0.6)
        if ranks.rank == ranks.world_size - 1:
            versions, sources, swap = preflight._versions, preflight.source_hashes, link_speeds._swap
            check, exists = run_module.check_same_rows, preflight.Path.exists
            match lie:
                case "version":
                    replace(preflight, "_versions", lambda names: versions(names) | dict.fromkeys(names, "0.1"))
                case "similar":
                    replace(preflight, "_versions",
                            lambda names: versions(names) | ({"numpy": "0.1"} if "numpy" in names else {}))  # fmt: skip
                case "code":
                    replace(preflight, "source_hashes", lambda: sources() | {"pretrain/optimizers/optim.py": "f" * 64})
                case "clock":
                    ahead = SimpleNamespace(time=lambda: time.time() + 3600, monotonic=time.monotonic, sleep=time.sleep)
                    replace(preflight, "time", ahead)
                case "shards":
                    replace(run_module, "check_same_rows",
                            lambda _, pieces, r: check("f" * 64, pieces | {"rows of code": 7}, r))  # fmt: skip
                case "folder":
                    replace(preflight.Path, "exists", lambda path: "seen-by-all" not in path.name and exists(path))
                case "slow":
                    replace(link_speeds, "_swap", lambda *args: (time.sleep(0.1), swap(*args)))
        yield
