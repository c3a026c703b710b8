"""What a run consists of, and its start: everything is built and checked here, before the first step."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from pretrain.checkpoints.checkpoint import Checkpoints, list_together
from pretrain.checkpoints.checkpoint_places import open_place
from pretrain.checkpoints.run_folder import RunFolder, open_log, writable
from pretrain.console import counted
from pretrain.data.data_plan import describe_phases
from pretrain.data.feed import Feed
from pretrain.data.stream import TokenStream, ValRows
from pretrain.evaluation.task_evals import TaskEvals
from pretrain.generation.samples import Samples, drop_samples_after
from pretrain.options.batch_plan import BatchPlan
from pretrain.options.config import Config
from pretrain.options.config_changes import describe_changes
from pretrain.options.families import ModelShape, flops_per_token, resolve_shape
from pretrain.options.phases import phases_of
from pretrain.ranks.distributed import PendingSum, Ranks
from pretrain.ranks.hardware import peak_flops
from pretrain.ranks.profiling import PhaseClock, Profiler
from pretrain.ranks.sequence_parallel import SequenceGroup
from pretrain.ranks.start_clock import StartClock
from pretrain.ranks.watchdog import Watchdog
from pretrain.redaction import storable
from pretrain.storage.whole_file import write_text
from pretrain.tasks.task_metrics import check_metric
from pretrain.tokenizers.tokenizer import Tokenizer
from pretrain.tokenizers.tokenizer_files import keep_files, open_tokenizer
from pretrain.training.guard import SkipGuard, StopRequest
from pretrain.training.layer_norms import LayerNorms, PendingNorms
from pretrain.training.metrics import MetricLog, StepMetrics
from pretrain.training.preflight import Findings, check_same_rows
from pretrain.training.resume import Progress, load_start
from pretrain.training.self_test import check_optimizer
from pretrain.training.spikes import Observation, SpikeGuard
from pretrain.training.tensorboard_events import hyper_parameters
from pretrain.training.tracking import Tracker, check_tracking
from pretrain.transformer.activation_offload import check_checkpointing
from pretrain.transformer.compiling import should_compile
from pretrain.transformer.lora import add_adapters
from pretrain.transformer.model import Transformer
from pretrain.zero.engine import Engine, sequence_group


@dataclass
class PendingStep:
    """A step that is done but for reading back its sums, which takes until the device has come so far."""

    metrics: StepMetrics  # without the losses, the norm, the count of clipped ones and the phases
    num_targets: int
    sums: PendingSum  # of the objective, the cross-entropy, and the gradient norm, which is the same on all ranks
    phases: PhaseClock
    world_size: int
    rows: tuple[int, int]
    starts_phase: bool
    layer_norms: PendingNorms | None

    def observe(self) -> Observation:
        """Wait for the device, and return what all ranks know alike."""
        _, loss_sum, norm_sum = self.sums.result()
        return Observation(
            self.metrics.step, *self.rows, loss_sum / max(self.num_targets, 1), norm_sum / self.world_size,
            self.starts_phase,
        )  # fmt: skip

    def finish(self, num_clipped: int) -> StepMetrics:
        """Wait for the device, and return the whole metrics."""
        objective_sum, *_ = self.sums.result()
        observation = self.observe()
        num_targets = max(self.num_targets, 1)
        seconds = {"communication": 0.0} | self.phases.seconds()  # one rank may have none
        # What the phases leave. The device runs behind the host, so that their ends differ a little.
        rest = max(0.0, self.metrics.step_seconds - sum(seconds.values()))
        return replace(
            self.metrics, loss=observation.loss, grad_norm=observation.grad_norm, clipped_steps=num_clipped,
            objective=None if self.metrics.objective is None else objective_sum / num_targets,
            phase_seconds=seconds | {"others": seconds.get("others", 0.0) + rest},
            layer_norms=self.layer_norms.result() if self.layer_norms else {},
        )  # fmt: skip


@dataclass
class Run:
    """Everything that a run consists of on this rank; `folder` and `log` exist on rank 0 only."""

    config: Config
    ranks: Ranks
    group: SequenceGroup  # the ranks that share this one's rows
    plan: BatchPlan
    tokenizer: Tokenizer
    stream: TokenStream
    val_rows: ValRows | None
    engine: Engine
    checkpoints: Checkpoints
    samples: Samples
    tasks: TaskEvals
    guard: SkipGuard
    spikes: SpikeGuard
    profiler: Profiler
    folder: RunFolder | None
    log: MetricLog | None
    stop: StopRequest
    watchdog: Watchdog
    clock: StartClock
    progress: Progress = field(default_factory=Progress)
    base: dict[str, str] | None = None  # of adapters, as `adapters.reference_to` says it
    feed: Feed = field(init=False)
    layer_norms: LayerNorms = field(init=False)
    unreported: PendingStep | None = None  # the step whose sums have not been read back
    saving_step: int = 0  # that the save under way, or the last one, is of
    best_before: tuple[float | None, int | None] = (None, None)  # loss and step of the best before that save
    step_began: float = field(default_factory=time.perf_counter)  # the time of the step that runs counts from here

    def __post_init__(self) -> None:
        self.feed = Feed(self.stream, self.ranks, self.group)
        self.layer_norms = LayerNorms(self.config.log.layer_norms_every, self.engine, self.samples.model, self.ranks)

    def event(self, event: str, message: str, **details: Any) -> None:
        """Record an event once, not once a rank; `details` are for programs that read `metrics.jsonl`."""
        if self.log:
            self.log.event(self.progress.step, event, message, **details)


def open_run(
    config: Config,
    ranks: Ranks,
    folder: RunFolder | None,
    stop: StopRequest,
    watchdog: Watchdog,
    cleanup: ExitStack,
    clock: StartClock,
) -> Run:
    """Build everything, check it, and load the newest checkpoint; whatever is wrong is found here, on all ranks."""
    if folder:
        folder.write_status("running", None, 0)
    ranks.agree(lambda: check_metric(config.eval.metric) if config.eval.metric else None)
    ranks.agree(lambda: check_tracking(config.log.wandb) if folder else None)
    plan = ranks.agree(lambda: BatchPlan.of(config, ranks.world_size))
    group = sequence_group(config.parallel, ranks)
    clock.begin("tokenizer")
    tokenizer = ranks.agree(lambda: open_tokenizer(config.tokenizer))
    ranks.agree(lambda: keep_tokenizer(tokenizer, folder))
    shape = resolve_shape(config.model, tokenizer.vocab_size, config.data.max_seq_len)
    clock.begin("data")
    run_path = ranks.from_first(folder.path if folder else None)
    place = ranks.agree(lambda: open_place(config.checkpoint, run_path, config.data))
    # A run that goes on puts up with what was lost meanwhile, within data.max_damaged_fraction.
    is_new = not list_together(place, ranks)
    stream, val_rows = open_rows(config, plan, ranks, tokenizer, is_new, cleanup)
    clock.begin("self-test")
    set_determinism(config.train.deterministic)
    check_optimizer(config, plan, ranks)
    clock.begin("model")
    model = ranks.agree(lambda: make_model(config, shape, group, ranks.device))
    samples = ranks.agree(lambda: Samples(config, model, tokenizer, ranks))
    if config.eval.tasks:
        clock.begin("tasks")
    tasks = ranks.agree(lambda: TaskEvals(config, model, tokenizer, ranks))
    clock.begin("engine")
    engine = ranks.agree(lambda: Engine(model, config, plan, ranks))
    clock.begin("checkpoint")
    cleanup.callback(engine.close)
    ranks.agree(lambda: keep_settings(engine, folder))
    events: list[tuple[str, str]] = list(folder.events) if folder else []
    checkpoints = Checkpoints(place, config.checkpoint, ranks, lambda *event: events.append(event), run_path,
                              folder.run_id if folder else "")  # fmt: skip
    cleanup.callback(checkpoints.close)
    start = load_start(config, plan.num_steps, checkpoints, engine, stream, ranks, tokenizer.fingerprint,
                       lambda *event: events.append(event))  # fmt: skip
    progress = start.progress
    if start.own:
        if num_mended := stream.damage.forget_mended(ranks):
            events.append(("damage_mended", f"{counted(num_mended, 'damaged document')} can be read again"))
        stream.damage.check()
        ranks.agree(lambda: folder.accept(config) if folder else None)
    clock.begin("metrics")
    open_log(run_path, ranks)
    tracker = ranks.agree(lambda: start_tracking(config, folder, events.append))
    log = None
    if folder:
        log = open_metrics(config, plan, shape, ranks, folder, progress, tracker)
        cleanup.push(lambda kind, *_: log.close(failed=kind is not None))
    guard = SkipGuard(config.guard.max_skipped_steps, progress.num_skipped)
    spikes = SpikeGuard(config.guard)
    spikes.load_state(start.spikes)
    profiler = Profiler(
        run_path, config.train.profile_steps, ranks.rank, ranks.device, lambda *event: run.event(*event)
    )
    run = Run(config, ranks, group, plan, tokenizer, stream, val_rows, engine, checkpoints, samples, tasks, guard,
              spikes, profiler, folder, log, stop, watchdog, clock, progress, start.base)  # fmt: skip
    announce(run, events, is_resumed=start.own)
    clock.begin("first step")
    return run


def open_rows(
    config: Config, plan: BatchPlan, ranks: Ranks, tokenizer: Tokenizer, is_new: bool, cleanup: ExitStack
) -> tuple[TokenStream, ValRows | None]:
    """Open this rank's rows, which are those of one plan on all ranks, and the held-out ones if they are used."""
    reader, fingerprint = plan.reader_of(ranks.rank), tokenizer.fingerprint
    blank_id = tokenizer.pad_id if tokenizer.unk_id is None else tokenizer.unk_id
    stream = ranks.agree(lambda: TokenStream(config, plan, reader, fingerprint, is_new=is_new, blank_id=blank_id))
    cleanup.callback(stream.close)
    check_same_rows(stream.plan.hash, stream.plan.pieces, ranks)
    val_rows = ranks.agree(lambda: ValRows(config, fingerprint, config.eval.max_rows, is_new)
                           if config.eval.every_steps else None)  # fmt: skip
    return stream, val_rows


