"""From logits to a token, and from tokens to text as it comes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from pretrain.generation.generate_options import GenerateOptions

NOT_FINITE = -1  # instead of a token, where the logits hold NaN or infinity
REPLACEMENT = "\ufffd"  # what a decoder writes for bytes that are no character, or not yet

# Tokens that are ordered first when the nucleus is looked for: of 128,000, ordering 1,024 takes 1.1 ms and all 16 ms.
_FIRST_ORDERED = 1024
_CONTEXT_TOKENS = 8  # of the prompt that the text's first tokens are decoded with


def choose_tokens(
    logits_BV: Tensor, uniform_B: Tensor, options: GenerateOptions, seen_BV: Tensor | None = None
) -> Tensor:
    """Choose the next token of each row.

    A row's choice depends on its own logits and number only, never on the other rows.

    Args:
        logits_BV: fp32, without the padding of the vocabulary.
        uniform_B: fp64 random numbers in [0, 1), used up by sampling.
        options: how to sample.
        seen_BV: bool, the tokens of each row's prompt and text; needed with a repetition penalty only.

    Returns:
        int64 `[B]`, `NOT_FINITE` where the logits are not finite.
    """
    if seen_BV is not None:
        logits_BV = penalise(logits_BV, seen_BV, options.repetition_penalty)
    if options.temperature == 0:
        chosen_B = logits_BV.argmax(-1)
    else:
        cumulative_BV = probabilities(logits_BV, options).cumsum_(-1)
        aim_B1 = uniform_B[:, None] * cumulative_BV[:, -1:]
        # The first token whose cumulative probability is above the aim: never one of probability 0.
        chosen_B = torch.searchsorted(cumulative_BV, aim_B1, right=True)[:, 0]
    return torch.where(logits_BV.amax(-1).isfinite(), chosen_B, NOT_FINITE)


def penalise(logits_BV: Tensor, seen_BV: Tensor, penalty: float) -> Tensor:
    """Make tokens that were seen less probable: divide positive logits by the penalty, multiply negative ones.

    Source: Keskar et al. 2019, "CTRL", section 4.1, with the sign's case as transformers computes it.
    """
    return torch.where(seen_BV, torch.where(logits_BV < 0, logits_BV * penalty, logits_BV / penalty), logits_BV)


def probabilities(logits_BV: Tensor, options: GenerateOptions) -> Tensor:
    """Compute the distribution that the next token is drawn from.

    Args:
        logits_BV: fp32, after the repetition penalty.
        options: temperature above 0, top-k, top-p and min-p, which are applied in this order.

    Returns:
        fp64 `[B, V]`: in fp32 the tail of a large vocabulary falls out of a cumulative sum.
    Source: Fan et al. 2018 (top-k), Holtzman et al. 2020 (top-p), Nguyen et al. 2024 (min-p); ties as in transformers:
        tokens equal to the k-th stay.
    """
    scores_BV = logits_BV.to(torch.float64, copy=True)
    # First the largest becomes 0: a tiny temperature then gives -inf for the others and never inf - inf.
    scores_BV.sub_(scores_BV.amax(-1, keepdim=True)).div_(options.temperature)
    if 0 < options.top_k < scores_BV.shape[-1]:
        kth_B1 = scores_BV.topk(options.top_k, dim=-1).values[:, -1:]
        scores_BV.masked_fill_(scores_BV < kth_B1, -math.inf)
    if options.top_p < 1:
        scores_BV.masked_fill_(~_nucleus(scores_BV, options.top_p), -math.inf)
    if options.min_p > 0:
        scores_BV.masked_fill_(scores_BV < math.log(options.min_p), -math.inf)
    return scores_BV.softmax(-1)


def _nucleus(scores_BV: Tensor, top_p: float) -> Tensor:
    """Return a mask of the fewest tokens that together hold `top_p`: a token stays while those before it hold less."""
    log_sum_B1 = scores_BV.logsumexp(-1, keepdim=True)
    kept_BV = torch.zeros_like(scores_BV, dtype=torch.bool)
    num_ordered = min(_FIRST_ORDERED, scores_BV.shape[-1])
    ordered_BO, index_BO = scores_BV.topk(num_ordered, dim=-1)
    before_BO = _before((ordered_BO - log_sum_B1).exp())
    kept_BV.scatter_(1, index_BO, before_BO < top_p)
    if num_ordered < scores_BV.shape[-1]:
        for row in (before_BO[:, -1] < top_p).nonzero()[:, 0].tolist():  # a flat distribution reaches beyond
            ordered_V, index_V = scores_BV[row].sort(descending=True, stable=True)
            kept_BV[row, index_V] = _before((ordered_V - log_sum_B1[row]).exp()) < top_p
    return kept_BV


def _before(probs: Tensor) -> Tensor:
    return probs.cumsum(-1) - probs


class TextStream:
    """The text of ids that arrive one by one, released as soon as it is sure.

    Held back are bytes that are not a whole character yet, and what may be the beginning of a stop string. Each token
    costs the same, however long the text: only the ids since the last whole character, and those before them that
    a decoder needs to see, are decoded again.
    """

    def __init__(
        self, decode: Callable[[Sequence[int]], str], prompt_ids: Sequence[int] = (), stop: Sequence[str] = ()
    ) -> None:
        """Begin a text.

        Args:
            decode: ids to text, as a tokenizer does.
            prompt_ids: what the text follows; some tokenizers decode the first token of a text differently.
            stop: strings that end the text.
        """
        self.stopped = False  # by a stop string
        self._decode, self._stop = decode, stop
        self._window = _whole_characters(decode, list(prompt_ids[-_CONTEXT_TOKENS:]))
        self._num_done = len(self._window)  # ids of the window whose text is known
        self._known = decode(self._window)
        self._held = ""
        self._released: list[str] = []

    @property
    def text(self) -> str:
        """All that was released."""
        return "".join(self._released)

    def add(self, token: int) -> str:
        """Take a token and return what is sure now: nothing more after a stop string."""
        self._window.append(token)
        text = self._decode(self._window)
        sure = text.rstrip(REPLACEMENT)
        if len(sure) <= len(self._known):
            return ""
        new, self._known = sure[len(self._known) :], sure
        if sure == text:
            self._window = self._window[self._num_done :]
            self._num_done, self._known = len(self._window), self._decode(self._window)
        return self._release(new)

    def end(self) -> str:
        """Return what was held back, when no token follows."""
        if self.stopped:
            return ""
        new = self._release(self._decode(self._window)[len(self._known) :])
        if not self.stopped:
            self._released.append(self._held)
            new += self._held
        return new

    def _release(self, new: str) -> str:
        text = self._held + new
        ends = [position for position in (text.find(stop) for stop in self._stop) if position >= 0]
        if ends:
            self.stopped, sure, self._held = True, text[: min(ends)], ""
        else:
            # The longest end of the text that begins a stop string: no stop string can begin before it any more.
            longest = max(map(len, self._stop), default=1) - 1
            starts = range(max(len(text) - longest, 0), len(text))
            cut = next((at for at in starts if any(stop.startswith(text[at:]) for stop in self._stop)), len(text))
            sure, self._held = text[:cut], text[cut:]
        self._released.append(sure)
        return sure


def _whole_characters(decode: Callable[[Sequence[int]], str], ids: list[int]) -> list[int]:
    """Leave out the first ids where they are the rest of a character; some decoders spoil all bytes behind it, too."""
    begins = (at for at in range(len(ids)) if not decode(ids[at:]).startswith(REPLACEMENT))
    return ids[next(begins, 0) :]
