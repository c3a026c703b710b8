"""Rendering and filtering of documents by several processes, in their order."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import closing
from functools import partial
from pathlib import Path

from pretrain.data.source_files import Bad
from pretrain.options.config import DataSection, SourceSection
from pretrain.preparing.filters import (
    Filtered,
    RawText,
    Refine,
    filter_all,
    filter_batch,
    filters_of,
    needs_work,
    refiner,
)
from pretrain.preparing.workers import num_processes, ordered_map

_BATCH_CHARACTERS = 1 << 18  # refined at once by one process
_Item = tuple[str, RawText]


def open_refiner(files: Iterable[Path], source: SourceSection, data: DataSection) -> Refine:
    """What renders and filters a source's documents: in `data.prepare_processes` if there is something to do.

    Raises:
        ConfigError: a library that it takes is missing.
    """
    if not needs_work(files, source, data):
        return filter_all
    if num_processes(data) == 1:
        return refiner(source, data)

    def refine(contents: Iterable[_Item]) -> Iterator[tuple[str, Filtered]]:
        function = partial(filter_batch, filters_of(source, data))
        with closing(ordered_map(function, _batches(contents), _contents_of, num_processes(data))) as results:
            for batch, filtered in results:
                yield from zip((origin for origin, _ in batch), filtered, strict=True)

    return refine


def _batches(contents: Iterable[_Item]) -> Iterator[list[_Item]]:
    batch: list[_Item] = []
    size = 0
    for item in contents:
        batch.append(item)
        size += 1 if isinstance(item[1], Bad) else len(item[1])
        if size >= _BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _contents_of(batch: list[_Item]) -> list[RawText]:
    return [content for _, content in batch]
