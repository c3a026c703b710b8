"""Texts that make tokenizers differ, made up from a seed."""

from __future__ import annotations

import random
from collections.abc import Sequence

from pretrain.tokenizers.tokenizer import SPACE_PIECE

_WORDS = (
    "the of and to in that is was for it with as his on be at by had not are but from or have an they which one you "
    "were all her she there would their we him been has when who will no more if out so up said what its about than "
    "Straße façade naïve Ångström œuvre İstanbul ﬁne Ⅷ ½ m² résumé re\u0301sume\u0301 "
    "привет мир Україна γλῶσσα λόγος שלום עולם مرحبا بالعالم سلام नमस्ते दुनिया สวัสดีชาวโลก ሰላም გამარჯობა "
    "你好 世界 語言模型 日本語 ひらがな カタカナ ｶﾀｶﾅ 한국어 \u1112\u1161\u11ab\u1100\u1173\u11af 𠮷野家 "
    "😀 👩‍👩‍👧‍👦 👍🏽 🏳️‍🌈 🇩🇪 ☃️ ∑ ∞ ≤ → „quoted“ — … € £ ¥ № \u200bzero\u200d\ufeff \u202eright "
    "<s> </s> <unk> <pad> <|im_start|> <|im_end|> <0x0A> [INST] ## @user #tag https://example.org/a?b=c&d=%20 "
    "def return self.__init__ lambda x: x**2 if __name__ == '__main__': {}; // /* */ <div> && || != === ::std -> "
    "foo_bar fooBar FOO_BAR 0 7 42 1999 3.14159 1e-10 0xDEADBEEF 1,000,000 12:34:56 2024-02-29 \\n \\t \\u0000"
).split(" ")
_BREAKS = (
    " ",
    " ",
    " ",
    " ",
    "  ",
    "\n",
    "\n\n",
    "\r\n",
    "\t",
    "    ",
    "\n    ",
    "\n\t\t",
    "\u00a0",
    "\u3000",
    ", ",
    "",
)


def _random_characters(rng: random.Random) -> str:
    """A few characters from anywhere in Unicode: most are unknown to any vocabulary and become bytes."""
    tops = [rng.choice((0x20, 0x7F, 0x250, 0x3000, 0x10000, 0x110000)) for _ in range(rng.randint(1, 12))]
    points = [rng.randrange(top) for top in tops]
    return "".join(chr(point) for point in points if not 0xD800 <= point <= 0xDFFF)


def varied_texts(num_texts: int, seed: int, samples: Sequence[str] = (), words: Sequence[str] = ()) -> list[str]:
    """Texts that make tokenizers differ, the same ones for the same seed.

    They hold words of many scripts, decomposed letters, emoji, code, digits, control characters, runs of one
    character, every kind of line end and space, special tokens' text and, where given, pieces of real text. None
    holds U+2581, which sentencepiece cannot tell from a space.

    Args:
        num_texts: how many to make.
        seed: what they are drawn from.
        samples: documents to cut some of the texts from.
        words: a tokenizer's own symbols, which a twentieth of the words is drawn from.
    """
    all_words = _WORDS + list(words) * (len(_WORDS) // (20 * len(words)) + 1) if words else _WORDS
    rng = random.Random(f"varied texts {seed}")

    def part() -> str:
        kind = rng.random()
        if kind < 0.70:
            return rng.choice(all_words)
        if kind < 0.78:
            return rng.choice((" ", " ", "\n", "\t", "\r\n", "a", "-", "=", "0", "ab", "ha")) * rng.randint(1, 40)
        if kind < 0.86:
            return _random_characters(rng)
        if kind < 0.90:
            return "".join(rng.choices("abcdefghijklmnopqrstuvwxyzAEIOU0123456789", k=rng.randint(1, 120)))
        if kind < 0.95 or not samples:
            return str(rng.randrange(10 ** rng.randint(1, 20)))
        sample = rng.choice(samples)
        start = rng.randrange(max(len(sample), 1))
        return sample[start : start + rng.randint(1, 400)]

    texts = ["", " ", "  ", "\n", "\t", "\r\n", "\x00", "a", " a", "a ", "\ufeff", "x" * 5000, " " * 5000, "ab" * 2500]
    while len(texts) < num_texts:
        texts.append("".join(part() + rng.choice(_BREAKS) for _ in range(rng.randint(1, 12))).replace(SPACE_PIECE, ""))
    return texts[:num_texts]
