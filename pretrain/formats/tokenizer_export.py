"""The tokenizer's part of an export, and the proof that transformers gives the same ids from it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from pretrain.errors import ExportError
from pretrain.tokenizers.hf_tokenizer import JsonTokenizer, is_tie
from pretrain.tokenizers.tokenizer import SPACE_PIECE, Tokenizer
from pretrain.tokenizers.tokenizer_files import write_tokenizer_files
from pretrain.tokenizers.varied_texts import varied_texts


def export_tokenizer(
    tokenizer: Tokenizer, out_dir: Path, max_length: int, samples: Sequence[str], num_texts: int,
    load: Callable[[Path], Any],
) -> dict[str, Any]:  # fmt: skip
    """Write a tokenizer's files and verify them.

    Some of transformers' classes build the tokenizer anew and not from what tokenizer.json says. Where the user's
    `tokenizer_config.json` names one with which the ids differ, `PreTrainedTokenizerFast` takes its place.

    Args:
        tokenizer: what the model was trained with.
        out_dir: an existing folder.
        max_length: longest input in tokens that the model was trained on.
        samples, num_texts: as for `verify_tokenizer`.
        load: loads the tokenizer of a folder with transformers.

    Returns:
        What `verify_tokenizer` does, and why the class was replaced if it was.

    Raises:
        ExportError: there is no exact counterpart, or transformers gives something else.
    """
    write_tokenizer_files(tokenizer, out_dir, max_length)
    try:
        return verify_tokenizer(tokenizer, load(out_dir), samples, num_texts)
    except ExportError as error:
        if not isinstance(tokenizer, JsonTokenizer):
            raise
        reason = str(error)
        write_tokenizer_files(tokenizer, out_dir, max_length, tokenizer_class="PreTrainedTokenizerFast")
        try:
            report = verify_tokenizer(tokenizer, load(out_dir), samples, num_texts)
        except ExportError:
            raise error from None
    return report | {"class_replaced_because": reason}


def verify_tokenizer(tokenizer: Tokenizer, exported: Any, samples: Sequence[str], num_texts: int) -> dict[str, Any]:
    """Compare ids and decoded text of an export's tokenizer with ours on varied texts.

    Args:
        tokenizer: the trained tokenizer.
        exported: what transformers loaded.
        samples: real text to cut some of the texts from; may be empty.
        num_texts: how many.

    Returns:
        The number of texts and tokens compared; the number of texts with other ids of the same score, which only a
        unigram model has; how many come back exactly; and the tokens that the client puts before each text.

    Raises:
        ExportError: ids, text or a special token differ, naming the first text.
    """
    where, what_to_do = "export: tokenizer", _what_to_do(tokenizer)
    for name, (ours, theirs) in _compare_special_tokens(tokenizer, exported).items():
        if ours != theirs:
            raise ExportError(f"{where}: {name} is {theirs} in transformers; expected {ours}. {what_to_do}")
    words = [*tokenizer.special_tokens(), *tokenizer.own_symbols()]
    texts = varied_texts(num_texts, seed=0, samples=[s.replace(SPACE_PIECE, "") for s in samples], words=words)
    # Special tokens' text is plain text to us; a client parses it unless it is told otherwise, as here.
    all_ids = exported(texts, split_special_tokens=True, add_special_tokens=False, verbose=False)["input_ids"]
    num_tokens = num_ties = num_restored = 0
    for text, expected, ids in zip(texts, tokenizer.encode_batch(texts), all_ids, strict=True):
        num_tokens += len(ids)
        num_restored += tokenizer.decode(expected) == text
        if ids != expected and is_tie(tokenizer, expected, ids):
            num_ties += 1
        elif ids != expected:
            raise ExportError(f"{where}: ids of {text!r} are {ids} in transformers; expected {expected}. {what_to_do}")
        decoded = exported.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        # sentencepiece writes `⁇` for what it does not know, others nothing.
        if tokenizer.unk_id not in ids and decoded != (ours := tokenizer.decode(expected)):
            raise ExportError(f"{where}: {ids} decode to {decoded!r} in transformers; expected {ours!r}. {what_to_do}")
    return {
        "class": type(exported).__name__,
        "kind": tokenizer.kind,
        "texts": len(texts),
        "tokens": num_tokens,
        "mismatches": 0,
        "ties": num_ties,
        "restored": num_restored,
        "loses_u2581": tokenizer.loses_u2581,
        "documents_begin_with": tokenizer.name_of(tokenizer.bos_id),
        "begins_texts_with": exported.convert_ids_to_tokens(exported("")["input_ids"]),
    }


def _compare_special_tokens(tokenizer: Tokenizer, exported: Any) -> dict[str, tuple[object, object]]:
    """(ours, theirs) of the size and every special token, each of which must give one id where it is to be parsed."""
    vocabulary = exported.get_vocab()
    pairs: dict[str, tuple[object, object]] = {"vocab_size": (tokenizer.vocab_size, max(vocabulary.values()) + 1)}
    # Where a tokenizer has no bos or pad, ours stands in for it and a client need not know.
    optional = {"bos": tokenizer.bos_id == tokenizer.eos_id, "pad": tokenizer.pad_id == tokenizer.eos_id}
    for name in ("unk", "bos", "eos", "pad"):
        theirs = getattr(exported, f"{name}_token_id")
        if name == "unk" and tokenizer.unk_id is None:  # no text gives it, whatever a client calls so
            continue
        if not (theirs is None and optional.get(name)):
            pairs[f"{name}_id"] = (getattr(tokenizer, f"{name}_id"), theirs)
    for token, token_id in tokenizer.special_tokens().items():
        pairs[token] = ([token_id], exported.encode(token, add_special_tokens=False))
    if not isinstance(tokenizer, JsonTokenizer):  # of our own making, so it puts bos first
        pairs["what is put before a text"] = ([tokenizer.bos_id], exported("")["input_ids"])
    return pairs


def _what_to_do(tokenizer: Tokenizer) -> str:
    if isinstance(tokenizer, JsonTokenizer):
        return (
            "Nothing was exported: transformers does not use this tokenizer.json as it is. See what "
            "tokenizer_config.json beside it says, and mend it in the run folder."
        )
    if tokenizer.is_exact:
        return "Nothing was exported; report this with the tokenizer, it is a bug or an untested transformers."
    return (
        "Nothing was exported: this sentencepiece model has no exact counterpart in tokenizer.json (docs/tokenizers.md "
        "says which have)."
    )
