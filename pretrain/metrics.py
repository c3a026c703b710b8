"""What a run reports: `metrics.jsonl`, TensorBoard, the log and the live line. The only file on tensorboard.

Weights & Biases, where it is wanted, gets what TensorBoard gets.
"""

from __future__ import annotations

import json
import logging
import math
import os
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pretrain.console import LiveLine, format_count, format_duration
from pretrain.redaction import redact, storable
from pretrain.run_options import LogSection
from pretrain.tracking import Tracker

logger = logging.getLogger("longhaul")


@dataclass(frozen=True)
class StepMetrics:
    """One optimizer step.

    `loss` is the cross-entropy in nats per scored token, `objective` what was minimised (None where that is the same),
    `lr` as used, `memory_bytes` the peak of rank 0, `phase_seconds` rank 0's own. `corpus_tokens`, padding
    included, `epochs` and what is damaged (each document once, of training only) are of the run so far; `seq_len` is of
    the step's rows.
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


def _json_number(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def drop_lines_after(path: Path, step: int) -> None:
    """Remove the lines of a `metrics.jsonl` beyond a step, and a last line that a crash cut short."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
        try:
            if line.endswith("\n") and json.loads(line)["step"] <= step:
                kept.append(line)
        except (ValueError, KeyError, TypeError):
            continue
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(kept), encoding="utf-8")
    os.replace(temporary, path)


class MetricLog:
    """Rank 0's record of the run."""

    def __init__(
        self, folder: Path, section: LogSection, *, num_steps: int, tokens_per_step: int, world_size: int,
        flops_per_token: Mapping[int, tuple[float, float]], peak_flops: float | None, first_step: int, attempt: int,
        tracker: Tracker | None = None,
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
        """
        self.section, self.num_steps, self.tokens_per_step = section, num_steps, tokens_per_step
        self.world_size, self.attempt, self._tracker = world_size, attempt, tracker
        self._flops_per_token, self._peak_flops = flops_per_token, peak_flops
        self._recent: deque[float] = deque(maxlen=20)
        self._line = LiveLine()
        self._folder = folder
        self._open_files(first_step, is_first=attempt == 1)

    def _open_files(self, after_step: int, is_first: bool) -> None:
        path = self._folder / "metrics.jsonl"
        drop_lines_after(path, after_step)
        self._file = open(path, "a", encoding="utf-8", buffering=1)
        self._writer = None
        if self.section.tensorboard:
            from torch.utils.tensorboard import SummaryWriter  # imports tensorboard

            purge_step = None if is_first else after_step + 1
            self._writer = SummaryWriter(str(self._folder / "tensorboard"), purge_step=purge_step, flush_secs=10)

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
        self._write(line)
        self._add_scalars(line, "train/", metrics.step)
        self._recent.append(metrics.step_seconds)
        self._show(line)

    def _show(self, line: dict[str, Any]) -> None:
        step = line["step"]
        mean_seconds = sum(self._recent) / len(self._recent)
        mfu = "" if line["mfu"] is None else f"  MFU {100 * line['mfu']:.1f}%"
        text = (
            f"step {step}/{self.num_steps}  loss {line['loss']:.4f}  "
            f"{format_count(self.tokens_per_step / mean_seconds)} tokens/s{mfu}  lr {line['lr']:.2e}  "
            f"{format_duration((self.num_steps - step) * mean_seconds)} left"
        )
        is_due = step % self.section.every_steps == 0 or step == self.num_steps
        self._line.show(text, plain=is_due)
        if is_due:
            logger.info(text)

    def evaluation(self, step: int, tokens: int, loss: float, perplexity: float, bits_per_byte: float) -> None:
        """Record an evaluation on held-out documents: nats per token, its exponential, bits per byte of text."""
        line = {"step": step, "tokens": tokens, "eval/loss": loss, "eval/perplexity": perplexity,
                "eval/bits_per_byte": bits_per_byte}  # fmt: skip
        self._write(line)
        self._add_scalars(line, "", step)
        self.say(
            f"step {step}  held-out loss {loss:.4f}  perplexity {perplexity:.2f}  bits per byte {bits_per_byte:.4f}"
        )

    def event(self, step: int, event: str, message: str, **details: Any) -> None:
        """Record that something happened: a start, a save, a skipped step, a damaged document."""
        message = redact(message)
        self._write({"step": step, "event": event, "message": message, **storable(details)})
        if self._writer:
            self._writer.add_text(event, message, step)
        if self._tracker:
            self._track(self._tracker.log({f"event/{event}": message}, step), step)
        self.say(f"step {step}  {event}: {message}")

    def samples(self, step: int, path: Path, text: str) -> None:
        """Record text that the model wrote."""
        if self._writer:
            self._writer.add_text("samples", "    " + text.replace("\n", "\n    "), step)  # indented: as it is
        if self._tracker:
            self._track(self._tracker.log_text("samples", text, step), step)
        self.say(f"step {step}  samples in {path}")

    def say(self, text: str) -> None:
        """Print a line that stays, and log it."""
        self._line.say(text)
        logger.info(text)

    def _write(self, line: dict[str, Any]) -> None:
        self._file.write(json.dumps({key: _json_number(value) for key, value in line.items()}) + "\n")

    def _add_scalars(self, line: dict[str, Any], prefix: str, step: int) -> None:
        scalars = {
            prefix + key: value for key, value in line.items()
            if key not in ("step", "timestamp", "attempt") and _json_number(value) is not None
        }  # fmt: skip
        if self._writer:
            for key, value in scalars.items():
                self._writer.add_scalar(key, value, step)
        if self._tracker:
            self._track(self._tracker.log(scalars, step), step)

    def _track(self, problem: str | None, step: int) -> None:
        if problem:
            self._tracker = None
            self.event(step, "wandb_failed", problem)

    def close(self, failed: bool = False) -> None:
        """Flush and close everything; `failed` says how the run ended."""
        self._line.end()
        self._close_files()
        if self._tracker:
            self._tracker.close(failed)

    def _close_files(self) -> None:
        self._file.close()
        if self._writer:
            self._writer.close()
