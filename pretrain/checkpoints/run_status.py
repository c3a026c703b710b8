"""`status.json`: how a run stands, for people and for what starts it again."""

from __future__ import annotations

import json
import os
import platform
import time
from contextlib import suppress
from pathlib import Path

from pretrain.console import warn
from pretrain.errors import EXIT_FAILED, LonghaulError
from pretrain.redaction import redact
from pretrain.storage.whole_file import write_text


def write_failure(folder: Path, error: BaseException, step: int) -> None:
    """Write into `status.json` that the run failed after `step` steps; by the rank that speaks for all."""
    code = error.exit_status if isinstance(error, LonghaulError) else EXIT_FAILED
    if problem := write_status(folder, "failed", code, step, str(error) or type(error).__name__):
        warn(problem)


def write_status(
    folder: Path, status: str, exit_status: int | None, step: int, reason: str, saved_step: int | None = None
) -> str:
    """Write `status.json`; return what is wrong if the disk does not let it.

    Args:
        folder: the run folder.
        status, exit_status, step, reason: what it says.
        saved_step: of the newest checkpoint; None leaves what it says, 0 says that there is none.
    """
    path = folder / "status.json"
    saved_step = read_saved_step(folder) if saved_step is None else saved_step or None
    content = {"status": status, "exit_status": exit_status, "step": step, "saved_step": saved_step,
               "reason": redact(reason), "pid": os.getpid(), "host": platform.node(),
               "timestamp": time.time()}  # fmt: skip
    try:
        write_text(path, json.dumps(content, indent=1) + "\n")
    except OSError as error:
        return f"{path}: cannot be written ({error.strerror}); it does not say '{status}'."
    return ""


def read_saved_step(folder: Path) -> int | None:
    """The step of the newest checkpoint that `status.json` tells of."""
    with suppress(OSError, ValueError, AttributeError):  # there is none, or it is not ours
        return json.loads((folder / "status.json").read_text(encoding="utf-8")).get("saved_step") or None
    return None
