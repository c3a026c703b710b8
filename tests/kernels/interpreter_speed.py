"""Spares Triton's interpreter a third of its time.

It replaces the language's functions by interpreted ones in every program and every function that a program calls, and
puts them back after a program. Here they are replaced once and stay, in a process that does nothing but interpret.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import triton.language as tl
from triton.runtime import interpreter

_patch = interpreter._patch_lang
_patched: set[frozenset[int]] = set()


class _Kept:
    def restore(self) -> None:
        pass


def _patch_once(function: Callable[..., Any]) -> _Kept:
    seen = frozenset(id(value) for value in function.__globals__.values() if value is tl or value is tl.core)
    if seen not in _patched:
        _patch(function)
        _patched.add(seen)
    return _Kept()


def install() -> None:
    """Let the language stay replaced for the rest of the process."""
    interpreter._patch_lang = _patch_once