def make_model(config: Config, shape: ModelShape, group: SequenceGroup, device: torch.device) -> Transformer:
    """Make the model, whose weights the engine draws.

    Raises:
        ConfigError: activations cannot be kept as the config says.
    """
    train = config.train
    check_checkpointing(train.activation_checkpointing, device)
    with torch.device("meta"):
        model = Transformer(shape, config.run.seed, train.activation_checkpointing, train.z_loss, train.label_smoothing,
                            group, train.ffn_chunk_tokens)  # fmt: skip
        if train.lora is not None:
            add_adapters(model, train.lora)
    if should_compile(config, device):
        model.compile_blocks()
    return model


def keep_tokenizer(tokenizer: Tokenizer, folder: RunFolder | None) -> None:
    """Keep the tokenizer in the run folder, which is all that a model needs beside its weights."""
    if folder:
        with writable(folder.path):
            keep_files(tokenizer, folder.path)


def keep_settings(engine: Engine, folder: RunFolder | None) -> None:
    """Keep what DeepSpeed is told in the run folder, for people."""
    if folder:
        with writable(folder.path):
            write_text(folder.path / "deepspeed.json", json.dumps(engine.settings, indent=2) + "\n")


def open_metrics(
    config: Config, plan: BatchPlan, shape: ModelShape, ranks: Ranks, folder: RunFolder, progress: Progress,
    tracker: Tracker | None,
) -> MetricLog:  # fmt: skip
    """Open the metrics of the run folder, after the step that the run goes on from."""
    drop_samples_after(folder.path, progress.step)
    return MetricLog(
            folder.path, config.log, num_steps=plan.num_steps, tokens_per_step=plan.tokens_per_step,
            world_size=ranks.world_size, first_step=progress.step, attempt=folder.attempt,
            flops_per_token=flops_by_length(shape, config.data.seq_lens, config.train.lora is not None),
            peak_flops=peak_flops(ranks.device, config.train.precision), tracker=tracker,
            save_every=config.checkpoint.every_steps,
            hyper_parameters=hyper_parameters(storable(config.model_dump(mode="json")), ranks.world_size),
        )  # fmt: skip


