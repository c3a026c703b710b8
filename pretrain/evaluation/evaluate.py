"""Loss, perplexity and bits per byte on the held-out documents."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from pretrain.data.stream import ValRows
from pretrain.errors import DataError
from pretrain.ranks.distributed import Ranks
from pretrain.ranks.sequence_parallel import ALONE, SequenceGroup

LN_2 = math.log(2.0)


@dataclass(frozen=True)
class Evaluation:
    """Result: nats per token, its exponential, bits per UTF-8 byte of text, and over how much it was taken.

    Attributes:
        sources: the same of each source that has scored tokens.
        rows_RS: fp64 `[rows, 3]`, of each row the summed loss, its tokens and their bytes; None in `sources`.
    """

    loss: float
    perplexity: float
    bits_per_byte: float
    tokens: int
    bytes: int
    sources: dict[str, Evaluation] = field(default_factory=dict)
    rows_RS: np.ndarray | None = field(default=None, repr=False, compare=False)

    def numbers(self) -> dict[str, Any]:
        """All of it but the rows, for JSON."""
        own = {key: getattr(self, key) for key in ("loss", "perplexity", "bits_per_byte", "tokens", "bytes")}
        return own | {"sources": {name: part.numbers() for name, part in self.sources.items()}} if self.sources else own

    def by_source(self) -> dict[str, dict[str, float]]:
        """The rates of each source, where there are several."""
        keys = ("loss", "perplexity", "bits_per_byte")
        several = self.sources if len(self.sources) > 1 else {}
        return {name: {key: getattr(part, key) for key in keys} for name, part in several.items()}

    @staticmethod
    def of(rows_RS: np.ndarray) -> Evaluation:
        """Sum up rows that have at least one scored token with text."""
        loss_sum, tokens, text_bytes = rows_RS.sum(0).tolist()
        mean = loss_sum / tokens
        bits = loss_sum / LN_2 / text_bytes
        return Evaluation(mean, math.exp(min(mean, 700.0)), bits, int(tokens), int(text_bytes))


def evaluate(
    forward: Callable[..., Any], rows: ValRows, token_bytes: np.ndarray, micro_batch_size: int,
    ranks: Ranks | None = None, device: torch.device | None = None, group: SequenceGroup = ALONE,
) -> Evaluation:  # fmt: skip
    """Score held-out rows, divided between the ranks, in all and by source.

    Bits per byte count every token that the model must predict, ends of documents too, over the bytes of the text
    itself, so they do not depend on the tokenizer or on how rows are cut.

    Args:
        forward: as `Transformer.forward`, in evaluation mode: the cross-entropy of each token, in nats.
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
    losses_R = torch.zeros(rows.num_rows, dtype=torch.float64, device=device)  # read back once: a batch need not wait
    counts_RC = np.zeros((rows.num_rows, 2))
    with torch.no_grad():
        # Every rank runs the same number of forward passes, since ZeRO-3 gathers weights in them together.
        for begin in range(0, per_rank, micro_batch_size):
            numbers = own[begin : begin + micro_batch_size]
            batch = rows.batch(numbers or [0])
            batch = batch.part(group.own(batch.tokens_BT.shape[1]))
            targets_BT = batch.targets_BT if numbers else torch.full_like(batch.targets_BT, -100)
            losses_BT = forward(
                batch.tokens_BT.to(device), targets_BT.to(device), batch.doc_start_BT.to(device),
                batch.row_ids_B.to(device), 0, True,
            )  # fmt: skip
            if numbers:
                span, scored_BT = slice(numbers[0], numbers[-1] + 1), (targets_BT >= 0).numpy()
                losses_R[span] = losses_BT.double().sum(-1)
                counts_RC[span, 0] = scored_BT.sum(-1)
                counts_RC[span, 1] = (token_bytes[targets_BT.clamp(min=0).numpy()] * scored_BT).sum(-1)
            if ranks:
                ranks.heartbeat.beat()
    rows_RS = torch.cat((losses_R[:, None], torch.from_numpy(counts_RC).to(device)), 1)
    if ranks:
        rows_RS = torch.tensor(ranks.start_sum(rows_RS.flatten()).result(), dtype=torch.float64).view(-1, 3)
    return _sum_up(rows_RS.cpu().numpy(), rows, ranks is not None)


def _sum_up(rows_RS: np.ndarray, rows: ValRows, agreed: bool) -> Evaluation:
    if not rows_RS[:, 1].any():
        error = DataError(
            f"data.sources: no document of the {rows.num_rows} held-out rows can be read; expected some. Look for the "
            "damage with python launch/prepare.py --verify, and restore the val- shards from a copy."
        )
        error.agreed = agreed
        raise error
    parts = {name: rows_RS[numbers.start : numbers.stop] for name, numbers in rows.sources()}
    sources = {name: Evaluation.of(part) for name, part in parts.items() if part[:, 2].any()}
    return replace(Evaluation.of(rows_RS), sources=sources, rows_RS=rows_RS)
