"""Which language a text is in, by py3langid: an extra (`pip install 'longhaul[data]'`) with its model inside."""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec

from pretrain.errors import ConfigError

_MAX_CHARACTERS = 4000  # of a document are looked at


def check_library() -> None:
    """Check that py3langid is installed.

    Raises:
        ConfigError: it is not.
    """
    if find_spec("py3langid") is None:
        raise ConfigError(
            "data.filters.languages is set; expected py3langid, which tells languages apart. Install it: "
            "pip install 'longhaul[data]'"
        )


@cache
def known_languages() -> frozenset[str]:
    """Codes of the languages that it tells apart."""
    import py3langid

    return frozenset(language for language, _ in py3langid.rank("text"))


def language_of(text: str) -> str:
    """The code of a text's most likely language (ISO 639-1)."""
    import py3langid

    return str(py3langid.classify(text[:_MAX_CHARACTERS])[0])
