"""Filters: each choice, its counts, and the same shards whatever the number of processes or interruptions."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pretrain.data.shards import Manifest
from pretrain.data.source_files import Bad
from pretrain.errors import ConfigError
from pretrain.options.checks import idle_options
from pretrain.options.config import DataSection, FiltersSection, SourceSection
from pretrain.preparing import languages, refining
from pretrain.preparing import shares as shares_module
from pretrain.preparing.dry_run import forecast
from pretrain.preparing.filters import filter_text, needs_work
from pretrain.preparing.prepare import prepare
from tests.preparing.test_prepare import config_of, copy_of, hashes, read_back, text_of, write_corpus
from tests.preparing.test_wikipedia import dump, page

GERMAN = "Das ist ein ganz gewöhnlicher deutscher Satz über das Wetter und die Leute in der Stadt."
ENGLISH = "This is quite an ordinary English sentence about the weather and the people in town."


def judged(text: str, **options: object) -> str:
    content = filter_text(text, FiltersSection(**options)).content
    return content.reason if isinstance(content, Bad) else content


@pytest.mark.parametrize(
    ("text", "options", "reason"),
    [
        ("123", {"min_characters": 4}, "short"),
        ("12345", {"max_characters": 4}, "long"),
        ("ab --- ///", {"min_alphanumeric": 0.5}, "few_alphanumerics"),
        ("the same\n" * 9, {"repetition": True}, "repetitive"),
        (GERMAN, {"languages": ["en", "fr"]}, "other_language"),
        ("mail a@b.org", {"personal_data": "drop"}, "personal_data"),
        ("AKIA" + "IOSFODNN7EXAMPLE", {"secrets": "drop"}, "secrets"),
    ],
)
def test_what_is_not_wanted_is_left_out_for_its_reason(text: str, options: dict, reason: str) -> None:
    assert judged(text, **options) == reason
    content = filter_text(text, FiltersSection(**options)).content
    assert isinstance(content, Bad) and not content.is_fault


def test_what_is_wanted_stays_as_it_is() -> None:
    options = {"min_characters": 4, "max_characters": 500, "min_alphanumeric": 0.6, "repetition": True,
               "languages": ["en"], "secrets": "drop", "personal_data": "drop", "near_duplicates": 0.8}  # fmt: skip
    assert judged(ENGLISH, **options) == ENGLISH
    assert judged(GERMAN, **options | {"languages": ["de", "en"]}) == GERMAN
    assert judged("1234", min_characters=4, max_characters=4) == "1234"
    assert judged("ab --", min_alphanumeric=0.5) == "ab --"
    assert filter_text("", FiltersSection(min_characters=5)).content == ""  # counted as empty, as ever
    assert len(filter_text(ENGLISH, FiltersSection(near_duplicates=0.8)).bands) == 72


def test_masks_come_before_the_rules() -> None:
    filtered = filter_text(
        "write a.very.long.name@mail.example.org", FiltersSection(personal_data="mask", max_characters=13)
    )
    assert filtered.content == "write [email]" and filtered.masked == {"masked_email": 1}


def test_unknown_languages_and_missing_libraries_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    source = SourceSection(name="a", paths=["a"], shards="b")
    data = DataSection(sources=[source], seq_len=8, filters=FiltersSection(languages=["english"]))
    with pytest.raises(ConfigError, match=r"data\.filters\.languages has english; expected codes of: .*, en, "):
        needs_work([], source, data)
    monkeypatch.setattr(languages, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"expected py3langid.*pip install 'longhaul\[data\]'"):
        needs_work([], source, data)
    assert not needs_work([], source.model_copy(update={"filter": False}), data)


FILTERS = {"personal_data": "mask", "min_characters": 100, "near_duplicates": 0.8, "repetition": True}


def write_texts(folder: Path) -> list[str]:
    """Writes good texts, near-duplicates of some, short and repetitive ones; returns the good ones as they are kept.

    Of 10 of them and their near-duplicates it is the hash that decides which is.
    """
    folder.mkdir()
    good = [text_of(number, 80) for number in range(150)]
    lines = []
    for number, text in enumerate(good):
        lines.append(text + (f" mail{number}@example.org" if number % 10 == 0 else ""))
        lines += [text + " and a bit"] if number % 15 == 0 else []
        lines += ["short"] if number % 50 == 0 else []
        lines += ["again and again\n" * 20] if number == 7 else []
    (folder / "a.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    (folder / "wiki-pages-articles.xml").write_bytes(
        dump(*(page(f"Page {n}", f"'''Bold''' [[link]] {'x'.join(map(str, range(n, n + 60)))}", n) for n in range(20)))
    )
    return [
        text + (" [email]" if number % 10 == 0 else "") for number, text in enumerate(good)
    ]  # fmt: skip


def near_texts() -> list[tuple[int, str]]:
    """The texts that have near-duplicates, with their numbers."""
    return [(number, text_of(number, 80)) for number in range(0, 150, 15)]


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("filters") / "done"
    folder.mkdir()
    write_texts(folder / "raw")
    prepare(config_of(folder, filters=FILTERS))
    return folder


def test_everything_is_counted_in_the_manifest(done: Path, tmp_path: Path) -> None:
    counts = Manifest.load(done / "shards").counts
    assert counts == {
        "documents_read": 150 + 10 + 3 + 1 + 20, "files_read": 2, "masked_email": 15, "skipped_short": 3,
        "skipped_repetitive": 1, "near_duplicates": 10,
    }  # fmt: skip
    expected = write_texts(tmp_path / "raw")
    found = read_back(done, "train") + read_back(done, "val")
    assert len(set(found)) == len(found) == 170
    near = {text + " and a bit": text + (" [email]" if number % 2 == 0 else "") for number, text in near_texts()}
    assert sorted(near.get(text, text) for text in found if not text.startswith("Page")) == sorted(expected)
    assert 0 < sum(text in near for text in found) < 10
    assert sum(text.startswith("Page") for text in found) == 20


def test_bytes_do_not_depend_on_the_number_of_processes(
    done: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shares_module, "BATCH_CHARACTERS", 3000)
    monkeypatch.setattr(refining, "_BATCH_CHARACTERS", 2000)
    folder = copy_of(done, tmp_path / "fresh")
    prepare(config_of(folder, filters=FILTERS, prepare_processes=2))
    assert hashes(folder) == hashes(done)


def test_it_goes_on_where_it_was_stopped(done: Path, tmp_path: Path) -> None:
    folder = copy_of(done, tmp_path / "fresh", with_shards=True)
    (folder / "shards/manifest.json").unlink()
    journal = folder / "shards/prepare.jsonl"
    journal.write_text("".join(journal.read_text().splitlines(keepends=True)[:2]))
    prepare(config_of(folder, filters=FILTERS))
    assert hashes(folder) == hashes(done)


def test_other_filters_are_another_corpus(done: Path, tmp_path: Path) -> None:
    folder = copy_of(done, tmp_path / "fresh", with_shards=True)
    prepare(config_of(folder, filters=FILTERS))  # nothing to do
    for other in ({}, FILTERS | {"min_characters": 101}):
        with pytest.raises(ConfigError, match=r"changed since then: data\.filters from .*min_characters"):
            prepare(config_of(folder, filters=other))
    with pytest.raises(ConfigError, match=r"changed since then: data\.filters from .* to None"):
        prepare(config_of(folder, filters=FILTERS, source={"filter": False}))


def test_a_source_can_be_left_alone(tmp_path: Path) -> None:
    write_corpus(tmp_path / "raw", 40)
    filters = {"min_characters": 10**6}
    prepare(config_of(tmp_path, filters=filters, source={"filter": False}, seq_len=16))
    assert Manifest.load(tmp_path / "shards").counts == {"documents_read": 40, "files_read": 13}


def test_a_dry_run_foresees_what_filters_leave(done: Path, tmp_path: Path) -> None:
    content = forecast(config_of(copy_of(done, tmp_path / "fresh"), filters=FILTERS))
    assert content["sources"][0]["num_documents"] == 180  # near-duplicates count: they are known only when all is read


@pytest.mark.parametrize(
    ("source", "option", "reason"),
    [
        ({"shards": "b"}, "filter", "the source has no paths"),
        ({"shards": "b", "paths": ["a"], "format": "nanogpt"}, "filter", "holds token ids"),
        (
            {"shards": "b", "paths": ["a"], "format": "squad"},
            "text_field",
            "Where the text is in squad's files is known",
        ),
    ],
)
def test_options_that_do_nothing_are_refused(tmp_path: Path, source: dict, option: str, reason: str) -> None:
    config = config_of(tmp_path)
    data = config.data.model_copy(update={"sources": [SourceSection(name="a", **source)]})
    assert reason in idle_options(config.model_copy(update={"data": data}))[f"data.sources.0.{option}"]
