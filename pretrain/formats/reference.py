"""What the trained model computes, kept on disk for the comparison with what other software computes from an export.

So the two models are not in memory at once. Continuations are compared by greedy choice: where the two most probable
tokens are as near to each other as the tolerance, either may be chosen, and what follows is not compared.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pretrain.errors import ExportError
from pretrain.transformer.model import KVCache, Transformer

REPORT_IT = (
    "Nothing was exported; report this with the run's config.yaml, it is a bug or a version of the library that is not "
    "tested."
)
PROMPT_TOKENS, NEW_TOKENS, NUM_PROMPTS = 8, 16, 4
MAX_LOGITS = 1 << 26  # of a row that are compared: 256 MB, which both sides hold, and their difference


@dataclass(frozen=True)
class Continuation:
    """A prompt, what the trained model takes to be the most probable tokens after it, and how sure it was.

    Args:
        prompt, ids: token ids.
        margins: of each of `ids`, its logit less that of the second best, over the largest logit.
    """

    prompt: list[int]
    ids: list[int]
    margins: list[float]


@dataclass(frozen=True)
class Reference:
    """What the trained model computes for some rows.

    Args:
        rows: token ids by where they are from, each int64 [T].
        folder: holds the logits of each row.
        continuations: of the beginnings of rows.
        vocab_size: V.
    """

    rows: Mapping[str, Sequence[Tensor]]
    folder: Path
    continuations: list[Continuation]
    vocab_size: int

    def named_rows(self) -> list[tuple[str, Tensor]]:
        """Return each row with what messages call it."""
        return [(f"{kind} row {index}", row) for kind in self.rows for index, row in enumerate(self.rows[kind])]

    def positions(self, index: int) -> Tensor:
        """Return the positions of a row whose logits are compared, int64 [N]."""
        return compared_positions(len(self.named_rows()[index][1]), self.vocab_size)

    def logits(self, index: int) -> Tensor:
        """Read the logits of a row, fp32 [N, V]."""
        path = self.folder / str(index)
        flat = torch.from_file(str(path), shared=False, size=path.stat().st_size // 4, dtype=torch.float32)
        return flat.view(-1, self.vocab_size)


def compared_positions(num_tokens: int, vocab_size: int) -> Tensor:
    """Return positions of a row: all, or as many as `MAX_LOGITS` has room for, spread evenly, the last one among them.

    Of 150,000 tokens the logits of 8192 positions would be 5 GB, several times over.
    """
    num_compared = min(num_tokens, max(MAX_LOGITS // vocab_size, 1))
    return torch.arange(1, num_compared + 1) * num_tokens // num_compared - 1


@torch.inference_mode()
def compute_reference(model: Transformer, rows: Mapping[str, Sequence[Tensor]], folder: Path) -> Reference:
    """Compute logits and continuations with the trained model, its weights rounded as the export's are.

    Args:
        model: fp32, on the CPU.
        rows: token ids by where they are from, each int64 [T].
        folder: is made, and gets the logits.

    Raises:
        OSError: they could not be written.
    """
    folder.mkdir(parents=True)
    reference = Reference(rows, folder, [], model.shape.vocab_size)
    prompt_tokens = min(PROMPT_TOKENS, max(model.shape.seq_len // 2, 1))
    num_new = min(NEW_TOKENS, model.shape.seq_len - prompt_tokens)
    for index, (_, row_T) in enumerate(reference.named_rows()):
        logits_NV = model.logits(row_T[None], places_N=reference.positions(index)).contiguous()
        with open(folder / str(index), "wb") as file:
            file.write(logits_NV.view(-1).numpy().data)
        del logits_NV
        if len(row_T) >= prompt_tokens and len(reference.continuations) < NUM_PROMPTS:
            reference.continuations.append(_continue(model, row_T[:prompt_tokens], num_new))
    return reference


def _continue(model: Transformer, prompt_T: Tensor, num_new: int) -> Continuation:
    cache = KVCache(model.shape, torch.zeros(1, dtype=torch.int64), len(prompt_T) + num_new, torch.float32)
    continuation, tokens_BT = Continuation(prompt_T.tolist(), [], []), prompt_T[None]
    for _ in range(num_new):
        logits_V = model.logits(tokens_BT, cache, last_only=True)[0, -1]
        best, second = logits_V.topk(2).values.tolist()
        tokens_BT = logits_V.argmax()[None, None]
        continuation.ids.append(int(tokens_BT))
        continuation.margins.append((best - second) / max(float(logits_V.abs().max()), 1e-30))
    return continuation


def largest_difference(
    expected_TV: Tensor, found_TV: Tensor, tolerance: float
) -> tuple[float, float, tuple[int, int] | None]:
    """Compare the logits of a row.

    Args:
        expected_TV, found_TV: of equal shape.
        tolerance: of a difference, relative to the largest logit that is expected.

    Returns:
        The largest difference, the largest logit, and the first position with a difference that is too large, with the
        token of the largest one there; None if there is none.
    """
    scale = max(float(expected_TV.abs().max()), torch.finfo(torch.float32).tiny)
    difference_TV = (expected_TV - found_TV).abs()
    largest = float(difference_TV.max())
    if largest <= tolerance * scale:
        return largest, scale, None
    difference_TV = difference_TV.nan_to_num(torch.inf)  # NaN is too large
    position = int((difference_TV.amax(1) > tolerance * scale).nonzero()[0])
    return largest, scale, (position, int(difference_TV[position].argmax()))


def compare_logits(
    ours_TV: Tensor, theirs_TV: Tensor, where: str, client: str, tolerance: float, positions_T: Tensor
) -> dict[str, float]:
    """Compare the logits of a row.

    Args:
        ours_TV, theirs_TV: of the trained model and of the export.
        where: names the row, for the message.
        client: the software that computed the export's.
        tolerance: of a difference, relative to the largest logit of the row.
        positions_T: of the row, whose logits these are.

    Returns:
        The largest difference, the largest logit, and at how many positions the most probable token differs: there the
        two candidates' logits are closer than twice the tolerance.

    Raises:
        ExportError: a difference is too large, or the shapes differ.
    """
    if ours_TV.shape != theirs_TV.shape:
        raise ExportError(
            f"{where}: logits are {tuple(theirs_TV.shape)} in {client}; expected {tuple(ours_TV.shape)}. {REPORT_IT}"
        )
    largest, scale, wrong = largest_difference(ours_TV, theirs_TV, tolerance)
    if wrong:
        place, token = wrong
        raise ExportError(
            f"{where}, position {int(positions_T[place])}: the logit of token {token} is "
            f"{float(theirs_TV[place, token]):.6g} in {client}; expected {float(ours_TV[place, token]):.6g} within "
            f"{tolerance * scale:.2g} (largest difference in the row: {largest:.3g}). {REPORT_IT}"
        )
    return {"difference": largest, "scale": scale, "ties": int((ours_TV.argmax(1) != theirs_TV.argmax(1)).sum())}


def summarize(reference: Reference, found: Sequence[Mapping[str, float]], tolerance: float) -> dict[str, Any]:
    """Put together what `compare_logits` found of each row, as it stands in `verification.json`."""
    rows = [row for _, row in reference.named_rows()]
    return {
        "rows": {kind: len(rows) for kind, rows in reference.rows.items()},
        "tokens": sum(len(reference.positions(index)) for index in range(len(rows))),
        "longest_row": max(map(len, rows)),
        "max_difference": max(one["difference"] for one in found),
        "max_relative_difference": max(one["difference"] / one["scale"] for one in found),
        "relative_tolerance": tolerance,
        "argmax_ties": int(sum(one["ties"] for one in found)),
    }


def compare_continuations(
    reference: Reference, theirs: Sequence[Sequence[int]], client: str, tolerance: float
) -> dict[str, int]:
    """Compare greedy continuations.

    Args:
        reference: with ours.
        theirs: ids that the client took after each prompt.
        client: its name.
        tolerance: of a logit, relative to the largest one: nearer than twice that, two tokens tie.

    Returns:
        The number of prompts, of tokens that are equal, and of continuations that part at a tie.

    Raises:
        ExportError: one parts elsewhere.
    """
    num_equal = num_ties = 0
    for number, (ours, ids) in enumerate(zip(reference.continuations, theirs, strict=True)):
        same = next(
            (at for at, pair in enumerate(zip(ours.ids, ids, strict=True)) if pair[0] != pair[1]), len(ours.ids)
        )
        num_equal += same
        if same == len(ours.ids):
            continue
        if ours.margins[same] > 2 * tolerance:
            raise ExportError(
                f"export: continuation {number}: token {same} after {ours.prompt} is {ids[same]} in {client}; expected "
                f"{ours.ids[same]}, the most probable by {ours.margins[same]:.2g} of the largest logit. {REPORT_IT}"
            )
        num_ties += 1
    return {"prompts": len(reference.continuations), "equal_tokens": num_equal, "ties": num_ties}
