"""How rank 0 waits for what the others have written; the writing itself is in test_checkpoint_store.py and training/test_train.py."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from pretrain.checkpoints import share_writer
from pretrain.checkpoints.share_writer import collect_shares
from pretrain.errors import CheckpointError


@pytest.mark.parametrize(("look_seconds", "rests"), [(0.001, [0.05] * 3), (0.1, [1.0] * 3), (3.0, [5.0] * 3)])
def test_looking_for_notes_takes_little_of_the_time_however_many_ranks_there_are(monkeypatch, look_seconds, rests):
    now, slept = [0.0], []
    monkeypatch.setattr(share_writer, "time", SimpleNamespace(monotonic=lambda: now[0], sleep=slept.append))
    found = ["a", "ab", "ab", "abc"]

    def list_notes(*_):
        now[0] += look_seconds
        return list(found.pop(0))

    place = SimpleNamespace(
        longest_poll_seconds=0.05, list_notes=list_notes, take_notes=lambda _, names: [f'"{name}"' for name in names]
    )
    assert collect_shares(place, 1, 3, lambda: 1e9) == ["a", "b", "c"]
    assert slept == pytest.approx(rests)


def test_ranks_that_never_write_are_given_up():
    place = SimpleNamespace(longest_poll_seconds=0.05, list_notes=lambda *_: ["a"])
    with pytest.raises(CheckpointError, match=r"only 1 of 3 ranks have written their share; expected all"):
        collect_shares(place, 1, 3, lambda: 0.0)
