"""Loss, perplexity and bits per byte on the held-out documents."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from pretrain.distributed import Ranks
from pretrain.errors import DataError
from pretrain.sequence_parallel import ALONE, SequenceGroup
from pretrain.stream import ValRows

LN_2 = math.log(2.0)


@dataclass(frozen=True)
class Evaluation:
    """Result: nats per token, its exponential, bits per UTF-8 byte of text, and over how much it was taken."""

    loss: float
    perplexity: float
    bits_per_byte: float
    tokens: int
    bytes: int


def evaluate(
    forward: Callable[..., Any], rows: ValRows, token_bytes: np.ndarray, micro_batch_size: int,
    ranks: Ranks | None = None, device: torch.device | None = None, group: SequenceGroup = ALONE,
) -> Evaluation:  # fmt: skip
    """Score held-out rows, divided between the ranks.

    Bits per byte count every token that the model must predict, ends of documents too, over the bytes of the text
    itself, so they do not depend on the tokenizer or on how rows are cut.

    Args:
        forward: as `Transformer.forward`, in evaluation mode: objective and cross-entropy, summed, in nats.
        rows: the held-out rows.
        token_bytes: int32 [V], bytes of text of each token id, 0 for special ones.
        micro_batch_size: rows computed at once.
        ranks: all ranks, which call this together; None for one process.
        device: where the model is; the ranks' device by default.
        group: the ranks that share rows, each of which scores its part of them.
    Raises:
        DataError: on all ranks: there is no document that can be read.
    """
    reader, num_readers = (ranks.rank // group.size, ranks.world_size // group.size) if ranks else (0, 1)
    device = ranks.device if ranks else (device or torch.device("cpu"))
    per_rank = -(-rows.num_rows // num_readers)
    own = list(range(reader * per_rank, min((reader + 1) * per_rank, rows.num_rows)))
    losses = torch.zeros((), dtype=torch.float64, device=device)  # read back once: a batch need not wait for the last
    num_tokens, num_bytes = 0, 0
    with torch.no_grad():
        # Every rank runs the same number of forward passes, since ZeRO-3 gathers weights in them together.
        for begin in range(0, per_rank, micro_batch_size):
            numbers = own[begin : begin + micro_batch_size]
            batch = rows.batch(numbers or [0])
            batch = batch.part(group.own(batch.tokens_BT.shape[1]))
            targets_BT = batch.targets_BT if numbers else torch.full_like(batch.targets_BT, -100)
            _, loss = forward(
                batch.tokens_BT.to(device), targets_BT.to(device), batch.doc_start_BT.to(device),
                batch.row_ids_B.to(device), 0,
            )  # fmt: skip
            scored = targets_BT[targets_BT >= 0].numpy()
            losses += loss
            num_tokens += scored.size
            num_bytes += int(token_bytes[scored].sum())
            if ranks:
                ranks.heartbeat.beat()
    totals = [float(losses), float(num_tokens), float(num_bytes)]
    loss_sum, tokens, text_bytes = ranks.sum(totals) if ranks else totals
    if not tokens:
        error = DataError(
            f"data.sources: no document of the {rows.num_rows} held-out rows can be read; expected some. Look for the "
            "damage with python launch/prepare.py --verify, and restore the val- shards from a copy."
        )
        error.agreed = ranks is not None
        raise error
    loss_mean = loss_sum / tokens
    return Evaluation(
        loss_mean, math.exp(min(loss_mean, 700.0)), loss_sum / LN_2 / text_bytes, int(tokens), int(text_bytes)
    )
