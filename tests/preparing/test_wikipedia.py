"""Wikipedia's dumps: what is an article, its text, and damage. The files have the structure of those published."""

from __future__ import annotations

import bz2
import tracemalloc
from pathlib import Path

import pytest

from pretrain.data.source_files import Bad, list_files
from pretrain.errors import ConfigError, DataError
from pretrain.options.config import DataSection, SourceSection
from pretrain.preparing import wikipedia
from pretrain.preparing.filters import filter_all, needs_work
from pretrain.preparing.sources import ReadLog, read_documents
from pretrain.preparing.wikipedia import Markup, render

HEAD = """<mediawiki xmlns="http://www.mediawiki.org/xml/export-0.10/" xmlns:xsi="http://www.w3.org/2001/XMLSchema-instance" xsi:schemaLocation="http://www.mediawiki.org/xml/export-0.10/ http://www.mediawiki.org/xml/export-0.10.xsd" version="0.10" xml:lang="de">
  <siteinfo>
    <sitename>Wikipedia</sitename>
    <dbname>dewiki</dbname>
    <base>https://de.wikipedia.org/wiki/Wikipedia:Hauptseite</base>
    <generator>MediaWiki 1.41.0-wmf.30</generator>
    <case>first-letter</case>
    <namespaces>
      <namespace key="-2" case="first-letter">Medium</namespace>
      <namespace key="0" case="first-letter" />
      <namespace key="1" case="first-letter">Diskussion</namespace>
      <namespace key="6" case="first-letter">Datei</namespace>
      <namespace key="14" case="first-letter">Kategorie</namespace>
    </namespaces>
  </siteinfo>
"""
PAGE = """  <page>
    <title>{title}</title>
    <ns>{ns}</ns>
    <id>{number}</id>{redirect}
    <revision>
      <id>{number}1</id>
      <parentid>7</parentid>
      <timestamp>2023-10-21T08:13:05Z</timestamp>
      <contributor>
        <username>Somebody</username>
        <id>12</id>
      </contributor>
      <comment>text &amp; more</comment>
      <model>{model}</model>
      <format>text/x-wiki</format>
      <text bytes="{size}" sha1="abc" xml:space="preserve">{text}</text>
      <sha1>abc</sha1>
    </revision>
  </page>
"""
ANARCHISM = """{{short description|Political philosophy}}
{{Infobox philosophy
| name = Anarchism
| image = [[File:flag.svg]]
}}
[[Datei:Flagge.svg|mini|Eine [[Flagge]]]]
'''Anarchism''' is a [[political philosophy]] and [[Social movement|movement]]&lt;ref name="x"&gt;{{cite book|title=Book}}&lt;/ref&gt; that is ''skeptical'' of {{lang|el|ἀναρχία}} (; {{IPA|x}}).&lt;!-- a comment --&gt;

It is {{convert|5|km|mi}} long &amp;mdash; see [http://a.org the page], [http://b.org] or http://c.org.

== Etymology ==
* first&lt;br /&gt;line
* second [[:Kategorie:Linked|item]]
# H&lt;sub&gt;2&lt;/sub&gt;O and &lt;math&gt;a^2&lt;/math&gt;

{| class="wikitable"
|-
| cell || cell
|}

=== Deeper ===
&lt;code&gt;x = 1&lt;/code&gt; __NOTOC__

== See also ==
{{Portal|Anarchism}}

=== Nothing here ===

== References ==
{{Reflist}}
&lt;references /&gt;

[[Kategorie:Anarchismus]]
[[Category:Foo]]
"""
EXPECTED = """Anarchism

Anarchism is a political philosophy and movement that is skeptical of ἀναρχία.

It is 5 km long — see the page, or http://c.org.

Etymology

- first
line
- second item
- H2O and a^2

Deeper

x = 1"""


def page(title: str, text: str, number: int = 1, ns: int = 0, redirect: str = "", model: str = "wikitext") -> str:
    target = f'\n    <redirect title="{redirect}" />' if redirect else ""
    return PAGE.format(title=title, text=text, number=number, ns=ns, redirect=target, model=model, size=len(text))


def dump(*pages: str) -> bytes:
    return (HEAD + "".join(pages) + "</mediawiki>\n").encode()


PAGES = (
    page("Anarchism", ANARCHISM),
    page("AccessibleComputing", "#REDIRECT [[Computer accessibility]]", 2, redirect="Computer accessibility"),
    page("Diskussion:Anarchism", "talk", 3, ns=1),
    page("Data", "{}", 4, model="json"),
    page("Nur Vorlage", "{{Template}}", 5),
    page("R &amp; B", "Some ''music''.", 6),
)


def source_of(path: Path, **options: str) -> SourceSection:
    return SourceSection(name="wiki", paths=[str(path)], shards="unused", **options)


def read(path: Path, on_bad_file: str = "error", on_bad_document: str = "error", **options: str):
    log, source = ReadLog(), source_of(path, **options)
    files = list_files(source)
    return list(read_documents(files, source, on_bad_document, on_bad_file, log)), log


