"""What to expect of a tokenizer that others made, tried out on some of the corpus before anything is written."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from pretrain.errors import ExportError
from pretrain.tokenizers.hf_tokenizer import check_ids
from pretrain.tokenizers.sentencepiece_tokenizer import SentencePieceTokenizer
from pretrain.tokenizers.tokenizer import SPACE_PIECE, Tokenizer
from pretrain.tokenizers.varied_texts import varied_texts

NUM_TEXTS = 10_000
SAMPLE_CHARACTERS = 1_000_000


def try_out(tokenizer: Tokenizer, documents: Iterable[str], seed: int) -> list[str]:
    """Say what a tokenizer is, what does not come back from its ids, and whether a model can be exported with it.

    Args:
        tokenizer: any but one that is known to be exact.
        documents: the corpus; as many are read as have `SAMPLE_CHARACTERS` together.
        seed: of the made-up texts.

    Returns:
        Lines for the user. Nothing in them is an error: whether the losses matter is the user's to judge.
    """
    texts, num_characters = [], 0
    for document in documents:
        text = document[:SAMPLE_CHARACTERS]
        texts.append(text.replace(SPACE_PIECE, "") if tokenizer.loses_u2581 else text)
        num_characters += len(text)
        if num_characters >= SAMPLE_CHARACTERS:
            break
    num_bytes = sum(len(text.encode()) for text in texts)
    token_bytes = tokenizer.token_bytes()
    all_ids = tokenizer.encode_batch(texts)
    num_tokens = sum(map(len, all_ids))
    counted = sum(int(token_bytes[ids].sum()) for ids in all_ids)
    begin, end = tokenizer.name_of(tokenizer.bos_id), tokenizer.name_of(tokenizer.eos_id)
    lines = [
        f"{tokenizer.kind}, {tokenizer.vocab_size:,} ids, {num_bytes / max(num_tokens, 1):.2f} bytes per token on "
        f"{num_bytes:,} bytes of the corpus; documents begin with {begin} and end with {end}"
    ]
    lost = [
        (text, returned)
        for text, ids in zip(texts, all_ids, strict=True)
        if (returned := tokenizer.decode(ids)) != text
    ]
    if lost:
        lines.append(
            f"warning: {len(lost):,} of {len(texts):,} documents do not come back from their ids exactly, such as "
            f"{_first_difference(*lost[0])}. The model learns the text as it comes back."
        )
    if counted != num_bytes:
        lines.append(
            f"its ids stand for {counted / max(num_bytes, 1):.3%} of the bytes of the text, so bits per byte are off "
            "by as much"
        )
    if isinstance(tokenizer, SentencePieceTokenizer):
        lines += _exportable(tokenizer, texts, seed)
    return lines


def _exportable(tokenizer: SentencePieceTokenizer, sample: Sequence[str], seed: int) -> list[str]:
    texts = [*sample, *varied_texts(NUM_TEXTS, seed, sample, tokenizer.own_symbols())]
    try:
        different = check_ids(tokenizer, texts)
    except ExportError as error:
        return [f"warning: a model that is trained with it cannot be exported to Hugging Face's format: {error}"]
    if not different:
        return [f"its tokenizer.json for exports gives the same ids for {len(texts):,} documents and made-up texts"]
    return [
        f"warning: a model that is trained with it cannot be exported to Hugging Face's format: {len(different):,} of "
        f"{len(texts):,} documents and made-up texts get other ids from tokenizer.json, such as {different[0][:80]!r}"
    ]


def _first_difference(text: str, returned: str) -> str:
    """The surroundings of the first place where a text and what came back of it differ."""
    pairs = zip(text, returned, strict=False)
    place = next((i for i, (ours, theirs) in enumerate(pairs) if ours != theirs), min(len(text), len(returned)))
    begin = max(place - 20, 0)
    return f"{text[begin : place + 20]!r}, which becomes {returned[begin : place + 20]!r}"
