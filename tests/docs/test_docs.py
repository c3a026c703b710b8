"""The documentation as a site builds without a warning, every link leads somewhere, and what it says of the code is true.

The code in its pages is tested by `test_docs_code.py`.
"""

from __future__ import annotations

import ast
import functools
import html.parser
import re
import subprocess
import sys
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

from kernels.tile_table import KERNELS, read_table
from pretrain.options.config_docs import options
from pretrain.options.families import num_parameters
from pretrain.options.settings import load_config
from tests.docs.doc_pages import BLOCKS, PAGES, SECTIONS, Block, text_of
from tests.helpers.rank_helpers import ROOT
from tests.options.test_configs import shape_of

# --- the site


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built site; a warning is an error."""
    folder = tmp_path_factory.mktemp("site")
    made = subprocess.run(
        [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-b", "html", "-c", "docs", "-d", str(folder / "trees"),
         ".", str(folder / "html")],
        cwd=ROOT, capture_output=True, text=True, timeout=280,
    )  # fmt: skip
    assert made.returncode == 0 and made.stderr == "", made.stderr[-5000:]
    return folder / "html"


class Links(html.parser.HTMLParser):
    """The links and the anchors of a page."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.targets: list[str] = []
        self.anchors: set[str] = set()
        self.feed(page.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name == "id" and value:
                self.anchors.add(value)
            elif name in ("href", "src") and value and tag in ("a", "img", "script", "link", "source"):
                self.targets.append(value)


def test_the_site_has_every_page_and_no_link_that_leads_nowhere(site: Path) -> None:
    pages = {path: Links(path) for path in site.rglob("*.html")}
    built = {path.relative_to(site).with_suffix(".md") for path in pages}
    assert {page for page in PAGES if page.parts[0] == "docs"} | {
        Path("CONTRIBUTING.md"),
        Path("CHANGELOG.md"),
    } <= built
    wrong = []
    for path, links in pages.items():
        for target in links.targets:
            url = urlsplit(target)
            if url.scheme or url.netloc or not (url.path or url.fragment):
                continue
            place = (path.parent / unquote(url.path)).resolve() if url.path else path
            if not place.is_file() or (
                url.fragment and place in pages and unquote(url.fragment) not in pages[place].anchors
            ):
                wrong.append(f"{path.relative_to(site)}: {target}")
    assert wrong == [] and len(pages) > 60


def test_the_contents_name_every_page_once() -> None:
    index = text_of(Path("docs/index.md"))
    listed = re.findall(r"^- \[.+?\]\((.+?)\)", index, re.MULTILINE)
    assert len(listed) == len(set(listed))
    unlisted = [page.name for page in PAGES if page.parent == Path("docs") and page.name not in {*listed, "index.md"}]
    assert unlisted == [], "docs/index.md does not list them"


# --- links, as a git host shows the pages


@functools.cache
def anchors_of(page: Path) -> frozenset[str]:
    """The anchors that GitHub gives the headings of a page."""
    counts: dict[str, int] = {}
    anchors = set()
    text = re.sub(r"^( *)(```+).*?^ *\2 *$", "", text_of(page), flags=re.MULTILINE | re.DOTALL)
    for heading in re.findall(r"^#{1,6} +(.+?) *$", text, re.MULTILINE):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).replace("`", "")
        slug = re.sub(r"[^\w\- ]", "", plain.lower()).replace(" ", "-")
        anchors.add(slug if slug not in counts else f"{slug}-{counts[slug]}")
        counts[slug] = counts.get(slug, -1) + 1
    return frozenset(anchors)


def prose_of(page: Path) -> str:
    text = re.sub(r"^( *)(```+).*?^ *\2 *$", "", text_of(page), flags=re.MULTILINE | re.DOTALL)
    return re.sub(r"`[^`\n]*`", "", text)


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_links_lead_somewhere(page: Path) -> None:
    wrong = []
    for target in re.findall(r"\]\(\s*<?([^)\s>]+)>?(?:\s+\"[^\"]*\")?\)", prose_of(page)):
        url = urlsplit(target)
        if url.scheme or url.netloc:
            if url.scheme != "https" or "." not in url.netloc:
                wrong.append(target)
            continue
        place = (ROOT / page).parent / unquote(url.path) if url.path else ROOT / page
        place = place.resolve()
        if not place.exists() or not place.is_relative_to(ROOT.resolve()):
            wrong.append(target)
        elif (
            url.fragment and place.suffix == ".md" and url.fragment not in anchors_of(place.relative_to(ROOT.resolve()))
        ):
            wrong.append(target)
    assert wrong == []


def test_pages_that_the_sources_name_exist() -> None:
    wrong = []
    for path in [*ROOT.glob("configs/**/*.yaml"), *(one for folder in ("pretrain", "kernels", "launch", "benchmarks", "tests")
                                                     for one in (ROOT / folder).rglob("*.*"))]:  # fmt: skip
        if path.suffix in (".py", ".yaml", ".sh", ".sbatch", ".def", ".js"):
            for name in re.findall(r"\bdocs/(?:notes/)?[a-z0-9-]+\.md\b", path.read_text(encoding="utf-8")):
                if not (ROOT / name).is_file():
                    wrong.append(f"{path.relative_to(ROOT)}: {name}")
    assert wrong == []


