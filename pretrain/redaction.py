"""What must not be written down: passwords, tokens and keys, taken out of texts and of configs that are stored."""

from __future__ import annotations

import logging
import os
import re
import sys
from collections.abc import Mapping
from functools import cache
from typing import Any

from pretrain.console import write_patiently
from pretrain.personal_data import SECRETS, mask

HIDDEN = "…"
_SHORTEST = 8  # of a variable's value: shorter ones are words of ordinary texts
_VARIABLE = re.compile(r"(?:^|_)(?:KEY|TOKEN|SECRET|PASSWORD|PASSWD|PASS|PWD|CREDENTIALS?)(?:_|$)", re.IGNORECASE)
_USER = re.compile(r"(?<=://)[^/\s@'\"]+@")  # user:password@ of a URL
_QUERY = re.compile(r"(?<=://)([^\s?'\"]+)\?[^\s'\"]*[^\s'\".,:;)]")  # signatures are in queries
_NAMED = re.compile(
    r"(?<![A-Za-z])((?:api|access|secret)[_-]?key|(?:auth|access)?[_-]?token|secret|password|passwd)([=:]\s?)[^\s'\",]+",
    re.IGNORECASE,
)


@cache
def _is_secret(name: str) -> bool:
    """Whether a variable's name says that its value gives access."""
    return _VARIABLE.search(name) is not None


def redact(text: str) -> str:
    """Return a text with what gives access to something replaced by `…` or `[access key]`.

    These are values of environment variables with such a name, users, passwords and queries of URLs, `password=…`
    and the like, and keys and tokens of known shapes.
    """
    for name in filter(_is_secret, os.environ):
        value = os.environ.get(name, "")
        if len(value) >= _SHORTEST and not value.startswith("/"):  # a path gives no access
            text = text.replace(value, HIDDEN)
    text = _QUERY.sub(rf"\1?{HIDDEN}", _USER.sub("", text))
    return mask(_NAMED.sub(rf"\1\2{HIDDEN}", text), SECRETS)[0]


def storable(tree: Any) -> Any:
    """Return nested plain values, such as a config's, with every text redacted."""
    if isinstance(tree, str):
        return redact(tree)
    if isinstance(tree, Mapping):
        return {key: storable(value) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return [storable(value) for value in tree]
    return tree


def print_error(error: Exception, where: str = "") -> None:
    """Print an error that a user is to read, redacted, on stderr."""
    write_patiently(sys.stderr, f"error{where}: {redact(str(error))}\n")


class RedactingFormatter(logging.Formatter):
    """A formatter whose lines, tracebacks among them, are redacted."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line."""
        return redact(super().format(record))
