"""Noise in what a model is given, not in what it has to predict: dropped tokens, and spans of prompts in another order.

It is made where rows are read, from the run's seed and the number of the row in the run alone. So it is another one in
every epoch, and the same one on any number of ranks and after any restart.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from itertools import pairwise

import numpy as np

from pretrain.options.config import AugmentSection, Config

AUGMENT_VERSION = "philox-1"  # part of the plan's identity: change it with what is below
MAX_SPAN_TOKENS = 5


def is_on(section: AugmentSection) -> bool:
    """Whether rows are to be changed."""
    return section.token_dropout > 0 or section.span_shuffle > 0


def identity(section: AugmentSection) -> str:
    """What rows depend on, as a text for the plan."""
    return f"{AUGMENT_VERSION}, token_dropout {section.token_dropout}, span_shuffle {section.span_shuffle}"


class Augmenter:
    """Changes the inputs of a run's training rows as their sources say.

    Args:
        config: uses `data.sources[].augment` and `run.seed`.
        blank_id: what stands for a dropped token.
    """

    def __init__(self, config: Config, blank_id: int) -> None:
        self._sections = {source.name: source.augment for source in config.data.sources if is_on(source.augment)}
        self._seed, self._blank_id = config.run.seed, blank_id

    def __call__(
        self, rows: Iterable[tuple[str, int]], tokens_BT: np.ndarray, targets_BT: np.ndarray, doc_start_BT: np.ndarray
    ) -> None:
        """Change tokens in place; `rows` are the name of the corpus and the number of each row."""
        if not self._sections:
            return
        for (corpus, row), tokens_T, is_scored_T, doc_start_T in zip(
            rows, tokens_BT, targets_BT >= 0, doc_start_BT, strict=True
        ):
            if section := self._sections.get(corpus):
                augment_row(tokens_T, is_scored_T, doc_start_T, section, self._blank_id, self._seed, row)


def augment_row(
    tokens_T: np.ndarray,
    is_scored_T: np.ndarray,
    doc_start_T: np.ndarray,
    section: AugmentSection,
    blank_id: int,
    seed: int,
    row: int,
) -> None:
    """Change the inputs of a row in place.

    A dropped token becomes `blank_id`, whether it is of a prompt or of what is predicted; the first of each document
    stays (word dropout: Bowman et al., arXiv 1511.06349). Spans of 1 to 5 tokens change places with the next one,
    where nothing is scored between them, so that no token comes before the place at which it is predicted.

    Args:
        tokens_T: inputs, integers.
        is_scored_T: whether the token after each input is scored.
        doc_start_T: place in the row where each token's document begins.
        section: how much.
        blank_id: what stands for a dropped token.
        seed: of the run.
        row: number of the row in the run.
    """
    num = len(tokens_T)
    digest = hashlib.sha256(json.dumps(["augment", seed, row]).encode()).digest()
    # The raw output of Philox never changes between versions of numpy, as `row_order` says.
    random = np.random.Philox(key=int.from_bytes(digest[:16], "little")).random_raw(3 * num)
    is_dropped_T, size_T, swap_T = random[:num], random[num : 2 * num], random[2 * num :]
    if section.span_shuffle:
        for begin, end in _unscored(is_scored_T, doc_start_T):
            tokens_T[begin:end] = _shuffled(
                tokens_T[begin:end], size_T[begin:end], swap_T[begin:end], section.span_shuffle
            )
    if section.token_dropout:
        places = (is_dropped_T < _limit(section.token_dropout)) & (doc_start_T != np.arange(num))
        tokens_T[places] = blank_id


def _limit(share: float) -> np.uint64:
    return np.uint64(int(share * 2**64))


def _unscored(is_scored_T: np.ndarray, doc_start_T: np.ndarray) -> list[tuple[int, int]]:
    """Ranges [begin, end) of inputs after which nothing is scored, without the first of each, which opens a turn.

    The input whose next token is the first that is scored is not in them: it ends the prompt.
    """
    changes = (is_scored_T[1:] != is_scored_T[:-1]) | (doc_start_T[1:] != doc_start_T[:-1])
    edges = [0, *(np.flatnonzero(changes) + 1).tolist(), len(is_scored_T)]
    return [(begin + 1, end) for begin, end in pairwise(edges) if not is_scored_T[begin] and end - begin > 2]


def _shuffled(tokens: np.ndarray, sizes: np.ndarray, swaps: np.ndarray, share: float) -> np.ndarray:
    """Spans of tokens, of which a share changes places with the one behind it; each is moved once at most."""
    spans: list[np.ndarray] = []
    begin = 0
    while begin < len(tokens):
        end = begin + 1 + int(sizes[begin] % np.uint64(MAX_SPAN_TOKENS))
        spans.append(tokens[begin:end])
        begin = end
    number = 0
    while number + 1 < len(spans):
        if swaps[number] < _limit(share):
            spans[number], spans[number + 1] = spans[number + 1], spans[number]
            number += 1
        number += 1
    return np.concatenate(spans)
