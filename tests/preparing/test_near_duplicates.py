"""Near-duplicates: found where they are similar, the table exact, and the signature datasketch's."""

from __future__ import annotations

import random

import numpy as np
import pytest

from pretrain.errors import ConfigError
from pretrain.preparing import near_duplicates
from pretrain.preparing.near_duplicates import NearDuplicates, band_shape, bands_of, check_library

WORDS = [f"word{number}" for number in range(20_000)]


def text_of(seed: int, num_words: int = 400) -> list[str]:
    rng = random.Random(seed)
    return [rng.choice(WORDS) for _ in range(num_words)]


def changed(words: list[str], num_changes: int, seed: int) -> list[str]:
    rng, words = random.Random(seed), list(words)
    for place in rng.sample(range(len(words)), num_changes):
        words[place] = "other"
    return words


def found_share(num_changes: int) -> float:
    table = NearDuplicates()
    num_found = 0
    for seed in range(60):
        words = text_of(seed)
        assert table.is_new(bands_of(" ".join(words), 0.8))
        num_found += not table.is_new(bands_of(" ".join(changed(words, num_changes, seed)), 0.8))
    return num_found / 60


def test_the_more_similar_the_surer() -> None:
    # each change of a word changes five shingles: Jaccard about (1 - 5n/400) / (1 + 5n/400)
    assert found_share(0) == 1.0
    assert found_share(2) > 0.9  # 0.95
    assert found_share(40) < 0.1  # 0.4
    assert band_shape(0.8) == (9, 13)


def test_case_and_white_space_do_not_matter() -> None:
    text = " ".join(text_of(1))
    assert bands_of(text, 0.8) == bands_of(text.upper().replace(" ", " \n\t"), 0.8)
    assert bands_of("short text", 0.8) == bands_of("Short  text", 0.8) != bands_of("other text", 0.8)
    assert bands_of("", 0.8) == bands_of(" ", 0.8)


def test_the_signature_is_that_of_datasketch() -> None:
    from datasketch import MinHash

    words = text_of(3)
    texts = (" ".join(words), " ".join(changed(words, 10, 1)))
    signatures = []
    for text in texts:
        signature = MinHash(num_perm=128, seed=1)
        for begin in range(len(words) - 4):
            signature.update(" ".join(text.split()[begin : begin + 5]).encode())
        signatures.append(signature.hashvalues)
    equal = [np.array_equal(signatures[0][13 * band :][:13], signatures[1][13 * band :][:13]) for band in range(9)]
    ours = [np.frombuffer(bands_of(text, 0.8), "<u8") for text in texts]
    assert (ours[0] == ours[1]).tolist() == equal and any(equal) and not all(equal)


def test_the_table_is_a_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(near_duplicates, "_FIRST_SLOTS", 16)
    rng, table, seen = random.Random(1), NearDuplicates(), set()
    for _ in range(5000):
        values = [rng.randrange(1, 30_000) * 2 + 1 for _ in range(3)]
        expected = not seen & set(values)
        assert table.is_new(np.array(values, "<u8").tobytes()) == expected
        seen |= set(values) if expected else set()
    assert len(table._slots) >= 2 * len(seen)


def test_without_the_library_it_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(near_duplicates, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"expected datasketch.*pip install 'longhaul\[data\]'"):
        check_library()
