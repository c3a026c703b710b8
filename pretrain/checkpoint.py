"""Saving and resuming by all ranks together: complete or absent, never half.

Every rank writes the fragments that it owns into a temporary folder and syncs it; when all have, rank 0 writes the
manifest and renames the folder. Whatever is killed at whatever moment, a folder named `step-NNNNNNNN` is whole. All of
it goes on beside training, one save at a time; only between steps do ranks talk about it.
"""

from __future__ import annotations

import json
import logging
import math
import os
import secrets
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from pretrain.checkpoint_files import (
    DAMAGED,
    FORMAT_VERSION,
    MANIFEST,
    CheckpointReader,
    Piece,
    find_uncovered,
    folder_name,
    has_checkpoints,
    list_steps,
    manifest_digest,
)
from pretrain.distributed import Ranks
from pretrain.engine import MASTER, Engine
from pretrain.errors import CheckpointError
from pretrain.run_options import CheckpointSection
from pretrain.share_writer import ShareWriter, Task, collect_shares
from pretrain.tensor_files import check_space, explain, sync_folder, write_text

logger = logging.getLogger("longhaul")
_WRITE_SECONDS = 60.0  # for which a run that has failed waits for its disk
_OTHERS_SECONDS = 5.0  # and then for other ranks' shares
_FILES_A_RANK = 3  # at once: its share, a note of it, and one of these under a temporary name


