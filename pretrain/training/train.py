"""The training loop. A step is one optimizer update; what a run does at every step can be read here, top to bottom."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path

import torch

from pretrain.checkpoints.run_folder import RunFolder, log_path
from pretrain.checkpoints.run_status import write_failure
from pretrain.console import counted
from pretrain.data.damage import TooMuchDamageError, describe
from pretrain.data.feed import StepInput
from pretrain.errors import EXIT_DONE, EXIT_STOPPED, DataError, TrainingError
from pretrain.evaluation.answers import describe as describe_answers
from pretrain.evaluation.answers import judge_answers
from pretrain.evaluation.comparison import task_table
from pretrain.evaluation.evaluate import Evaluation, evaluate
from pretrain.evaluation.task_evals import values_of
from pretrain.generation.samples import save_samples
from pretrain.options.config import Config
from pretrain.options.schedule import lr_at
from pretrain.ranks.distributed import PendingSum, Ranks, leave_distributed
from pretrain.ranks.hardware import peak_memory_bytes
from pretrain.ranks.profiling import PhaseClock
from pretrain.ranks.start_clock import StartClock
from pretrain.ranks.watchdog import Watchdog
from pretrain.training.guard import StopRequest
from pretrain.training.layer_norms import PendingNorms
from pretrain.training.metrics import StepMetrics
from pretrain.training.plan_check import compare_with_plan
from pretrain.training.preflight import check_start
from pretrain.training.rollback import roll_back
from pretrain.training.run import PendingStep, Run, open_run, record
from pretrain.training.saving import describe_best, finish_save, follow, judge_steps, report, save
from pretrain.zero.engine import StepResult, init_distributed
from pretrain.zero.replicas import check_when_due

logger = logging.getLogger("longhaul")
REPORT_SECONDS = 5.0  # that a failed run waits at most for the last step's loss


def train(config: Config, stop: StopRequest, clock: StartClock) -> int:
    """Train to the end of the schedule, going on from the newest good checkpoint in the run folder.

    Args:
        config: of the run.
        stop: told of signals.
        clock: of this start.
    Returns:
        The exit status: 0 done, 75 stopped by a signal after saving.
    Raises:
        LonghaulError: nothing was lost; the message says what to do.
    """
    ranks = init_distributed(config.parallel.start_timeout_seconds, clock)
    stop.ends_process = False  # from now on all ranks agree about it
    status = train_on(config, ranks, stop, clock)
    leave_distributed()  # not after an error: the other ranks may be gone
    return status


def train_on(config: Config, ranks: Ranks, stop: StopRequest, clock: StartClock) -> int:
    """Do what `train` does in a process group that exists and goes on existing."""
    with ExitStack() as cleanup:
        limits, path = config.parallel, Path(config.run.dir)
        watchdog = Watchdog(ranks, limits.timeout_seconds, limits.start_timeout_seconds, log_path(path, ranks))
        cleanup.callback(watchdog.close)
        clock.heartbeat = ranks.heartbeat
        clock.begin("run folder")
        run = folder = None
        try:
            folder = ranks.agree(lambda: RunFolder(config) if ranks.is_first else None)
            if folder:
                cleanup.callback(folder.close)
            watchdog.on_end = partial(write_failure, path)
            clock.begin("pre-flight")
            findings = check_start(config, ranks)
            run = open_run(config, ranks, folder, stop, watchdog, cleanup, clock)
            record(run, findings)
            watchdog.attend(run.checkpoints.close)
            status, exit_status, reason = run_steps(run)
        except BaseException as error:
            failure = watchdog.end_by(error)
            if run:
                report_after_failure(run)
            if folder or (watchdog.speaks and not ranks.is_first):
                write_failure(path, failure, run.progress.step if run else 0)
            if failure is error:
                raise
            raise failure from None
        if folder:
            folder.write_status(status, exit_status, run.progress.step, reason)
            run.event(status, reason)
        return exit_status


def run_steps(run: Run) -> tuple[str, int, str]:
    """Step until the run is over or must stop; return its status, exit status and the reason in words."""
    config = run.config
    run.engine.train()
    run.step_began = time.perf_counter()
    first_step = run.progress.step + 1
    if run.ranks.sum([run.stop.received is not None])[0]:  # while it started
        return stopped(run)
    if run.val_rows and not run.progress.step and (config.eval.metric or config.resume.from_):
        judge(run)  # what tuning begins with
    while not is_over(run):
        progress = run.progress
        try:
            with run.profiler.watch(progress.step + 1):
                asked_to_stop = train_step(run)
        except DataError as error:  # on all ranks, which cannot have the step's rows: it has not begun
            if isinstance(error, TooMuchDamageError):
                name_damage(run, error.damage)
            if progress.step and error.agreed:
                save(run)  # what was trained is not lost
                finish_save(run)
            raise
        if run.feed.save_ended():
            finish_save(run)
        if progress.step == first_step:
            run.watchdog.first_step_is_over()
            seconds = run.clock.end()
            run.event("first_step", str(run.clock), seconds=seconds, cpu_seconds=run.clock.cpu_seconds)
        compare_with_plan(run, first_step)
        for sentence in run.watchdog.take_stragglers():
            run.event("straggler", sentence)
        at_end = progress.step == run.plan.num_steps
        if config.eval.every_steps and (progress.step % config.eval.every_steps == 0 or at_end):
            judge(run)
        patience_is_over = 0 < config.eval.patience <= progress.evals_without_improvement
        if due := run.tasks.due(progress.step, at_end or patience_is_over):
            judge_tasks(run, due)
        if run.samples.is_due(progress.step, at_end or patience_is_over):
            sample(run)
        if config.checkpoint.every_steps and progress.step % config.checkpoint.every_steps == 0 and not at_end:
            save(run)
        if patience_is_over:
            save(run, last=True)
            return "done", EXIT_DONE, (
                f"stopped early at step {progress.step}: {describe_best(run)} for {config.eval.patience} evaluations; "
                f"best step {progress.best_step}"
            )  # fmt: skip
        if asked_to_stop and not at_end:
            save(run, last=True)
            return stopped(run)
    save(run, last=True)
    more = run.progress.step > run.plan.num_steps
    than = f", more than the {run.plan.num_steps} of the config" if more else ""
    return "done", EXIT_DONE, f"trained {counted(run.progress.step, 'step')}{than}"


def is_over(run: Run) -> bool:
    """Whether all steps are done, after going back from those that must be done again."""
    at_end = run.progress.step >= run.plan.num_steps
    # Decided by steps whose numbers every rank has by now; of the newest one they may still be on their way.
    judge_steps(run, up_to_step=run.progress.step - (not at_end))
    if spike := run.spikes.spike():
        finish_save(run)
        run.ranks.heartbeat.enter("rollback", is_patient=True)
        roll_back(run, spike)
        run.step_began = time.perf_counter()
        return is_over(run)
    return at_end


def stopped(run: Run) -> tuple[str, int, str]:
    """Status, exit status and reason of a run that a signal has stopped."""
    return "stopped", EXIT_STOPPED, (
        f"a signal ({run.stop.received or 'on another rank'}) asked to stop after step {run.progress.step}; the same "
        "command goes on from here"
    )  # fmt: skip


def train_step(run: Run) -> bool:
    """Do one optimizer update; return whether any rank was asked to stop.

    The host runs ahead of a GPU and waits for it once, in the optimizer, to see whether the gradients are finite. What
    the step computed is read back and recorded while the next one runs, or at once where that takes no waiting.
    """
    run.ranks.heartbeat.step = run.progress.step + 1
    phases = PhaseClock(run.ranks.device, run.ranks.heartbeat)
    run.engine.time_communication(phases)
    phases.begin("data")
    rows = run.feed.take()
    with run.layer_norms.watch(run.progress.step + 1):
        totals = compute_gradients(run, rows, phases)
    if run.progress.step + 1 < run.plan.num_steps:
        phases.begin("data")
        run.feed.prepare(run.stop.received is not None, run.checkpoints.must_be_finished())
    phases.begin("optimizer")
    lr = lr_at(run.progress.step, run.plan.num_steps, run.config.optim.lr, run.config.schedule)
    check_when_due(run.engine, run.ranks, run.progress.step, run.config.guard.check_replicas_every)
    run.checkpoints.wait_for_copy()
    norms = run.layer_norms.start(run.progress.step + 1)
    result = run.engine.step(lr)
    if not result.applied and run.config.guard.rerun and run.config.train.precision != "fp16":
        totals, result = compute_again(run, rows, totals, lr, phases)
    phases.end()
    run.engine.time_communication(None)
    sums = run.ranks.start_sum(torch.cat((totals, result.grad_norm.view(1))))
    finish_step(run, rows, result.applied, lr, sums, phases, norms)
    return run.feed.stop_requested()


def compute_gradients(run: Run, rows: StepInput, phases: PhaseClock) -> torch.Tensor:
    """Do the forward and backward passes of a step; return this rank's sums of objective and cross-entropy."""
    # DeepSpeed divides by micro-steps and ranks; what must remain is the sum over the step's targets / their number.
    scale = run.ranks.world_size * run.plan.num_micro_steps / max(rows.num_targets, 1)
    totals = torch.zeros(2, device=run.ranks.device)
    for index, batch in enumerate(rows.micro_batches):
        phases.begin("forward")
        objective, cross_entropy = run.engine.forward(*batch, run.progress.step)
        phases.begin("backward")
        # A loss that is not finite may have finite gradients: they become NaN, which keeps every rank from updating.
        run.engine.backward(objective * torch.where(objective.detach().isfinite(), scale, math.nan))
        totals += torch.stack((objective.detach(), cross_entropy))
        if index < run.plan.num_micro_steps - 1:
            run.engine.end_micro_step()
        if index == 0:
            phases.begin("others")
            report(run)  # the step before: its sums have arrived, or do while this micro-step runs
    return totals


