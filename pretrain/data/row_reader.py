"""Rows of tokens as torch tensors, put together from the documents of shards."""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from pretrain.data.augment import Augmenter
from pretrain.data.damage import Damage
from pretrain.data.data_plan import Corpus
from pretrain.data.row_table import RowTable
from pretrain.data.shard_reader import DamagedDocumentError, ShardCache
from pretrain.data.shards import PREPARE_COMMAND
from pretrain.errors import DataError

IGNORED_TARGET = -100
_MAX_BUFFERS = 256  # that are remembered; more may be in use
_PAD_ID = 3  # pad of the tokenizers trained here; of others any id does: padding is not scored, nor attended to


@dataclass
class Batch:
    """Rows of one micro-step.

    Attributes:
        tokens_BT: Inputs, int64; padding has the pad id.
        targets_BT: The token after each input, int64; -100 where nothing is scored.
        doc_start_BT: Place in the row where the token's document begins, int32. The continuation of a
            document that was cut, and padding, are documents of their own.
        row_ids_B: Number of each row in the run (evaluation: in the held-out set), int64.
    """

    tokens_BT: torch.Tensor
    targets_BT: torch.Tensor
    doc_start_BT: torch.Tensor
    row_ids_B: torch.Tensor

    def part(self, slots: slice) -> Batch:
        """Return what a rank gets that has these slots of each row; where documents begin, attention needs of all."""
        tokens_BT, targets_BT = (tensor[:, slots].contiguous() for tensor in (self.tokens_BT, self.targets_BT))
        return Batch(tokens_BT, targets_BT, self.doc_start_BT, self.row_ids_B)

    def count_targets(self) -> int:
        """Count what is scored."""
        return int((self.targets_BT != IGNORED_TARGET).sum())


class RowAddress(NamedTuple):
    """Where a row lies: the corpus, its table, the block, the row in the block; and its number for the batch."""

    corpus: Corpus
    rows: RowTable
    block: int
    row: int
    row_id: int


class _Buffers:
    """Memory of batches, used again once nothing refers to it.

    Memory that is fresh from the system costs a page fault every 4 KiB, and these take longer than reading the rows.
    """

    def __init__(self) -> None:
        self._blocks: deque[np.ndarray] = deque([np.empty(0, np.uint8)], _MAX_BUFFERS)  # handed out longest ago first
        self._num_references_when_idle = sys.getrefcount(self._blocks[-1])

    def take(self, num_rows: int, seq_len: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return tokens and targets, int64, and starts of documents, int32, each [num_rows, seq_len], not filled."""
        size = num_rows * seq_len
        block = self._idle_block(20 * size)
        parts = (
            block[: 8 * size].view(np.int64),
            block[8 * size : 16 * size].view(np.int64),
            block[16 * size :].view(np.int32),
        )
        tokens, targets, doc_start = (part.reshape(num_rows, seq_len) for part in parts)
        return tokens, targets, doc_start

    def _idle_block(self, num_bytes: int) -> np.ndarray:
        """A block that no array or tensor is a view of."""
        if len(self._blocks[0]) != num_bytes:
            self._blocks.clear()  # rows of another length from now on
        for _ in range(len(self._blocks)):
            self._blocks.rotate(-1)
            if sys.getrefcount(self._blocks[-1]) == self._num_references_when_idle:
                return self._blocks[-1]
        self._blocks.append(np.empty(num_bytes, np.uint8))
        return self._blocks[-1]


class RowReader:
    """Puts rows together from their documents."""

    def __init__(self, augment: Augmenter | None = None) -> None:
        """Begin with no shard open; `augment` changes the inputs of what is read."""
        self._shards, self._buffers, self._augment = ShardCache(), _Buffers(), augment

    def read(self, addresses: Sequence[RowAddress], seq_len: int) -> tuple[Batch, int, list[Damage]]:
        """Read rows into one batch; count its targets, and name the damaged documents, whose place stays empty.

        Raises:
            DataError: A corpus is gone, or where it lies cannot be read; or a table does not fit its shard.
        """
        tokens_BT, targets_BT, doc_start_BT = self._buffers.take(len(addresses), seq_len)
        damaged: list[Damage] = []
        num_targets = 0
        for i, address in enumerate(addresses):
            num_targets += self._fill(address, tokens_BT[i], targets_BT[i], doc_start_BT[i], damaged)
        if self._augment:
            rows = [(address.corpus.name, address.row_id) for address in addresses]
            self._augment(rows, tokens_BT, targets_BT, doc_start_BT)
        row_ids_B = np.array([address.row_id for address in addresses], dtype=np.int64)
        arrays = (tokens_BT, targets_BT, doc_start_BT, row_ids_B)
        return Batch(*(torch.from_numpy(array) for array in arrays)), num_targets, damaged

    def release_unused(self) -> None:
        """Let go of shards from elsewhere that were not read since the last call."""
        self._shards.release_unused()

    def close(self) -> None:
        """Close the shards."""
        self._shards.close()

    def _fill(
        self,
        address: RowAddress,
        tokens_T: np.ndarray,
        targets_T: np.ndarray,
        doc_start_T: np.ndarray,
        damaged: list[Damage],
    ) -> int:
        corpus, rows, block, row, _ = address
        shard = corpus.shards[block]
        reader = self._shards.reader(corpus.folder, shard, corpus.manifest.dtype, corpus.remote, corpus.open_shard)
        begin = num_targets = 0
        for document, start, length in rows.row(block, row):
            end = begin + length
            if document >= shard.num_documents or end > len(tokens_T):
                raise self._wrong_table(address)
            doc_start_T[begin:end] = begin
            try:
                ids = reader.read(document, start, start + length + 1)
            except DamagedDocumentError as error:
                damaged.append(_damage(address, document, error))
                tokens_T[begin:end], targets_T[begin:end] = _PAD_ID, IGNORED_TARGET
            else:
                if len(ids) <= length:
                    raise self._wrong_table(address)
                tokens_T[begin:end] = ids[:-1]
                targets_T[begin:end] = ids[1:]
                num_targets += length
                if (bit := corpus.manifest.context_bit) is not None:
                    num_targets -= _hide_context(tokens_T[begin:end], targets_T[begin:end], 1 << bit)
            begin = end
        if begin < len(tokens_T):
            tokens_T[begin:], targets_T[begin:], doc_start_T[begin:] = _PAD_ID, IGNORED_TARGET, begin
        return num_targets

    def _wrong_table(self, address: RowAddress) -> DataError:
        return DataError(
            f"{address.rows.path} is damaged: row {address.row} of block {address.block} does not fit its documents. "
            f"Delete this folder and run: {PREPARE_COMMAND}"
        )


def _hide_context(tokens: np.ndarray, targets: np.ndarray, flag: int) -> int:
    """Take the mark of context off stored ids, and have such targets not scored; return how many these are."""
    tokens &= flag - 1
    is_context = targets >= flag
    targets[is_context] = IGNORED_TARGET
    return int(np.count_nonzero(is_context))


def _damage(address: RowAddress, document: int, error: DamagedDocumentError) -> Damage:
    corpus, shard = address.corpus, address.corpus.shards[address.block]
    place = f"{corpus.place}/{shard.name}.tar"
    amounts = error.num_tokens, address.row_id, error.reason, error.is_shard_lost
    return Damage(corpus.name, shard.name, place, document, *amounts)