@dataclass
class _Pending:
    """A save that is under way."""

    final: Path
    temporary: Path
    content: dict[str, Any]  # of the manifest, but for parameters and files
    shapes: dict[str, tuple[int, ...]]
    states: dict[str, tuple[str, ...]]
    share: Task  # this rank's
    whole: Task | None = None  # on rank 0: what completes the checkpoint
    give_up_at: float = math.inf  # when rank 0 no longer waits for shares, by the monotonic clock


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
        self._writer = ShareWriter(ranks.device, ranks.rank)
        self._pending: _Pending | None = None
        # A rank that outlives its job, on another node, must not write into the save of the job that follows.
        self._start = ranks.from_first(secrets.token_hex(4))
        if ranks.is_first:
            folder.mkdir(parents=True, exist_ok=True)
            for leftover in folder.glob(".tmp-*"):
                shutil.rmtree(leftover, ignore_errors=True)
        ranks.barrier()

    def start_save(
        self, engine: Engine, step: int, training: dict[str, Any], about: dict[str, Any], best_step: int | None
    ) -> None:
        """Begin the checkpoint of update number `step`, or do nothing if it exists; no other save may be under way.

        Before the next update `wait_for_copy` must have returned; `finish_save` ends it.

        Args:
            engine: whose masters and moments are written.
            step: updates done.
            training: what resuming needs besides tensors; JSON.
            about: config and versions, for people and for other programs; JSON.
            best_step: the checkpoint that is kept beside the newest ones.
        Raises:
            CheckpointError: on all ranks, if any rank failed; nothing is left behind.
        """
        assert self._pending is None
        final = self.folder / folder_name(step)
        if self.ranks.from_first((final / MANIFEST).is_file()):
            return
        temporary = self.folder / f".tmp-{self._start}-{final.name}"
        problem = self._try(lambda: self._make_folder(temporary, engine)) if self.ranks.is_first else None
        if problem := self.ranks.from_first(problem):
            raise self._failure(final, problem)
        training = training | {"optimizer_step": engine.optimizer_step(), "loss_scale": engine.loss_scale_state()}
        about = about | {"world_size": self.ranks.world_size, "zero_stage": engine.stage}
        content = {"format_version": FORMAT_VERSION, "step": step, "training": training, "about": about}
        share = self._writer.start(list(engine.fragments()), temporary)
        self._pending = pending = _Pending(final, temporary, content, engine.parameter_shapes(), engine.states, share)
        if self.ranks.is_first:
            pending.whole = Task(lambda: self._complete(pending, best_step))

    def _make_folder(self, temporary: Path, engine: Engine) -> None:
        """Make the folder of a save, if there is space for it: a disk that is filled takes other programs down too."""
        needed = sum(
            4 * math.prod(shape) * len(engine.states[name]) for name, shape in engine.parameter_shapes().items()
        )
        num_files = _FILES_A_RANK * self.ranks.world_size + 2  # and the manifest, and the folder
        check_space(self.folder, needed, num_files)
        temporary.mkdir(parents=True)

    def wait_for_copy(self) -> None:
        """Wait until a save that was started no longer needs the engine's tensors."""
        self._writer.wait_for_copy()

    def must_be_finished(self) -> bool:
        """Whether this rank knows the save that is under way to have ended, well or not: `finish_save` is due."""
        pending = self._pending
        return pending is not None and (pending.share.has_failed() or bool(pending.whole and pending.whole.is_done()))

    def finish_save(self) -> bool:
        """Wait for the save that is under way, if there is one.

        Returns:
            Whether there was one.
        Raises:
            CheckpointError: on all ranks, if any rank failed; nothing is left behind.
        """
        if self._pending is None:
            return False
        pending, self._pending = self._pending, None
        problems = [text for text in self.ranks.gather(self._try(pending.share.result)) if text]
        if problems:
            pending.give_up_at = 0.0  # a rank whose disk is full may not even be able to say so there
        whole = self._try(pending.whole.result) if pending.whole else None
        if problems and self.ranks.is_first:
            shutil.rmtree(pending.temporary, ignore_errors=True)
        if problem := self.ranks.from_first(problems[0] if problems else whole):
            raise self._failure(pending.final, problem)
        return True

    def close(self) -> None:
        """Wait for a save that is under way when training has failed: it is whole if every rank can still write."""
        if pending := self._pending:
            pending.share.wait(_WRITE_SECONDS)
            pending.give_up_at = time.monotonic() + _OTHERS_SECONDS
            if pending.whole:
                pending.whole.wait(_WRITE_SECONDS)

    def _complete(self, pending: _Pending, best_step: int | None) -> None:
        """Rank 0's part, beside training too: the manifest, the name, and the removal of what is not kept."""
        try:
            pending.share.result()
            shares = collect_shares(pending.temporary, self.ranks.world_size, lambda: pending.give_up_at)
            manifest = _manifest(pending, shares)
            sealed = manifest | {"sha256": manifest_digest(manifest)}
            write_text(pending.temporary / MANIFEST, json.dumps(sealed, indent=1, allow_nan=False))
            os.rename(pending.temporary, pending.final)
            sync_folder(self.folder)
        except BaseException:
            shutil.rmtree(pending.temporary, ignore_errors=True)
            raise
        self._prune(best_step)

    @staticmethod
    def _failure(final: Path, problem: str) -> CheckpointError:
        return CheckpointError(f"{final}: could not be written: {problem} Earlier checkpoints are untouched.")

    @staticmethod
    def _try(action: Callable[[], object]) -> str | None:
        """Return why an action failed, and the fix; None if it did not."""
        try:
            action()
        except CheckpointError as error:
            return str(error)
        except OSError as error:
            return explain(error)
        return None

    def steps(self) -> list[int]:
        """Steps of the complete checkpoints, oldest first, as rank 0 sees them."""
        return self.ranks.from_first(list_steps(self.folder))

    def load_newest(self, engine: Engine, up_to_step: int | None = None) -> dict[str, Any] | None:
        """Fill the engine from the newest checkpoint that verifies, and return its `training` state.

        Newer ones, which are damaged, are renamed to `step-NNNNNNNN.damaged` and reported.

        Args:
            engine: whose masters and moments are filled.
            up_to_step: leave out checkpoints of later steps.
        Returns:
            None if the folder holds no such checkpoint at all.
        Raises:
            CheckpointError: there are checkpoints and none is good. The run never begins anew by itself.
        """
        damaged: dict[Path, str] = {}  # what is wrong with each; they keep their names until a good one is found
        steps = self.ranks.from_first(list_steps(self.folder, without_manifest=True))
        for step in reversed([step for step in steps if up_to_step is None or step <= up_to_step]):
            folder = self.folder / folder_name(step)
            problems = self.verify(folder)
            if not problems:
                for bad, problem in damaged.items():
                    self.ranks.agree(partial(self._set_aside, bad))
                    if self.ranks.is_first:
                        self.report("checkpoint_damaged", f"{problem}. Going on from the one before.")
                reader = CheckpointReader(folder)
                fill(engine, reader, self.ranks)
                return reader.training
            damaged[folder] = "; ".join(problem.rstrip(".") for problem in problems)
        if self.ranks.from_first(has_checkpoints(self.folder)):
            found = f"has only checkpoints that are called step-…{DAMAGED}"
            if damaged:
                found = f"none of its {len(damaged)} checkpoints is intact ({next(iter(damaged.values()))})"
            error = CheckpointError(
                f"{self.folder}: {found}; expected one that is. Restore one from a backup, or begin anew with "
                "resume.from_scratch=true or another run.dir."
            )
            error.agreed = True
            raise error
        return None

    def discard_after(self, step: int) -> None:
        """Remove the checkpoints of later steps, which are not to be gone on from.

        Raises:
            CheckpointError: on all ranks, one cannot be removed.
        """
        self.ranks.agree(partial(self._discard_after, step))

    def _discard_after(self, step: int) -> None:
        for later in list_steps(self.folder) if self.ranks.is_first else []:
            folder = self.folder / folder_name(later)
            try:
                if later > step:
                    self._remove(folder)
            except OSError as error:
                raise CheckpointError(
                    f"{folder}: is past step {step}, to which the run goes back, and cannot be removed ({error}); "
                    "expected a writable folder. Remove it."
                ) from None

    def _set_aside(self, folder: Path) -> None:
        """Take a damaged checkpoint's name from it, so that its step can be saved again."""
        if not self.ranks.is_first:
            return
        number = 1
        while (aside := folder.with_name(f"{folder.name}{DAMAGED}{'' if number == 1 else f'-{number}'}")).exists():
            number += 1
        try:
            folder.rename(aside)
        except OSError as error:
            raise CheckpointError(
                f"{folder}: is damaged and cannot be renamed ({error}); expected a writable folder. Move it away."
            ) from None

    def verify(self, folder: Path) -> list[str]:
        """Return what is wrong with a checkpoint; the ranks divide its files between them."""
        found = self.ranks.gather(self._verify_share(folder))
        return list(dict.fromkeys(problem for problem in found if problem))  # each once: all ranks read the manifest

    def _verify_share(self, folder: Path) -> str | None:
        try:
            reader = CheckpointReader(folder)
            names = sorted(reader.manifest["files"])[self.ranks.rank :: self.ranks.world_size]
            return "; ".join(problem for name in names if (problem := reader.verify_file(name))) or None
        except CheckpointError as error:
            return str(error)

    def _prune(self, best_step: int | None) -> None:
        """Remove all but the newest `keep_last` checkpoints, the multiples of `keep_every` and the best one."""
        steps = list_steps(self.folder)
        keep = {*steps[-self.section.keep_last :], best_step}
        if self.section.keep_every:
            keep |= {step for step in steps if step % self.section.keep_every == 0}
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


