"""The learning rate of every update: a pure function of its number."""

from __future__ import annotations

import math

from pretrain.options.config import ScheduleSection


def lr_at(step: int, num_steps: int, peak_lr: float, schedule: ScheduleSection) -> float:
    """Return the learning rate of update number `step`.

    Warm-up rises linearly: with W warm-up steps, update 0 uses `peak_lr / W` and update W - 1 uses `peak_lr`; no
    update is wasted at a rate of zero. Without warm-up, update 0 uses `peak_lr`. From that update on the shape
    falls so that the last update, `num_steps - 1`, uses `final_lr_ratio * peak_lr` exactly:

    - `cosine`: half a cosine wave.
    - `linear`: a straight line.
    - `wsd`: `peak_lr` until the last `decay_steps` updates, then a straight line.
    - `constant`: `peak_lr` to the end.

    Where the warm-up ends with the run, or the run is one update long, there is nothing left to fall and the last
    update uses `peak_lr` (`wsd` without warm-up excepted: its last update is the decay).

    Args:
        step: number of the update, from 0; beyond the end it counts as the last.
        num_steps: updates of the whole run.
        peak_lr: rate at the end of the warm-up.
        schedule: shape, warm-up and decay.

    Returns:
        the rate, above 0 unless `final_lr_ratio` is 0.

    Source: cosine: SGDR (arXiv:1608.03983) without restarts, with GPT-3's floor (arXiv:2005.14165, appendix B);
        wsd: MiniCPM (arXiv:2404.06395, section 4), with the linear decay of arXiv:2405.18392.
    """
    last = num_steps - 1
    step = min(step, last)
    if step < schedule.warmup_steps:
        return peak_lr * ((step + 1) / schedule.warmup_steps)
    if schedule.name == "constant":
        return peak_lr
    at_peak = max(schedule.warmup_steps - 1, 0)
    if schedule.name == "wsd":
        at_peak = last - num_decay_steps(schedule, num_steps)
    if step <= at_peak:
        return peak_lr
    progress = (step - at_peak) / (last - at_peak)
    remaining = 1.0 - progress
    if schedule.name == "cosine":
        remaining = 0.5 * (1.0 + math.cos(math.pi * progress))
    return peak_lr * (schedule.final_lr_ratio + (1.0 - schedule.final_lr_ratio) * remaining)


def num_decay_steps(schedule: ScheduleSection, num_steps: int) -> int:
    """Return the length of the final decay of `wsd`: as given, or a tenth of the run, at least one update."""
    return schedule.decay_steps or max(1, num_steps // 10)
