"""The pages of the documentation, and the blocks of code in them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from pretrain.options.config_docs import options
from tests.helpers.rank_helpers import ROOT

PAGES = sorted(
    path.relative_to(ROOT)
    for pattern in ("*.md", "docs/**/*.md", "benchmarks/**/*.md", "examples/**/*.md")
    for path in ROOT.glob(pattern)
)
SECTIONS = {name for name, option in options().items() if option.section and "." not in name}


class Block(NamedTuple):
    page: Path
    line: int
    language: str
    text: str
    before: str


def text_of(page: Path) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def blocks_of(page: Path) -> Iterator[Block]:
    text = text_of(page)
    for found in re.finditer(r"^( *)(```+)([^\n`]*)\n(.*?)^ *\2 *$", text, re.MULTILINE | re.DOTALL):
        before = text[: found.start()]
        yield Block(page, before.count("\n") + 1, found[3].strip(), found[4], before.rstrip().rpartition("\n")[2])


BLOCKS = [block for page in PAGES for block in blocks_of(page)]