def announce(run: Run, events: Sequence[tuple[str, str]], is_resumed: bool) -> None:
    """Record what happened at the start, and what the run is."""
    config, engine, plan, ranks = run.config, run.engine, run.plan, run.ranks
    for event in events:
        run.event(*event)
    former = run.folder.former if run.folder else None
    if former and (changes := describe_changes(former, config, run.progress.step)):
        run.event("config_changed", changes)
    if engine.frozen:
        run.event("frozen", f"optim.groups has lr_ratio 0 for, and these stay as they are: {', '.join(engine.frozen)}")
    if config.train.lora is not None:
        num_trained = sum(math.prod(shape) for shape in engine.parameter_shapes().values())
        num_frozen = sum(math.prod(shape) for shape in engine.untrained_shapes.values())
        run.event("adapters", f"{num_trained:,} parameters are trained beside {num_frozen:,} that stay as they are")
    action = f"going on after step {run.progress.step}" if is_resumed else "starting"
    if run.log and run.log.last_dropped > run.progress.step:
        action += f", and doing steps {run.progress.step + 1} to {run.log.last_dropped} again"
    shared = f", {run.group.size} of them to a row" if run.group.size > 1 else ""
    where = f"{counted(ranks.world_size, 'rank')} on {ranks.device.type}{shared}"
    run.event("start", f"{action}: {where}, ZeRO stage {engine.stage}, {config.train.precision}, "
              f"{plan.tokens_per_step} tokens a step, {counted(plan.num_steps, 'step')}")  # fmt: skip
    phases = describe_phases(run.stream.plan, phases_of(config), plan.num_steps)
    for number, text in enumerate(phases, 1):
        run.event("mixture", text if len(phases) == 1 else f"phase {number} of {len(phases)}: {text}")


