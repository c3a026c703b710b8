"""A run on Weights & Biases (`log.wandb`). The only file on wandb, which is optional.

The library hands what it is given to a process of its own, which writes it to the run folder and sends it from there:
a step neither waits for the network nor fails with it.
"""

from __future__ import annotations

import html
import importlib.util
import logging
import os
import secrets
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from pretrain.errors import ConfigError
from pretrain.storage.whole_file import write_text

logger = logging.getLogger("longhaul")

ID_FILE = "wandb-id.txt"
START_SECONDS = 30  # for the site's answer at the start; then the run is kept on disk
FINISH_SECONDS = 60  # for sending the rest at the end; what remains is on disk


def check_tracking(project: str | None) -> None:
    """Check that a run can be tracked, before anything is started.

    Raises:
        ConfigError: a project is wanted and the library is not installed.
    """
    if project is not None and importlib.util.find_spec("wandb") is None:
        raise ConfigError(
            f"log.wandb is {project}; expected the library wandb, which is not installed. Install it by "
            "pip install 'longhaul[wandb]' (in a checkout: pip install '.[wandb]'), or set log.wandb=null."
        )


class Tracker:
    """Rank 0's record on Weights & Biases; the same one for every start of a run folder."""

    def __init__(
        self, project: str, folder: Path, config: Mapping[str, Any], report: Callable[[str, str], None]
    ) -> None:
        """Start the run there, or take it up again.

        A site that cannot be reached is reported and the run is kept in `folder/wandb`; `wandb sync` sends it later.

        Args:
            project: name of the project there.
            folder: the run folder, which keeps the id.
            config: the resolved config.
            report: called with (event, message).

        Raises:
            ConfigError: the library has no key for the site, or the site does not take it.
        """
        check_tracking(project)
        import wandb  # seconds, and not installed everywhere

        settings = wandb.Settings(
            console="off", silent=True, init_timeout=START_SECONDS, login_timeout=START_SECONDS,
            finish_timeout=FINISH_SECONDS,
        )  # fmt: skip
        about: dict[str, Any] = {
            "project": project, "id": _run_id(folder), "name": os.environ.get("WANDB_NAME") or folder.resolve().name,
            "dir": str(folder), "config": dict(config), "resume": "allow", "settings": settings,
        }  # fmt: skip
        try:
            self._run = wandb.init(**about)
        except (wandb.errors.UsageError, wandb.errors.AuthenticationError) as error:
            raise ConfigError(
                f"log.wandb is {project}; expected a login that Weights & Biases takes ({error}). Run `wandb login` or "
                "set WANDB_API_KEY; WANDB_MODE=offline keeps the run on disk, log.wandb=null does without."
            ) from None
        except Exception as error:  # the network, the site, the library: no reason not to train
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            report("wandb_unreachable", f"{reason}. The run is kept in {folder}/wandb; `wandb sync` sends it.")
            wandb.teardown()  # else the library takes the run for one that is under way
            self._run = wandb.init(**about, mode="offline")
        self._html = wandb.Html
        # A resumed run there has one value a step, as here: steps that it has already are not sent again.
        self._first_step = self._run.step
        if self._run.url:
            report("wandb", f"this run is at {self._run.url}")

    def log(self, values: Mapping[str, float | str], step: int) -> str | None:
        """Record values of a training step.

        Returns:
            What went wrong, after which nothing is recorded any more; None if nothing did.
        """
        return self._log(dict(values), step)

    def log_text(self, name: str, text: str, step: int) -> str | None:
        """Record a text of several lines, as `log` does values."""
        return self._log({name: self._html(f"<pre>{html.escape(text)}</pre>")}, step)

    def _log(self, values: dict[str, Any], step: int) -> str | None:
        if step < self._first_step:
            return None
        try:
            self._run.log(values, step=step)
        except Exception as error:  # its process is gone, for one: a record less is no reason to lose the run
            return f"{type(error).__name__}: {error}. Weights & Biases gets nothing more from this start."
        return None

    def close(self, failed: bool) -> None:
        """Send the rest, for a limited time, and mark the run as finished or failed."""
        try:
            self._run.finish(exit_code=int(failed))
        except Exception as error:
            logger.warning("Weights & Biases: the run could not be finished there: %s", error)


def _run_id(folder: Path) -> str:
    """Return the id in the folder, made at the first start."""
    path = folder / ID_FILE
    if not path.exists():
        write_text(path, secrets.token_hex(8) + "\n")
    return path.read_text(encoding="utf-8").strip()
