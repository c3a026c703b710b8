"""Rows of tokens for training and evaluation, as torch tensors.

A thread of each rank reads whole steps ahead, so that the step's number of targets, the divisor of its loss,
is known before its first micro-step. One thread is enough: a core reads thousands of rows a second.
"""

from __future__ import annotations

import threading
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from pretrain.config import Config
from pretrain.data_plan import Corpus, DataPlan, open_corpora, open_plan
from pretrain.errors import DataError
from pretrain.prefetch import Prefetcher
from pretrain.shard_reader import DamagedDocumentError, ShardCache
from pretrain.shards import PREPARE_COMMAND

if TYPE_CHECKING:
    from pretrain.batch_plan import BatchPlan

IGNORED_TARGET = -100
_PAD_ID = 3  # pad of the tokenizers trained here; of others any id does: padding is not scored, nor attended to
_STOP_SECONDS = 5.0
_WINDOWS_AHEAD = 2  # of each corpus: that of the step that is read, and the next one


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


@dataclass
class StepRows:
    """What one rank computes in one step.

    Attributes:
        micro_batches: One batch a micro-step.
        num_targets: Scored targets in all of them.
        damaged: Documents that are damaged on disk, so that their targets are not scored.
    """

    micro_batches: list[Batch]
    num_targets: int
    damaged: list[str]


@dataclass(frozen=True)
class _RowAddress:
    """Where a row lies: the corpus, the block, the row in the block; and its number for the batch."""

    corpus: Corpus
    block: int
    row: int
    row_id: int


class _RowReader:
    """Puts rows together from their documents."""

    def __init__(self, seq_len: int) -> None:
        self._seq_len = seq_len
        self._shards = ShardCache()

    def read(self, addresses: Sequence[_RowAddress]) -> tuple[Batch, int, list[str]]:
        """Read rows into one batch; count its targets, and name the damaged documents, whose place stays empty."""
        shape = (len(addresses), self._seq_len)
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
        self._shards.release_unused()

    def close(self) -> None:
        self._shards.close()

    def _fill(
        self,
        address: _RowAddress,
        tokens_T: np.ndarray,
        targets_T: np.ndarray,
        doc_start_T: np.ndarray,
        damaged: list[str],
    ) -> int:
        corpus = address.corpus
        shard = corpus.shards[address.block]
        reader = self._shards.reader(corpus.folder, shard, corpus.manifest.dtype, corpus.remote)
        begin = num_targets = 0
        for document, start, length in corpus.rows.row(address.block, address.row).tolist():
            end = begin + length
            if document >= shard.num_documents or end > self._seq_len:
                raise self._wrong_table(address)
            doc_start_T[begin:end] = begin
            try:
                ids = reader.read(document)
            except DamagedDocumentError:
                damaged.append(f"{corpus.place}/{shard.name}.tar document {document} in row {address.row_id}")
            else:
                if start + length >= len(ids):
                    raise self._wrong_table(address)
                tokens_T[begin:end] = ids[start : start + length]
                targets_T[begin:end] = ids[start + 1 : start + length + 1]
                num_targets += length
            begin = end
        doc_start_T[begin:] = begin
        return num_targets

    def _wrong_table(self, address: _RowAddress) -> DataError:
        return DataError(
            f"{address.corpus.folder}/rows-{self._seq_len} is damaged: row {address.row} of block {address.block} does "
            f"not fit its documents. Delete this folder and run: {PREPARE_COMMAND}"
        )