def record(run: Run, findings: Findings) -> None:
    """Record what was found before the run was opened."""
    if run.folder and findings.details:
        run.folder.add_to_environment(findings.details)
    for event in findings.events:
        run.event(*event)


def flops_by_length(shape: ModelShape, seq_lens: Sequence[int], frozen: bool = False) -> dict[int, tuple[float, float]]:
    """FLOPs of a token in rows of each length: by the peers' convention, and with causal attention counted once."""
    return {
        seq_len: (flops_per_token(own, False, frozen), flops_per_token(own, True, frozen))
        for seq_len in seq_lens
        for own in [replace(shape, seq_len=seq_len)]
    }


def start_tracking(
    config: Config, folder: RunFolder | None, report: Callable[[tuple[str, str]], None]
) -> Tracker | None:
    """Start the run on Weights & Biases, on rank 0 and if the config names a project."""
    if folder is None or config.log.wandb is None:
        return None
    return Tracker(
        config.log.wandb, folder.path, storable(config.model_dump(mode="json")), lambda *event: report(event)
    )


def set_determinism(wanted: bool) -> None:
    """Have the same bits come out on every run, as far as that is free; or, if wanted, whatever it costs."""
    # cuBLAS is deterministic only with a workspace for each stream, here 32 MiB; it is read at the first product.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    if torch.are_deterministic_algorithms_enabled() != wanted:  # else torch imports its compiler only to tell it
        torch.use_deterministic_algorithms(wanted)
    # Else every torch.empty is filled, DeepSpeed's gradient buckets too, which are up to 2 GB a micro-step.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
