"""Recording a run's steps, and saving it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict

import torch

from pretrain import __version__
from pretrain.checkpoints.adapters import BASE
from pretrain.errors import CheckpointError
from pretrain.redaction import storable
from pretrain.training.run import Run
from pretrain.zero.replicas import check_replicas


def judge_steps(run: Run, up_to_step: int) -> None:
    """Look for bad steps among those up to this one."""
    if run.unreported and run.unreported.metrics.step <= up_to_step:
        report(run)
    for event in run.spikes.judge(up_to_step):
        run.event(*event)


def report(run: Run) -> None:
    """Record the step whose sums have not been read back, if there is one."""
    pending, run.unreported = run.unreported, None
    if pending is None:
        return
    observation = pending.observe()
    run.progress.num_clipped += 0 < run.config.optim.clip_norm < observation.grad_norm
    run.spikes.record(observation)
    metrics = pending.finish(run.progress.num_clipped)
    run.ranks.heartbeat.count_step(metrics.own_seconds)
    if run.log:
        run.log.step(metrics)


def save(run: Run, last: bool = False) -> None:
    """Save a checkpoint, which goes on beside the next steps, and remove those that retention does not keep.

    A failed save is reported and the run goes on, unless it is the last one, which is waited for. Nothing is done if
    this step is being saved already, as the best one so far.
    """
    if run.checkpoints.is_saving(run.progress.step) and not last:
        return
    judge_steps(run, up_to_step=run.progress.step)
    finish_save(run)
    run.ranks.heartbeat.enter("saving", is_patient=True)
    run.saving_step = run.progress.step
    if run.log:
        run.log.flush()
    check_replicas(run.engine, run.ranks, run.saving_step, run.config.guard.check_replicas_every)
    training = {
        "progress": asdict(run.progress), "num_tokens": run.progress.num_tokens, "data": run.stream.state(),
        "spikes": run.spikes.state(),
    }  # fmt: skip
    training |= {BASE: run.base} if run.base else {}
    about = {"config": storable(run.config.model_dump(mode="json")), "tokenizer": run.tokenizer.fingerprint,
             "longhaul": __version__, "torch": torch.__version__}  # fmt: skip
    with save_failures(run, last):
        run.checkpoints.start_save(run.engine, run.saving_step, training, about, run.progress.best_step)
    if last or not run.config.checkpoint.asynchronous:
        finish_save(run, last)
    run.step_began = time.perf_counter()


def finish_save(run: Run, last: bool = False) -> None:
    """Wait for the save that is under way, if there is one."""
    run.ranks.heartbeat.enter("saving", is_patient=True)
    with save_failures(run, last):
        if run.checkpoints.finish_save() and run.folder:
            run.folder.write_status("running", None, run.saving_step, saved_step=run.saving_step)
    run.step_began = time.perf_counter()


@contextmanager
def save_failures(run: Run, last: bool) -> Iterator[None]:
    """Report a failed save, or raise its error if it was the last one."""
    try:
        yield
    except CheckpointError as error:
        progress = run.progress
        if progress.best_step == run.saving_step:  # the best that exists is still the one before: not to be pruned
            progress.best_loss, progress.best_step = run.best_before
        if last:
            error.agreed = True
            raise
        run.event("save_failed", str(error), saved_step=run.saving_step)


def follow(run: Run, value: float) -> None:
    """Remember, and by choice save, the best so far of what early stopping follows; less is better."""
    progress, what = run.progress, run.config.eval.metric or "loss"
    if progress.followed != what:  # since this start: what was best by another measure is not compared
        progress.followed, progress.evals_without_improvement = what, 0
        progress.best_loss = progress.best_counted_loss = None
    if progress.best_counted_loss is None or value < progress.best_counted_loss - run.config.eval.min_delta:
        progress.best_counted_loss, progress.evals_without_improvement = value, 0
    else:
        progress.evals_without_improvement += 1
    if progress.best_loss is None or value < progress.best_loss:
        if run.config.checkpoint.keep_best:
            finish_save(run)  # which may have been of the best before
            run.best_before = progress.best_loss, progress.best_step
            progress.best_loss, progress.best_step = value, progress.step
            save(run)
        else:
            progress.best_loss = value


def describe_best(run: Run) -> str:
    """Say what early stopping waits for."""
    best, metric = run.progress.best_counted_loss, run.config.eval.metric
    assert best is not None
    return (
        f"{metric} has not risen above {-best:.2f}" if metric else f"the held-out loss has not fallen below {best:.4f}"
    )
