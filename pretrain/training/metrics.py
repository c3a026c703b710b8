"""What a run reports: `metrics.jsonl`, TensorBoard, the log, and a view on a terminal or plain lines elsewhere.

Weights & Biases, where it is wanted, gets what TensorBoard gets.
"""

from __future__ import annotations

import json
import logging
import math
import os
import statistics
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pretrain.console import LiveLine, format_count, format_duration, is_live, warn
from pretrain.options.run_options import LogSection
from pretrain.redaction import redact, storable
from pretrain.storage.patient_file import PatientFile
from pretrain.training.live_view import LiveView
from pretrain.training.tensorboard_events import Events, HyperParameters, curves_of
from pretrain.training.tracking import Tracker

logger = logging.getLogger("longhaul")


@dataclass(frozen=True)
class StepMetrics:
    """One optimizer step.

    `loss` is the cross-entropy in nats per scored token, `objective` what was minimised (None where that is the same),
    `lr` as used, `memory_bytes` the peak of rank 0, `phase_seconds` rank 0's own. `corpus_tokens`, padding
    included, `epochs` and what is damaged (each document once, of training only) are of the run so far; `seq_len` is of
    the step's rows; `layer_norms` by key, where they were wanted.
    """

    step: int
    tokens: int
    loss: float
    objective: float | None
    grad_norm: float
    lr: float
    step_seconds: float
    memory_bytes: int
    skipped_steps: int
    clipped_steps: int
    damaged_documents: int
    damaged_tokens: int
    seq_len: int
    corpus_tokens: dict[str, int]
    epochs: dict[str, float]
    phase_seconds: dict[str, float]
    layer_norms: dict[str, float] = field(default_factory=dict)

    @property
    def own_seconds(self) -> float:
        """Of `step_seconds`, what this rank worked and did not wait for others."""
        return sum(self.phase_seconds.get(phase, 0.0) for phase in ("data", "forward", "backward", "optimizer"))


_STRICT = json.JSONEncoder(allow_nan=False)


