"""A process that reads a remote corpus as a rank does, for tests: `python -m tests.helpers.store_reader JSON`."""

from __future__ import annotations

import hashlib
import json
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

from pretrain.data.stream import TokenStream
from pretrain.options.config import Config
from tests.helpers.data_helpers import TOKENIZER, batch_plan, make_config


def remote_config(url: str, cache: Any, **data: Any) -> Config:
    """A config over one remote corpus."""
    values = make_config({Path("web"): 1.0}, **({"cache_dir": str(cache), "retry_seconds": 20} | data)).model_dump()
    values["data"]["sources"] = [{"name": "web", "shards": url}]
    return Config.model_validate(values)


def digests(config: Config, num_steps: int, global_batch_size: int = 12, cursor: int = 0) -> list[str]:
    """The hash of each step's rows, of one rank that has them all."""
    sizes = batch_plan(global_batch_size, 1, 4, seq_len=config.data.seq_len)
    found = []
    with closing(TokenStream(config, sizes, 0, TOKENIZER, cursor)) as stream:
        for _ in range(num_steps):
            rows = stream.next_step()
            assert not rows.damaged
            digest = hashlib.sha256()
            for batch in rows.micro_batches:
                for tensor in (batch.tokens_BT, batch.targets_BT, batch.doc_start_BT, batch.row_ids_B):
                    digest.update(tensor.numpy().tobytes())
            found.append(digest.hexdigest())
    return found


if __name__ == "__main__":
    options = json.loads(sys.argv[1])
    steps = options.pop("num_steps")
    print(json.dumps(digests(remote_config(**options), steps)))
