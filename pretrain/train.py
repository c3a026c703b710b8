"""The training loop. A step is one optimizer update; what a run does at every step can be read here, top to bottom."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from pretrain import __version__
from pretrain.batch_plan import BatchPlan
from pretrain.checkpoint import Checkpoints
from pretrain.compiling import should_compile
from pretrain.config import Config
from pretrain.distributed import Ranks
from pretrain.engine import Engine, init_distributed, leave_distributed
from pretrain.errors import EXIT_DONE, EXIT_FAILED, EXIT_STOPPED, CheckpointError, LonghaulError, TrainingError
from pretrain.evaluate import Evaluation, evaluate
from pretrain.families import flops_per_token, resolve_shape
from pretrain.guard import SkipGuard, StopRequest
from pretrain.hardware import peak_flops, peak_memory_bytes
from pretrain.metrics import MetricLog, StepMetrics
from pretrain.model import Transformer
from pretrain.profiling import PhaseClock, Profiler
from pretrain.run_folder import RunFolder, open_log
from pretrain.samples import Samples, drop_samples_after, save_samples
from pretrain.schedule import lr_at
from pretrain.self_test import check_optimizer
from pretrain.start_clock import StartClock
from pretrain.stream import Batch, StepRows, TokenStream, ValRows
from pretrain.tokenizer import Tokenizer
from pretrain.tokenizer_files import keep_files, open_tokenizer
from pretrain.tracking import Tracker, check_tracking

logger = logging.getLogger("longhaul")


@dataclass
class Progress:
    """How far the run is; part of every checkpoint."""

    step: int = 0
    num_tokens: int = 0
    num_skipped: int = 0
    best_loss: float | None = None
    best_step: int | None = None
    best_counted_loss: float | None = None  # the best by more than eval.min_delta, for early stopping
    evals_without_improvement: int = 0


@dataclass
class Run:
    """Everything that a run consists of on this rank; `folder` and `log` exist on rank 0 only."""

    config: Config
    ranks: Ranks
    plan: BatchPlan
    tokenizer: Tokenizer
    stream: TokenStream
    val_rows: ValRows | None
    engine: Engine
    checkpoints: Checkpoints
    samples: Samples
    guard: SkipGuard
    profiler: Profiler
    folder: RunFolder | None
    log: MetricLog | None
    stop: StopRequest
    clock: StartClock
    progress: Progress = field(default_factory=Progress)

    def event(self, event: str, message: str, **details: Any) -> None:
        """Record an event once, not once a rank; `details` are for programs that read `metrics.jsonl`."""
        if self.log:
            self.log.event(self.progress.step, event, message, **details)


def train(config: Config) -> int:
    """Train to the end of the schedule, going on from the newest good checkpoint in the run folder.

    Returns:
        The exit status: 0 done, 75 stopped by a signal after saving.
    Raises:
        LonghaulError: nothing was lost; the message says what to do.
    """
    clock = StartClock()
    ranks = init_distributed(config.parallel.timeout_seconds)
    clock.mark("process group")
    status = train_on(config, ranks, clock)
    leave_distributed()  # not after an error: the other ranks may be gone
    return status


def train_on(config: Config, ranks: Ranks, clock: StartClock) -> int:
    """Do what `train` does in a process group that exists and goes on existing."""
    with ExitStack() as cleanup:
        stop = cleanup.enter_context(StopRequest())
        folder = ranks.agree(lambda: RunFolder(config) if ranks.is_first else None)
        if folder:
            cleanup.callback(folder.close)
        run = None
        try:
            run = open_run(config, ranks, folder, stop, cleanup, clock)
            status, exit_status, reason = run_steps(run)
        except BaseException as error:
            if folder:
                code = error.exit_status if isinstance(error, LonghaulError) else EXIT_FAILED
                folder.write_status("failed", code, run.progress.step if run else 0, str(error) or type(error).__name__)
            raise
        if folder:
            folder.write_status(status, exit_status, run.progress.step, reason)
            run.event(status, reason)
        return exit_status


def open_run(
    config: Config,
    ranks: Ranks,
    folder: RunFolder | None,
    stop: StopRequest,
    cleanup: ExitStack,
    clock: StartClock,
) -> Run:
    """Build everything, check it, and load the newest checkpoint; whatever is wrong is found here, on all ranks."""
    if folder:
        folder.write_status("running", None, 0)
    ranks.agree(lambda: check_tracking(config.log.wandb) if folder else None)
    plan = ranks.agree(lambda: BatchPlan.of(config, ranks.world_size))
    tokenizer = ranks.agree(lambda: open_tokenizer(config.tokenizer))
    if folder:
        keep_files(tokenizer, folder.path)
    shape = resolve_shape(config.model, tokenizer.vocab_size, config.data.seq_len)
    stream = ranks.agree(lambda: TokenStream(config, plan, ranks.rank, tokenizer.fingerprint))
    cleanup.callback(stream.close)
    val_rows = ranks.agree(lambda: ValRows(config, tokenizer.fingerprint, config.eval.max_rows)
                           if config.eval.every_steps else None)  # fmt: skip
    clock.mark("data")
    set_determinism(config.train.deterministic)
    check_optimizer(config, plan, ranks)
    clock.mark("self-test")
    objective = config.train.z_loss, config.train.label_smoothing
    model = Transformer(shape, config.run.seed, config.train.activation_checkpointing, *objective)
    if should_compile(config, ranks.device):
        model.compile_blocks()
    samples = ranks.agree(lambda: Samples(config, model, tokenizer, ranks))
    clock.mark("model")
    engine = ranks.agree(lambda: Engine(model, config, plan, ranks))
    clock.mark("engine")
    cleanup.callback(engine.close)
    events: list[tuple[str, str]] = []
    run_path = ranks.from_first(folder.path if folder else None)
    checkpoints = Checkpoints(run_path / "checkpoints", config.checkpoint, ranks, lambda *event: events.append(event))
    progress = Progress()
    training = checkpoints.load_newest(engine)
    if training is not None:
        progress = Progress(**training["progress"])
        ranks.agree(lambda: stream.load_state(training["data"]))
    clock.mark("checkpoint")
    open_log(run_path, ranks)
    log, tracker = None, ranks.agree(lambda: start_tracking(config, folder, events.append))
    if folder:
        drop_samples_after(folder.path, progress.step)
        log = MetricLog(
            folder.path, config.log, num_steps=plan.num_steps, tokens_per_step=plan.tokens_per_step,
            world_size=ranks.world_size, first_step=progress.step, attempt=folder.attempt,
            flops_per_token=(flops_per_token(shape, causal=False), flops_per_token(shape, causal=True)),
            peak_flops=peak_flops(ranks.device, config.train.precision), tracker=tracker,
        )  # fmt: skip
        cleanup.push(lambda kind, *_: log.close(failed=kind is not None))
    guard = SkipGuard(config.guard.max_skipped_steps, progress.num_skipped)
    profiler = Profiler(
        run_path, config.train.profile_steps, ranks.rank, ranks.device, lambda *event: run.event(*event)
    )
    run = Run(config, ranks, plan, tokenizer, stream, val_rows, engine, checkpoints, samples, guard, profiler, folder,
              log, stop, clock, progress)  # fmt: skip
    for event in events:
        run.event(*event)
    if engine.frozen:
        run.event("frozen", f"optim.groups has lr_ratio 0 for, and these stay as they are: {', '.join(engine.frozen)}")
    action = f"going on after step {progress.step}" if training else "starting"
    run.event("start", f"{action}: {ranks.world_size} ranks on {ranks.device.type}, ZeRO stage {engine.stage}, "
              f"{config.train.precision}, {plan.tokens_per_step} tokens a step, {plan.num_steps} steps")  # fmt: skip
    return run


def start_tracking(
    config: Config, folder: RunFolder | None, report: Callable[[tuple[str, str]], None]
) -> Tracker | None:
    """Start the run on Weights & Biases, on rank 0 and if the config names a project."""
    if folder is None or config.log.wandb is None:
        return None
    return Tracker(config.log.wandb, folder.path, config.model_dump(mode="json"), lambda *event: report(event))


def set_determinism(wanted: bool) -> None:
    """Make torch choose deterministic algorithms, or the fastest."""
    if wanted:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS is deterministic only with this
    torch.use_deterministic_algorithms(wanted)
    # Else every torch.empty is filled, DeepSpeed's gradient buckets too, which are up to 2 GB a micro-step.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def run_steps(run: Run) -> tuple[str, int, str]:
    """Step until the run is over or must stop; return its status, exit status and the reason in words."""
    config, progress = run.config, run.progress
    run.engine.train()
    first_step = progress.step + 1
    while progress.step < run.plan.num_steps:
        with run.profiler.watch(progress.step + 1):
            asked_to_stop = train_step(run)
        if progress.step == first_step:
            run.clock.mark("first step")
            run.event("first_step", str(run.clock), seconds=run.clock.seconds)
        at_end = progress.step == run.plan.num_steps
        if config.eval.every_steps and (progress.step % config.eval.every_steps == 0 or at_end):
            judge(run)
        patience_is_over = 0 < config.eval.patience <= progress.evals_without_improvement
        if run.samples.is_due(progress.step, at_end or patience_is_over):
            sample(run)
        if config.checkpoint.every_steps and progress.step % config.checkpoint.every_steps == 0 and not at_end:
            save(run)
        if patience_is_over:
            save(run, last=True)
            return "done", EXIT_DONE, (
                f"stopped early at step {progress.step}: the held-out loss has not fallen below "
                f"{progress.best_counted_loss:.4f} for {config.eval.patience} evaluations; best step "
                f"{progress.best_step}"
            )  # fmt: skip
        if asked_to_stop and not at_end:
            save(run, last=True)
            return "stopped", EXIT_STOPPED, (
                f"a signal ({run.stop.received or 'on another rank'}) asked to stop after step {progress.step}; "
                "the same command goes on from here"
            )  # fmt: skip
    save(run, last=True)
    return "done", EXIT_DONE, f"trained {progress.step} steps"


def train_step(run: Run) -> bool:
    """Do one optimizer update and report it; return whether any rank was asked to stop."""
    begin, phases = time.perf_counter(), PhaseClock(run.ranks.device)
    rows, num_targets, num_damaged = read_rows(run)
    waited = time.perf_counter() - begin
    phases.mark("data")
    # DeepSpeed divides by micro-steps and ranks; what must remain is the sum over the step's targets / their number.
    scale = run.ranks.world_size * run.plan.num_micro_steps / max(num_targets, 1)
    sums = torch.zeros(2, device=run.ranks.device)  # of the objective and of the cross-entropy
    for index, batch in enumerate(rows.micro_batches):
        objective, cross_entropy = run.engine.forward(*to_device(batch, run.ranks.device), run.progress.step)
        phases.mark("forward")
        run.engine.backward(objective * scale)
        sums += torch.stack((objective.detach(), cross_entropy))
        if index < run.plan.num_micro_steps - 1:
            run.engine.end_micro_step()
        phases.mark("backward")
    lr = lr_at(run.progress.step, run.plan.num_steps, run.config.optim.lr, run.config.schedule)
    result = run.engine.step(lr)
    phases.mark("optimizer")
    *totals, stop_requests = run.ranks.sum([*sums.tolist(), run.stop.received is not None])
    phase_seconds = phases.seconds()  # before: the host has now waited for the device
    phase_seconds["others"] = time.perf_counter() - begin - sum(phase_seconds.values())
    means = [total / max(num_targets, 1) for total in totals]
    finish_step(run, StepMetrics(
        step=run.progress.step + 1, tokens=run.progress.num_tokens + run.plan.tokens_per_step,
        loss=means[1], objective=means[0] if run.config.train.has_extra_terms else None,
        grad_norm=result.grad_norm, lr=lr,
        step_seconds=time.perf_counter() - begin, data_wait_seconds=waited,
        memory_bytes=peak_memory_bytes(run.ranks.device), skipped_steps=0, epochs=run.stream.state()["epochs"],
        phase_seconds=phase_seconds,
    ), result.applied, num_damaged)  # fmt: skip
    return stop_requests > 0


def read_rows(run: Run) -> tuple[StepRows, int, int]:
    """Take this rank's rows of the next step; return them and, over all ranks, the targets and damaged documents.

    Raises:
        LonghaulError: on all ranks, if any rank cannot read its rows.
    """
    rows, failure = StepRows([], 0, []), None
    try:
        rows = run.stream.next_step()
    except LonghaulError as error:
        failure = error
    num_targets, num_damaged, num_failed = run.ranks.sum([rows.num_targets, len(rows.damaged), failure is not None])
    if num_failed:
        run.ranks.agree(lambda: _reraise(failure))
    for document in rows.damaged:
        logger.warning("step %d: %s is damaged and was masked", run.progress.step + 1, document)
    return rows, int(num_targets), int(num_damaged)


def _reraise(error: Exception | None) -> None:
    if error is not None:
        raise error


def finish_step(run: Run, metrics: StepMetrics, applied: bool, num_damaged: int) -> None:
    """Count and record a step."""
    progress = run.progress
    progress.step, progress.num_tokens = metrics.step, metrics.tokens
    if num_damaged:
        run.event("damaged_documents", f"{num_damaged} documents of this step failed their checksum and were masked")
    if not applied:
        run.event("skipped_step", "a gradient is not finite; the weights were left as they were")
    is_overflow = run.config.train.precision == "fp16" and metrics.loss == metrics.loss  # the loss scale adapts
    last_row = run.stream.cursor
    try:
        run.guard.record(applied or is_overflow, metrics.step, (last_row - run.plan.global_batch_size, last_row))
    finally:
        progress.num_skipped = run.guard.num_skipped
        if run.log:
            run.log.step(StepMetrics(**{**vars(metrics), "skipped_steps": progress.num_skipped}))


def to_device(batch: Batch, device: torch.device) -> tuple[torch.Tensor, ...]:
    """Move a micro-batch to where the model is, in the order of `Transformer.forward`."""
    tensors = (batch.tokens_BT, batch.targets_BT, batch.doc_start_BT, batch.row_ids_B)
    return tuple(tensor.to(device, non_blocking=True) for tensor in tensors)


def judge(run: Run) -> Evaluation:
    """Evaluate on held-out documents; remember, and by choice save, the best so far."""
    assert run.val_rows is not None
    run.engine.train(False)
    num_damaged = len(run.val_rows.damaged)
    result = evaluate(
        run.engine.forward, run.val_rows, run.tokenizer.token_bytes(), run.plan.micro_batch_size, run.ranks
    )
    run.engine.train()
    for document in run.val_rows.damaged[num_damaged:]:
        logger.warning("held-out %s is damaged and was not scored", document)
    progress = run.progress
    if run.log:
        run.log.evaluation(progress.step, progress.num_tokens, result.loss, result.perplexity, result.bits_per_byte)
    if progress.best_counted_loss is None or result.loss < progress.best_counted_loss - run.config.eval.min_delta:
        progress.best_counted_loss, progress.evals_without_improvement = result.loss, 0
    else:
        progress.evals_without_improvement += 1
    if progress.best_loss is None or result.loss < progress.best_loss:
        before = progress.best_loss, progress.best_step
        progress.best_loss = result.loss
        if run.config.checkpoint.keep_best:
            progress.best_step = progress.step
            if not save(run):  # the best that exists is still the one before, and must not be pruned
                progress.best_loss, progress.best_step = before
    return result


def sample(run: Run) -> None:
    """Let the model write text. Neither what it computes nor a disk that fails ends the run, or changes it."""
    step = run.progress.step
    run.engine.train(False)
    try:
        text = run.samples.write(step, run.progress.num_tokens)
        if run.folder and run.log:
            run.log.samples(step, save_samples(run.folder.path, step, text), text)
    except (OSError, TrainingError) as error:
        run.event("samples_failed", str(error))
    run.engine.train()


def save(run: Run, last: bool = False) -> bool:
    """Save a checkpoint and remove those that retention does not keep.

    A failed save is reported and the run goes on, unless it is the last one. Returns whether it was saved.
    """
    training = {"progress": asdict(run.progress), "num_tokens": run.progress.num_tokens, "data": run.stream.state()}
    about = {"config": run.config.model_dump(mode="json"), "longhaul": __version__, "torch": torch.__version__}
    try:
        run.checkpoints.save(run.engine, run.progress.step, training, about)
    except CheckpointError as error:
        if last:
            error.agreed = True
            raise
        run.event("save_failed", str(error))
        return False
    run.checkpoints.prune(run.progress.best_step)
    if run.folder:
        run.folder.write_status("running", None, run.progress.step)
    return True
