"""Documents that are nearly equal to an earlier one, by MinHash: Broder 1997, in bands as in Leskovec et al.'s book.

A document is the set of its shingles of five words. Its signature is the least of 128 hashes each over the set; cut
into bands, two documents that agree in a whole band are taken for near-duplicates. Only 8 bytes a band are kept, so
what is found is not compared again, and memory grows by 144 to 288 bytes a document at a threshold of 0.8.

datasketch, an extra (`pip install 'longhaul[data]'`), makes the signatures and chooses the bands.
"""

from __future__ import annotations

import hashlib
from functools import cache
from importlib.util import find_spec
from typing import Any

import numpy as np

from pretrain.errors import ConfigError

NUM_HASHES, SHINGLE_WORDS = 128, 5
_SEED = 1
_FIRST_SLOTS = 1 << 16
_MAX_LOAD = 0.5


def check_library() -> None:
    """Check that datasketch is installed.

    Raises:
        ConfigError: it is not.
    """
    if find_spec("datasketch") is None:
        raise ConfigError(
            "data.filters.near_duplicates is set; expected datasketch, which makes MinHash signatures. Install it: "
            "pip install 'longhaul[data]'"
        )


@cache
def band_shape(threshold: float) -> tuple[int, int]:
    """Number of bands and hashes in each, for a similarity from which documents are near-duplicates."""
    from datasketch import MinHashLSH

    chosen = MinHashLSH(threshold=threshold, num_perm=NUM_HASHES)
    return chosen.b, chosen.r


@cache
def _empty_signature() -> Any:
    from datasketch import MinHash

    return MinHash(num_perm=NUM_HASHES, seed=_SEED, scheme="affine32")


def bands_of(text: str, threshold: float) -> bytes:
    """A document's bands as 8 bytes each, which is all that `NearDuplicates` needs of it."""
    words = text.lower().split()
    shingles = {
        " ".join(words[begin : begin + SHINGLE_WORDS]) for begin in range(max(len(words) - SHINGLE_WORDS + 1, 1))
    }
    signature = _empty_signature().copy()
    signature.update_batch([shingle.encode() for shingle in shingles])
    num_bands, num_rows = band_shape(threshold)
    values = signature.hashvalues.astype("<u8")
    parts = [
        hashlib.blake2b(values[band * num_rows :][:num_rows].tobytes(), digest_size=8, salt=band.to_bytes(2, "little"))
        for band in range(num_bands)
    ]
    return b"".join(part.digest() for part in parts)


class NearDuplicates:
    """The bands of all documents that were kept: a hash table of 64-bit values, open addressing, at most half full."""

    def __init__(self) -> None:
        self._slots = np.zeros(_FIRST_SLOTS, np.uint64)
        self._num_used = 0

    def is_new(self, bands: bytes) -> bool:
        """Whether no document before shares a band; its own are kept then."""
        values = np.frombuffer(bands, "<u8").astype(np.uint64) | np.uint64(1)  # 0 marks an empty slot
        if self._find(values).any():
            return False
        if self._num_used + len(values) > _MAX_LOAD * len(self._slots):
            old = self._slots[self._slots != 0]
            self._slots = np.zeros(2 * len(self._slots), np.uint64)
            for begin in range(0, len(old), 1 << 20):
                self._insert(old[begin : begin + (1 << 20)])
        self._insert(np.unique(values))
        self._num_used += len(values)
        return True

    def _find(self, values: np.ndarray) -> np.ndarray:
        """Which of some values are in the table, bool [num_values]."""
        mask = np.uint64(len(self._slots) - 1)
        places, found = (values >> np.uint64(1)) & mask, np.zeros(len(values), bool)
        pending = np.arange(len(values))
        while len(pending):
            held = self._slots[places[pending]]
            found[pending] = held == values[pending]
            pending = pending[(held != 0) & (held != values[pending])]
            places[pending] = (places[pending] + np.uint64(1)) & mask
        return found

    def _insert(self, values: np.ndarray) -> None:
        """Put in different values that are not in the table."""
        mask = np.uint64(len(self._slots) - 1)
        places = (values >> np.uint64(1)) & mask
        while len(values):
            is_free = self._slots[places] == 0
            self._slots[places[is_free]] = values[is_free]  # of several for one slot the last stays
            is_left = self._slots[places] != values
            values, places = values[is_left], (places[is_left] + np.uint64(1)) & mask
