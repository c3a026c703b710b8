"""Saving and resuming by all ranks together: complete or absent, never half.

Every rank writes the fragments that it owns to the run's place, a folder or a store; when all have, rank 0 writes the
manifest, with which the checkpoint is complete. Whatever is killed at whatever moment, one that counts is whole. All
of it goes on beside training, one save at a time; only between steps do ranks talk about it.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from pretrain.checkpoints.checkpoint_files import (
    DAMAGED,
    FORMAT_VERSION,
    CheckpointReader,
    Piece,
    find_uncovered,
    folder_name,
    manifest_text,
)
from pretrain.checkpoints.checkpoint_loading import fill
from pretrain.checkpoints.checkpoint_places import Place
from pretrain.checkpoints.share_writer import ShareWriter, Task, collect_shares
from pretrain.errors import CheckpointError, StoreAccessError
from pretrain.options.run_options import CheckpointSection
from pretrain.ranks.distributed import Ranks
from pretrain.storage.tensor_files import explain
from pretrain.zero.engine import Engine

logger = logging.getLogger("longhaul")
_WRITE_SECONDS = 60.0  # for which a run that has failed waits for its disk
_POLL_SECONDS = 5.0  # for which ranks whose share is written wait for the others, before they ask again
_OTHERS_SECONDS = 5.0  # and then for other ranks' shares


@dataclass
class _Pending:
    """A save that is under way."""

    step: int
    content: dict[str, Any]  # of the manifest, but for parameters and files
    shapes: dict[str, tuple[int, ...]]
    states: dict[str, tuple[str, ...]]
    share: Task  # this rank's
    whole: Task | None = None  # on rank 0: what completes the checkpoint
    give_up_at: float = math.inf  # when rank 0 no longer waits for shares, by the monotonic clock


class Checkpoints:
    """The checkpoints of one run folder."""

    def __init__(
        self,
        place: Place,
        section: CheckpointSection,
        ranks: Ranks,
        report: Callable[[str, str], None],
        run_path: Path,
        run_id: str,
    ) -> None:
        """Take the place for this start, and clean up what a killed save left behind.

        Args:
            place: that the checkpoints are written to.
            section: the config's `checkpoint`.
            ranks: all ranks call every method together.
            report: called on rank 0 with (event, message).
            run_path: the run folder.
            run_id: what tells the run from others; rank 0's counts.
        Raises:
            ConfigError: the place is another run's, or cannot be used.
            StoreAccessError: it cannot be reached.
        """
        self.place = place
        self.run_path = run_path
        self.section = section
        self.ranks = ranks
        self.report = report
        self._writer = ShareWriter(ranks.device, ranks.rank, asynchronous=section.asynchronous)
        self._pending: _Pending | None = None
        record = ranks.agree(lambda: place.claim(run_id, run_path) if ranks.is_first else "")
        place.join(ranks.from_first(record))

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
        if self.ranks.from_first(self.ranks.is_first and self.place.has(step)):
            return
        begin = partial(self.place.begin, step, _num_bytes(engine), self.ranks.world_size)
        problem = self._try(begin) if self.ranks.is_first else None
        if problem := self.ranks.from_first(problem):
            raise self._failure(step, problem)
        training = training | {"optimizer_step": engine.optimizer_step(), "loss_scale": engine.loss_scale_state()}
        about = about | {"world_size": self.ranks.world_size, "zero_stage": engine.stage}
        content = {"format_version": FORMAT_VERSION, "step": step, "training": training, "about": about}
        share = self._writer.start(list(engine.fragments()), self.place, step, bool(engine.disk))
        self._pending = pending = _Pending(step, content, engine.parameter_shapes(), engine.states, share)
        if self.ranks.is_first:
            pending.whole = Task(lambda: self._complete(pending, best_step))

    def is_saving(self, step: int) -> bool:
        """Whether a save of this step was started and `finish_save` has not ended it; alike on all ranks."""
        return self._pending is not None and self._pending.step == step

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
        self._await(pending.share)
        problems = [text for text in self.ranks.gather(self._try(pending.share.result)) if text]
        if problems:
            pending.give_up_at = 0.0  # a rank whose disk is full may not even be able to say so there
        self._await(pending.whole)
        whole = self._try(pending.whole.result) if pending.whole else None
        if problems and self.ranks.is_first:
            self.place.abandon(pending.step)
        if problem := self.ranks.from_first(problems[0] if problems else whole):
            raise self._failure(pending.step, problem)
        return True

    def _await(self, task: Task | None) -> None:
        """Wait on all ranks for a task of each; in many short collectives, since one has a time limit."""
        with self.ranks.heartbeat.held():
            while self.ranks.sum([task is not None and not task.wait(_POLL_SECONDS)])[0]:
                pass

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
            shares = collect_shares(self.place, pending.step, self.ranks.world_size, lambda: pending.give_up_at)
            manifest = _manifest(pending, shares)
            self.place.complete(pending.step, manifest_text(manifest))
        except BaseException:
            self.place.abandon(pending.step)
            raise
        self._prune(best_step)

    def _failure(self, step: int, problem: str) -> CheckpointError:
        return CheckpointError(
            f"{self.place}/{folder_name(step)}: could not be written: {problem} Earlier checkpoints are untouched."
        )

    @staticmethod
    def _try(action: Callable[[], object]) -> str | None:
        """Return why an action failed, and the fix; None if it did not."""
        try:
            action()
        except (CheckpointError, StoreAccessError) as error:
            return str(error)
        except OSError as error:
            return explain(error)
        return None

    def steps(self) -> list[int]:
        """Steps of the complete checkpoints, oldest first, as rank 0 sees them."""
        return list_together(self.place, self.ranks)

    def load_newest(self, engine: Engine, up_to_step: int | None = None) -> dict[str, Any] | None:
        """Fill the engine from the newest checkpoint that verifies, and return its `training` state.

        Newer ones, which are damaged, are set aside and reported.

        Args:
            engine: whose masters and moments are filled.
            up_to_step: leave out checkpoints of later steps.
        Returns:
            None if the folder holds no such checkpoint at all.
        Raises:
            CheckpointError: there are checkpoints and none is good. The run never begins anew by itself.
        """
        damaged: dict[int, str] = {}  # what is wrong with each; they keep their names until a good one is found
        steps = self.ranks.agree(lambda: self.place.list_claimed() if self.ranks.is_first else [])
        steps = self.ranks.from_first(steps)
        for step in reversed([step for step in steps if up_to_step is None or step <= up_to_step]):
            problems = self.verify(partial(self.place.open, step))
            if not problems:
                for bad, problem in damaged.items():
                    self.ranks.agree(partial(self._set_aside, bad))
                    if self.ranks.is_first:
                        self.report("checkpoint_damaged", f"{problem}; set aside. Going on from the one before.")
                reader = self.ranks.agree(partial(self.place.open, step))
                fill(engine, reader, self.ranks)
                return reader.training
            damaged[step] = "; ".join(problem.rstrip(".") for problem in problems)
        if self.ranks.from_first(self.ranks.agree(lambda: self.ranks.is_first and self.place.has_any())):
            found = f"has only checkpoints that are called step-…{DAMAGED}, or whose manifests are"
            if damaged:
                found = f"none of its {len(damaged)} checkpoints is intact ({next(iter(damaged.values()))})"
            error = CheckpointError(
                f"{self.place}: {found}; expected one that is. Restore one from a backup, or begin anew with "
                "resume.from_scratch=true or another run.dir."
            )
            error.agreed = True
            raise error
        return None

    def discard_after(self, step: int) -> None:
        """Remove the checkpoints of later steps, which are not to be gone on from.

        Raises:
            CheckpointError: on all ranks, one cannot be removed.
            StoreAccessError: likewise.
        """
        self.ranks.agree(partial(self._discard_after, step))

    def _discard_after(self, step: int) -> None:
        for later in self.place.list_steps() if self.ranks.is_first else []:
            try:
                if later > step:
                    self.place.remove(later)
            except OSError as error:
                raise CheckpointError(
                    f"{self.place}/{folder_name(later)}: is past step {step}, to which the run goes back, and cannot "
                    f"be removed ({error}); expected a writable folder. Remove it."
                ) from None

    def _set_aside(self, step: int) -> None:
        if self.ranks.is_first:
            self.place.set_aside(step)

    def verify(self, open_reader: Callable[[], CheckpointReader]) -> list[str]:
        """Return what is wrong with a checkpoint; the ranks divide its files between them.

        Raises:
            LonghaulError: on all ranks, that cannot be found out: the store does not answer.
        """
        found = self.ranks.gather(self.ranks.agree(partial(self._verify_share, open_reader)))
        return list(dict.fromkeys(problem for problem in found if problem))  # each once: all ranks read the manifest

    def _verify_share(self, open_reader: Callable[[], CheckpointReader]) -> str | None:
        try:
            reader = open_reader()
            names = sorted(reader.manifest["files"])[self.ranks.rank :: self.ranks.world_size]
            problems = []
            for name in names:
                if problem := reader.verify_file(name):
                    problems.append(f"{reader.folder}/{problem}")
                self.ranks.heartbeat.beat()
            return "; ".join(problems) or None
        except CheckpointError as error:
            return str(error).partition("; expected")[0]  # what to do about it is another matter here

    def _prune(self, best_step: int | None) -> None:
        """Remove all but the newest `keep_last` checkpoints, the multiples of `keep_every` and the best one."""
        try:
            steps = self.place.list_steps()
        except StoreAccessError as error:
            logger.warning("checkpoints could not be removed: %s", error)
            return
        keep = {*steps[-self.section.keep_last :], best_step}
        if self.section.keep_every:
            keep |= {step for step in steps if step % self.section.keep_every == 0}
        for step in steps:
            if step not in keep:
                try:
                    self.place.remove(step)
                except (OSError, StoreAccessError) as error:  # too many checkpoints are no reason to end a run
                    logger.warning("checkpoint %d could not be removed: %s", step, error)


def list_together(place: Place, ranks: Ranks) -> list[int]:
    """Return the steps of the complete checkpoints, oldest first, as rank 0 sees them.

    Raises:
        StoreAccessError: on all ranks, the place cannot be reached.
    """
    return ranks.from_first(ranks.agree(lambda: place.list_steps() if ranks.is_first else []))


def _num_bytes(engine: Engine) -> int:
    """Size of a checkpoint, without what describes it."""
    return sum(4 * math.prod(shape) * len(engine.states[name]) for name, shape in engine.parameter_shapes().items())


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
            "fragments": [piece.as_json() for piece in pieces[name]],
        }
        for name, shape in pending.shapes.items()
    }
    files = {outcome["file"]: {"bytes": outcome["bytes"], "sha256": outcome["sha256"]} for outcome in outcomes}
    return pending.content | {"parameters": parameters, "files": files}
