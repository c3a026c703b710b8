"""Secrets and personal data: what is found, and what only looks like it."""

from __future__ import annotations

import random
import time

import pytest

from pretrain.personal_data import PERSONAL_DATA, SECRETS, mask

KEY = "-----BEGIN RSA PRIVATE KEY-----\nMIIEowIBAAKCAQEA\nxyz==\n-----END RSA PRIVATE KEY-----"
# Made up in the published shapes; put together here, so that no scanner takes this file for a leak.
TOKENS = (
    "AKIA" + "IOSFODNN7EXAMPLE", "AIza" + "SyA-1234567890abcdefghijklmnopqrst_", "ghp_" + "a1B2" * 9,
    "github_pat_" + "11ABCDEFG0" * 5, "glpat-" + "abcDEF123456_-xyz789", "xoxb-" + "123456789012-abcdefGHIJ",
    "sk_live_" + "4eC39HqLyjWDarjtT1zdp7dc", "sk-" + "proj-Abc1" + "Xy9z" * 10, "sk-ant-" + "api03-" + "aB3d" * 12,
    "hf_" + "abcdEFGHijklMNOPqrstUVWXyz12345678", "npm_" + "a1B2c3" * 6, "pypi-Ag" + "EIcHlwaS5vcmcCJ" * 5,
    "eyJ" + "hbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0NTY3ODkwIn0.dozjgNryP4J3jVmNHl0w5N_XgL0n3I9P",
)  # fmt: skip


@pytest.mark.parametrize("token", TOKENS)
def test_keys_of_known_services_are_masked(token: str) -> None:
    for before, after in (("key = '", "'\n"), ("", ""), ("a ", ".")):
        assert mask(before + token + after, SECRETS) == (f"{before}[access key]{after}", {"access_key": 1})


def test_private_keys_are_masked_whole() -> None:
    assert mask(f"a\n{KEY}\nb\n{KEY}", SECRETS) == ("a\n[private key]\nb\n[private key]", {"private_key": 2})
    assert mask("x -----BEGIN PRIVATE KEY-----\nMIIE cut", SECRETS) == ("x [private key]", {"private_key": 1})
    text = "The line -----BEGIN PUBLIC KEY----- is public; a PRIVATE KEY is not."
    assert mask(text, SECRETS) == (text, {})


@pytest.mark.parametrize(
    "text",
    [
        "sk-learn and sk-" + "a" * 40,
        "AKIA1234",
        "XAKIA" + "A" * 16,
        "hf_hub_download",
        "eyJ is how they begin",
        "xoxo-" + "1" * 20,
        "task-" + "Ab1" * 12,
    ],  # fmt: skip
)
def test_what_only_looks_like_a_key_stays(text: str) -> None:
    assert mask(text, SECRETS) == (text, {})


@pytest.mark.parametrize(
    ("text", "masked"),
    [
        ("write to jo.doe+x@mail.example.co.uk, now", "write to [email], now"),
        ("<a@b.org>; c_d@e-f.net.", "<[email]>; [email]."),
        ("pay 4111 1111 1111 1111 or 5500-0000-0000-0004", "pay [card] or [card]"),
        ("amex 378282246310005.", "amex [card]."),
        ("from 8.8.8.8:53 and 93.184.216.34.", "from [ip address]:53 and [ip address]."),
        ("call +49 30 901820 or +1 (212) 555-0123, +442079460958", "call [phone] or [phone], [phone]"),
    ],
)
def test_personal_data_is_masked(text: str, masked: str) -> None:
    found, counts = mask(text, PERSONAL_DATA)
    assert found == masked and sum(counts.values()) == masked.count("[")


@pytest.mark.parametrize(
    "text",
    [
        "@decorator\ndef f(a @ b): pass  # user@localhost",
        "4111 1111 1111 1112 has a wrong check digit",  # Luhn
        "1234567812345670 is of no issuer; 0000000000000000; 4444444444444444",
        "127.0.0.1, 10.1.2.3, 192.168.0.1, 256.1.1.1, version 1.2.3, 1.2.3.4.5, v8.8.8.8",
        "2 + 2 = 4, +1, x+12345678901234567890, in 1999-2005",
        "日本語@例え、 price 12.50 + 13.40",
    ],
)
def test_what_only_looks_like_personal_data_stays(text: str) -> None:
    assert mask(text, PERSONAL_DATA) == (text, {})


@pytest.mark.parametrize(
    "piece",
    [
        "a",
        "1",
        "a.",
        "a@",
        "1 ",
        "1-",
        "+1",
        "+1 ",
        "1.",
        "-----BEGIN PRIVATE KEY-----",
        "eyJa",
        "sk-A1",
        "a@a.",
        "xoxb-",
    ],
)
def test_no_text_takes_long(piece: str) -> None:
    text = piece * (300_000 // len(piece))
    begin = time.process_time()
    mask(text, SECRETS + PERSONAL_DATA)
    assert time.process_time() - begin < 3


def test_random_texts_do_not_break_it() -> None:
    rng = random.Random(1)
    for _ in range(300):
        text = "".join(rng.choice("a1@.+- -_ABK=\né日") for _ in range(300))
        masked, counts = mask(text, SECRETS + PERSONAL_DATA)
        assert (masked == text) == (not counts)
