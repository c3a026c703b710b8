"""The made-up texts: the same for a seed, and of every kind."""

from __future__ import annotations

from pretrain.tokenizers.varied_texts import varied_texts


def test_varied_texts_are_fixed_by_the_seed_and_varied():
    texts = varied_texts(2000, 5)
    assert texts == varied_texts(2000, 5) != varied_texts(2000, 6)
    together = "".join(texts)
    assert "\u2581" not in together and len(set(texts)) > 1900
    for part in ("\r\n", "\t", "\x00", "e\u0301", "日本語", "😀", "नमस्ते", "  ", "</s>", "def"):
        assert part in together
    assert any(char > "\U00010000" for char in together) and max(map(len, texts)) >= 5000


def test_own_words_are_among_them_and_change_no_other_text():
    texts = varied_texts(2000, 5, words=["<|tool|>", "  "])
    assert 100 < sum("<|tool|>" in text for text in texts) < 700
    assert varied_texts(2000, 5, words=[]) == varied_texts(2000, 5)
