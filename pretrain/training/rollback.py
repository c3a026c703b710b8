"""Going back to a checkpoint before a spike, and leaving out the rows around it."""

from __future__ import annotations

from pretrain.errors import TrainingError
from pretrain.generation.samples import drop_samples_after
from pretrain.training.resume import Progress
from pretrain.training.run import Run
from pretrain.training.spikes import Spike, describe_ranges


def roll_back(run: Run, spike: Spike) -> None:
    """Go back to the newest checkpoint that lies `guard.rollback_steps` before a spike, or else nearer before it.

    The rows from there on that led to the spike are left out from now on, as every later checkpoint records. What the
    steps in between left behind is removed: metrics, samples and checkpoints. No save may be under way.

    Raises:
        TrainingError: on all ranks, it went back `guard.max_rollbacks` times already.
        CheckpointError: on all ranks, no checkpoint from before the spike is good.
    """
    earlier = [step for step in run.checkpoints.steps() if step < spike.first_step]
    if not earlier:
        run.event("no_rollback", f"steps {spike.first_step} to {spike.last_step} are bad, and there is no checkpoint "
                  "from before them to go back to (checkpoint.every_steps); going on")  # fmt: skip
        run.spikes.forgive()
        return
    if run.spikes.num_rollbacks >= run.config.guard.max_rollbacks:
        raise _give_up(run, spike)
    repeat = run.spikes.must_repeat(spike)
    left_out = list(run.stream.skipped)
    run.unreported = None
    run.feed.discard()
    go_back_to = max([step for step in earlier if step <= spike.go_back_to], default=earlier[-1])
    training = run.checkpoints.load_newest(run.engine, go_back_to)
    assert training is not None
    run.progress = Progress(**training["progress"])
    run.guard.restart(run.progress.num_skipped)
    run.stream.load_state(training["data"])
    run.spikes.went_back(training.get("spikes", {}), spike)
    ranges = [] if repeat else [(max(spike.begin, run.stream.cursor), spike.end)]
    run.stream.skip([*left_out, *ranges])
    step = run.progress.step
    run.checkpoints.discard_after(step)
    if run.folder and run.log:
        drop_samples_after(run.folder.path, step)
        run.log.rewind(step)
        run.folder.write_status("running", None, step, saved_step=step)
    done = "to compute the same steps again" if repeat else f"rows {describe_ranges(ranges)} are left out"
    losses = ", ".join(f"{loss:.4g}" for loss in spike.losses)
    text = f"steps {spike.first_step} to {spike.last_step} were bad (losses {losses}); back to step {step}, {done}"
    if run.log:  # as of the step to come: who starts from this checkpoint, for want of a later one, has not gone back
        bad_steps = [spike.first_step, spike.last_step]
        run.log.event(step + 1, "rollback", text, rows=ranges, bad_steps=bad_steps)


def _give_up(run: Run, spike: Spike) -> TrainingError:
    left_out = f", though rows {describe_ranges(run.stream.skipped)} were left out" if run.stream.skipped else ""
    error = TrainingError(
        f"steps {spike.first_step} to {spike.last_step}: the loss or the gradient norm spikes after "
        f"{run.spikes.num_rollbacks} of guard.max_rollbacks={run.config.guard.max_rollbacks} rollbacks{left_out}; "
        "expected no such spike any more. The newest checkpoint from before is of step "
        f"{max(step for step in run.checkpoints.steps() if step < spike.first_step)}. Look at the samples and at "
        "the data of these rows, lower optim.lr (run.allow_changes=[optim.lr]), or raise guard.spike_sigmas if this is "
        "how the data is."
    )
    error.agreed = True
    return error