def fill(engine: Engine, reader: CheckpointReader, ranks: Ranks, with_optimizer: bool = True) -> None:
    """Fill the engine from a checkpoint that was verified; each rank reads what it owns.

    Args:
        engine: whose masters and moments are filled.
        reader: the checkpoint.
        ranks: all ranks.
        with_optimizer: the moments too, and the optimizer's own step; else they stay as they are before the first one.
    Raises:
        CheckpointError: on all ranks, it is of another model or of another optimizer, or cannot be read.
    """
    ranks.agree(lambda: _read_into(engine, reader, with_optimizer))
    engine.finish_loading(reader.training["optimizer_step"] if with_optimizer else 0)
    engine.load_loss_scale_state(reader.training["loss_scale"])


def _read_into(engine: Engine, reader: CheckpointReader, with_optimizer: bool) -> None:
    if reader.shapes != engine.parameter_shapes():
        raise CheckpointError(
            f"{reader.folder}: holds another model than the config's; expected the same parameters. Use the `model` of "
            "the config that wrote it, or begin with another run.dir."
        )
    if with_optimizer and (lacking := _lacking(engine, reader)):
        raise CheckpointError(
            f"{reader.folder}: has no {lacking}; expected the states of optim.name. Use the `optim` of the config that "
            "wrote it; a new run can do without by resume.from and resume.optimizer=false."
        )
    for fragment in engine.replicated_fragments():
        for state, view in fragment.tensors.items():
            if with_optimizer or state == MASTER:
                view.copy_(reader.read(fragment.name, state, fragment.start, fragment.length))


def _lacking(engine: Engine, reader: CheckpointReader) -> str:
    """Name a state that the engine has and a checkpoint has not."""
    missing = ((state, name) for name, states in engine.states.items() for state in states
               if state not in reader.states[name])  # fmt: skip
    return next((f"'{state}' of '{name}'" for state, name in missing), "")


def _manifest(pending: _Pending, outcomes: list[dict]) -> dict[str, Any]:
    """What the ranks' shares are together.

    Raises:
        CheckpointError: a part of some state is in none of them.
    """
    pieces: dict[str, list[Piece]] = {name: [] for name in pending.shapes}
    problems = []
    for outcome in outcomes:
        for name, start, length, states in outcome["fragments"]:
            pieces[name].append(Piece(outcome["file"], start, length))
            problems += [f"'{name}' has no '{state}'" for state in pending.states[name] if state not in states]
    if problems := problems + find_uncovered(pending.shapes, pieces):
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise CheckpointError(
            f"state is missing: {'; '.join(problems[:3])}{more}; expected all that the optimizer keeps. It is lost in "
            "this process: stop it, and start it again from the last checkpoint."
        )
    parameters = {
        name: {
            "shape": list(shape),
            "states": list(pending.states[name]),
            "fragments": [list(asdict(piece).values()) for piece in pieces[name]],
        }
        for name, shape in pending.shapes.items()
    }
    files = {outcome["file"]: {"bytes": outcome["bytes"], "sha256": outcome["sha256"]} for outcome in outcomes}
    return pending.content | {"parameters": parameters, "files": files}
