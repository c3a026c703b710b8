"""What is left out or masked in text by choice: `data.filters`. A pure function of a text, so it can run anywhere."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from pretrain.data.source_files import Bad, kind_of
from pretrain.errors import ConfigError
from pretrain.options.config import DataSection, FiltersSection, SourceSection
from pretrain.personal_data import PERSONAL_DATA, SECRETS, mask
from pretrain.preparing import languages, near_duplicates, wikipedia
from pretrain.preparing.near_duplicates import bands_of
from pretrain.preparing.repetition import find_repetition
from pretrain.preparing.wikipedia import Markup

RULES_VERSION = 1  # of everything here that decides what becomes of a text
REASONS = "secrets", "personal_data", "short", "long", "few_alphanumerics", "repetitive", "other_language"  # to drop
RawText = str | Bad | Markup


@dataclass(frozen=True)
class Filtered:
    """What became of a document.

    Attributes:
        content: its text, or why there is none.
        masked: what was masked in it, as counted.
        bands: what near-duplicates have in common, if they are looked for.
    """

    content: str | Bad
    masked: dict[str, int] = field(default_factory=dict)
    bands: bytes = b""


Refine = Callable[[Iterable[tuple[str, RawText]]], Iterator[tuple[str, Filtered]]]


def filters_of(source: SourceSection, data: DataSection) -> FiltersSection:
    """The filters that a source's documents are put through; examples are put through none."""
    return data.filters if source.filter and source.examples is None else FiltersSection()


def identity(filters: FiltersSection) -> str | None:
    """Everything that the filters' results depend on, as a text; None if they do nothing."""
    chosen = filters.model_dump(mode="json", exclude_defaults=True)
    return json.dumps(chosen | {"rules": RULES_VERSION}, sort_keys=True) if chosen else None


def needs_work(files: Iterable[Path], source: SourceSection, data: DataSection) -> bool:
    """Whether documents of files are rendered or filtered, after a check that what this takes is installed.

    Raises:
        ConfigError: it is not, or a language is not known.
    """
    filters = filters_of(source, data)
    has_markup = any(kind_of(file, source.format) == "wikipedia" for file in files)
    if has_markup:
        wikipedia.check_library()
    _check_libraries(filters)
    return has_markup or identity(filters) is not None


def _check_libraries(filters: FiltersSection) -> None:
    if filters.near_duplicates:
        near_duplicates.check_library()
    if filters.languages:
        languages.check_library()
        unknown = sorted(set(filters.languages) - languages.known_languages())
        if unknown:
            raise ConfigError(
                f"data.filters.languages has {unknown[0]}; expected codes of: "
                f"{', '.join(sorted(languages.known_languages()))}. Correct it."
            )


def refiner(source: SourceSection, data: DataSection) -> Refine:
    """What renders and filters a source's documents, in this process."""
    return partial(filter_all, filters=filters_of(source, data))


def filter_all(
    contents: Iterable[tuple[str, RawText]], filters: FiltersSection | None = None
) -> Iterator[tuple[str, Filtered]]:
    """Render and filter documents one after the other; without filters they are rendered only."""
    filters = filters or FiltersSection()
    for origin, content in contents:
        yield origin, filter_text(content, filters)


def filter_batch(filters: FiltersSection, contents: Sequence[RawText]) -> list[Filtered]:
    """Render and filter documents; what other processes are sent."""
    return [filter_text(content, filters) for content in contents]


def filter_text(content: RawText, filters: FiltersSection) -> Filtered:
    """Render and filter a document.

    Masks come first, then the rules look at what is left; the first one that a text breaks is what it is counted as.
    """
    if isinstance(content, Markup):
        try:
            content = wikipedia.render(content)
        except ImportError:
            raise
        except Exception as error:  # of the parser: one article is not worth a dump
            content = Bad("bad_markup", f"its markup cannot be parsed ({type(error).__name__}: {error})")
    if isinstance(content, Bad) or not content:
        return Filtered(content)
    masked: Counter[str] = Counter()
    for choice, kinds in ((filters.secrets, SECRETS), (filters.personal_data, PERSONAL_DATA)):
        if choice == "keep":
            continue
        content, found = mask(content, kinds)
        if found and choice == "drop":
            reason = "secrets" if kinds is SECRETS else "personal_data"
            return Filtered(Bad(reason, f"it holds {_listed(found)}", False))
        masked += Counter({f"masked_{name}": count for name, count in found.items()})
    unwanted = _judge(content, filters)
    if unwanted is not None:
        return Filtered(unwanted)
    bands = bands_of(content, filters.near_duplicates) if filters.near_duplicates else b""
    return Filtered(content, dict(masked), bands)


def _judge(text: str, filters: FiltersSection) -> Bad | None:
    """Why a text is not wanted."""
    if len(text) < filters.min_characters:
        return Bad("short", f"it has {len(text):,} characters, less than {filters.min_characters:,}", False)
    if filters.max_characters and len(text) > filters.max_characters:
        return Bad("long", f"it has {len(text):,} characters, more than {filters.max_characters:,}", False)
    if filters.min_alphanumeric:
        share = sum(map(str.isalnum, text)) / max(len("".join(text.split())), 1)
        if share < filters.min_alphanumeric:
            return Bad("few_alphanumerics", f"{share:.0%} of its characters are letters or digits", False)
    if filters.repetition and (rule := find_repetition(text)):
        return Bad("repetitive", rule, False)
    if filters.languages:
        language = languages.language_of(text)
        if language not in filters.languages:
            return Bad("other_language", f"it is in {language}, most likely", False)
    return None


def _listed(found: Counter[str]) -> str:
    return ", ".join(f"{count} {name.replace('_', ' ')}" for name, count in sorted(found.items()))
