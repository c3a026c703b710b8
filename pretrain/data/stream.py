"""Rows of tokens for training and evaluation, step by step.

A thread of each rank reads whole steps ahead, so that the step's number of targets, the divisor of its loss,
is known before its first micro-step. One thread is enough: a core reads thousands of rows a second.
"""

from __future__ import annotations

import weakref
from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from pretrain.data.augment import Augmenter
from pretrain.data.damage import Damage, DamageLedger
from pretrain.data.data_plan import Corpus, DataPlan, open_corpora, open_plan
from pretrain.data.prefetch import Prefetcher
from pretrain.data.row_reader import Batch, RowAddress, RowReader
from pretrain.data.shards import PREPARE_COMMAND
from pretrain.errors import DataError
from pretrain.options.config import Config
from pretrain.storage.read_ahead import ReadAhead

if TYPE_CHECKING:
    from pretrain.options.batch_plan import BatchPlan

_WINDOWS_AHEAD = 2  # of each corpus: that of the step that is read, and the next one


@dataclass
class StepRows:
    """What one rank computes in one step.

    Attributes:
        micro_batches: One batch a micro-step.
        num_targets: Scored targets in all of them.
        damaged: Documents that cannot be read, so that their targets are not scored; once for each place in a row.
    """

    micro_batches: list[Batch]
    num_targets: int
    damaged: list[Damage]


class _StepReader:
    """Reads one rank's share of the step that begins at a row."""

    def __init__(self, plan: DataPlan, corpora: list[Corpus], sizes: BatchPlan, rank: int, rows: RowReader) -> None:
        self._plan, self.corpora, self._batch_plan, self._rank, self._rows = plan, corpora, sizes, rank, rows
        self.skipped: list[tuple[int, int]] = []
        self._prefetcher: Prefetcher | None = None
        self._is_local = not any(corpus.remote for corpus in corpora)

    def __call__(self, cursor: int) -> StepRows:
        if not self._is_local:
            self._prefetch(cursor)
        sizes = self._batch_plan.for_seq_len(self._plan.seq_len_at(cursor))
        begin = cursor + self._rank * sizes.rows_per_rank
        batches: list[Batch] = []
        damaged: list[Damage] = []
        num_targets = 0
        for first in range(begin, begin + sizes.rows_per_rank, sizes.micro_batch_size):
            addresses = [self._locate(t, sizes.seq_len) for t in range(first, first + sizes.micro_batch_size)]
            batch, num_scored, names = self._rows.read(addresses, sizes.seq_len)
            batches.append(batch)
            num_targets += num_scored
            damaged += names
        self._rows.release_unused()
        return StepRows(batches, num_targets, damaged)

    def rows_in_step(self, cursor: int) -> int:
        return self._batch_plan.for_seq_len(self._plan.seq_len_at(cursor)).global_batch_size

    def next_cursor(self, cursor: int) -> int:
        return self.past_skipped(cursor + self.rows_in_step(cursor))

    def past_skipped(self, cursor: int) -> int:
        return next((end for begin, end in self.skipped if begin <= cursor < end), cursor)

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

    def _locate(self, t: int, seq_len: int) -> RowAddress:
        number, _, block, row = self._plan.locate(t)
        corpus = self.corpora[number]
        return RowAddress(corpus, corpus.rows[seq_len], block, row, t)


def _stop(*ends: Callable[[], object]) -> None:
    for end in ends:
        end()


