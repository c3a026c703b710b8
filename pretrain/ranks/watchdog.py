"""A thread on every rank that ends the run when a rank is lost or no longer gets on, and says which.

Collectives have time limits of their own. This is for what is none: reading data, a disk, a compiler, a process that
was stopped, a node that is gone. Every rank tells rank 0 what its main thread is doing (`Heartbeat`); rank 0 judges,
and all ranks write down the stacks of their threads and end with status 69. They do so from this thread, for the main
one may be in C code that never returns.
"""

from __future__ import annotations

import faulthandler
import os
import platform
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

from pretrain.console import write_patiently
from pretrain.errors import EXIT_FAILED, LonghaulError, PeerError, TrainingError
from pretrain.ranks.distributed import Ranks, is_communication_failure, set_timeouts
from pretrain.ranks.stalls import GO_ON, Judge, Stragglers, Verdict
from pretrain.ranks.watch_links import Hub, News, Spoke
from pretrain.redaction import redact

_INTERVAL_SECONDS = 2.0  # between beats, at most a fifth of the limit
_RANKS_A_SECOND = 128  # that rank 0 hears at most: with very many ranks the beats are rarer
_SILENT_INTERVALS = 3  # without a word make a rank silent
_MARGIN_SECONDS = 30.0  # that collectives have more than the watchdog, which knows better whose fault it is
_GRACE_SECONDS = 5.0  # for the main thread to notice by itself that a rank is lost
_ENDING_SECONDS = 150.0  # for the main thread to end a run that has failed: it may be writing a checkpoint
_WORDS_SECONDS = 10.0  # for the last words: the disk may be what has failed
_SAVE_SECONDS = 70.0  # for a checkpoint that is being written when another rank is lost