class _ReadAhead:
    """Reads steps on a thread of its own, a bounded number ahead of who takes them."""

    def __init__(self, read_step: Callable[[int], StepRows], cursor: int, rows_per_step: int, depth: int) -> None:
        self._read_step, self._cursor, self._rows_per_step, self._depth = read_step, cursor, rows_per_step, depth
        self._steps: deque[StepRows] = deque()
        self._failure: BaseException | None = None
        self._stopped = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="longhaul-data", daemon=True)
        self._thread.start()

    def take(self) -> StepRows:
        """Return the next step; raise what the thread raised, once the steps before it are taken."""
        with self._changed:
            self._changed.wait_for(lambda: self._steps or self._failure or self._stopped)
            if self._stopped:
                raise RuntimeError("the token stream was closed")
            if self._steps:
                self._changed.notify_all()
                return self._steps.popleft()
            assert self._failure is not None
            raise self._failure

    def stop(self) -> None:
        """End the thread; a read that hangs in the file system is left behind, it does not hold up an exit."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()
        self._thread.join(_STOP_SECONDS)

    def _run(self) -> None:
        try:
            while True:
                with self._changed:
                    self._changed.wait_for(lambda: self._stopped or len(self._steps) < self._depth)
                    if self._stopped:
                        return
                step = self._read_step(self._cursor)
                self._cursor += self._rows_per_step
                with self._changed:
                    self._steps.append(step)
                    self._changed.notify_all()
        except BaseException as error:  # surfaces in take, whatever it is: nobody sees a thread's exception
            with self._changed:
                self._failure = error
                self._changed.notify_all()


class _StepReader:
    """Reads one rank's share of the step that begins at a row."""

    def __init__(self, plan: DataPlan, corpora: list[Corpus], batch_plan: BatchPlan, rank: int) -> None:
        self._plan, self.corpora, self._batch_plan, self._rank = plan, corpora, batch_plan, rank
        self._rows = _RowReader(batch_plan.seq_len)
        self._prefetcher: Prefetcher | None = None
        self._is_local = not any(corpus.remote for corpus in corpora)

    def __call__(self, cursor: int) -> StepRows:
        if not self._is_local:
            self._prefetch(cursor)
        sizes = self._batch_plan
        begin = cursor + self._rank * sizes.rows_per_rank
        batches: list[Batch] = []
        damaged: list[str] = []
        num_targets = 0
        for first in range(begin, begin + sizes.rows_per_rank, sizes.micro_batch_size):
            addresses = [self._locate(t) for t in range(first, first + sizes.micro_batch_size)]
            batch, num_scored, names = self._rows.read(addresses)
            batches.append(batch)
            num_targets += num_scored
            damaged += names
        self._rows.release_unused()
        return StepRows(batches, num_targets, damaged)

    def stop_prefetch(self) -> None:
        if self._prefetcher:
            self._prefetcher.stop()
            self._prefetcher = None

    def close(self) -> None:
        self._rows.close()
        for corpus in self.corpora:
            corpus.close()

    def _prefetch(self, cursor: int) -> None:
        """Have the shards of the windows from the cursor on downloaded, of corpora that are not in a local folder."""
        blocks = [(self.corpora[corpus], block) for corpus, block in self._plan.coming_blocks(cursor, _WINDOWS_AHEAD)]
        wanted = [(corpus.remote, corpus.shards[block]) for corpus, block in blocks if corpus.remote]
        if self._prefetcher is None:
            self._prefetcher = Prefetcher(wanted)
        self._prefetcher.want(wanted)

    def _locate(self, t: int) -> _RowAddress:
        corpus, _, block, row = self._plan.locate(t)
        return _RowAddress(self.corpora[corpus], block, row, t)


def _stop(*ends: Callable[[], object]) -> None:
    for end in ends:
        end()


