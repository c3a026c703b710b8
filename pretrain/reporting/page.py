"""One HTML page that needs nothing else: no network, no file beside it. What it shows cannot become markup."""

from __future__ import annotations

import base64
import hashlib
import html
import json
import re
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pretrain.errors import ConfigError
from pretrain.storage.whole_file import write_text

_LONE = re.compile("[\ud800-\udfff]")  # halves of characters: bytes in a file's name that are no UTF-8
OUTSIDE = "Name a file outside of the run folder by --out."  # where a page cannot lie in it
_PAGES = Path(__file__).with_name("pages")


def fill_page(name: str, title: str, data: dict[str, Any], *, scripts: Sequence[str] = (), library: str = "") -> str:
    """Put a page together from `pages/NAME.html` and what belongs to it.

    A policy in the page lets nothing be loaded, and no script run but those whose hashes it names.

    Args:
        name: of the files in `pages/`.
        title: plain text.
        data: what the page's script reads; numbers must be finite.
        scripts: names of scripts in `pages/` that come before the page's own.
        library: a script of others, which the page's own unpacks and starts. Such libraries write styles as they draw,
            and the policy lets them: a style can load nothing here either.
    """
    style = (_PAGES / f"{name}.css").read_text(encoding="utf-8")
    script = "".join((_PAGES / f"{part}.js").read_text(encoding="utf-8") for part in [*scripts, name])
    policy = [
        "default-src 'none'", "img-src data: blob:" if library else "img-src data:", "base-uri 'none'",
        "form-action 'none'", "style-src 'unsafe-inline'" if library else f"style-src {_hash(style)}",
        f"script-src {_hash(script)}" + (f" {_hash(library)}" if library else ""),
    ]  # fmt: skip
    # `<` would end the element, and U+2028 is no character of a script's strings in old browsers.
    content = json.dumps(data, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    content = content.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")
    content, title = (_LONE.sub("\ufffd", text) for text in (content, title))
    parts = {
        "policy": "; ".join(policy), "title": html.escape(title), "style": style, "script": script, "data": content,
        "library": base64.b64encode(zlib.compress(library.encode(), 9)).decode() if library else "",
    }  # fmt: skip
    head, *rest = (_PAGES / f"{name}.html").read_text(encoding="utf-8").split("{{")
    return head + "".join(parts[part] + text for part, _, text in (piece.partition("}}") for piece in rest))


def _hash(content: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}'"


def save_page(out: Path, page: str, fix: str = "Name another.") -> None:
    """Write a page, complete or not at all.

    Args:
        out: the file.
        page: its content.
        fix: what to do where it cannot be written.

    Raises:
        ConfigError: it cannot be written.
    """
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_text(out, page)
    except OSError as error:
        raise ConfigError(f"--out is {out}; expected a file that can be written ({error}). {fix}") from None
