"""Rows of tokens as torch tensors, put together from the documents of shards."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from pretrain.data_plan import Corpus
from pretrain.errors import DataError
from pretrain.row_table import RowTable
from pretrain.shard_reader import DamagedDocumentError, ShardCache
from pretrain.shards import PREPARE_COMMAND

IGNORED_TARGET = -100
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


@dataclass(frozen=True)
class RowAddress:
    """Where a row lies: the corpus, its table, the block, the row in the block; and its number for the batch."""

    corpus: Corpus
    rows: RowTable
    block: int
    row: int
    row_id: int


class RowReader:
    """Puts rows together from their documents."""

    def __init__(self) -> None:
        """Begin with no shard open."""
        self._shards = ShardCache()

    def read(self, addresses: Sequence[RowAddress], seq_len: int) -> tuple[Batch, int, list[str]]:
        """Read rows into one batch; count its targets, and name the damaged documents, whose place stays empty.

        Raises:
            DataError: A shard cannot be read, or a table does not fit it.
        """
        shape = (len(addresses), seq_len)
        tokens_BT = np.full(shape, _PAD_ID, dtype=np.int64)
        targets_BT = np.full(shape, IGNORED_TARGET, dtype=np.int64)
        doc_start_BT = np.empty(shape, dtype=np.int32)
        damaged: list[str] = []
        num_targets = 0
        for i, address in enumerate(addresses):
            num_targets += self._fill(address, tokens_BT[i], targets_BT[i], doc_start_BT[i], damaged)
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
        damaged: list[str],
    ) -> int:
        corpus = address.corpus
        shard = corpus.shards[address.block]
        reader = self._shards.reader(corpus.folder, shard, corpus.manifest.dtype, corpus.remote, corpus.open_shard)
        begin = num_targets = 0
        for document, start, length in address.rows.row(address.block, address.row).tolist():
            end = begin + length
            if document >= shard.num_documents or end > len(tokens_T):
                raise self._wrong_table(address)
            doc_start_T[begin:end] = begin
            try:
                ids = reader.read(document, start, start + length + 1)
            except DamagedDocumentError:
                damaged.append(f"{corpus.place}/{shard.name}.tar document {document} in row {address.row_id}")
            else:
                if len(ids) <= length:
                    raise self._wrong_table(address)
                tokens_T[begin:end] = ids[:-1]
                targets_T[begin:end] = ids[1:]
                num_targets += length
            begin = end
        doc_start_T[begin:] = begin
        return num_targets

    def _wrong_table(self, address: RowAddress) -> DataError:
        return DataError(
            f"{address.rows.path} is damaged: row {address.row} of block {address.block} does not fit its documents. "
            f"Delete this folder and run: {PREPARE_COMMAND}"
        )