def compute_again(
    run: Run, rows: StepInput, totals: torch.Tensor, lr: float, phases: PhaseClock
) -> tuple[torch.Tensor, StepResult]:
    """Repeat a step that was not finite, to see whether the data or a machine is why; return what counts."""
    again = compute_gradients(run, rows, phases)
    result = run.engine.step(lr)
    if result.applied:
        finite = run.ranks.gather(bool(totals.isfinite().all()))
        named = [str(rank) for rank, is_finite in enumerate(finite) if not is_finite]
        where = f"on rank {', '.join(named)}" if named else "in gradients only, on a rank that is not known"
        run.event("transient_fault", f"step {run.progress.step + 1} was not finite {where}, and is when computed again "
                  "from the same weights and rows: a machine had erred")  # fmt: skip
    return again, result


def finish_step(
    run: Run, rows: StepInput, applied: bool, lr: float, sums: PendingSum, phases: PhaseClock,
    norms: PendingNorms | None,
) -> None:  # fmt: skip
    """Count a step, and leave its metrics to `report`."""
    progress, config = run.progress, run.config
    progress.step, progress.num_tokens = progress.step + 1, progress.num_tokens + run.plan.tokens_per_step
    name_damage(run, rows.damage)
    if not applied:
        run.event("skipped_step", "a gradient is not finite; the weights were left as they were")
    # fp16's loss scale adapts by overflows, which count only where the loss is not a number itself
    is_overflow = config.train.precision == "fp16" and not applied and math.isfinite(sums.result()[1])
    (begin, end), plan = run.stream.step_rows, run.stream.plan
    if phase := run.stream.phase_begun():
        run.event("phase", f"phase {phase} of {len(plan.first_rows)} has begun with this step")
    try:
        run.guard.record(applied or is_overflow, progress.step, (begin, end))
    finally:
        progress.num_skipped = run.guard.num_skipped
        now = time.perf_counter()
        run.unreported = PendingStep(StepMetrics(
            step=progress.step, tokens=progress.num_tokens, loss=math.nan,
            objective=math.nan if config.train.has_extra_terms else None, grad_norm=math.nan, lr=lr,
            step_seconds=now - run.step_began, memory_bytes=peak_memory_bytes(run.ranks.device),
            skipped_steps=progress.num_skipped, clipped_steps=0, damaged_documents=run.stream.damage.num_documents,
            damaged_tokens=run.stream.damage.num_tokens, seq_len=plan.seq_len_at(begin),
            corpus_tokens=run.stream.tokens_per_corpus(), epochs=plan.epochs(end), phase_seconds={},
        ), rows.num_targets, sums, phases, run.ranks.world_size, (begin, end), phase > 0, norms)  # fmt: skip
        run.step_began = now
    if sums.is_ready():
        report(run)


