"""Which documents of a corpus cannot be read, each counted once, and how many of them a run puts up with.

Every rank has the same ledger, because all of them add what any of them finds at the same step; so they stop together.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any

from pretrain.data.data_plan import Corpus
from pretrain.data.node_cache import CacheFullError
from pretrain.data.shard_reader import DamagedDocumentError
from pretrain.data.shards import Shard
from pretrain.errors import DataError
from pretrain.ranks.distributed import Ranks

_NUM_WORST = 3  # shards that a message names
_Key = tuple[str, str]  # names of a corpus and of a shard of it


class TooMuchDamageError(DataError):
    """More of a corpus cannot be read than `data.max_damaged_fraction`; raised by all ranks together.

    Attributes:
        damage: What `StepInput.damage` would be of the step that ends the run: names of new documents, and their sum.
    """

    agreed = True
    damage: Sequence[str] = ()


@dataclass(frozen=True)
class Damage:
    """A document that a row lacks.

    Attributes:
        corpus: Name of its corpus in the config.
        shard: Name of its shard.
        place: Where the shard's tar lies.
        document: Its number in the shard.
        num_tokens: Its tokens; those of its shard if that is lost.
        row: Number of the row in the run (evaluation: in the held-out set).
        reason: What is wrong.
        is_shard_lost: Nothing of the shard can be read, or most of what was read is damaged.
    """

    corpus: str
    shard: str
    place: str
    document: int
    num_tokens: int
    row: int
    reason: str
    is_shard_lost: bool

    def __str__(self) -> str:
        if self.is_shard_lost:
            return f"{self.place}, first asked for in row {self.row}: the shard counts as lost: {self.reason}"
        return f"{self.place} document {self.document} in row {self.row}: {self.reason}"


class DamageLedger:
    """The documents of one split that cannot be read.

    Attributes:
        max_fraction: Share of a corpus's tokens up to which a run goes on.
        num_documents: How many; of a shard that is lost, all.
        num_tokens: Tokens in them.
    """

    def __init__(self, corpora: Sequence[Corpus], max_fraction: float) -> None:
        """Begin with none."""
        self.max_fraction = max_fraction
        self._corpora = {corpus.name: corpus for corpus in corpora}
        self._documents: dict[_Key, dict[int, int]] = {}  # tokens of each damaged document of a shard
        self._lost: dict[_Key, Shard] = {}
        self._reasons: dict[_Key, str] = {}  # one of each shard's
        self.num_documents = self.num_tokens = 0

    def is_known(self, damage: Damage) -> bool:
        """Whether a document was counted before."""
        key = damage.corpus, damage.shard
        return key in self._lost or not damage.is_shard_lost and damage.document in self._documents.get(key, ())

    def add(self, found: Iterable[Damage]) -> list[Damage]:
        """Count documents; all ranks add the same.

        Returns:
            Those that are counted for the first time, in the order of their rows.
        """
        new = []
        for damage in sorted(found, key=lambda one: (one.row, one.shard, one.document)):
            if self.is_known(damage):
                continue
            new.append(damage)
            key = damage.corpus, damage.shard
            if damage.is_shard_lost:
                self._lost[key] = self._shard(key)
                self._documents.pop(key, None)
                self._reasons[key] = damage.reason
            else:
                self._documents.setdefault(key, {})[damage.document] = damage.num_tokens
                self._reasons.setdefault(key, damage.reason)
        self._count()
        return new

    def fraction(self, corpus: str) -> float:
        """Share of the tokens of a corpus's split that cannot be read."""
        damaged = sum(self._amounts(key)[1] for key in self._keys() if key[0] == corpus)
        return damaged / max(sum(shard.num_tokens for shard in self._corpora[corpus].shards), 1)

    def check(self) -> None:
        """Check that no corpus has lost more than the run puts up with.

        Raises:
            TooMuchDamageError: One has; names its worst shards and what to do.
        """
        for corpus in self._corpora:
            if (fraction := self.fraction(corpus)) > self.max_fraction:
                raise self._too_much(
                    corpus,
                    f"{_percent(fraction)} of its {self._split(corpus)} tokens cannot be read; expected at most "
                    f"data.max_damaged_fraction ({self.max_fraction:g})",
                    "a higher data.max_damaged_fraction",
                )

    def check_step(self, num_targets: int) -> None:
        """Check that a step in which documents are masked has something left to learn from.

        Raises:
            TooMuchDamageError: It has not, and the option does not allow for the loss of everything.
        """
        if not num_targets and self.max_fraction < 1 and (keys := self._keys()):
            corpus = max(keys, key=lambda key: self._amounts(key)[1])[0]
            raise self._too_much(
                corpus,
                f"no document of this step's rows can be read, nor {_percent(self.fraction(corpus))} of its "
                f"{self._split(corpus)} tokens in all; expected something to learn from",
                "data.max_damaged_fraction=1",
            )

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps, JSON: by corpus and shard the number and tokens of each document, null for all."""
        state: dict[str, Any] = {}
        for corpus, shard in sorted(self._keys()):
            documents = self._documents.get((corpus, shard))
            listed = None if documents is None else sorted(map(list, documents.items()))
            state.setdefault(corpus, {})[shard] = listed
        return state

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Take up the count of an earlier start, of corpora and shards that are still there."""
        self._documents, self._lost = {}, {}
        for corpus, shards in state.items():
            for shard, documents in shards.items():
                key = corpus, shard
                if corpus not in self._corpora or all(one.name != shard for one in self._corpora[corpus].shards):
                    continue
                if documents is None:
                    self._lost[key] = self._shard(key)
                else:
                    self._documents[key] = dict(documents)
        self._count()

    def forget_mended(self, ranks: Ranks) -> int:
        """Read again what was damaged at an earlier start, and stop counting what is in order by now.

        All ranks call this together and divide the shards; those from elsewhere are downloaded again.

        Returns:
            How many documents are in order.
        """
        before, keys = self.num_documents, sorted(self._keys())
        own = ranks.agree(lambda: {key: self._read_again(key) for key in keys[ranks.rank :: ranks.world_size]})
        for key, (damaged, reason) in (item for part in ranks.gather(own) for item in part.items()):
            self._reasons[key] = reason
            if damaged is None:
                continue  # lost, as before
            self._lost.pop(key, None)
            self._documents.pop(key, None)
            if damaged:
                self._documents[key] = damaged
        self._count()
        return before - self.num_documents

    def _read_again(self, key: _Key) -> tuple[dict[int, int] | None, str]:
        """Tokens of each document of a shard that is damaged now, None if the shard is lost as before; and why."""
        corpus, shard, known = self._corpora[key[0]], self._shard(key), self._documents.get(key)
        damaged: dict[int, int] = {}
        reason = ""
        try:
            opened = corpus.open_shard(corpus.folder, shard, corpus.manifest.dtype, remote=corpus.remote)
        except CacheFullError:
            return known, reason  # as before: it is looked at when it is needed
        with closing(opened) as reader:
            for document in range(shard.num_documents) if known is None else known:
                try:
                    reader.read(document)
                except DamagedDocumentError as error:
                    reason = error.reason
                    if known is None and error.is_shard_lost:
                        return None, reason
                    damaged[document] = error.num_tokens if known is None else known[document]
        return damaged, reason

    def _keys(self) -> set[_Key]:
        return {*self._documents, *self._lost}

    def _shard(self, key: _Key) -> Shard:
        return next(shard for shard in self._corpora[key[0]].shards if shard.name == key[1])

    def _amounts(self, key: _Key) -> tuple[int, int]:
        """Documents and tokens of a shard that cannot be read."""
        if key in self._lost:
            return self._lost[key].num_documents, self._lost[key].num_tokens
        return len(self._documents[key]), sum(self._documents[key].values())

    def _count(self) -> None:
        amounts = [self._amounts(key) for key in self._keys()]
        self.num_documents, self.num_tokens = sum(one[0] for one in amounts), sum(one[1] for one in amounts)

    def _split(self, corpus: str) -> str:
        return "training" if self._corpora[corpus].split == "train" else "held-out"

    def _too_much(self, name: str, found: str, way_on: str) -> TooMuchDamageError:
        corpus = self._corpora[name]
        own = sorted((key for key in self._keys() if key[0] == name), key=lambda key: (-self._amounts(key)[1], key))
        worst = "; ".join(self._describe(key) for key in own[:_NUM_WORST])
        rest = f"; and {len(own) - _NUM_WORST} more shards" if len(own) > _NUM_WORST else ""
        mend = (
            f"Upload these files to {corpus.place} again, whole,"
            if corpus.remote
            else f"Restore these files from a copy (python launch/prepare.py --verify {corpus.place} names all damage)"
        )
        return TooMuchDamageError(
            f"data.sources[{name}]: {found}. The worst are {worst}{rest}. {mend} and run the same command again; or go "
            f"on without them by {way_on}."
        )

    def _describe(self, key: _Key) -> str:
        num_documents, _ = self._amounts(key)
        reason = f" ({self._reasons[key]})" if self._reasons.get(key) else ""
        return f"{key[1]}.tar: {num_documents:,} of {self._shard(key).num_documents:,} documents{reason}"


def _percent(fraction: float) -> str:
    return f"{100 * fraction:.3g}%"


def describe(new: Sequence[Damage], ledger: DamageLedger) -> Iterator[str]:
    """Name documents that are counted for the first time, and sum up what is damaged by now."""
    for damage in new:
        yield f"{damage}; it is masked"
    shares = ", ".join(f"{_percent(ledger.fraction(name))} of {name}" for name in dict.fromkeys(d.corpus for d in new))
    yield (
        f"in all {ledger.num_documents:,} documents are damaged, {shares}; the run ends at more than "
        f"data.max_damaged_fraction ({ledger.max_fraction:g}) of a source"
    )
