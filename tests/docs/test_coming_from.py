"""`docs/coming-from.md` names options that exist, and "did you mean" leads where the page does."""

from __future__ import annotations

import re

import pytest

from pretrain.options.config_docs import options
from pretrain.options.spellings import suggest_option
from tests.helpers.rank_helpers import ROOT

PAGE = (ROOT / "docs/coming-from.md").read_text(encoding="utf-8")
HEADER = "| there | here | difference |"
ROWS = [
    (section.partition("\n")[0], *re.findall(r"[^|]+", line)[:2])
    for section in PAGE.split("\n## ")
    if HEADER in section
    for line in section.splitlines()
    if line.startswith("|") and line != HEADER and not line.startswith("|---")
]
SECTIONS = {name for name, option in options().items() if option.section}


def words(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


def test_the_tables_are_read() -> None:
    assert len({trainer for trainer, _, _ in ROWS}) == 7 and len(ROWS) > 200


@pytest.mark.parametrize(("trainer", "there", "here"), ROWS)
def test_a_foreign_name_leads_to_the_option_that_the_page_names(trainer: str, there: str, here: str) -> None:
    [option] = words(here)
    assert option in options() and option not in SECTIONS - {"data.sources", "optim.groups"}, (
        f"{trainer}: {option} is no option"
    )
    assert words(there), there
    for name in words(there):
        word = name.removeprefix("--").rpartition(".")[2].replace("-", "_")
        assert word.isidentifier(), name
        suggested = suggest_option(word, list(options()))
        found = re.fullmatch(r"Did you mean (.+)\?", suggested)
        meant = re.split(r", | or ", found.group(1)) if found else []
        assert any(option == name or option.startswith(f"{name}.") for name in meant), f"{trainer}: {name}: {suggested}"


def test_every_option_in_the_text_exists() -> None:
    sections = "|".join(sorted(section for section in SECTIONS if "." not in section))
    names = {word.replace("[]", ".*").partition("=")[0] for word in words(PAGE)}
    dotted = {
        name
        for name in names
        if re.fullmatch(rf"({sections})\.[a-z_.*]+", name) and not name.endswith((".py", ".bin", ".json"))
    }
    foreign = {name for _, there, _ in ROWS for name in words(there)}
    assert len(dotted) > 40 and sorted(dotted - foreign - set(options())) == []