def _json_number(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def drop_lines_after(path: Path, step: int, see: Callable[[dict[str, Any]], None] | None = None) -> int:
    """Remove the lines of a `metrics.jsonl` beyond a step, and a last line that a crash cut short.

    Args:
        path: the file.
        step: the last that stays.
        see: is given the content of each line that stays.
    Returns:
        The last step that there were lines of.
    """
    last = 0
    if not path.exists():
        return last
    kept = []
    for line in path.read_bytes().splitlines(keepends=True):
        try:
            if line.endswith(b"\n"):
                last = max(last, own := int((content := json.loads(line))["step"]))
                if own <= step:
                    kept.append(line)
                    if see:
                        see(content)
        except (ValueError, KeyError, TypeError):
            continue
    temporary = path.with_suffix(".tmp")
    try:
        temporary.write_bytes(b"".join(kept))
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        warn(f"{path}: lines past step {step} cannot be removed ({error.strerror}); these steps will be there twice")
    return last


class MetricLog:
    """Rank 0's record of the run.

    Attributes:
        last_dropped: the last step that the files told of before what is past the checkpoint was dropped.
    """

    def __init__(
        self, folder: Path, section: LogSection, *, num_steps: int, tokens_per_step: int, world_size: int,
        flops_per_token: Mapping[int, tuple[float, float]], peak_flops: float | None, first_step: int, attempt: int,
        tracker: Tracker | None = None, save_every: int = 0,
        hyper_parameters: Mapping[str, bool | float | str] | None = None,
    ) -> None:  # fmt: skip
        """Open the files, dropping what is past the checkpoint that the run goes on from.

        Args:
            folder: the run folder.
            section: the config's `log`.
            num_steps: steps of the whole run, for the time left.
            tokens_per_step: of the whole batch.
            world_size: number of ranks.
            flops_per_token: by length of rows: model FLOPs by the peers' convention, and with causal attention counted
                once.
            peak_flops: of one rank's device; None if unknown.
            first_step: steps done before this start.
            attempt: number of this start, from 1.
            tracker: the run on Weights & Biases.
            save_every: steps between checkpoints; 0: one at the end.
            hyper_parameters: for TensorBoard's comparison of runs.
        """
        self.section, self.num_steps, self.tokens_per_step = section, num_steps, tokens_per_step
        self.world_size, self.attempt, self._tracker = world_size, attempt, tracker
        self._flops_per_token, self._peak_flops = flops_per_token, peak_flops
        self._recent: deque[float] = deque(maxlen=20)
        self._is_done = False
        self._view = LiveView(num_steps, save_every) if is_live(sys.stderr) else None
        self._lines, self._has_doubted = LiveLine(), False
        self._folder = folder
        self._open_files(first_step, is_first=attempt == 1 and first_step == 0)
        self._hyper_parameters = None
        if section.tensorboard and hyper_parameters is not None:
            self._hyper_parameters = HyperParameters(folder / "tensorboard", hyper_parameters)

    def _open_files(self, after_step: int, is_first: bool) -> None:
        path = self._folder / "metrics.jsonl"
        if self._view:
            self._view.forget()
        self.last_dropped = drop_lines_after(path, after_step, self._view.take if self._view else None)
        self._file, self._events = PatientFile(path), None
        if self.section.tensorboard:
            self._events = Events(self._folder / "tensorboard", None if is_first else after_step + 1)

    def rewind(self, step: int) -> None:
        """Drop what was recorded of the steps after this one, which are done again."""
        self._close_files()
        self._open_files(step, is_first=False)

    def step(self, metrics: StepMetrics) -> None:
        """Record one training step."""
        rate = self.tokens_per_step / metrics.step_seconds
        utilisation = [
            rate * flops / (self._peak_flops * self.world_size) if self._peak_flops else None
            for flops in self._flops_per_token[metrics.seq_len]
        ]
        line = {
            "step": metrics.step, "tokens": metrics.tokens, "loss": metrics.loss, "grad_norm": metrics.grad_norm,
            "lr": metrics.lr, "tokens_per_second": rate, "tokens_per_second_per_gpu": rate / self.world_size,
            "step_seconds": metrics.step_seconds, "mfu": utilisation[0], "mfu_causal": utilisation[1],
            "memory_bytes": metrics.memory_bytes, "data_wait_seconds": metrics.phase_seconds["data"],
            "skipped_steps": metrics.skipped_steps, "clipped_steps": metrics.clipped_steps,
            "damaged_documents": metrics.damaged_documents, "damaged_tokens": metrics.damaged_tokens,
            "timestamp": time.time(), "attempt": self.attempt,
        }  # fmt: skip
        line |= {} if metrics.objective is None else {"objective": metrics.objective}
        line |= {f"epoch/{name}": epoch for name, epoch in metrics.epochs.items()}
        line |= {f"tokens/{name}": tokens for name, tokens in metrics.corpus_tokens.items()}
        line |= {f"seconds/{phase}": seconds for phase, seconds in metrics.phase_seconds.items()}
        line |= metrics.layer_norms
        self._add_scalars(self._write(line))
        self._recent.append(metrics.step_seconds)
        self._show(line)

    def median_step_seconds(self) -> float:
        """Of the last twenty steps of this start."""
        return statistics.median(self._recent)

    def _show(self, line: dict[str, Any]) -> None:
        step = line["step"]
        mean_seconds = sum(self._recent) / len(self._recent)
        mfu = "" if line["mfu"] is None or line["mfu"] > 1 else f"  MFU {100 * line['mfu']:.1f}%"
        if line["mfu"] and line["mfu"] > 1 and not self._has_doubted:
            self._has_doubted = True
            self.say(
                f"step {step}  MFU is left out where above 100%: the peak of a rank, {self._peak_flops:.3g} FLOP/s, "
                "is too low. A CPU's is measured at the start, and was when others used it."
            )
        is_due = step % self.section.every_steps == 0 or step == self.num_steps
        if self._view:
            self._view.show()
        if not is_due:
            return
        text = (
            f"step {step}/{self.num_steps}  loss {line['loss']:.4f}  "
            f"{format_count(self.tokens_per_step / mean_seconds)} tokens/s{mfu}  lr {line['lr']:.2e}  "
            f"{format_duration((self.num_steps - step) * mean_seconds)} left"
        )
        if not self._view:
            self._lines.say(text)
        logger.info(text)

    def evaluation(
        self, step: int, tokens: int, loss: float, perplexity: float, bits_per_byte: float,
        sources: Mapping[str, Mapping[str, float]] | None = None,
    ) -> None:  # fmt: skip
        """Record an evaluation on held-out documents: nats per token, its exponential, bits per byte of text.

        Args:
            step, tokens, loss, perplexity, bits_per_byte: of all of them.
            sources: the last three of each source, where there are several.
        """
        line: dict[str, Any] = {"step": step, "tokens": tokens, "eval/loss": loss, "eval/perplexity": perplexity,
                                "eval/bits_per_byte": bits_per_byte}  # fmt: skip
        line |= {f"eval/{name}/{key}": value for name, part in (sources or {}).items() for key, value in part.items()}
        self._add_scalars(self._write(line))
        by_source = ", ".join(f"{name} {part['loss']:.4f}" for name, part in (sources or {}).items())
        self.say(
            f"step {step}  held-out loss {loss:.4f}{by_source and f' ({by_source})'}  perplexity {perplexity:.2f}  "
            f"bits per byte {bits_per_byte:.4f}"
        )

    def tasks(self, step: int, tokens: int, values: Mapping[str, float], table: str) -> None:
        """Record results of tasks.

        Args:
            step, tokens: trained so far.
            values: by `task/metric`.
            table: the same for people.
        """
        line = {"step": step, "tokens": tokens} | {f"eval/task/{name}": value for name, value in values.items()}
        self._add_scalars(self._write(line))
        self.say(f"step {step}  tasks\n{table}")

    def event(self, step: int, event: str, message: str, **details: Any) -> None:
        """Record that something happened: a start, a skipped step, a damaged document, the run's end (`done`)."""
        message = redact(message)
        self._write({"step": step, "event": event, "message": message, **storable(details)})
        if self._events:
            self._events.add_text(f"event/{event}", message, step)
        if self._tracker:
            self._track(self._tracker.log({f"event/{event}": message}, step), step)
        self.say(f"step {step}  {event}: {message}")
        self._is_done = event == "done"

    def samples(self, step: int, path: Path, text: str) -> None:
        """Record text that the model wrote."""
        if self._events:
            self._events.add_text("samples", "    " + text.replace("\n", "\n    "), step)  # indented: as it is
        if self._tracker:
            self._track(self._tracker.log_text("samples", text, step), step)
        self.say(f"step {step}  samples in {path}")

    def say(self, text: str) -> None:
        """Print a line that stays, and log it."""
        (self._view or self._lines).say(text)
        logger.info(text)

    def _write(self, line: dict[str, Any]) -> dict[str, Any]:
        """Add a line to `metrics.jsonl`; return it as it is there, with None for what is not finite."""
        written = line
        try:
            text = _STRICT.encode(line)
        except ValueError:  # something is not finite, which is seldom, and looked for only then
            written = {key: _json_number(value) for key, value in line.items()}
            text = _STRICT.encode(written)
        self._file.append(text.encode() + b"\n")
        if self._view:
            self._view.take(written)
        return written

    def _add_scalars(self, line: dict[str, Any]) -> None:
        """Show a line of `metrics.jsonl` as points of curves."""
        curves = curves_of(line)
        if self._events:
            self._events.add_scalars(curves, line["step"])
        if self._tracker:
            self._track(self._tracker.log(curves, line["step"]), line["step"])

    def _track(self, problem: str | None, step: int) -> None:
        if problem:
            self._tracker = None
            self.event(step, "wandb_failed", problem)

    def flush(self) -> None:
        """Write whatever waits to be written together: a start from the checkpoint to come has all steps before it."""
        if self._events:
            self._events.flush()

    def close(self, failed: bool = False) -> None:
        """Flush and close everything; `failed` says how the run ended."""
        if self._view:
            self._view.end()
        self._close_files()
        if self._hyper_parameters:
            if failed or self._is_done:  # else it goes on
                self._hyper_parameters.end(failed)
            self._hyper_parameters.close()
        if self._tracker:
            self._tracker.close(failed)

    def _close_files(self) -> None:
        self._file.close()
        if self._events:
            self._events.close()