@pytest.mark.parametrize(
    "name",
    [
        "dewiki-20231101-pages-articles.xml",
        "dewiki-20231101-pages-articles.xml.bz2",
        "dewiki-20231101-pages-articles-multistream.xml.bz2",
        "dewiki-20231101-pages-articles1.xml-p1p41242.bz2",
        "dewiki-latest-pages-meta-current.xml.bz2",
    ],
)
def test_articles_are_documents_and_the_rest_is_counted(tmp_path: Path, name: str) -> None:
    content = dump(*PAGES)
    if "multistream" in name:  # streams of bzip2, one after another
        content = b"".join(bz2.compress(content[begin : begin + 1500]) for begin in range(0, len(content), 1500))
    elif name.endswith(".bz2"):
        content = bz2.compress(content)
    path = tmp_path / name
    path.write_bytes(content)
    documents, log = read(tmp_path)  # redirects and the like are no bad documents
    assert [document.text for document in documents] == [EXPECTED, "R & B\n\nSome music."]
    assert [document.origin for document in documents] == [f"{path}:Anarchism", f"{path}:R & B"]
    assert log.counts == {
        "documents_read": 6, "files_read": 1, "skipped_redirect": 1, "skipped_not_an_article": 1,
        "skipped_not_wikitext": 1, "skipped_empty": 1,
    }  # fmt: skip
    assert log.position_bytes() == path.stat().st_size


def test_a_dump_of_another_name_needs_the_format(tmp_path: Path) -> None:
    (tmp_path / "my.xml").write_bytes(dump(page("A", "text")))
    (tmp_path / "notes.txt").write_text("not of the dump")
    assert len(read(tmp_path)[0]) == 2 and read(tmp_path)[0][0].text.startswith("<mediawiki")
    assert [document.text for document in read(tmp_path, format="wikipedia")[0]] == ["A\n\ntext"]


def test_the_index_of_a_multistream_dump_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "dewiki-20231101-pages-articles-multistream-index.txt.bz2").write_bytes(bz2.compress(b"600:1:A\n"))
    with pytest.raises(DataError, match=r"multistream-index\.txt\.bz2 is one of 1 files that are not text"):
        read(tmp_path)


@pytest.mark.parametrize("suffix", ["", ".bz2"])
def test_a_dump_that_is_cut_short_keeps_the_articles_before(tmp_path: Path, suffix: str) -> None:
    # of bzip2's blocks of 900 kB at most, the first are whole
    content = dump(*(page(f"Page {n}", f"Text number {n}. " + chr(97 + n % 26) * 500, n) for n in range(4000)))
    content = bz2.compress(content, 1) if suffix else content
    path = tmp_path / f"x-pages-articles.xml{suffix}"
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(DataError, match=r"the file cannot be read to its end \(.*\); expected a whole file"):
        read(tmp_path)
    documents, log = read(tmp_path, on_bad_file="skip")
    assert 500 < len(documents) < 3500 and log.counts["files_unreadable"] == 1
    assert documents[3].text == "Page 3\n\nText number 3. " + "d" * 500


def test_memory_does_not_grow_with_the_dump(tmp_path: Path) -> None:
    peaks = []
    for num_pages in (300, 3000):
        path = tmp_path / f"{num_pages}-pages-articles.xml"
        path.write_bytes(dump(*(page(f"Page {n}", "word " * 1000, n) for n in range(num_pages))))
        tracemalloc.start()
        with open(path, "rb") as file:
            assert sum(isinstance(found, Markup) for _, found in wikipedia.read_pages(file)) == num_pages
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.2 * peaks[0] + 100_000


def test_markup_that_the_parser_cannot_take_is_a_bad_document(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(page: Markup) -> str:
        raise RuntimeError("too deep")

    monkeypatch.setattr(wikipedia, "render", fail)
    ((_, filtered),) = filter_all([("a:1", Markup("A", "text", frozenset()))])
    assert filtered.content == Bad("bad_markup", "its markup cannot be parsed (RuntimeError: too deep)")


def test_awkward_markup_gives_text() -> None:
    def text(wikitext: str) -> str:
        return render(Markup("T", wikitext, frozenset(("file", "category"))))

    assert text("{{unclosed [[link|''text'' <ref>open") != ""
    assert text("") == "" and text("{{Only|template}}") == ""
    assert text("a\x00b") == "T\n\nab"
    assert text("== A ==\n=== B ===\nx\n== C ==\n== D ==\ny") == "T\n\nA\n\nB\n\nx\n\nD\n\ny"
    assert text("[[FILE:x.png|thumb|c]]a [[ category :X]]") == "T\n\na"
    assert text("[[Star Trek: Discovery]] (''see'' [[it]])") == "T\n\nStar Trek: Discovery (see it)"


def test_without_the_library_a_dump_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "x-pages-articles.xml").write_bytes(dump(*PAGES))
    monkeypatch.setattr(wikipedia, "find_spec", lambda name: None)
    source = source_of(tmp_path)
    with pytest.raises(ConfigError, match=r"expected mwparserfromhell.*pip install 'longhaul\[data\]'"):
        needs_work(list_files(source), source, DataSection(sources=[source], seq_len=8))