# --- messages


@functools.cache
def messages_in_sources() -> tuple[str, ...]:
    """Every text in the sources, with a `\\0` for what is filled in."""
    found = []
    for folder in ("pretrain", "launch", "kernels"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.JoinedStr):
                    found.append(
                        "".join(str(one.value) if isinstance(one, ast.Constant) else "\0" for one in node.values)
                    )
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    found.append(node.value)
    makefile = re.sub(r"\\\n\s*", "", text_of(Path("Makefile")))
    found.append(re.sub(r"\$\(PYTHON\)", "\0", makefile))
    return tuple(" ".join(text.split()) for text in found)


def quoted(block: Block) -> list[str]:
    return [" ".join(paragraph.split()) for paragraph in re.split(r"\n\s*\n", block.text) if paragraph.strip()]


QUOTED = [(block, message) for block in BLOCKS if block.page == Path("docs/faq.md") and block.language == "text"
          for message in quoted(block)]  # fmt: skip


@pytest.mark.parametrize(
    ("block", "message"), QUOTED, ids=[f"line {block.line}: {text[:50]}" for block, text in QUOTED]
)
def test_messages_of_the_faq_are_in_the_sources(block: Block, message: str) -> None:
    parts = [part.strip() for part in message.split("…")]
    pattern = re.compile(".*?".join(re.escape(part) for part in parts))
    assert sum(map(len, parts)) > 20, "too little to be found by"
    assert any(pattern.search(text) for text in messages_in_sources()), message


# --- tables


def test_the_table_of_sizes_is_that_of_the_configs() -> None:
    rows = re.findall(r"^\| (`configs/.*?)\|(.*?)\|(.*?)\|(.*?)\|", text_of(Path("docs/sizes.md")), re.MULTILINE)
    units = {"M": 1e6, "B": 1e9, "T": 1e12, "GB": 1e9, "TB": 1e12}
    named = set()
    for names, *cells in rows:
        columns = [[float(n) * units[unit] for n, unit in re.findall(r"([\d.]+) (\w+)", cell)] for cell in cells]
        for place, name in enumerate(re.findall(r"([\w.-]+\.yaml)", names)):
            config = load_config(ROOT / "configs" / name)
            size = num_parameters(shape_of(config))
            tokens = (
                config.train.num_tokens or config.train.num_steps * config.train.global_batch_size * config.data.seq_len
            )
            found = [column[place] for column in columns]
            assert found == pytest.approx([size, tokens, 20 * size], rel=0.04), name
            named.add(name)
    assert named == {path.name for path in (ROOT / "configs").glob("*.yaml")}


def test_the_table_of_tiles_is_that_of_the_kernels() -> None:
    page = text_of(Path("docs/kernels.md"))
    for kernel in KERNELS:
        [row] = re.findall(rf"^\| `{kernel}` .*?\|(.*)\|$", page, re.MULTILINE)
        shown = [tuple(map(int, re.findall(r"\d+", cell))) for cell in row.split("|")]
        assert shown == [tuple(read_table(gpu)["tiles"][kernel]["128 long"]) for gpu in ("sm_80", "sm_86", "sm_90")], (
            kernel
        )


# --- names in the text

# Notes and changes are of their own day; docs/coming-from.md names others' options, and has a test of its own.
USER_PAGES = [
    page for page in PAGES if "notes" not in page.parts and page.name not in ("CHANGELOG.md", "coming-from.md")
]


def inline_code(page: Path) -> list[str]:
    text = re.sub(r"^( *)(```+).*?^ *\2 *$", "", text_of(page), flags=re.MULTILINE | re.DOTALL)
    return [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", text)]


@pytest.mark.parametrize("page", USER_PAGES, ids=str)
def test_files_and_options_in_the_text_exist(page: Path) -> None:
    known = set(options())
    files = (".gguf", ".sh", ".json", ".jsonl", ".md", ".model", ".pt", ".py", ".txt", ".yaml")
    sections = "|".join(sorted(SECTIONS))
    wrong = []
    for code in inline_code(page):
        if re.fullmatch(r"(launch|pretrain|kernels|benchmarks|tests|configs|docs)/[\w/.-]+", code):
            if not (ROOT / code).exists() and "NNNN" not in code:
                wrong.append(code)
        for word in re.findall(rf"(?<![\w./-])((?:{sections})\.(?:[a-z_0-9.*]|\[\])+)", code):
            name = re.sub(r"\.\d+(?=\.|$)", ".*", word.replace("[]", ".*")).rstrip(".").removesuffix(".*")
            if name not in known and not name.endswith(files):
                wrong.append(word)
    assert wrong == []
