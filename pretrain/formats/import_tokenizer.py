"""The tokenizer of a published model: which of its files it is read from, and the proof that transformers agrees."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pretrain.errors import ConfigError, DataError, ExportError
from pretrain.formats.added_tokens import AddedTokens, add_tokens
from pretrain.tokenizers.hf_tokenizer import TOKENIZER_CONFIG, JsonTokenizer, is_tie
from pretrain.tokenizers.sentencepiece_model import read_model
from pretrain.tokenizers.sentencepiece_tokenizer import SentencePieceTokenizer
from pretrain.tokenizers.tokenizer import CARRIED_FILES, SPACE_PIECE, Tokenizer
from pretrain.tokenizers.varied_texts import varied_texts

CHAT_TEMPLATE = CARRIED_FILES[0]


def choose_tokenizer(
    folder: Path, config: Mapping[str, Any], load: Callable[..., Any], samples: Sequence[str], num_texts: int
) -> tuple[Tokenizer, dict[str, Any]]:
    """Open the sentencepiece model where there is one that gives the ids of transformers, else `tokenizer.json`.

    Some classes of transformers build a tokenizer anew and not from what its file says. Where the class gives other
    ids and the file read plainly does not, the file counts, as the model was trained before that class was.

    Args:
        folder: the published model.
        config: its `config.json`, whose eos counts where the tokenizer names none.
        load: loads the folder's tokenizer with transformers, plainly if asked for `is_plain`.
        samples: real text.
        num_texts: how many texts are compared.

    Returns:
        The tokenizer, and what was found out.

    Raises:
        ExportError: there is none, or transformers gives other ids; naming the first text.
    """
    candidates = [folder / name for name in ("tokenizer.model", "tokenizer.json") if (folder / name).is_file()]
    if not candidates:
        raise ExportError(
            f"{folder}: has no tokenizer; expected tokenizer.model or tokenizer.json. Copy the one that the model was "
            "trained with, of the same repository; if that has vocab.json and merges.txt, make it of these by "
            "transformers: AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR)."
        )
    opened: dict[Path, Tokenizer] = {}
    passed_over: list[str] = []
    for path in candidates:
        try:
            opened[path] = _open(path, config)
        except ExportError:
            if path == candidates[-1] and not opened:
                raise
            passed_over.append(f"{path.name}: it is not readable")  # such as tiktoken's, which has the same name
    references = [load(folder)]
    if (folder / "tokenizer.json").is_file():
        references.append(load(folder, is_plain=True))
    for path, tokenizer in opened.items():
        faults: list[str] = []
        for reference in references:
            fault, num_tokens = _difference(tokenizer, reference, samples, num_texts)
            if fault is None:
                report = {"file": path.name, "kind": tokenizer.kind, "class": type(reference).__name__,
                          "texts": num_texts, "tokens": num_tokens, "mismatches": 0,
                          "vocab_size": tokenizer.vocab_size}  # fmt: skip
                if faults:
                    report["class_differs"] = f"{type(references[0]).__name__}: {faults[0]}"
                if passed_over:
                    report["passed_over"] = passed_over
                return tokenizer, report
            faults.append(fault)
        passed_over.append(f"{path.name}: {faults[0]}")
    raise ExportError(
        f"{folder}: {passed_over[-1]}. Expected the ids of transformers. The files are of different tokenizers, or "
        "transformers does not use this one as it is: correct the files beside it."
    )


def _open(path: Path, config: Mapping[str, Any]) -> Tokenizer:
    kind = JsonTokenizer if path.suffix == ".json" else SentencePieceTokenizer
    try:
        return kind(path)
    except ConfigError:  # nothing there says which token ends documents
        eos = config.get("eos_token_id")
        eos = eos[0] if isinstance(eos, list) and eos else eos
        names = {index: token for token, index in _vocabulary(path).items()}
        if eos not in names:
            raise ExportError(
                f"{path}: nothing says which token ends documents; expected eos_token in tokenizer_config.json or "
                "eos_token_id in config.json. Add what the model was trained with."
            ) from None
        return kind(path, eos=names[eos])
    except DataError as error:
        if path.suffix == ".json":
            raise ExportError(str(error)) from None
        raise ExportError(f"{str(error).partition('; expected')[0]}; expected a sentencepiece model.") from None


def _vocabulary(path: Path) -> dict[str, int]:
    if path.suffix != ".json":
        return {piece: index for index, (piece, _, _) in enumerate(read_model(path.read_bytes()).pieces)}
    spec = json.loads(path.read_bytes())
    model = spec["model"]["vocab"]
    known = dict(model) if isinstance(model, dict) else {entry[0]: index for index, entry in enumerate(model)}
    return known | {token["content"]: token["id"] for token in spec.get("added_tokens", [])}


def _difference(tokenizer: Tokenizer, reference: Any, samples: Sequence[str], num_texts: int) -> tuple[str | None, int]:
    """Return in which text, size or token a tokenizer of transformers differs, and the number of tokens compared."""
    size = max(reference.get_vocab().values()) + 1
    if tokenizer.vocab_size < size:  # tokens were added in a file beside it
        added = [name for name, index in reference.get_vocab().items() if index >= tokenizer.vocab_size]
        return f"it has {tokenizer.vocab_size:,} ids, and transformers {size:,} with {min(added)!r} from beside it", 0
    for which in ("bos", "eos"):
        theirs = getattr(reference, f"{which}_token_id")
        ours = getattr(tokenizer, f"{which}_id")
        if theirs is not None and theirs != ours:
            return f"its {which} is {ours}, and {theirs} in transformers", 0
    words = [*tokenizer.special_tokens(), *tokenizer.own_symbols()]
    texts = varied_texts(num_texts, seed=0, samples=[one.replace(SPACE_PIECE, "") for one in samples], words=words)
    all_ids = reference(texts, split_special_tokens=True, add_special_tokens=False, verbose=False)["input_ids"]
    num_tokens = 0
    for text, ours, theirs in zip(texts, tokenizer.encode_batch(texts), all_ids, strict=True):
        num_tokens += len(ours)
        if list(theirs) != list(ours) and not is_tie(tokenizer, ours, theirs):
            return f"its ids of {text!r} are {ours}, and {theirs} in transformers", num_tokens
    return None, num_tokens


def keep_tokenizer(tokenizer: Tokenizer, added: AddedTokens, source: Path, folder: Path, num_texts: int) -> Tokenizer:
    """Write a tokenizer's files, the chat template too, with more tokens if asked for, and open what was written.

    Raises:
        ConfigError: a token is there already.
        ExportError: another text has other ids with the new tokens than without.
    """
    files = add_tokens(tokenizer, added) if len(added) else dict(tokenizer.files)
    if isinstance(tokenizer, SentencePieceTokenizer) and CHAT_TEMPLATE not in files:
        settings = source / TOKENIZER_CONFIG
        template = json.loads(settings.read_bytes()).get("chat_template") if settings.is_file() else None
        if isinstance(template, list):  # several, by name
            template = {one["name"]: one["template"] for one in template}.get("default")
        if template:
            files[CHAT_TEMPLATE] = template.encode()
    for name, content in files.items():
        (folder / name).write_bytes(content)
    main = folder / next(iter(files))
    names = [tokenizer.name_of(tokenizer.bos_id), tokenizer.name_of(tokenizer.eos_id)]
    grown = type(tokenizer)(main, bos=names[0], eos=names[1])  # type: ignore[call-arg]
    assert grown.vocab_size == tokenizer.vocab_size + len(added)
    for place, name in enumerate([*added.special, *added.symbols]):
        written = name.replace(" ", SPACE_PIECE) if isinstance(grown, SentencePieceTokenizer) else name
        assert grown.name_of(tokenizer.vocab_size + place) == written
    if len(added):
        texts = [text for text in varied_texts(num_texts, seed=1) if not any(one in text for one in added.symbols)]
        for text, before, after in zip(texts, tokenizer.encode_batch(texts), grown.encode_batch(texts), strict=True):
            if before != after:
                raise ExportError(
                    f"--add-tokens: ids of {text!r} would be {after}; expected {before}, as without them. Add other "
                    "tokens."
                )
    return grown
