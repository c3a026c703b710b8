"""`prepare` by many machines: each makes a share of a source's files, and one merges them.

A share is a corpus of its own in `<shards>/share-K-of-N`, whose documents are all in one split, in their order, with a
record of each: its digest, bytes and bands. The merge reads the shares one after the other and does with their
documents what `prepare` does with those that it tokenizes, so the result is the same to the byte, whatever N is.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Generator, Iterator
from pathlib import Path

import numpy as np

from pretrain.config import Config, SourceSection
from pretrain.console import LiveLine
from pretrain.corpus import Corpus, Item
from pretrain.errors import ConfigError, DataError
from pretrain.journal import Journal, Recipe, check_recipe, read_recipe
from pretrain.near_duplicates import NearDuplicates
from pretrain.shard_reader import ShardReader
from pretrain.shards import MANIFEST_NAME, Manifest, sync_folder
from pretrain.tokenizer import Tokenizer
from pretrain.workers import Batch

RECORDS_NAME = "records.bin"
_DIGEST_BYTES, _SIZE_BYTES, _BANDS_BYTES = (
    16,
    4,
    2,
)  # of a record: digest, bytes of text, bytes of the bands that follow


def parse_share(text: str) -> tuple[int, int]:
    """Read `K/N`: the share, from 1, and how many there are.

    Raises:
        ConfigError: it is something else.
    """
    number, _, count = text.partition("/")
    if number.isdigit() and count.isdigit() and 1 <= int(number) <= int(count):
        return int(number), int(count)
    raise ConfigError(f"--share is {text}; expected K/N with K from 1 to N, such as 3/16. Correct it.")


def files_of_share(files: list[Path], number: int, count: int) -> list[Path]:
    """A share of files: those in a row whose middles are in the K-th of N equal parts of all bytes."""
    sizes = [file.stat().st_size for file in files]
    total, begin, chosen = max(sum(sizes), 1), 0, []
    places: dict[Path, int] = {}  # a .bin and its .idx stay together
    for file, size in zip(files, sizes, strict=True):
        place = min(2 * begin + size, 2 * total - 1) * count // (2 * total)
        if places.setdefault(file.with_suffix(""), place) != place and file.suffix == ".idx":
            place = places[file.with_suffix("")]
        chosen += [file] if place == number - 1 else []
        begin += size
    return chosen


class ShareCorpus(Corpus):
    """A share of a source.

    Args:
        source, config, tokenizer, line: as for `Corpus`.
        number, count: the share, from 1, and how many there are.
    """

    def __init__(
        self, source: SourceSection, config: Config, tokenizer: Tokenizer, line: LiveLine, number: int, count: int
    ) -> None:
        data = config.data.model_copy(update={"val_fraction": 0.0})
        super().__init__(source, config.model_copy(update={"data": data}), tokenizer, line)
        self.number, self.count = number, count
        self.folder = share_folder(source, number, count)

    def files(self) -> list[Path]:
        """The files of this share."""
        return files_of_share(super().files(), self.number, self.count)

    def recipe(self) -> Recipe:
        """What the share is made of."""
        return self._recipe(self.files())

    def _recipe(self, files: list[Path]) -> Recipe:
        return super()._recipe(files) | {"the share": f"{self.number}/{self.count}"}

    def _pack(self, manifest: Manifest) -> None:
        """Rows are packed when all shares are merged."""

    def _add_rows(self, manifest: Manifest) -> list[int]:
        return []

    def _check_not_empty(self) -> None:
        """A share may be empty; all of them may not."""

    def _batches(self, files: list[Path], journal: Journal) -> Iterator[Batch]:
        """As of any corpus; the records are written anew, since what was tokenized before is read again too."""
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / RECORDS_NAME
        temporary = path.with_name(f".{RECORDS_NAME}.tmp")
        with open(temporary, "wb") as self._records:
            yield from super()._batches(files, journal)
            self._records.flush()
            os.fsync(self._records.fileno())
        os.replace(temporary, path)
        sync_folder(self.folder)

    def _is_new(self, item: Item, digests: set[bytes], near_duplicates: NearDuplicates) -> bool:
        """Near-duplicates are found when shares are merged: which documents stay is known only then."""
        without_bands = Item(item.origin, item.digest, b"", item.num_bytes, None, None)
        if not super()._is_new(without_bands, digests, near_duplicates):
            return False
        sizes = item.num_bytes.to_bytes(_SIZE_BYTES, "little") + len(item.bands).to_bytes(_BANDS_BYTES, "little")
        self._records.write(item.digest + sizes + item.bands)
        return True


class MergedCorpus(Corpus):
    """A source whose shares are all there.

    Args:
        source, config, tokenizer, line: as for `Corpus`.
        count: how many shares there are.
    """

    def __init__(
        self, source: SourceSection, config: Config, tokenizer: Tokenizer, line: LiveLine, count: int
    ) -> None:  # fmt: skip
        super().__init__(source, config, tokenizer, line)
        self.shares = [ShareCorpus(source, config, tokenizer, line, number, count) for number in range(1, count + 1)]

    def _documents(self, files: list[Path]) -> Iterator[Item]:
        manifests = [self._manifest_of(share) for share in self.shares]  # before the first is read
        for share, manifest in zip(self.shares, manifests, strict=True):
            self.log.counts += Counter(manifest.counts)
            yield from _items_of(share.folder, manifest)
            self.log._finished_bytes += sum(file.stat().st_size for file in share.files())

    def _encoded(
        self, batches: Iterator[Batch], files: list[Path]
    ) -> Generator[tuple[Batch, list[np.ndarray]], None, None]:
        yield from ((batch, batch.ids) for batch in batches)

    def _manifest_of(self, share: ShareCorpus) -> Manifest:
        if not (share.folder / MANIFEST_NAME).exists():
            raise DataError(
                f"{share.folder} is not complete; expected every share before they are merged. Run: "
                f"python launch/prepare.py CONFIG --share {share.number}/{share.count}"
            )
        check_recipe(share.folder, share.recipe(), read_recipe(share.folder) or {})
        return Manifest.load(share.folder)


def share_folder(source: SourceSection, number: int, count: int) -> Path:
    """Where a share of a source lies."""
    return Path(source.shards) / f"share-{number}-of-{count}"


def _items_of(folder: Path, manifest: Manifest) -> Iterator[Item]:
    """The documents of a share, in their order.

    Raises:
        DataError: a document is damaged, or the records do not fit the shards.
    """
    with open(folder / RECORDS_NAME, "rb") as records:
        for shard in manifest.train:
            reader = ShardReader(folder, shard, manifest.dtype)
            try:
                for number in range(shard.num_documents):
                    head = records.read(_DIGEST_BYTES + _SIZE_BYTES + _BANDS_BYTES)
                    digest, sizes = head[:_DIGEST_BYTES], head[_DIGEST_BYTES:]
                    num_bytes, bands_bytes = (
                        int.from_bytes(part, "little") for part in (sizes[:_SIZE_BYTES], sizes[_SIZE_BYTES:])
                    )
                    bands = records.read(bands_bytes)
                    if len(sizes) != _SIZE_BYTES + _BANDS_BYTES or len(bands) != bands_bytes:
                        raise _wrong_records(folder)
                    yield Item(f"{folder}: {shard.name}, document {number}", digest, bands, num_bytes, None,
                               reader.read(number))  # fmt: skip
            finally:
                reader.close()
        if records.read(1):
            raise _wrong_records(folder)


def _wrong_records(folder: Path) -> DataError:
    return DataError(
        f"{folder / RECORDS_NAME} does not fit the shards beside it; expected a record of each document. Delete "
        f"{folder} and prepare this share again."
    )
