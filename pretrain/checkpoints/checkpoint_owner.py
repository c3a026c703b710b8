"""Whose a place of checkpoints outside the run folder is: one run's, and of that run the newest start's.

The lock of a run folder ends at its machine. A place elsewhere holds `owner.json`, which a start puts there and looks
at again before it writes: who finds another start's, was taken for dead and replaced, and writes no more.
"""

from __future__ import annotations

import json
import os
import platform
import time
import uuid
from collections.abc import Callable
from pathlib import Path

from pretrain.errors import ConfigError, StoreAccessError

OWNER = "owner.json"


class Ownership:
    """This start's claim to a place."""

    def __init__(self, place: str, read: Callable[[], str | None], write: Callable[[str], None]) -> None:
        """Take what reads and writes the place's `owner.json`, and how messages call the place."""
        self._place, self._read, self._write = place, read, write
        self._record = ""

    def claim(self, run_id: str, run_path: Path) -> str:
        """Make the place this start's; on one rank.

        Returns:
            What the other ranks `join`.
        Raises:
            ConfigError: it is another run's.
        """
        found = self._read()
        if found is not None and (owner := _parse(found)).get("run") != run_id:
            who = "is not readable"
            if owner:
                who = f"names the run in {owner['run_dir']} on {owner['host']}, last started {owner['started']}"
            raise ConfigError(
                f"checkpoint.dir is {self._place}; expected a place of this run alone: its {OWNER} {who}. Use another "
                "checkpoint.dir. If that run's folder is lost and no job of it is left, "
                f"remove {self._place}/{OWNER}, and this run goes on from the checkpoints there."
            )
        record = {
            "run": run_id, "start": uuid.uuid4().hex, "run_dir": str(run_path.absolute()), "host": platform.node(),
            "pid": os.getpid(), "started": time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime()),
        }  # fmt: skip
        self._record = json.dumps(record, indent=1)
        self._write(self._record)
        return self._record

    def is_of(self, run_id: str) -> bool:
        """Whether the place is this run's, or nobody's."""
        found = self._read()
        return found is None or _parse(found).get("run") == run_id

    def join(self, record: str) -> None:
        """Take part in what another rank has claimed."""
        self._record = record

    def check(self, read: Callable[[], str | None] | None = None) -> None:
        """Make sure that no other start has claimed the place since.

        Args:
            read: reads `owner.json`, if not what was given does.
        Raises:
            StoreAccessError: one has.
        """
        found = (read or self._read)()
        if found is None:  # removed by somebody, and nobody has claimed it: it still is this start's
            self._write(self._record)
        elif (owner := _parse(found)).get("start") != _parse(self._record)["start"]:
            raise StoreAccessError(
                f"{self._place}/{OWNER} is of a start on {owner.get('host', '?')} at {owner.get('started', '?')}; "
                "expected this one's, which therefore writes no more. End one of both jobs."
            )


def _parse(text: str) -> dict[str, str]:
    """Return what an `owner.json` says; nothing if it cannot be read."""
    try:
        owner = json.loads(text)
        return {name: str(owner[name]) for name in ("run", "start", "run_dir", "host", "started")}
    except (ValueError, KeyError, TypeError):
        return {}
