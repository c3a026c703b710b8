"""Texts that repeat themselves: the rules of Gopher's training data.

Source: Rae et al., Scaling Language Models: Methods, Analysis & Insights from Training Gopher, arXiv 2112.11446,
    appendix A.1.1, table A1. Repeats are counted from the second occurrence on.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

MAX_DUPLICATE_SHARE = 0.30  # of lines, and of paragraphs
MAX_DUPLICATE_CHARACTERS = 0.20  # in them
MAX_TOP_NGRAM = {2: 0.20, 3: 0.18, 4: 0.16}  # characters in the most frequent one
MAX_DUPLICATE_NGRAMS = {5: 0.15, 6: 0.14, 7: 0.13, 8: 0.12, 9: 0.11, 10: 0.10}  # characters in all that repeat
_PARAGRAPH_END = re.compile(r"\n\s*\n")


def find_repetition(text: str) -> str | None:
    """The rule of Gopher's that a text breaks, in words, the first of them; None if it breaks none."""
    for name, parts in (("lines", text.split("\n")), ("paragraphs", _PARAGRAPH_END.split(text))):
        share, characters = _duplicate_shares([part for part in map(str.strip, parts) if part])
        if share > MAX_DUPLICATE_SHARE:
            return f"{share:.0%} of its {name} are repeats"
        if characters > MAX_DUPLICATE_CHARACTERS:
            return f"{characters:.0%} of its characters are in {name} that are repeats"
    words = text.split()
    numbers: dict[str, int] = {}
    ids = np.array([numbers.setdefault(word, len(numbers)) for word in words], dtype=np.uint64)
    lengths = np.array([len(word) for word in words], dtype=np.int64)
    for size, largest in MAX_TOP_NGRAM.items():
        share = _top_share(ids, lengths, size)
        if share > largest:
            return f"{share:.0%} of its characters are in one sequence of {size} words"
    for size, largest in MAX_DUPLICATE_NGRAMS.items():
        share = _duplicate_share(ids, lengths, size)
        if share > largest:
            return f"{share:.0%} of its characters are in repeated sequences of {size} words"
    return None


def _duplicate_shares(parts: Sequence[str]) -> tuple[float, float]:
    """Share of parts that are equal to an earlier one, and of the characters in them."""
    seen: set[str] = set()
    num_repeats = num_characters = 0
    for part in parts:
        if part in seen:
            num_repeats += 1
            num_characters += len(part)
        seen.add(part)
    return num_repeats / max(len(parts), 1), num_characters / max(sum(map(len, parts)), 1)


def _ngrams(ids: np.ndarray, size: int) -> np.ndarray:
    """A 64-bit hash of each sequence of `size` words, by the words' ids."""
    mixed = (ids + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)  # SplitMix64's steps; products wrap around
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    hashes = np.zeros(len(ids) - size + 1, np.uint64)
    for offset in range(size):
        hashes = hashes * np.uint64(0x100000001B3) + mixed[offset : offset + len(hashes)]
    return hashes


def _top_share(ids: np.ndarray, lengths: np.ndarray, size: int) -> float:
    """Share of the words' characters that the most frequent n-gram takes; 0 if none occurs twice."""
    if len(ids) <= size:
        return 0.0
    _, first, counts = np.unique(_ngrams(ids, size), return_index=True, return_counts=True)
    most = int(counts.max())
    if most == 1:
        return 0.0
    sums = np.convolve(lengths, np.ones(size, np.int64), "valid")
    return most * int(sums[first[counts == most]].max()) / max(int(lengths.sum()), 1)


def _duplicate_share(ids: np.ndarray, lengths: np.ndarray, size: int) -> float:
    """Share of the words' characters in n-grams that occurred before, each word counted once."""
    if len(ids) <= size:
        return 0.0
    hashes = _ngrams(ids, size)
    is_repeat = np.ones(len(hashes), np.int64)
    is_repeat[np.unique(hashes, return_index=True)[1]] = 0
    covered = np.convolve(is_repeat, np.ones(size, np.int64), "full") > 0
    return int(lengths[covered].sum()) / max(int(lengths.sum()), 1)
