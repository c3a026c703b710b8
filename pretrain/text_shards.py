"""Reading documents out of tars of text: checked, then tokenized as when the tar was indexed, which is checked too."""

from __future__ import annotations

import zlib
from bisect import bisect_left, bisect_right
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path

import numpy as np

from pretrain.decoding import decode_text, parse_json
from pretrain.errors import DataError
from pretrain.remote_corpus import RemoteCorpus
from pretrain.sentencepiece_tokenizer import SentencePieceTokenizer
from pretrain.shard_reader import DamagedDocumentError, ShardReader
from pretrain.shards import PREPARE_COMMAND, Manifest, Shard, repair_advice
from pretrain.source_files import Bad
from pretrain.text_index import PIECE_DTYPE, TEXT_INDEX_DTYPE, TextContent, by_bytes, map_pieces
from pretrain.tokenizer import Tokenizer

PIECE_CHARACTERS = 1024  # a row of 2,048 tokens begins and ends inside of a piece: about 256 tokens in vain
_MIN_CHANGED_FOR_ALL = 8  # fewer documents with other ids than this are not taken for another tokenizer


def tokenize_pieces(tokenizer: Tokenizer, text: str) -> tuple[np.ndarray, np.ndarray]:
    """Tokenize a document and note its pieces.

    Returns:
        Its ids as `encode_document` gives them, and its pieces, of `PIECE_DTYPE`.
    """
    places = tokenizer.places_to_cut(text, PIECE_CHARACTERS) if len(text) > PIECE_CHARACTERS else [0]
    ids = [_piece_ids(tokenizer, text, places, number) for number in range(len(places))]
    begins = np.cumsum([0, *map(len, ids[:-1])])
    pieces = np.array(
        [
            (place, begin, zlib.crc32(part.data))
            for place, begin, part in zip(places, begins.tolist(), ids, strict=True)
        ],
        PIECE_DTYPE,
    )
    return np.concatenate(ids) if len(ids) > 1 else ids[0], pieces


def _piece_ids(tokenizer: Tokenizer, text: str, places: list[int], number: int) -> np.ndarray:
    """The ids of a piece; bos is in the first one, eos in the last."""
    is_last = number == len(places) - 1
    ids = tokenizer.encode(text[places[number] : None if is_last else places[number + 1]])
    if number == 0:
        ids.insert(0, tokenizer.bos_id)
    if is_last:
        ids.append(tokenizer.eos_id)
    return np.array(ids, tokenizer.id_dtype)


def content_of(text_field: str, tokenizer: Tokenizer) -> TextContent:
    """What an index that is made now says of its texts."""
    library = "sentencepiece" if isinstance(tokenizer, SentencePieceTokenizer) else "tokenizers"
    return TextContent(text_field, {library: version(library)})


class TextShardReader(ShardReader):
    """Reads single documents of one tar of text; rows read parts of long ones."""

    def __init__(
        self, folder: str | Path, shard: Shard, dtype: str, verify_index: bool = True,
        remote: RemoteCorpus | None = None, *, content: TextContent, tokenizer: Tokenizer,
    ) -> None:  # fmt: skip
        """Open the tar and map the index, as `ShardReader` does.

        Args:
            folder, shard, verify_index, remote: As for `ShardReader`.
            dtype: That of `tokenizer`, whose ids are returned.
            content: How texts become ids.
            tokenizer: That of the corpus.
        """
        self._content, self._tokenizer = content, tokenizer
        self._num_equal = 0  # documents whose ids were those of the index
        self._changed: set[int] = set()
        super().__init__(folder, shard, "uint8", verify_index, remote)

    def read(self, document: int, begin: int = 0, end: int | None = None) -> np.ndarray:
        """Return the ids of one document, bos and eos included, from the `begin`-th to the `end`-th.

        Raises:
            DamagedDocumentError: The document's bytes are damaged, or its ids are not those of the index.
            DataError: As `ShardReader.read`; or most documents have other ids.
        """
        data = super().read(document).tobytes()
        record = self._documents[document]
        is_last = document == len(self._documents) - 1
        last_piece = len(self._pieces) if is_last else self._documents["first_piece"][document + 1]
        pieces = self._pieces[record["first_piece"] : last_piece]
        text = parse_json(data, self._content.text_field) if record["is_json"] else decode_text(data)
        if isinstance(text, Bad):
            raise self._other(document, text.message)
        begins = [*pieces["token"].tolist(), int(record["num_tokens"])]
        end = begins[-1] if end is None else min(end, begins[-1])
        places, crcs = pieces["character"].tolist(), pieces["crc32"].tolist()
        parts = []
        for number in range(bisect_right(begins, begin) - 1, min(bisect_left(begins, end), len(places))):
            ids = _piece_ids(self._tokenizer, text, places, number)
            if len(ids) != begins[number + 1] - begins[number] or zlib.crc32(ids.data) != crcs[number]:
                raise self._other(document, "its ids are not those of the index")
            parts.append(ids[max(begin - begins[number], 0) : end - begins[number]])
        self._num_equal += 1
        return np.concatenate(parts) if parts else np.zeros(0, self._tokenizer.id_dtype)

    def _adopt(self, index: np.ndarray, path: Path) -> np.ndarray:
        """Keep the index, and return one by which the bytes of documents are read."""
        try:
            if index.dtype != TEXT_INDEX_DTYPE:
                raise ValueError(f"its dtype is {index.dtype}; expected {TEXT_INDEX_DTYPE}")
            self._documents, self._pieces = index, np.asarray(map_pieces(path))
        except (OSError, ValueError, EOFError) as error:
            raise DataError(f"{path} cannot be read: {error}. {repair_advice(self._folder)}") from error
        return by_bytes(index)

    def _other(self, document: int, reason: str) -> DataError:
        """The error for a document whose bytes are right and do not give the ids that they gave."""
        self._changed.add(document)
        now = content_of(self._content.text_field, self._tokenizer).libraries
        then, installed = (" ".join(f"{name} {number}" for name, number in one.items())
                           for one in (self._content.libraries, now))  # fmt: skip
        what = (
            f"The same {installed} is installed, in another build, most likely. Index"
            if then == installed
            else f"It was indexed with {then}, and {installed} is installed. Install that version, or index"
        )
        advice = f"{what} the tars into another folder: {PREPARE_COMMAND} --index"
        num_changed = len(self._changed)
        if num_changed >= _MIN_CHANGED_FOR_ALL and num_changed > self._num_equal:
            return DataError(
                f"{self._path}: {num_changed} documents have other ids than in the index and {self._num_equal} have "
                f"the same, so far; expected the same. {advice}"
            )
        return DamagedDocumentError(f"{self._path}: document {document}: {reason}. {advice}")


def text_opener(manifest: Manifest, tokenizer: Tokenizer) -> Callable[..., ShardReader]:
    """What opens the training shards of a corpus, with the arguments of `ShardReader`.

    Args:
        manifest: Of the corpus.
        tokenizer: The corpus's own.

    Raises:
        DataError: It is another one.
    """
    if manifest.text is None:
        return ShardReader
    if tokenizer.fingerprint != manifest.tokenizer_fingerprint:
        raise DataError(
            f"tokenizer.model: its fingerprint is {tokenizer.fingerprint[:12]}…; expected "
            f"{manifest.tokenizer_fingerprint[:12]}…, that of the tokenizer that the tars of {manifest.corpus} were "
            "indexed with. Put that one there."
        )
    return partial(TextShardReader, content=manifest.text, tokenizer=tokenizer)
