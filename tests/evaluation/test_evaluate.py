"""Bits per byte, by hand and by `evaluate`."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from pretrain.data.row_reader import Batch
from pretrain.errors import DataError
from pretrain.evaluation.evaluate import evaluate


class Rows:
    """Three rows of four tokens, of which two are not scored."""

    num_rows = 3
    targets = torch.tensor([[1, 2, 3, -100], [2, 2, 1, 0], [3, -100, 1, 2]])

    def batch(self, numbers):
        targets = self.targets[list(numbers)]
        zeros = torch.zeros_like(targets)
        return Batch(zeros, targets, zeros.int(), torch.tensor(list(numbers)))

    def sources(self):
        return [("code", range(0, 1)), ("empty", range(1, 1)), ("prose", range(1, 3))]


def uniform(tokens, targets, doc_start, row_ids, step, per_token):
    assert per_token
    return (targets >= 0) * math.log(8.0)


@pytest.mark.parametrize("micro_batch_size", [1, 2, 3, 8])
def test_a_uniform_model_has_the_entropy_it_should(micro_batch_size):
    token_bytes = np.array([0, 1, 2, 5], dtype=np.int32)
    result = evaluate(uniform, Rows(), token_bytes, micro_batch_size)
    num_bytes = sum(int(token_bytes[target]) for target in Rows.targets.flatten().tolist() if target >= 0)
    assert (result.tokens, result.bytes) == (10, num_bytes)
    assert result.loss == pytest.approx(math.log(8.0)) and result.perplexity == pytest.approx(8.0)
    assert result.bits_per_byte == pytest.approx(10 * 3 / num_bytes)
    assert {name: part.tokens for name, part in result.sources.items()} == {"code": 3, "prose": 7}
    assert result.sources["code"].bits_per_byte == pytest.approx(3 * 3 / (1 + 2 + 5))
    assert result.rows_RS[:, 1].tolist() == [3, 4, 3] and result.rows_RS[:, 0].sum() == pytest.approx(10 * math.log(8))


def test_held_out_rows_without_a_document_that_can_be_read_are_an_error():
    rows = Rows()
    rows.targets = torch.full((3, 4), -100)
    with pytest.raises(DataError, match=r"no document of the 3 held-out rows can be read; expected some.*--verify"):
        evaluate(uniform, rows, np.ones(4, dtype=np.int32), 2)
