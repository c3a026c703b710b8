"""Gopher's rules of repetition, against a plain reading of them."""

from __future__ import annotations

import random
from collections import Counter

import numpy as np
import pytest

from pretrain.preparing.repetition import _duplicate_share, _top_share, find_repetition

WORDS = [f"w{number}" + "x" * (number % 7) for number in range(5000)]


def prose(num_words: int, seed: int = 1) -> str:
    rng = random.Random(seed)
    return " ".join(rng.choice(WORDS) + ("\n" if rng.random() < 0.1 else "") for _ in range(num_words))


def test_ordinary_text_passes() -> None:
    for text in (prose(2000), "One short sentence.", "word", "", "a\n\nb", "日本語の文章です。"):
        assert find_repetition(text) is None


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        (prose(50) + "\nthe same line" * 40, "of its lines are repeats"),
        (
            "\n".join(f"line {n}" for n in range(20)) + ("\n" + "a long line of words " * 9) * 3,
            "of its characters are in lines that",
        ),
        ("\n\n".join(prose(20, seed % 3) for seed in range(9)), "lines are repeats"),
        (prose(100) + " again and" * 60, "of its characters are in one sequence of 2 words"),
        (" ".join([*(f"{prose(1, n)} with so many words" for n in range(80))]), "in one sequence of 2 words"),
        (
            "\n".join(
                prose(3, 100 + n).replace("\n", "") + " " + prose(40, n % 8).replace("\n", "") for n in range(40)
            ),
            "of its characters are in repeated sequences of 5 words",
        ),  # fmt: skip
    ],
)
def test_each_rule(text: str, rule: str) -> None:
    assert rule in str(find_repetition(text))


def test_shares_of_ngrams_are_those_of_a_plain_count() -> None:
    rng = random.Random(5)
    for trial in range(60):
        words = [rng.choice(WORDS[: rng.choice((3, 8, 40))]) for _ in range(rng.randrange(1, 60))]
        numbers = {word: number for number, word in enumerate(dict.fromkeys(words))}
        ids = np.array([numbers[word] for word in words], np.uint64)
        lengths = np.array([len(word) for word in words])
        for size in (2, 3, 5, 10):
            grams = [tuple(words[begin : begin + size]) for begin in range(len(words) - size + 1)]
            counts = Counter(grams)
            most = max(counts.values(), default=0)
            longest = max((sum(map(len, gram)) for gram in counts if counts[gram] == most), default=0)
            total = sum(map(len, words))
            expected = most * longest / total if most > 1 else 0.0
            assert _top_share(ids, lengths, size) == pytest.approx(expected), (trial, size)
            seen, covered = set(), set()
            for begin, gram in enumerate(grams):
                if gram in seen:
                    covered |= set(range(begin, begin + size))
                seen.add(gram)
            expected = sum(len(words[place]) for place in covered) / total
            assert _duplicate_share(ids, lengths, size) == pytest.approx(expected), (trial, size)