class TokenStream:
    """The training rows of one rank, step by step.

    Attributes:
        cursor: Rows of the run that all ranks together have consumed; what is read ahead does not count.
        plan: The order of the rows.
    """

    def __init__(
        self, config: Config, batch_plan: BatchPlan, rank: int, tokenizer_fingerprint: str, cursor: int = 0
    ) -> None:
        """Open the corpora; reading begins with the first `next_step`.

        Args:
            config: Uses `data` and `run.seed`.
            batch_plan: Sizes of the step, the same on every rank.
            rank: Takes the rank-th contiguous part of every step's rows.
            tokenizer_fingerprint: sha256 of the tokenizer's model file.
            cursor: Row at which to begin.

        Raises:
            DataError: The corpora are not prepared, damaged, or do not fit each other.
        """
        self.plan, corpora = open_plan(config, tokenizer_fingerprint)
        self.cursor = cursor
        self._batch_plan, self._depth = batch_plan, config.data.prefetch_steps
        self._read_step = _StepReader(self.plan, corpora, batch_plan, rank)
        self._stop_prefetch = self._read_step.stop_prefetch
        self._ahead: _ReadAhead | None = None
        self._stop_reading: Callable[[], Any] = lambda: None
        self._closed = False

    def next_step(self) -> StepRows:
        """Return this rank's rows of the next step and move the cursor past the step.

        Raises:
            DataError: A shard cannot be read.
        """
        step = self.read_step()
        self.advance()
        return step

    def read_step(self) -> StepRows:
        """Return this rank's rows of the next step, which count as consumed only after `advance`.

        Raises:
            DataError: A shard cannot be read.
        """
        if self._closed:
            raise RuntimeError("the token stream was closed")
        if self._ahead is None:
            num_rows = self._batch_plan.global_batch_size
            self._ahead = _ReadAhead(self._read_step, self.cursor, num_rows, self._depth)
            # Runs at close, when the stream is collected, or at exit, before daemon threads are frozen.
            self._stop_reading = weakref.finalize(self, _stop, self._stop_prefetch, self._ahead.stop)
        return self._ahead.take()

    def advance(self) -> None:
        """Move the cursor past the oldest step that was read and not yet counted."""
        self.cursor += self._batch_plan.global_batch_size

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps, JSON: the cursor, the plan's identity, and rows and epochs per corpus."""
        return {
            "cursor": self.cursor,
            "plan_hash": self.plan.hash,
            "plan": self.plan.pieces,
            "rows_per_corpus": self.plan.rows_per_corpus(self.cursor),
            "epochs": self.plan.epochs(self.cursor),
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Go to where another stream of the same plan was.

        Raises:
            DataError: The state belongs to another plan; names what differs.
        """
        if state["plan_hash"] != self.plan.hash:
            raise DataError(
                f"data: the order of rows differs from the checkpoint's: "
                f"{self.plan.explain_difference(state.get('plan', {}))}. "
                "Put back what changed, or begin another run with run.dir=…"
            )
        self._stop_reading()
        self._ahead = None
        self.cursor = int(state["cursor"])

    def close(self) -> None:
        """End the threads and close the shards."""
        for corpus in self._read_step.corpora:
            corpus.stop_downloads()
        self._stop_reading()
        self._closed = True
        self._read_step.close()


class ValRows:
    """The held-out rows of all sources, one after the other.

    Attributes:
        num_rows: Rows used.
        damaged: Documents that turned out to be damaged on disk; they are not scored.
    """

    def __init__(self, config: Config, tokenizer_fingerprint: str, max_rows: int) -> None:
        """Open the validation splits.

        Args:
            config: Uses `data`.
            tokenizer_fingerprint: sha256 of the tokenizer's model file.
            max_rows: Rows to use, spread evenly over all; 0 uses all.

        Raises:
            DataError: There are no held-out rows, or the corpora are as for `TokenStream`.
        """
        self._corpora = open_corpora(config, tokenizer_fingerprint, "val")
        self._ends = np.cumsum([corpus.rows.num_rows for corpus in self._corpora])
        available = int(self._ends[-1])
        if not available:
            documents = ", ".join(
                f"{corpus.name} has {sum(shard.num_documents for shard in corpus.manifest.val)} held-out documents of "
                f"{sum(shard.num_documents for split in ('train', 'val') for shard in corpus.manifest.shards(split))}"
                for corpus in self._corpora
            )
            raise DataError(
                f"data.sources: held-out rows are 0 ({documents}); expected at least one. Raise data.val_fraction "
                f"and prepare the corpora into new folders ({PREPARE_COMMAND}), or set eval.every_steps=0."
            )
        self._available = available
        self.num_rows = min(max_rows or available, available)
        self.damaged: list[str] = []
        self._rows = _RowReader(config.data.seq_len)

    def batch(self, row_numbers: Sequence[int]) -> Batch:
        """Read the rows with these numbers, each from 0 to num_rows - 1."""
        batch, _, damaged = self._rows.read([self._locate(number) for number in row_numbers])
        self._rows.release_unused()
        self.damaged += [name for name in damaged if name not in self.damaged]
        return batch

    def close(self) -> None:
        """Close the shards."""
        self._rows.close()
        for corpus in self._corpora:
            corpus.close()

    def _locate(self, number: int) -> _RowAddress:
        if not 0 <= number < self.num_rows:
            raise IndexError(f"held-out row {number} of {self.num_rows}")
        row = number * self._available // self.num_rows
        corpus = int(np.searchsorted(self._ends, row, side="right"))
        rows = self._corpora[corpus].rows
        return _RowAddress(self._corpora[corpus], *rows.locate(row - (int(self._ends[corpus]) - rows.num_rows)), number)
