"""Secrets and personal data in texts: found by their published shapes and checksums, and masked.

Each kind has a string that all of its instances hold, so that texts without it cost one search. What is found is what
these shapes say; a name, a street or a password has none, and is not found.
"""

from __future__ import annotations

import ipaddress
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

_HEX = "A-Za-z0-9"


@dataclass(frozen=True)
class _Kind:
    """One kind of thing.

    Attributes:
        name: what it is counted as; also in what stands in its place, `[email]`.
        triggers: a text without any of these holds none; empty: always looked for.
        pattern: its shape. Patterns begin with what they look for and look behind it then: Python's `re` finds a first
            character quickly, and tries a look-behind at each place.
        accepts: says of a match whether it is one.
        hint: a part of it that is found more quickly; a text without it holds none.
    """

    name: str
    triggers: tuple[str, ...]
    pattern: re.Pattern[str]
    accepts: Callable[[str], bool] = bool
    hint: re.Pattern[str] | None = None


def _is_card(text: str) -> bool:
    """Whether digits are a payment card's: prefix and length of an issuer, and Luhn's check digit (ISO/IEC 7812-1)."""
    digits = [int(char) for char in text if char.isdigit()]
    number, length = "".join(map(str, digits)), len(digits)
    first_two, first_four = int(number[:2]), int(number[:4])
    is_issued = (
        (number[0] == "4" and length in (13, 16, 19))  # Visa
        or (length == 16 and (51 <= first_two <= 55 or 2221 <= first_four <= 2720))  # Mastercard
        or (length == 15 and first_two in (34, 37))  # American Express
        or (16 <= length <= 19 and (first_four == 6011 or first_two in (62, 65) or 3528 <= first_four <= 3589))
        or (length == 14 and first_two in (30, 36, 38, 39))  # Diners Club
    )
    doubled = [digit * 2 - 9 * (digit > 4) for digit in digits[-2::-2]]
    return is_issued and len(set(digits)) > 1 and (sum(doubled) + sum(digits[-1::-2])) % 10 == 0


def _is_public_address(text: str) -> bool:
    try:
        return ipaddress.IPv4Address(text).is_global
    except ValueError:
        return False


SECRETS = (
    _Kind(
        "private_key",
        ("PRIVATE KEY",),
        re.compile(
            r"-----BEGIN (?:[A-Z0-9]+ )*PRIVATE KEY(?: BLOCK)?-----"
            r"(?:.*?-----END (?:[A-Z0-9]+ )*PRIVATE KEY(?: BLOCK)?-----|.*\Z)",
            re.DOTALL,
        ),
    ),
    _Kind(
        "access_key",
        ("AKIA", "ASIA", "AIza", "ghp_", "gho_", "ghu_", "ghs_", "ghr_", "github_pat_", "glpat-", "xox", "sk_live_",
         "rk_live_", "sk-", "hf_", "npm_", "pypi-Ag", "eyJ"),
        re.compile(
            rf"(?<![{_HEX}_-])(?:"
            r"(?:AKIA|ASIA)[A-Z2-7]{16}"  # Amazon Web Services
            r"|AIza[\w-]{35}"  # Google
            rf"|gh[pousr]_[{_HEX}]{{36,251}}|github_pat_\w{{36,251}}|glpat-[\w-]{{20,64}}"  # GitHub, GitLab
            r"|xox[abeprs]-[A-Za-z0-9-]{10,250}"  # Slack
            rf"|[sr]k_live_[{_HEX}]{{20,250}}"  # Stripe
            r"|sk-(?:proj-|ant-|svcacct-|or-)?[\w-]{0,12}(?=[\w-]*\d)(?=[\w-]*[A-Z])[\w-]{32,250}"  # model providers
            rf"|hf_[{_HEX}]{{34}}|npm_[{_HEX}]{{36}}|pypi-Ag[\w-]{{50,250}}"  # Hugging Face, npm, PyPI
            r"|eyJ[\w-]{10,2000}\.eyJ[\w-]{10,4000}\.[\w-]{10,2000}"  # JSON web tokens
            rf")(?![{_HEX}_])"
        ),
    ),
)  # fmt: skip
PERSONAL_DATA = (
    _Kind(
        "email",
        ("@",),
        re.compile(
            r"(?<![\w.%+-])[A-Za-z0-9][\w.%+-]{0,63}@(?:[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?\.){1,8}"
            r"[A-Za-z]{2,24}(?![\w@])",
            re.ASCII,
        ),
        hint=re.compile(r"@[A-Za-z0-9][A-Za-z0-9-]*\.[A-Za-z0-9]"),
    ),
    _Kind("card", (), re.compile(r"\d(?<![\w.-].)(?:[ -]?\d){12,18}(?![\w-])", re.ASCII), _is_card),
    _Kind(
        "ip_address",
        (".",),
        re.compile(r"\d(?<![\w.-].)\d{0,2}\.(?:\d{1,3}\.){2}\d{1,3}(?![\w-]|\.\d)", re.ASCII),
        _is_public_address,
    ),
    _Kind(
        "phone",
        ("+",),
        re.compile(r"\+(?<![\w+.-].)[1-9]\d{0,2}(?:[ .-]?\(\d{1,4}\))?(?:[ .-]?\d{2,4}){2,5}(?![\w-])", re.ASCII),
        lambda text: 8 <= sum(map(str.isdigit, text)) <= 15,  # ITU-T E.164
    ),
)


def mask(text: str, kinds: tuple[_Kind, ...]) -> tuple[str, Counter[str]]:
    """Put `[email]` and the like in place of what is found.

    Returns:
        The text, and how many of each kind were found.
    """
    found: Counter[str] = Counter()
    for kind in kinds:
        if kind.triggers and not any(trigger in text for trigger in kind.triggers):
            continue
        if kind.hint is not None and kind.hint.search(text) is None:
            continue

        def replace(match: re.Match[str], kind: _Kind = kind) -> str:
            if not kind.accepts(match[0]):
                return match[0]
            found[kind.name] += 1
            return f"[{kind.name.replace('_', ' ')}]"

        text = kind.pattern.sub(replace, text)
    return text, found
