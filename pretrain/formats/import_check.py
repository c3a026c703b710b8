"""Whether an imported model computes what transformers computes from the published one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from pretrain.errors import ExportError
from pretrain.formats.reference import largest_difference
from pretrain.options.families import ModelShape
from pretrain.transformer.model import KVCache, Transformer

NUM_POSITIONS = 256  # whose logits are compared in each row, the last ones: of 150,000 tokens they are 150 MB a row
ROW_TOKENS = 512
MAX_ROW_TOKENS = 8192  # a window that is longer is not reached, which the report says
PROMPT_TOKENS, NEW_TOKENS = 32, 32


class ReferenceOutputs(Protocol):
    """As `hf_export.Computed`."""

    architecture: str
    logits: list[Tensor]
    greedy: list[int]
    greedy_logits: Tensor


@dataclass(frozen=True)
class Rows:
    """What both models compute.

    Args:
        rows: token ids by name, each int64 [T].
        num_positions: of each row whose logits are compared.
        prompt_T: is continued,
        num_new_tokens: by so many tokens.
    """

    rows: Mapping[str, Tensor]
    num_positions: int
    prompt_T: Tensor
    num_new_tokens: int


def comparison_rows(shape: ModelShape, num_ids: int, text: Sequence[int]) -> Rows:
    """Make rows of real text and of random ids, past the window where there is one.

    Args:
        shape: of the model.
        num_ids: of the published tokenizer.
        text: ids of real text; repeated where it is too short.
    """
    length = ROW_TOKENS if shape.sliding_window is None else shape.sliding_window + NUM_POSITIONS // 2
    length = min(max(length, ROW_TOKENS), shape.seq_len, MAX_ROW_TOKENS)
    generator = torch.Generator().manual_seed(0)
    text_T = torch.tensor((list(text) * (-(-length // max(len(text), 1))))[:length] or [0], dtype=torch.int64)
    random_T = torch.randint(num_ids, (length,), generator=generator)
    prompt = min(PROMPT_TOKENS, max(shape.seq_len // 2, 1))
    return Rows({"text": text_T, "random": random_T, "short": random_T[:7], "one": random_T[:1]}, NUM_POSITIONS,
                text_T[:prompt], max(min(NEW_TOKENS, shape.seq_len - prompt - 1), 0))  # fmt: skip


@torch.no_grad()
def check_model(model: Transformer, rows: Rows, reference: ReferenceOutputs, tolerance: float) -> dict[str, Any]:
    """Compare logits and a greedy continuation, both in fp32.

    Args:
        model: the imported one, read back from its checkpoint.
        rows: that `reference` was computed on.
        reference: of transformers, whose V are the ids of the published tokenizer.
        tolerance: largest difference of a logit, relative to the largest one of its row.

    Returns:
        What was compared, the largest differences, and where the greedy continuations part for a tie, if they do.

    Raises:
        ExportError: naming the first row, position and token that differ.
    """
    num_ids = reference.greedy_logits.shape[1]
    largest, relative = 0.0, 0.0
    for (name, row_T), theirs_TV in zip(rows.rows.items(), reference.logits, strict=True):
        ours_TV = model.logits(row_T[None])[0, -len(theirs_TV) :, :num_ids]
        difference, scale = _compare(ours_TV, theirs_TV, tolerance, name, len(row_T) - len(theirs_TV))
        largest, relative = max(largest, difference), max(relative, difference / scale)
    window = model.shape.sliding_window
    return {
        "architecture": reference.architecture,
        "rows": {name: len(row_T) for name, row_T in rows.rows.items()},
        "positions": sum(len(theirs_TV) for theirs_TV in reference.logits),
        "max_difference": largest,
        "max_relative_difference": relative,
        "relative_tolerance": tolerance,
        "window_is_reached": None if window is None else any(len(row_T) > window for row_T in rows.rows.values()),
        "greedy_tokens": len(reference.greedy),
        "greedy_tie_at": _compare_greedy(model, rows, reference, tolerance),
    }


def _compare(ours_TV: Tensor, theirs_TV: Tensor, tolerance: float, row: str, first: int) -> tuple[float, float]:
    """Return the largest difference and the largest logit; raise if a difference is too large."""
    largest, scale, wrong = largest_difference(theirs_TV, ours_TV, tolerance)
    if wrong:
        place, token = wrong
        raise ExportError(
            f"import: {row} row, position {first + place}: the logit of token {token} is "
            f"{float(ours_TV[place, token]):.6g}; "
            f"expected {float(theirs_TV[place, token]):.6g}, as in transformers, within {tolerance * scale:.2g} "
            "(largest "
            f"difference in the row: {largest:.3g}). Nothing was imported; report this with the model's config.json."
        )
    return largest, scale


def _compare_greedy(model: Transformer, rows: Rows, reference: ReferenceOutputs, tolerance: float) -> int | None:
    """Continue the prompt; return at which token two candidates tie and the other is taken, from where texts part."""
    num_ids, num_slots = reference.greedy_logits.shape[1], len(rows.prompt_T) + rows.num_new_tokens
    cache = KVCache(model.shape, torch.zeros(1, dtype=torch.int64), num_slots, torch.float32)
    tokens_BT = rows.prompt_T[None]
    for place, (expected, theirs_V) in enumerate(zip(reference.greedy, reference.greedy_logits, strict=True)):
        chosen = int(model.logits(tokens_BT, cache, last_only=True)[0, 0, :num_ids].argmax())
        if chosen != expected:
            margin = float(theirs_V[expected] - theirs_V[chosen])
            if margin <= 2 * tolerance * float(theirs_V.abs().max()):
                return place
            raise ExportError(
                f"import: token {place} of the greedy continuation is {chosen}; expected {expected}, whose logit is "
                f"{margin:.3g} higher in transformers. Nothing was imported; report this with the model's config.json."
            )
        tokens_BT = torch.tensor([[chosen]])
    return None