class TokenStream:
    """The training rows of one rank, step by step.

    Attributes:
        cursor: Row of the run at which the next step begins; what is read ahead does not count.
        step_rows: The first row of the step that was consumed last, and the one past its last.
        plan: The order of the rows.
        damage: Documents that cannot be read; who takes the steps adds them, so that all ranks have the same.
    """

    def __init__(
        self,
        config: Config,
        batch_plan: BatchPlan,
        rank: int,
        tokenizer_fingerprint: str,
        cursor: int = 0,
        is_new: bool = True,
        blank_id: int = 0,
    ) -> None:
        """Open the corpora; reading begins with the first `next_step`.

        Args:
            config: Uses `data` and `run.seed`.
            batch_plan: Sizes of a step with rows of `data.seq_len`, the same on every rank.
            rank: Takes the rank-th contiguous part of every step's rows.
            tokenizer_fingerprint: sha256 of the tokenizer's model file.
            cursor: Row at which to begin.
            is_new: No run has read these shards before: that files are missing or cut short is an error.
            blank_id: What stands for a token that `data.sources[].augment` drops.

        Raises:
            DataError: The corpora are not prepared, damaged, or do not fit each other.
        """
        self.plan, corpora = open_plan(config, tokenizer_fingerprint, is_new)
        self.damage = DamageLedger(corpora, config.data.max_damaged_fraction)
        self.cursor, self.step_rows = cursor, (cursor, cursor)
        self._depth = config.data.prefetch_steps
        self._read_step = _StepReader(self.plan, corpora, batch_plan, rank, RowReader(Augmenter(config, blank_id)))
        self._rows_in_step = self._read_step.rows_in_step
        self._ahead: ReadAhead[StepRows] | None = None
        self._stop_reading: Callable[[], Any] = lambda: None
        self._closed = False

    def next_step(self) -> StepRows:
        """Return this rank's rows of the next step and move the cursor past the step.

        Raises:
            DataError: A corpus is gone, or where it lies cannot be read.
        """
        step = self.read_step()
        self.advance()
        return step

    def read_step(self) -> StepRows:
        """Return this rank's rows of the next step, which count as consumed only after `advance`.

        Raises:
            DataError: A corpus is gone, or where it lies cannot be read.
        """
        if self._closed:
            raise RuntimeError("the token stream was closed")
        if self._ahead is None:
            self._ahead = ReadAhead(self._read_step, self.cursor, self._read_step.next_cursor, self._depth)
            # Runs at close, when the stream is collected, or at exit, before daemon threads are frozen.
            # The reader ends first: it is what starts downloads ahead.
            self._stop_reading = weakref.finalize(self, _stop, self._ahead.stop, self._read_step.stop_prefetch)
        return self._ahead.take()

    def advance(self) -> None:
        """Move the cursor past the oldest step that was read and not yet counted."""
        self.step_rows = self.cursor, self.cursor + self._rows_in_step(self.cursor)
        self.cursor = self._read_step.next_cursor(self.cursor)

    def phase_begun(self) -> int:
        """Number of the phase, from 1, that began with the step that was consumed last; 0 if it goes on with one."""
        begin, _ = self.step_rows
        number = bisect_right(self.plan.first_rows, begin)
        after = next((first for first, end in self.skipped if end == begin), begin)  # what was left out before it
        return number if number > 1 and self.plan.first_rows[number - 1] >= after else 0

    @property
    def skipped(self) -> list[tuple[int, int]]:
        """Ranges [begin, end) of rows that are left out, in order and apart from each other."""
        return self._read_step.skipped

    def skip(self, ranges: Iterable[tuple[int, int]]) -> None:
        """Leave out rows from the cursor on, of whole steps; what is read ahead is read anew."""
        merged: list[tuple[int, int]] = []
        for begin, end in sorted([*self.skipped, *ranges]):
            if merged and begin <= merged[-1][1]:
                begin, end = merged[-1][0], max(end, merged.pop()[1])
            merged.append((begin, end))
        self._go_to(self.cursor, merged)

    def tokens_per_corpus(self) -> dict[str, int]:
        """Tokens of each corpus that were consumed, padding included."""
        return self._consumed(self.plan.tokens_per_corpus)

    def _consumed(self, amounts: Callable[[int], dict[str, int]]) -> dict[str, int]:
        """Amounts of the rows before the cursor, given those of all rows before one, without what was left out."""
        total = amounts(self.cursor)
        for begin, end in self.skipped:
            if end <= self.cursor:
                before, after = amounts(begin), amounts(end)
                total = {name: number - after[name] + before[name] for name, number in total.items()}
        return total

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps, JSON: cursor, identity of the plan, amounts by corpus, damaged and skipped data."""
        return {
            "cursor": self.cursor,
            "plan_hash": self.plan.hash,
            "plan": self.plan.pieces,
            "rows_per_corpus": self._consumed(self.plan.rows_per_corpus),
            "tokens_per_corpus": self.tokens_per_corpus(),
            "epochs": self.plan.epochs(self.cursor),
            "damaged": self.damage.state(),
            "skipped_rows": [list(one) for one in self.skipped],
        }

    def load_state(self, state: dict[str, Any], way_on: str = "begin another run with run.dir=…") -> None:
        """Go to where another stream was whose plan has the same rows up to there; later phases may differ.

        Args:
            state: what `state` returned.
            way_on: what can be done if they do not, besides putting back what changed.
        Raises:
            DataError: The rows before are those of another plan; names what differs.
        """
        cursor = int(state["cursor"])
        if state["plan_hash"] != self.plan.hash:
            if difference := self.plan.explain_difference(state.get("plan", {}), cursor):
                raise DataError(
                    f"data: the order of rows differs from the checkpoint's: {difference}. "
                    f"Put back what changed, or {way_on}"
                )
        self._check_steps(cursor)
        self._go_to(cursor, [(begin, end) for begin, end in state.get("skipped_rows", ())])
        self.damage.load_state(state.get("damaged", {}))

    def _go_to(self, cursor: int, skipped: list[tuple[int, int]]) -> None:
        self._stop_reading()
        if self._ahead is not None:
            self._ahead.wait()  # a read that hangs would else go on beside the next one, in the same open shards
        self._ahead = None
        self._read_step.skipped = skipped
        self.cursor = self._read_step.past_skipped(cursor)
        self.step_rows = self.cursor, self.cursor

    def _check_steps(self, cursor: int) -> None:
        """Check that no step from the cursor on has rows of two lengths."""
        for begin, end in pairwise([cursor, *(row for row in self.plan.first_rows if row > cursor)]):
            if self.plan.seq_len_at(begin) != self.plan.seq_len_at(end) and (end - begin) % self._rows_in_step(begin):
                raise DataError(
                    f"data.phases: rows of {self.plan.seq_len_at(end)} tokens begin at row {end}, inside of a step of "
                    f"{self._rows_in_step(begin)} rows; expected the end of one. Put back the train.global_batch_size "
                    f"that the checkpoint at row {cursor} was made with."
                )

    def close(self) -> None:
        """End the threads and close the shards."""
        for corpus in self._read_step.corpora:
            corpus.stop_downloads()
        self._stop_reading()
        self._closed = True
        self._read_step.close()


class ValRows:
    """The held-out rows of all sources, one after the other, of `data.seq_len` in every phase.

    Attributes:
        num_rows: Rows used.
        damage: Documents that cannot be read; who reads rows adds those of `take_damaged`.
    """

    def __init__(self, config: Config, tokenizer_fingerprint: str, max_rows: int, is_new: bool = True) -> None:
        """Open the validation splits.

        Args:
            config: Uses `data`.
            tokenizer_fingerprint: sha256 of the tokenizer's model file.
            max_rows: Rows to use, spread evenly over all; 0 uses all.
            is_new: As for `TokenStream`.

        Raises:
            DataError: There are no held-out rows, or the corpora are as for `TokenStream`.
        """
        self._seq_len = config.data.seq_len
        seq_lens = {source.name: [self._seq_len] for source in config.data.sources}
        self._corpora = open_corpora(config, tokenizer_fingerprint, "val", seq_lens, is_new)
        self.damage = DamageLedger(self._corpora, config.data.max_damaged_fraction)
        self._ends = np.cumsum([corpus.rows[self._seq_len].num_rows for corpus in self._corpora])
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
        self._damaged: list[Damage] = []
        self._rows = RowReader()

    def batch(self, row_numbers: Sequence[int]) -> Batch:
        """Read the rows with these numbers, each from 0 to num_rows - 1."""
        batch, _, damaged = self._rows.read([self._locate(number) for number in row_numbers], self._seq_len)
        self._rows.release_unused()
        self._damaged += damaged
        return batch

    def sources(self) -> list[tuple[str, range]]:
        """Each source's name and the numbers of its rows."""
        ends = [-(-int(end) * self.num_rows // self._available) for end in (0, *self._ends)]
        return [(corpus.name, range(*pair)) for corpus, pair in zip(self._corpora, pairwise(ends), strict=True)]

    def example_rows(self) -> list[range]:
        """The numbers of the rows of each source that holds examples for tuning."""
        parts = zip(self._corpora, self.sources(), strict=True)
        return [numbers for corpus, (_, numbers) in parts if corpus.manifest.context_bit is not None]

    def identity(self) -> str:
        """What fixes the rows: the content of each source, and their number and length."""
        return "|".join([f"{self.num_rows} x {self._seq_len}", *(c.manifest.fingerprint() for c in self._corpora)])

    def take_damaged(self) -> list[Damage]:
        """Documents that could not be read since the last call, and are not counted yet."""
        damaged, self._damaged = self._damaged, []
        return [one for one in damaged if not self.damage.is_known(one)]

    def close(self) -> None:
        """Close the shards."""
        self._rows.close()
        for corpus in self._corpora:
            corpus.close()

    def _locate(self, number: int) -> RowAddress:
        if not 0 <= number < self.num_rows:
            raise IndexError(f"held-out row {number} of {self.num_rows}")
        row = number * self._available // self.num_rows
        i = int(np.searchsorted(self._ends, row, side="right"))
        corpus = self._corpora[i]
        rows = corpus.rows[self._seq_len]
        return RowAddress(corpus, rows, *rows.locate(row - (int(self._ends[i]) - rows.num_rows)), number)