def name_damage(run: Run, damage: Sequence[str]) -> None:
    """Record the documents that a step is the first to lack, if any; `damage` as in `StepInput`."""
    if damage:
        *documents, sum_of_all = damage
        run.event("damaged_documents", sum_of_all, documents=documents)


def report_after_failure(run: Run) -> None:
    """Record the last step that was done, unless what failed is why its sums do not arrive."""
    give_up = time.monotonic() + REPORT_SECONDS
    with suppress(Exception):  # the failure that is already on its way is the one to be seen
        while run.unreported and not run.unreported.sums.is_ready() and time.monotonic() < give_up:
            time.sleep(0.01)
        if run.unreported and run.unreported.sums.is_ready():
            report(run)


def judge(run: Run) -> Evaluation:
    """Evaluate on held-out documents; remember, and by choice save, the best so far."""
    assert run.val_rows is not None
    report(run)
    run.ranks.heartbeat.enter("evaluation")
    run.engine.train(False)
    result = evaluate(
        run.engine.forward,
        run.val_rows,
        run.tokenizer.token_bytes(),
        run.plan.micro_batch_size,
        run.ranks,
        group=run.group,
    )
    run.engine.train()
    progress, followed = run.progress, result.loss
    count_held_out_damage(run)
    if run.log:
        run.log.evaluation(
            progress.step, progress.num_tokens, result.loss, result.perplexity, result.bits_per_byte, result.by_source()
        )
    if run.config.eval.metric:
        followed = -judge_metric(run, run.config.eval.metric)
    if progress.step:  # what a run begins with is neither an improvement nor saved
        follow(run, followed)
    run.step_began = time.perf_counter()
    return result


