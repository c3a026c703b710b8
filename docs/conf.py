"""How Sphinx makes a site of these pages: `make docs`. The pages are plain Markdown, which a git host shows as well."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]

project = "Longhaul"
author = "the Longhaul contributors"
version = release = re.search(r'__version__ = "(.+)"', (ROOT / "pretrain/__init__.py").read_text("utf-8")).group(1)  # type: ignore[union-attr]

# The source folder is the repository, so that links to pages outside of docs/ are the same here and on a git host.
root_doc = "docs/index"
include_patterns = ["docs/**.md", "CONTRIBUTING.md", "CHANGELOG.md", "benchmarks/README.md", "examples/README.md"]
exclude_patterns = [".*", "build", "runs", "data", "dist", "bench-results", "tests", "pretrain", "kernels", "launch"]
source_suffix = {".md": "markdown"}
extensions = ["myst_parser"]
myst_heading_anchors = 4  # as GitHub makes them
suppress_warnings = ["myst.header"]  # a page may leave out a level of headings
highlight_language = "text"

html_theme = "furo"
html_title = "Longhaul"
html_static_path = ["_static"]
html_css_files = ["longhaul.css"]
html_copy_source = False
html_show_sphinx = False
html_show_copyright = False
pygments_style = "friendly"
pygments_dark_style = "github-dark"


def add_contents(app: Any, page: str, source: list[str]) -> None:
    """Make the table of contents of the lists of links in `docs/index.md`, a part a section, and that of all notes."""
    if page == "docs/notes/README":
        source[0] += "\n```{toctree}\n:glob:\n:titlesonly:\n\n0*\n```\n"
    if page != root_doc:
        return
    parts = re.split(r"^## (.+)\n", source[0], flags=re.MULTILINE)
    for title, text in zip(parts[1::2], parts[2::2], strict=True):
        pages = [f"{name} <{path}>" for name, path in re.findall(r"^- \[(.+?)\]\((.+?)\)", text, re.MULTILINE)]
        tree = f"```{{toctree}}\n:hidden:\n:caption: {title}\n\n" + "\n".join(pages) + "\n```\n"
        source[0] = source[0].replace(text, f"{text.rstrip()}\n\n{tree}\n")


def add_style(app: Any, page: str, *_: Any) -> None:
    """Break the long lines of messages on the page of symptoms, and none of the wide tables of benchmarks."""
    if style := {"docs/faq": "messages.css", "benchmarks/README": "columns.css"}.get(page):
        app.add_css_file(style)


def add_entrance(app: Any, error: Exception | None) -> None:
    """Write the page that leads from the site's folder to its first page."""
    if error is None and app.builder.name == "html":
        first = "docs/index.html"
        leads = f'<meta http-equiv="refresh" content="0; url={first}"><a href="{first}">Longhaul</a>'
        text = f'<!doctype html><meta charset="utf-8"><title>Longhaul</title>{leads}\n'
        (Path(app.outdir) / "index.html").write_text(text, encoding="utf-8")


def setup(app: Any) -> None:
    """Say to Sphinx when the functions above are called."""
    app.connect("source-read", add_contents)
    app.connect("html-page-context", add_style)
    app.connect("build-finished", add_entrance)
