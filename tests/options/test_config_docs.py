"""What options accept, in words, and the page that is made of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pretrain.options.config_docs import describe, markdown, options, yaml_value

ROOT = Path(__file__).resolve().parents[2]


def test_the_page_is_current() -> None:
    page = (ROOT / "docs/config.md").read_text(encoding="utf-8")
    assert page == markdown(), "run: python -m pretrain.options.config_docs > docs/config.md"


def test_the_page_has_every_option_once() -> None:
    lines = markdown().splitlines()
    for name, option in options().items():
        if not option.section:
            assert sum(line.startswith(f"| `{name}` |") for line in lines) == 1
        else:
            assert lines.count(f"## {name}") == 1


def test_every_option_is_described() -> None:
    assert [name for name, option in options().items() if not option.description.endswith((".", ")"))] == []


def test_options_know_their_defaults() -> None:
    known = options()
    assert known["optim.betas"].default == "[0.9, 0.95]"
    assert known["log.tensorboard"].default == "true"
    assert known["model.ffn_dim"].default == "null"
    assert known["run.dir"].default == '""'
    assert known["model.dim"].default is None and known["model.dim"].required
    assert known["data.sources.*.weight"].default == "1.0"


@pytest.mark.parametrize(
    ("schema", "words"),
    [
        ({"type": "integer"}, "a whole number"),
        ({"type": "integer", "minimum": 0, "maximum": 3}, "a whole number from 0 to 3"),
        ({"type": "integer", "minimum": 1}, "a whole number of at least 1"),
        ({"type": "number", "exclusiveMinimum": 0, "maximum": 0.01}, "a number above 0 and at most 0.01"),
        ({"type": "number", "minimum": 0.0, "exclusiveMaximum": 1.0}, "a number of at least 0 and below 1"),
        ({"anyOf": [{"type": "boolean"}, {"type": "null"}]}, "true or false or null"),
        ({"enum": ["a", "b", "c"]}, "one of a, b or c"),
        ({"enum": [True, False, "c"]}, "one of true, false or c"),
        ({"anyOf": [{"$ref": "#/x"}, {"type": "null"}]}, "a section of options or null"),
        ({"type": "string"}, "text"),
        ({"type": "string", "pattern": "^x$"}, "text that matches `^x$`"),
        ({"type": "array", "items": {"type": "string"}}, "a list of texts"),
        ({"type": "array", "items": {"enum": ["a", "b"]}}, "a list, each one of a or b"),
        ({"type": "array", "items": {"type": "integer", "minimum": 1}}, "a list, each a whole number of at least 1"),
        ({"type": "array", "items": {"$ref": "#/x"}, "minItems": 1}, "a list of at least 1 sections"),
        ({"type": "array", "prefixItems": [{"type": "number"}] * 2}, "a list of 2, each a number"),
        ({"$ref": "#/$defs/X"}, "a section of options"),
    ],
)
def test_rules_in_words(schema: dict[str, Any], words: str) -> None:
    assert describe(schema) == words


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "null"),
        (True, "true"),
        (3, "3"),
        (1e-8, "1e-08"),
        ((0.9, 0.95), "[0.9, 0.95]"),
        ({"a": [1, "b"]}, "{a: [1, b]}"),
        ("runs/a-1.b", "runs/a-1.b"),
        ("on", '"on"'),
        ("Null", '"Null"'),
        ("3e4", '"3e4"'),
        ('say "x" \\ \n\t', '"say \\"x\\" \\\\ \\n\\t"'),
        ("\x07\u2028", '"\\u0007\\u2028"'),
        ("größe", '"größe"'),
    ],
)
def test_values_as_yaml(value: object, text: str) -> None:
    assert yaml_value(value) == text
