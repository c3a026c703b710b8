"""Saving and resuming by all ranks together: complete or absent, never half.

Every rank writes the fragments that it owns into a temporary folder and syncs it; when all have, rank 0 writes the
manifest and renames the folder. Whatever is killed at whatever moment, a folder named `step-NNNNNNNN` is whole.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from pretrain.checkpoint_files import (
    FORMAT_VERSION,
    MANIFEST,
    CheckpointReader,
    Piece,
    find_uncovered,
    folder_name,
    list_steps,
    manifest_digest,
    tensor_key,
)
from pretrain.config import CheckpointSection
from pretrain.distributed import Ranks
from pretrain.engine import Engine
from pretrain.errors import CheckpointError
from pretrain.tensor_files import sync_folder, write_tensors, write_text

logger = logging.getLogger("longhaul")


class Checkpoints:
    """The checkpoints of one run folder."""

    def __init__(
        self, folder: Path, section: CheckpointSection, ranks: Ranks, report: Callable[[str, str], None]
    ) -> None:
        """Clean up what a killed save left behind.

        Args:
            folder: the run's `checkpoints` folder.
            section: the config's `checkpoint`.
            ranks: all ranks call every method together.
            report: called on rank 0 with (event, message).
        """
        self.folder = folder
        self.section = section
        self.ranks = ranks
        self.report = report
        if ranks.is_first:
            folder.mkdir(parents=True, exist_ok=True)
            for leftover in folder.glob(".tmp-*"):
                shutil.rmtree(leftover, ignore_errors=True)
        ranks.barrier()

    def save(self, engine: Engine, step: int, training: dict[str, Any], about: dict[str, Any]) -> Path:
        """Write the checkpoint of update number `step`, or do nothing if it exists.

        Args:
            engine: whose masters and moments are written.
            step: updates done.
            training: what resuming needs besides tensors; JSON.
            about: config and versions, for people and for other programs; JSON.
        Returns:
            The checkpoint's folder.
        Raises:
            CheckpointError: on all ranks, if any rank failed; nothing is left behind.
        """
        final = self.folder / folder_name(step)
        if self.ranks.from_first(final.exists()):
            return final
        temporary = self.folder / f".tmp-{final.name}"
        self._agree(self._try(lambda: temporary.mkdir(parents=True)) if self.ranks.is_first else None, temporary)
        own: dict[str, Any] = {}
        problem = self._try(lambda: own.update(self._write_own(engine, temporary)))
        outcomes = self.ranks.gather(own)
        self._agree(problem, temporary)
        if self.ranks.is_first:
            make_manifest = partial(self._manifest, engine, outcomes, step, training, about)
            problem = self._try(lambda: self._commit(temporary, final, make_manifest()))
        self._agree(problem, temporary)
        return final

    def _write_own(self, engine: Engine, temporary: Path) -> dict[str, Any]:
        name = f"rank-{self.ranks.rank:05d}.safetensors"
        tensors, fragments = {}, []
        for fragment in engine.fragments():
            fragments.append((fragment.name, fragment.start, fragment.length, tuple(fragment.tensors)))
            for state, view in fragment.tensors.items():
                tensors[tensor_key(fragment.name, state, fragment.start)] = view.detach().cpu().clone()
        num_bytes, sha256 = write_tensors(
            temporary / name, tensors, {"format": "longhaul", "rank": str(self.ranks.rank)}
        )
        return {"file": name, "bytes": num_bytes, "sha256": sha256, "fragments": fragments}

    def _manifest(self, engine: Engine, outcomes: list[dict], step: int, training: dict, about: dict) -> dict[str, Any]:
        shapes = engine.parameter_shapes()
        pieces: dict[str, list[Piece]] = {name: [] for name in shapes}
        problems = []
        for outcome in outcomes:
            for name, start, length, states in outcome["fragments"]:
                pieces[name].append(Piece(outcome["file"], start, length))
                problems += [f"'{name}' has no '{state}'" for state in engine.states[name] if state not in states]
        if problems := problems + find_uncovered(shapes, pieces):
            more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
            raise CheckpointError(f"state is missing: {'; '.join(problems[:3])}{more}")
        return {
            "format_version": FORMAT_VERSION,
            "step": step,
            "training": training | {"optimizer_step": engine.optimizer_step(), "loss_scale": engine.loss_scale_state()},
            "about": about | {"world_size": self.ranks.world_size, "zero_stage": engine.stage},
            "parameters": {
                name: {
                    "shape": list(shape),
                    "states": list(engine.states[name]),
                    "fragments": [list(asdict(piece).values()) for piece in pieces[name]],
                }
                for name, shape in shapes.items()
            },
            "files": {
                outcome["file"]: {"bytes": outcome["bytes"], "sha256": outcome["sha256"]} for outcome in outcomes
            },
        }

    @staticmethod
    def _commit(temporary: Path, final: Path, manifest: dict[str, Any]) -> None:
        sealed = manifest | {"sha256": manifest_digest(manifest)}
        write_text(temporary / MANIFEST, json.dumps(sealed, indent=1, allow_nan=False))
        os.rename(temporary, final)
        sync_folder(final.parent)

    @staticmethod
    def _try(action: Callable[[], None]) -> str | None:
        try:
            action()
        except (OSError, CheckpointError) as error:
            return str(error)
        return None

    def _agree(self, problem: str | None, temporary: Path) -> None:
        """Raise on all ranks if any has a problem, after removing what was written."""
        problems = {rank: text for rank, text in enumerate(self.ranks.gather(problem)) if text}
        if not problems:
            return
        if self.ranks.is_first:
            shutil.rmtree(temporary, ignore_errors=True)
        rank, text = next(iter(problems.items()))
        raise CheckpointError(
            f"{self.folder}: a checkpoint could not be written on {len(problems)} of {self.ranks.world_size} ranks "
            f"(rank {rank}: {text}); expected a writable folder with enough space. Earlier checkpoints are untouched."
        )

    def load_newest(self, engine: Engine) -> dict[str, Any] | None:
        """Fill the engine from the newest checkpoint that verifies, and return its `training` state.

        Damaged ones are renamed to `step-NNNNNNNN.damaged` and reported.

        Returns:
            None if the folder holds no checkpoint at all.
        Raises:
            CheckpointError: there are checkpoints and none is good. The run never begins anew by itself.
        """
        steps = self.ranks.from_first(list_steps(self.folder))
        for step in reversed(steps):
            folder = self.folder / folder_name(step)
            problems = [problem for problem in self.ranks.gather(self._verify_share(folder)) if problem]
            if not problems:
                return self._fill(engine, CheckpointReader(folder))
            if self.ranks.is_first:
                self.report("checkpoint_damaged", f"{'; '.join(problems)}. Going on from the one before.")
            self.ranks.agree(partial(self._set_aside, folder))
        if steps:
            raise CheckpointError(
                f"{self.folder}: none of its {len(steps)} checkpoints is intact; expected one. Restore one from a "
                "backup, or start again with another run.dir."
            )
        return None

    def _set_aside(self, folder: Path) -> None:
        """Take a damaged checkpoint's name from it, so that its step can be saved again."""
        if not self.ranks.is_first:
            return
        number = 1
        while (aside := folder.with_name(f"{folder.name}.damaged{'' if number == 1 else f'-{number}'}")).exists():
            number += 1
        try:
            folder.rename(aside)
        except OSError as error:
            raise CheckpointError(
                f"{folder}: is damaged and cannot be renamed ({error}); expected a writable folder. Move it away."
            ) from None

    def _verify_share(self, folder: Path) -> str | None:
        try:
            reader = CheckpointReader(folder)
            names = sorted(reader.manifest["files"])[self.ranks.rank :: self.ranks.world_size]
            return "; ".join(problem for name in names if (problem := reader.verify_file(name))) or None
        except CheckpointError as error:
            return str(error)

    def _fill(self, engine: Engine, reader: CheckpointReader) -> dict[str, Any]:
        if reader.shapes != engine.parameter_shapes():
            raise CheckpointError(
                f"{reader.folder}: holds another model than the config's; use the config that wrote it."
            )
        for fragment in engine.replicated_fragments():
            for state, view in fragment.tensors.items():
                view.copy_(reader.read(fragment.name, state, fragment.start, fragment.length))
        engine.finish_loading(reader.training["optimizer_step"])
        engine.load_loss_scale_state(reader.training["loss_scale"])
        return reader.training

    def prune(self, best_step: int | None) -> None:
        """Remove all but the newest `keep_last` checkpoints and the best one."""
        if self.ranks.is_first:
            steps = list_steps(self.folder)
            keep = set(steps[-self.section.keep_last :]) | ({best_step} if best_step is not None else set())
            for step in steps:
                if step not in keep:
                    try:
                        self._remove(self.folder / folder_name(step))
                    except OSError as error:  # too many checkpoints are no reason to end a run
                        logger.warning("checkpoint %d could not be removed: %s", step, error)

    @staticmethod
    def _remove(folder: Path) -> None:
        doomed = folder.with_name(f".tmp-removed-{folder.name}")  # renamed first: half a folder is never seen
        folder.rename(doomed)
        shutil.rmtree(doomed, ignore_errors=True)