class Watchdog:
    """Watches a run from when it is made, by all ranks together, until `close` or `end_by`.

    Attributes:
        speaks: whether this rank speaks for all: rank 0, or rank 1 if that one is lost.
        on_end: called when the run is ended from here, on the rank that speaks for all, with the error and the number
            of steps that were done.
        finish_save: called before a process ends because another rank was lost; waits for a save that is under way.
    """

    def __init__(self, ranks: Ranks, timeout_seconds: float, start_timeout_seconds: float, log: Path) -> None:
        """Connect the ranks, and begin to watch.

        Args:
            ranks: all of them; what they do is read from their heartbeats.
            timeout_seconds: how long a rank may stay without a sign of life after the first step.
            start_timeout_seconds: the same before, and in phases that are patient.
            log: file that this rank's stacks are appended to.
        Raises:
            TrainingError: on all ranks, if one cannot connect to rank 0.
        """
        self._ranks, self._heartbeat, self._log = ranks, ranks.heartbeat, log
        self._timeout, self._start_timeout = timeout_seconds, start_timeout_seconds
        self._heartbeat.step, self._heartbeat.is_starting = 0, True
        self.speaks = ranks.is_first
        self.on_end: Callable[[PeerError, int], None] = lambda *_: None
        self.finish_save: Callable[[], None] = lambda: None
        address = os.environ["MASTER_ADDR"]
        hub = Hub(ranks.world_size, address) if ranks.is_first else None
        told = ranks.gather((platform.node(), hub and hub.port, hub and hub.token))
        spoke = ranks.agree(lambda: None if hub else _connect((address, told[0][1]), told[0][2], ranks.rank))
        self._link: Hub | Spoke = hub or spoke  # type: ignore[assignment]
        hosts = [host for host, *_ in told]
        self._judge = Judge(hosts if hub else hosts[:1], timeout_seconds, start_timeout_seconds)
        self._stragglers = Stragglers(self._judge)
        self._sentences: list[str] = []
        self._verdict: Verdict | None = None
        self._farewell: list[int | str] | None = None
        self._is_told, self._main_ends, self._has_left, self._is_closed = (threading.Event() for _ in range(4))
        self.limit_collectives()
        self._thread = threading.Thread(target=self._watch, name="longhaul-watchdog", daemon=True)
        self._thread.start()

    def limit_collectives(self) -> None:
        """Give collectives of all process groups that exist now the limit that holds now."""
        limit = self._start_timeout if self._heartbeat.is_starting else self._timeout
        set_timeouts(limit + _MARGIN_SECONDS)

    def attend(self, finish_save: Callable[[], None]) -> None:
        """Watch what has been built in the start: groups that were made since, and saves; see `finish_save`."""
        self.finish_save = finish_save
        self.limit_collectives()

    def first_step_is_over(self) -> None:
        """From now on the shorter limit holds."""
        self._heartbeat.is_starting = False
        self.limit_collectives()

    def take_stragglers(self) -> list[str]:
        """Return a sentence for each rank that was found to slow down the others since the last call; on rank 0."""
        sentences, self._sentences = self._sentences, []
        return sentences

    def close(self) -> None:
        """Stop watching, for the run is over on this rank."""
        self._is_closed.set()
        self._leave([])
        self._thread.join(2 * _GRACE_SECONDS)

    def end_by(self, error: BaseException) -> BaseException:
        """Stop watching, for the run ends by this error here, and tell other ranks so.

        Returns:
            The error; a PeerError instead if it comes of another rank's.
        """
        self._main_ends.set()
        if is_communication_failure(error):
            self._is_told.wait(_GRACE_SECONDS)
            if (verdict := self._verdict) and verdict.lost is None:
                time.sleep(_ENDING_SECONDS)  # the thread is ending this process
            error = self._peer_error(error)
        status = error.exit_status if isinstance(error, LonghaulError) else EXIT_FAILED
        self._leave([status, str(error) or type(error).__name__])
        return error

    def _peer_error(self, error: BaseException) -> PeerError:
        verdict, step = self._verdict, self._heartbeat.step
        if verdict:
            return verdict.error(is_shown=self.speaks)
        where = f"step {step}" if step else "start"
        text = str(error).strip().splitlines()[0]
        return PeerError(
            f"{where}: other ranks were not reached ({text}); expected all {self._ranks.world_size} to answer. Look "
            f"for the first error among the ranks' outputs. {GO_ON}"
        )

    def _leave(self, farewell: list[int | str]) -> None:
        """Let the thread say farewell, once, unless it knows that the run has failed."""
        self._main_ends.set()
        if self._farewell is None and self._verdict is None:
            self._farewell = farewell
            self._link.wake()
            self._has_left.wait(_GRACE_SECONDS)

    def _watch(self) -> None:
        last = time.monotonic()
        while self._farewell is None:
            limit = self._start_timeout if self._heartbeat.is_starting else self._timeout
            interval = min(max(_INTERVAL_SECONDS, self._ranks.world_size / _RANKS_A_SECOND), limit / 5)
            with suppress(AttributeError, ValueError, OSError):  # no standard error
                # for the case that C code keeps Python from running, and so this thread
                faulthandler.dump_traceback_later(limit, file=sys.__stderr__ or 2)
            news = self._link.exchange(interval, self._heartbeat.read)
            if self._farewell is not None or news.is_over:
                break
            now = time.monotonic()
            # A process that was stopped, or kept from running, does not count that time against anybody.
            self._judge.pass_time(min(now - last, _SILENT_INTERVALS * interval))
            last = now
            if verdict := self._judge_by(news, _SILENT_INTERVALS * interval):
                faulthandler.cancel_dump_traceback_later()
                self._end(verdict)
                break
        faulthandler.cancel_dump_traceback_later()
        self._say_farewell()

    def _judge_by(self, news: News, silent_seconds: float) -> Verdict | None:
        self._judge.step = self._heartbeat.step
        if self._judge.is_starting and not self._heartbeat.is_starting:
            self._judge.end_start()
        if self._ranks.is_first:
            self._judge.hear(0, self._heartbeat.read())
        for rank, beat in news.beats.items():
            self._judge.hear(rank, beat)
        for rank in news.left:
            self._judge.leave(rank)
        if news.verdict:
            return Verdict(**news.verdict)
        if news.failed:
            rank = next(iter(news.failed))
            return self._judge.failed(rank, *news.failed[rank])
        verdict = self._judge.ended(news.ended[0]) if news.ended else self._judge.silent()
        if self._ranks.is_first:
            self._sentences += self._stragglers.read()
            return verdict or self._judge.stalled(silent_seconds)
        self.speaks = verdict is not None and self._ranks.rank == 1
        return verdict

    def _end(self, verdict: Verdict) -> None:
        """End this process, unless the main thread ends the run because of the same."""
        self._verdict = verdict
        if self._ranks.is_first:
            self._link.tell({"verdict": asdict(verdict)})
        self._is_told.set()
        saves = verdict.lost is not None
        if saves and self._main_ends.wait(_GRACE_SECONDS):
            if self._is_closed.wait(_ENDING_SECONDS):
                return
            saves = False
        words = threading.Thread(target=self._say_last_words, args=(verdict,), daemon=True)
        words.start()
        words.join(_WORDS_SECONDS)
        if saves:
            saving = threading.Thread(target=self.finish_save, daemon=True)
            saving.start()
            saving.join(_SAVE_SECONDS)
        os._exit(verdict.exit_status)

    def _say_last_words(self, verdict: Verdict) -> None:
        if self.speaks:
            who = "error" if self._ranks.is_first else f"error on rank {self._ranks.rank}"
            write_patiently(sys.stderr, f"{who}: {redact(verdict.reason)}\n")
        with suppress(OSError), open(self._log, "a", encoding="utf-8") as file:
            file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} ERROR {redact(verdict.reason)}\nThis rank's threads:\n")
            file.flush()
            faulthandler.dump_traceback(file, all_threads=True)
        if self.speaks:
            with suppress(OSError):
                self.on_end(verdict.error(is_shown=True), verdict.num_done)

    def _say_farewell(self) -> None:
        if self._farewell is not None:
            self._link.tell({"farewell": self._farewell})
        self._has_left.set()
        if isinstance(self._link, Hub):  # what it has said is lost if it closes before the others have read it
            self._link.await_farewells(_GRACE_SECONDS)
        self._link.close()


def _connect(address: tuple[str, int], token: str, rank: int) -> Spoke:
    try:
        return Spoke(address, token, rank)
    except OSError as error:
        raise TrainingError(
            f"launch: rank {rank} on {platform.node()} cannot connect to rank 0 at {address[0]}:{address[1]} "
            f"({error}); expected that host's ports to be open to the others, as gloo and NCCL need it too. Open them."
        ) from None
