"""Reading documents out of tars of text: checked, then tokenized as when the tar was indexed, which is checked too."""

from __future__ import annotations

import zlib
from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path

import numpy as np

from pretrain.data.decoding import decode_text, parse_json
from pretrain.data.remote_corpus import RemoteCorpus
from pretrain.data.shard_reader import DamagedDocumentError, ShardReader
from pretrain.data.shards import PREPARE_COMMAND, Manifest, Shard, repair_advice
from pretrain.data.source_files import Bad
from pretrain.data.text_index import PIECE_DTYPE, TEXT_INDEX_DTYPE, TextContent, by_bytes, map_pieces
from pretrain.errors import DataError
from pretrain.tokenizers.sentencepiece_tokenizer import SentencePieceTokenizer
from pretrain.tokenizers.tokenizer import Tokenizer

PIECE_CHARACTERS = 512  # a row of 2,048 tokens begins and ends inside of a piece: about 256 tokens in vain
_MIN_CHANGED_FOR_ALL = 8  # fewer documents with other ids than this are not taken for another tokenizer


def tokenize_pieces(tokenizer: Tokenizer, text: str) -> tuple[np.ndarray, np.ndarray]:
    """Tokenize a document and note its pieces.

    Returns:
        Its ids as `encode_document` gives them, and its pieces, of `PIECE_DTYPE`.
    """
    places = tokenizer.places_to_cut(text, PIECE_CHARACTERS) if len(text) > PIECE_CHARACTERS else [0]
    bounds = [*places, len(text)]
    parts = [_ids(tokenizer, text, begin, end) for begin, end in pairwise(bounds)]
    begins = np.cumsum([0, *map(len, parts[:-1])]).tolist()
    pieces = [(place, begin, zlib.crc32(part.data)) for place, begin, part in zip(places, begins, parts, strict=True)]
    return np.concatenate(parts), np.array(pieces, PIECE_DTYPE)


def _ids(tokenizer: Tokenizer, text: str, begin: int, end: int) -> np.ndarray:
    """The ids of a part of a text; bos is in the first one, eos in the last."""
    ids = tokenizer.encode(text[begin:end])
    if begin == 0:
        ids.insert(0, tokenizer.bos_id)
    if end == len(text):
        ids.append(tokenizer.eos_id)
    return np.frombuffer(array("I", ids), np.uint32).astype(tokenizer.id_dtype)  # four times as quick as np.array


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
        bounds = [*pieces["token"].tolist(), int(record["num_tokens"])]
        end = bounds[-1] if end is None else min(end, bounds[-1])
        first, last = bisect_right(bounds, begin) - 1, bisect_left(bounds, end)  # pieces that are needed
        if first >= last:
            return np.zeros(0, self._tokenizer.id_dtype)
        places = [*pieces["character"].tolist(), len(text)]
        ids = _ids(self._tokenizer, text, places[first], places[last])
        offset = bounds[first]
        is_same = len(ids) == bounds[last] - offset and all(
            zlib.crc32(ids[bounds[number] - offset : bounds[number + 1] - offset].data) == crc32
            for number, crc32 in enumerate(pieces["crc32"][first:last].tolist(), first)
        )
        if not is_same:
            raise self._other(document, "its ids are not those of the index")
        self._num_equal += 1
        return ids[begin - offset : end - offset]

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
        text, num_tokens = f"{self._path}: document {document}: {reason}. {advice}", self._num_tokens(document)
        return DamagedDocumentError(text, f"{reason}. {advice}", num_tokens, is_shard_lost=False)

    def _failure(self, document: int, reason: str, num_tokens: int, is_shard_lost: bool) -> DamagedDocumentError:
        if num_tokens:  # of which there would be as many as bytes; 0 if there is no index
            num_tokens = self._num_tokens(document)
        return super()._failure(document, reason, num_tokens, is_shard_lost)

    def _num_tokens(self, document: int) -> int:
        return int(self._documents["num_tokens"][document])


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