def judge_metric(run: Run, metric: str) -> float:
    """Have the model answer held-out examples; return how good the answers are."""
    assert run.val_rows is not None
    run.ranks.heartbeat.enter("answers", is_patient=True)  # no sign of life within a batch of them
    run.engine.train(False)
    size = run.plan.micro_batch_size * run.config.data.seq_len
    answered = judge_answers(metric, run.samples.model, run.tokenizer, run.val_rows, size, run.ranks,
                             run.engine.stage == 3)  # fmt: skip
    run.engine.train()
    if run.log:
        run.log.tasks(run.progress.step, run.progress.num_tokens, answered.values, describe_answers(answered))
    return next(iter(answered.values.values()))


def judge_tasks(run: Run, names: Sequence[str]) -> None:
    """Let the model do tasks. Neither what they compute nor a mistake in them ends the run, or changes it."""
    report(run)
    run.ranks.heartbeat.enter("tasks", is_patient=True)
    run.engine.train(False)
    results, problem = run.tasks.run(names)
    run.engine.train()
    if run.log and results:
        run.log.tasks(run.progress.step, run.progress.num_tokens, values_of(results), task_table(results))
    if problem:
        run.event("tasks_failed", problem)
    run.step_began = time.perf_counter()


def count_held_out_damage(run: Run) -> None:
    """Name the held-out documents that no rank could read, and end the run if they are too many to compare losses."""
    assert run.val_rows is not None
    found, ledger = run.val_rows.take_damaged(), run.val_rows.damage
    if run.ranks.sum([len(found)])[0]:
        new = ledger.add(one for part in run.ranks.gather(found) for one in part)
        *documents, sum_of_all = describe(new, ledger)
        run.event("damaged_held_out_documents", sum_of_all, documents=documents)
        try:
            ledger.check()
        except TooMuchDamageError:
            save(run)
            raise


def sample(run: Run) -> None:
    """Let the model write text. Neither what it computes nor a disk that fails ends the run, or changes it."""
    report(run)
    run.ranks.heartbeat.enter("sampling")
    step = run.progress.step
    run.engine.train(False)
    try:
        text = run.samples.write(step, run.progress.num_tokens)
        if run.folder and run.log:
            run.log.samples(step, save_samples(run.folder.path, step, text), text)
    except (OSError, TrainingError) as error:
        run.event("samples_failed", str(error))
    run.engine.train()
    run.step_began = time.perf_counter()
