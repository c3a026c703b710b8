"""fp16's loss scale as DeepSpeed keeps it; a run in fp16 needs a GPU."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from pretrain.errors import TrainingError
from pretrain.zero.engine import import_deepspeed
from pretrain.zero.loss_scale import exhaustion_explained, read_state, write_state


def scaler(init_scale: float):
    import_deepspeed()
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler

    return DynamicLossScaler(init_scale, 1000, min_scale=1, delayed_shift=1, consecutive_hysteresis=False)


def test_the_least_scale_is_an_error_that_says_what_to_do():
    least = scaler(1.0)
    with pytest.raises(
        TrainingError, match=r"train\.precision is fp16, whose .*at a loss scale of 1, .*precision=bf16"
    ) as one:
        with exhaustion_explained():
            least.update_scale(True)
    assert one.value.agreed
    with pytest.raises(ValueError), exhaustion_explained():
        raise ValueError("another")


def test_a_scale_goes_on_as_it_was_saved():
    saved, restored = (SimpleNamespace(loss_scaler=scaler(2.0**16)) for _ in range(2))
    for optimizer in (saved, restored):
        optimizer.loss_scaler.cur_iter = 500
    saved.loss_scaler.cur_scale, saved.loss_scaler.last_overflow_iter = 2.0**12, 499
    write_state(restored, read_state(saved))
    for _ in range(1002):
        for optimizer in (saved, restored):
            optimizer.loss_scaler.update_scale(False)
    assert read_state(restored) == read_state(saved) and saved.loss_scaler.cur_scale == 2.0**13
