"""Articles of Wikipedia's XML dumps, and their wiki markup as plain text.

A dump is read page by page, so memory does not depend on its size. mwparserfromhell parses the markup; it is an extra
(`pip install 'longhaul[data]'`), imported when an article is rendered.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, BinaryIO
from xml.etree import ElementTree

from pretrain.errors import ConfigError

_FILES_AND_CATEGORIES = ("6", "14")  # keys of namespaces
_ALWAYS_DROPPED = ("file", "image", "media", "category")
_DROPPED_TAGS = {"ref", "references", "table", "gallery", "timeline", "imagemap", "score", "graph", "mapframe", "hr"}
_TEXT_TEMPLATES = {
    "lang",
    "nowrap",
    "transl",
    "transliteration",
    "small",
    "em",
    "strong",
    "abbr",
    "quote",
    "blockquote",
}
_LIST_MARKS = {"*": "- ", "#": "- ", ":": "", ";": ""}
_SWITCHES = re.compile(r"__[A-Z]{3,}__")  # such as __NOTOC__
_EMPTY_PARENTHESES = re.compile(r" ?\([\s,;:]*\)")
_SPACES = re.compile(r"(?<=\S) {2,}(?=\S)")  # around what was left out
_HEADING = "\x00"  # begins a heading's line until empty sections are gone; wiki text cannot hold it


@dataclass(frozen=True)
class Markup:
    """An article as the dump has it.

    Attributes:
        title: of the article.
        wikitext: its source.
        dropped: prefixes, in lower case, of links that show no text: files and categories.
    """

    title: str
    wikitext: str
    dropped: frozenset[str]

    def __len__(self) -> int:
        return len(self.wikitext)


def read_pages(file: BinaryIO) -> Iterator[tuple[str, Markup | str]]:
    """Yield each page of a dump: its title, and its markup or the reason why it is no article.

    Args:
        file: `<project>-<date>-pages-articles*.xml`, decompressed.

    Raises:
        ElementTree.ParseError: the file is damaged or cut short.

    Source: https://www.mediawiki.org/wiki/Help:Export#Export_format
    """
    dropped = set(_ALWAYS_DROPPED)
    root = None
    for event, element in ElementTree.iterparse(file, ("start", "end")):
        if event == "start":
            root = element if root is None else root
            continue
        name = element.tag.rpartition("}")[2]
        if name == "namespace" and element.get("key") in _FILES_AND_CATEGORIES:
            dropped.add((element.text or "").lower())
        elif name == "page":
            assert root is not None
            yield _page(element, frozenset(dropped))
            root.clear()  # what is not kept is not held


def _page(page: ElementTree.Element, dropped: frozenset[str]) -> tuple[str, Markup | str]:
    fields = {element.tag.rpartition("}")[2]: element for element in page.iter()}
    texts = {name: element.text or "" for name, element in fields.items()}
    title = texts.get("title", "")
    if texts.get("ns", "0") != "0":
        return title, "not_an_article"
    if "redirect" in fields:
        return title, "redirect"
    if texts.get("model", "wikitext") != "wikitext":
        return title, "not_wikitext"
    return title, Markup(title, texts.get("text", ""), dropped)


def check_library() -> None:
    """Check that mwparserfromhell is installed.

    Raises:
        ConfigError: it is not.
    """
    if find_spec("mwparserfromhell") is None:
        raise ConfigError(
            "a source holds a Wikipedia dump; expected mwparserfromhell, which parses its markup. Install it: "
            "pip install 'longhaul[data]'"
        )


def render(page: Markup) -> str:
    """Turn an article into plain text: its title, an empty line, and what a reader sees as running text.

    Templates, tables, references, comments, files and categories are left out, and so are sections that are empty
    then. Links give the text that they show, lists begin with `- `, formulas stay as they are written.
    """
    import mwparserfromhell

    parts: list[str] = []
    _render(mwparserfromhell.parse(page.wikitext.replace(_HEADING, "")), page.dropped, parts)
    text = _EMPTY_PARENTHESES.sub("", _SWITCHES.sub("", "".join(parts)))
    text = _SPACES.sub(" ", text)
    lines = _without_empty_sections([line.rstrip() for line in text.split("\n")])
    body = re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip()
    return f"{page.title}\n\n{body}" if body else ""


def _render(code: Any, dropped: frozenset[str], parts: list[str]) -> None:
    """Append the text of parsed markup."""
    from mwparserfromhell import nodes

    for node in code.nodes:
        if isinstance(node, nodes.Text):
            parts.append(node.value)
        elif isinstance(node, nodes.Wikilink):
            prefix, colon, _ = str(node.title).partition(":")
            if not (colon and prefix.strip().lower() in dropped):
                _render(node.title if node.text is None else node.text, dropped, parts)
        elif isinstance(node, nodes.Tag):
            _render_tag(node, dropped, parts)
        elif isinstance(node, nodes.Heading):
            parts.append(f"\n{_HEADING}{node.level}")
            _render(node.title, dropped, parts)
            parts.append("\n")
        elif isinstance(node, nodes.ExternalLink):
            if node.title is not None:
                _render(node.title, dropped, parts)
            elif not node.brackets:
                parts.append(str(node.url))
        elif isinstance(node, nodes.HTMLEntity):
            parts.append(node.normalize())
        elif isinstance(node, nodes.Template):
            _render_template(node, dropped, parts)


def _render_tag(tag: Any, dropped: frozenset[str], parts: list[str]) -> None:
    name = str(tag.tag).strip().lower()
    if name in _DROPPED_TAGS:
        return
    if name == "br":
        parts.append("\n")
    elif name in ("li", "dt", "dd") and tag.wiki_markup:
        parts.append(_LIST_MARKS.get(tag.wiki_markup, ""))
    elif tag.contents is not None:
        _render(tag.contents, dropped, parts)


def _render_template(template: Any, dropped: frozenset[str], parts: list[str]) -> None:
    """Of a few templates that wrap running text, or a number and its unit, that text; nothing of the others."""
    name = str(template.name).strip().lower()
    values = [one.value for one in template.params if not one.showkey]
    if name in _TEXT_TEMPLATES and values:
        _render(values[-1], dropped, parts)
    elif name in ("convert", "cvt") and len(values) >= 2:
        parts.append(f"{str(values[0]).strip()} {str(values[1]).strip()}")


def _without_empty_sections(lines: list[str]) -> list[str]:
    """Drop headings below which there is no text before the next one of their level or a higher one."""
    kept: list[str] = []
    below_level = 0  # headings above the line that are of a higher level than this have text below them
    for line in reversed(lines):
        if not line.startswith(_HEADING):
            below_level = 99 if line.strip() else below_level
            kept.append(line)
        elif int(line[1]) < below_level:
            below_level = int(line[1])
            kept += ["", line[2:].strip(), ""]
    return kept[::-1]
