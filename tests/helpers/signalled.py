"""Has a process send itself a signal at an exact moment: run as a script, or as a hook of the fork server.

`python tests/helpers/signalled.py 15 import:torch launch/plan.py CONFIG` runs a command that gets SIGTERM where torch is first
imported.
"""

from __future__ import annotations

import importlib
import os
import runpy
import sys
from typing import Any


def at_import(name: str, number: int) -> None:
    """Send the signal where a module is first looked for."""

    class Finder:
        @staticmethod
        def find_spec(wanted: str, *_: Any) -> None:
            if wanted == name:
                os.kill(os.getpid(), number)

    sys.meta_path.insert(0, Finder)  # type: ignore[arg-type]


def at_call(function: str, number: int, rank: int = 0, count: int = 1) -> None:
    """Send the signal just before the `count`-th call of `module:name`, or `module:Class.name`."""
    module, _, path = function.partition(":")
    holder: Any = importlib.import_module(module)
    *outer, name = path.split(".")
    for one in outer:
        holder = getattr(holder, one)
    original, calls = getattr(holder, name), [0]

    def called(*args: Any, **keywords: Any) -> Any:
        calls[0] += 1
        if calls[0] == count:
            os.kill(os.getpid(), number)
        return original(*args, **keywords)

    setattr(holder, name, called)


if __name__ == "__main__":
    at_import(sys.argv[2].removeprefix("import:"), int(sys.argv[1]))
    sys.argv = sys.argv[3:]
    sys.path[0] = os.path.dirname(os.path.abspath(sys.argv[0]))  # as Python does for a script
    runpy.run_path(sys.argv[0], run_name="__main__")
