"""The tokenizer as `tokenizers` and transformers load it, made by hand from the sentencepiece model.

transformers' own converters change ids: `LlamaTokenizer` rebuilds the normalizer, and `save_pretrained` drops
`tokenizer.model`, without which llama.cpp splits text differently and says nothing. So every file is written here.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Sequence
from pathlib import Path

import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, processors

from pretrain.errors import ExportError
from pretrain.tokenizer import SPACE_PIECE, Tokenizer


def _merges(normal: dict[str, float]) -> list[tuple[str, str]]:
    """All splits of normal pieces into two normal pieces, in the order in which sentencepiece would merge them.

    sentencepiece gives the splits of one piece the same score and takes the leftmost in the text; here each has a rank
    of its own. That could matter only where two of them overlap, as in `x y z` with x+y = y+z, which merging from the
    left does not produce: with 3,000 random vocabularies of random scores over one to four letters, no order among the
    splits of a piece changed the ids of any of 600,000 texts.
    """
    merges: list[tuple[float, int, str, str]] = []
    for piece, score in normal.items():
        splits = [s for s in range(1, len(piece)) if piece[:s] in normal and piece[s:] in normal]
        if len(piece) > 1 and not splits:
            raise ExportError(
                f"tokenizer: piece {piece!r} is not made of two other pieces; expected a sentencepiece BPE model. "
                "Train the tokenizer with `launch/prepare.py`."
            )
        merges += [(-score, -s, piece[:s], piece[s:]) for s in splits]
    return [(left, right) for *_, left, right in sorted(merges)]


def build_tokenizer(tokenizer: Tokenizer) -> tokenizers.Tokenizer:
    """Build the tokenizer that gives the same ids in `tokenizers`, with bos put first by its template.

    Args:
        tokenizer: a sentencepiece BPE model trained as `train_tokenizer` does: no dummy prefix, identity
            normalization, byte fallback.

    Returns:
        A tokenizer that reads the text of special tokens as these tokens, as transformers expects; set
        `encode_special_tokens` to read it as plain text, as `Tokenizer.encode` does.

    Raises:
        ExportError: a piece is of a kind that has no exact counterpart, or the model is not BPE.

    Source: sentencepiece `bpe_model.cc` (highest score first, then leftmost) and tokenizers `bpe/word.rs` (lowest
        rank first, then leftmost).
    """
    pieces = tokenizer.pieces()
    unfit = [f"{piece!r} ({kind})" for piece, _, kind in pieces if kind in ("user_defined", "unused")]
    if unfit:
        raise ExportError(
            f"tokenizer: {len(unfit)} pieces such as {unfit[0]} have no exact counterpart in tokenizer.json; expected "
            "normal, byte, unknown and control pieces. Declare such symbols as control symbols."
        )
    vocabulary = {piece: index for index, (piece, _, _) in enumerate(pieces)}
    normal = {piece: score for piece, score, kind in pieces if kind == "normal"}
    built = tokenizers.Tokenizer(
        models.BPE(
            vocab=vocabulary,
            merges=_merges(normal),
            unk_token=pieces[tokenizer.unk_id][0],
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    built.normalizer = normalizers.Replace(" ", SPACE_PIECE)
    built.decoder = decoders.Sequence([decoders.Replace(SPACE_PIECE, " "), decoders.ByteFallback(), decoders.Fuse()])
    built.add_special_tokens(
        [AddedToken(piece, special=True, normalized=False) for piece in _special_pieces(tokenizer)]
    )
    bos = pieces[tokenizer.bos_id][0]
    built.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos}:0 $A:0 {bos}:1 $B:1", special_tokens=[(bos, tokenizer.bos_id)]
    )
    return built


def _special_pieces(tokenizer: Tokenizer) -> list[str]:
    return [piece for piece, _, kind in tokenizer.pieces() if kind in ("unknown", "control")]


def check_ids(tokenizer: Tokenizer, texts: Iterable[str]) -> list[str]:
    """Find texts to which the exported tokenizer gives other ids than the trained one.

    Args:
        tokenizer: the trained tokenizer.
        texts: texts of any kind; special tokens' text counts as plain text.

    Returns:
        The texts whose ids differ, in order; empty when all agree.
    """
    texts = list(texts)
    exported = build_tokenizer(tokenizer)
    exported.encode_special_tokens = True
    encodings = exported.encode_batch_fast(texts, add_special_tokens=False)
    return [
        text for text, encoding in zip(texts, encodings, strict=True) if encoding.ids != list(tokenizer.encode(text))
    ]


def write_tokenizer_files(tokenizer: Tokenizer, out_dir: Path, max_length: int) -> None:
    """Write `tokenizer.json`, `tokenizer_config.json` and `tokenizer.model`.

    Args:
        tokenizer: the trained tokenizer.
        out_dir: an existing folder.
        max_length: longest input in tokens that the model was trained on; clients warn beyond it.
    """
    build_tokenizer(tokenizer).save(str(out_dir / "tokenizer.json"))
    pieces = tokenizer.pieces()
    tokenizer_config = {
        # Neither LlamaTokenizer, which rebuilds the tokenizer without the files' normalizer in transformers 5, nor
        # transformers 5's own TokenizersBackend, which transformers 4 does not know.
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": pieces[tokenizer.bos_id][0],
        "eos_token": pieces[tokenizer.eos_id][0],
        "unk_token": pieces[tokenizer.unk_id][0],
        "pad_token": pieces[tokenizer.pad_id][0],
        "add_bos_token": True,
        "add_eos_token": False,
        "add_prefix_space": False,
        "legacy": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": max_length,
        # transformers 4 would also give token_type_ids, which `generate` refuses.
        "model_input_names": ["input_ids", "attention_mask"],
    }
    text = json.dumps(tokenizer_config, indent=2, ensure_ascii=False)
    (out_dir / "tokenizer_config.json").write_text(text + "\n", encoding="utf-8")
    (out_dir / "tokenizer.model").write_bytes(tokenizer.model_bytes)


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


def varied_texts(num_texts: int, seed: int, samples: Sequence[str] = ()) -> list[str]:
    """Texts that make tokenizers differ, the same ones for the same seed.

    They hold words of many scripts, decomposed letters, emoji, code, digits, control characters, runs of one
    character, every kind of line end and space, special tokens' text and, where given, pieces of real text. None
    holds U+2581, which sentencepiece cannot tell from a space.

    Args:
        num_texts: how many to make.
        seed: what they are drawn from.
        samples: documents to cut some of the texts from.
    """
    rng = random.Random(f"varied texts {seed}")

    def part() -> str:
        kind = rng.random()
        if kind < 0.70:
            return rng.choice(_WORDS)
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
