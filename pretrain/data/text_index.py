"""The index of a tar of text: where the documents lie, and where their texts may be cut to be tokenized in parts.

It is a `.npy` file of documents, as other indexes are, with a second array behind the first: the pieces of these
documents. A row that holds a part of a long document tokenizes the pieces that it needs, not the whole document.
"""

from __future__ import annotations

import io
import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

INDEX_KEY = "what --index made"  # of the recipe in a journal; shards of ids have none
INDEX_DTYPE = np.dtype([("offset", "<u8"), ("num_tokens", "<u4"), ("crc32", "<u4")])  # of shards of ids
# Of a document: its bytes in the tar and their crc32; its tokens, bos and eos included; and its pieces, which end where
# the next document's begin.
TEXT_INDEX_DTYPE = np.dtype(
    [("offset", "<u8"), ("num_tokens", "<u4"), ("crc32", "<u4"), ("num_bytes", "<u4"), ("first_piece", "<u4"),
     ("is_json", "<u4")]
)  # fmt: skip
# Of a piece: where it begins in the text and in the document's ids, and the crc32 of its ids.
PIECE_DTYPE = np.dtype([("character", "<u4"), ("token", "<u4"), ("crc32", "<u4")])


@dataclass(frozen=True)
class TextContent:
    """How the texts of a corpus become ids.

    Attributes:
        text_field: Field of JSON documents that holds the text.
        libraries: Versions of what tokenized when the index was made, by name.
    """

    text_field: str
    libraries: dict[str, str]


def text_index_bytes(documents: np.ndarray, pieces: np.ndarray) -> bytes:
    """The content of an index file.

    Args:
        documents: Of `TEXT_INDEX_DTYPE`, in the order of the tar.
        pieces: Of `PIECE_DTYPE`, in the order of the documents; each has at least one.
    """
    buffer = io.BytesIO()
    for array in (documents, pieces):
        np.lib.format.write_array(buffer, array, allow_pickle=False)
    return buffer.getvalue()


def map_pieces(path: Path) -> np.ndarray:
    """Memory-map the pieces of an index.

    Raises:
        ValueError: The file is not an index of texts, or is cut short.
    """
    with open(path, "rb") as file:
        shape, dtype = _read_header(file)
        file.seek(math.prod(shape) * dtype.itemsize, os.SEEK_CUR)
        shape, dtype = _read_header(file)
        if dtype != PIECE_DTYPE or len(shape) != 1 or not shape[0]:
            raise ValueError(f"its second array is of {dtype}; expected {PIECE_DTYPE}")
        return np.memmap(path, dtype, "r", file.tell(), shape)


def by_bytes(documents: np.ndarray) -> np.ndarray:
    """An index of `INDEX_DTYPE` for documents of `TEXT_INDEX_DTYPE`: their bytes, as if each byte were an id."""
    index = np.empty(len(documents), INDEX_DTYPE)
    index["offset"], index["num_tokens"], index["crc32"] = (
        documents[name] for name in ("offset", "num_bytes", "crc32")
    )
    return index


def _read_header(file: BinaryIO) -> tuple[tuple[int, ...], np.dtype]:
    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, _, dtype = read(file)
    return shape, dtype


def select_documents(documents: np.ndarray, pieces: np.ndarray, is_chosen: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Take some documents, with their pieces.

    Args:
        documents: Has the fields of `TEXT_INDEX_DTYPE`, and perhaps others.
        pieces: Theirs.
        is_chosen: Bool [documents].

    Returns:
        Documents of `TEXT_INDEX_DTYPE`, and their pieces.
    """
    num_pieces = np.diff(np.append(documents["first_piece"].astype(np.int64), len(pieces)))
    chosen = np.empty(np.count_nonzero(is_chosen), TEXT_INDEX_DTYPE)
    for name in TEXT_INDEX_DTYPE.names or ():
        chosen[name] = documents[name][is_chosen]
    chosen["first_piece"] = np.cumsum(num_pieces[is_chosen]) - num_pieces[is_chosen]
    return chosen, pieces[np.repeat(is_chosen, num_pieces)]


def is_begun_index(journal: Path) -> bool:
    """Whether the journal of a corpus is that of `prepare --index`."""
    try:
        with open(journal, "rb") as file:
            return json.loads(file.readline())["recipe"].get(INDEX_KEY) is not None
    except (OSError, ValueError, KeyError, TypeError):
        return False
