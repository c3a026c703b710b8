"""One check in a process of its own: whatever becomes of it, the others go on.

`python -m pretrain.doctor.child MODULE REQUEST FILE` writes each line to the file as it is found, as JSON.
"""

from __future__ import annotations

import json
import signal
import sys
from dataclasses import asdict
from importlib import import_module

from pretrain.doctor.findings import Request


def main(module: str, request: str, file: str) -> None:
    """Run the check of a module of this package."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # removes what the check has written
    with open(file, "a", encoding="utf-8", buffering=1) as lines:
        for line in import_module(f"pretrain.doctor.{module}").check(Request(**json.loads(request))):
            lines.write(json.dumps(asdict(line)) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
