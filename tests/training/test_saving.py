"""What a save does not wait for; saves of whole runs are in test_train.py and tests/fault."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from pretrain.training import saving


def test_a_step_that_is_saved_as_the_best_is_not_waited_for_to_be_saved_again(monkeypatch):
    waited = []
    monkeypatch.setattr(saving, "judge_steps", lambda *_, **__: None)
    monkeypatch.setattr(saving, "finish_save", lambda run: waited.append(run.progress.step))
    run = SimpleNamespace(
        progress=SimpleNamespace(step=8), checkpoints=SimpleNamespace(is_saving=lambda step: step == 8)
    )
    saving.save(run)
    assert waited == []
    with pytest.raises(AttributeError):  # goes on to save, which this run cannot
        saving.save(run, last=True)
    assert waited == [8]
