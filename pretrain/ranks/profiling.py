"""Where a step's time and memory go: seconds by phase, traces of torch's profiler, and what to do when memory ends."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from pretrain.errors import TrainingError
from pretrain.ranks.heartbeat import Heartbeat

_Moment = float | torch.cuda.Event

MEMORY_ENTRIES = 100_000  # allocations and frees that a snapshot shows


class PhaseClock:
    """Seconds of one step by phase, without waiting for the device.

    On a GPU a phase begins with an event in the stream; `seconds` may be called once the host has waited for the last
    one, as it has when the step's loss has arrived.

    Args:
        device: where the step runs.
        heartbeat: told of every phase that begins.
    """

    def __init__(self, device: torch.device, heartbeat: Heartbeat | None = None) -> None:
        self._device, self._heartbeat = device, heartbeat
        self._stream = torch.cuda.current_stream(device) if device.type == "cuda" else None
        self._begun: list[tuple[str, _Moment]] = []
        self._end: _Moment | None = None
        self._inner: list[tuple[str, int, _Moment, _Moment]] = []  # phase, number of that around it, begin, end

    def begin(self, phase: str) -> None:
        """Say that this phase begins, and so the last one ends; one may come several times."""
        self._begun.append((phase, self._now()))
        if self._heartbeat:
            self._heartbeat.enter(phase)

    def end(self) -> None:
        """Say that the last phase is over."""
        self._end = self._now()

    @contextmanager
    def within(self, phase: str) -> Iterator[None]:
        """Enclose what is a phase of its own in the middle of another.

        On a GPU: what the stream that the clock began in waits for. Other streams' work runs beside it, and is not
        counted.
        """
        in_other_stream = self._stream is not None and torch.cuda.current_stream(self._device) != self._stream
        if in_other_stream or not self._begun or self._end is not None:
            yield
            return
        begin = self._now()
        yield
        self._inner.append((phase, len(self._begun) - 1, begin, self._now()))

    def seconds(self) -> dict[str, float]:
        """Sum the seconds of each phase; to be called after `end`."""
        assert self._end is not None
        found: dict[str, float] = defaultdict(float)
        ends = [moment for _, moment in self._begun[1:]] + [self._end]
        for (phase, begin), end in zip(self._begun, ends, strict=True):
            found[phase] += _seconds_between(begin, end)
        for phase, number, begin, end in self._inner:
            seconds = _seconds_between(begin, end)
            found[phase] += seconds
            found[self._begun[number][0]] -= seconds
        return dict(found)

    def _now(self) -> _Moment:
        if self._stream is None:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def _seconds_between(begin: _Moment, end: _Moment) -> float:
    if isinstance(begin, torch.cuda.Event) and isinstance(end, torch.cuda.Event):
        return begin.elapsed_time(end) / 1e3
    assert isinstance(begin, float) and isinstance(end, float)
    return end - begin


class Profiler:
    """Traces of the steps that a config names, and snapshots of GPU memory.

    Args:
        folder: run folder; files go to `profile/` in it.
        steps: that are traced.
        rank: of this process. Rank 0 writes traces; every rank writes what its memory held when it ended.
        device: where the steps run.
        report: called with a kind of event and a message.
    """

    def __init__(
        self,
        folder: Path,
        steps: list[int],
        rank: int,
        device: torch.device,
        report: Callable[[str, str], None],
    ) -> None:
        self.folder, self.rank, self.device, self._report = folder / "profile", rank, device, report
        self.steps = set(steps) if rank == 0 else set()
        if self.steps and device.type == "cuda":
            torch.cuda.memory._record_memory_history(max_entries=MEMORY_ENTRIES)

    @contextmanager
    def watch(self, step: int) -> Iterator[None]:
        """Enclose one step: trace it if it is to be, and explain it if memory ends in it.

        Raises:
            TrainingError: memory ended.
        """
        try:
            if step in self.steps:
                with self._trace(step):
                    yield
            else:
                yield
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            raise TrainingError(self._explain(step, error)) from error

    @contextmanager
    def _trace(self, step: int) -> Iterator[None]:
        activities = [torch.profiler.ProfilerActivity.CPU]
        if self.device.type == "cuda":
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        with torch.profiler.profile(activities=activities, record_shapes=True, profile_memory=True) as profile:
            yield
        # the name by which TensorBoard's profiler plugin finds it; Perfetto opens any
        path = self.folder / f"step-{step:08d}.rank-{self.rank}.pt.trace.json.gz"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            profile.export_chrome_trace(str(path))
            snapshot = self._snapshot(step)
        except OSError as error:
            self._report("profile_failed", f"{path}: {error.strerror}")
            return
        self._report("profile", f"{path}" + (f" and {snapshot}" if snapshot else ""))

    def _snapshot(self, step: int) -> Path | None:
        """Write what GPU memory holds, in the format of https://pytorch.org/memory_viz; None on a CPU."""
        if self.device.type != "cuda":
            return None
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"step-{step:08d}.rank-{self.rank}.memory.pickle"
        torch.cuda.memory._dump_snapshot(str(path))
        return path

    def _explain(self, step: int, error: RuntimeError) -> str:
        kind = "GPU memory" if self.device.type == "cuda" else "memory"
        try:
            snapshot = self._snapshot(step)
        except OSError:
            snapshot = None  # the disk is full as well; the message below is what matters
        first = str(error).strip().splitlines()[0]
        where = f" What it held: {snapshot} (open it at https://pytorch.org/memory_viz)." if snapshot else ""
        return (
            f"step {step}: rank {self.rank} ran out of {kind} ({first}); expected a micro-batch that fits. Halve "
            "train.micro_batch_size (train.global_batch_size stays, and so does the loss), then "
            "train.activation_checkpointing=selective or full, then parallel.zero_stage one higher, then "
            "parallel.offload=optimizer; for long rows train.ffn_chunk_tokens and parallel.sequence_parallel_size. The "
            f"same command goes on from the newest checkpoint.{where}"
        )


def is_out_of_memory(error: RuntimeError) -> bool:
    """Tell whether an error of torch says that memory ended, of a GPU or of the machine."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)
