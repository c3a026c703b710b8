"""Who works on which matrix, for every way that matrices can be divided; the collective itself is in test_optimizers.py."""

from __future__ import annotations

import pytest
import torch

from pretrain.optimizers import matrix_exchange
from pretrain.optimizers.matrix_exchange import Held, MatrixExchange, plan_buckets
from pretrain.optimizers.matrix_owners import Matrix, assign_owners

MATRICES = [Matrix("a", 0, 4, 6, 2.0), Matrix("a", 24, 2, 6, 3.0), Matrix("b", 0, 6, 4, 5.0), Matrix("c", 0, 3, 3, 7.0)]
SIZES = {"a": 36, "b": 24, "c": 9}


def flat_partitions(num_ranks):
    """As ZeRO 1 and 2: all parameters in one line, cut at equal distances."""
    size = -(-sum(SIZES.values()) // num_ranks)
    held = []
    for rank in range(num_ranks):
        pieces, position = [], 0
        for name, numel in SIZES.items():
            first, last = max(position, rank * size), min(position + numel, (rank + 1) * size)
            if first < last:
                pieces.append(Held(name, first - position, last - first, 0, first - rank * size))
            position += numel
        held.append(pieces)
    return held, [[size] for _ in range(num_ranks)]


def sliced_parameters(num_ranks):
    """As ZeRO 3: every parameter cut for all ranks, the last parts padded."""
    held, sizes = [], []
    for rank in range(num_ranks):
        pieces, offset = [], 0
        for name, numel in SIZES.items():
            size = -(-numel // num_ranks)
            length = min(size, numel - rank * size)
            if length > 0:
                pieces.append(Held(name, rank * size, length, 0, offset))
            offset += size
        held.append(pieces)
        sizes.append([offset])
    return held, sizes


def replicas(num_ranks):
    """As stage 0: all ranks hold all."""
    held = [[Held(name, 0, numel, number, 0) for number, (name, numel) in enumerate(SIZES.items())]] * num_ranks
    return held, [list(SIZES.values())] * num_ranks


class Mail:
    """all_to_all_single between ranks that run one after the other, as generators would: by two passes."""

    def __init__(self, num_ranks):
        self.sent = [[] for _ in range(num_ranks)]
        self.calls = [0] * num_ranks
        self.rank = 0

    def all_to_all_single(self, incoming, outgoing, in_sizes, out_sizes):
        call, self.calls[self.rank] = self.calls[self.rank], self.calls[self.rank] + 1
        self.sent[self.rank][call:] = [outgoing.clone().split(out_sizes)]
        parts = [
            sent[call][self.rank] if call < len(sent) else torch.zeros(size)
            for sent, size in zip(self.sent, in_sizes, strict=True)
        ]
        assert [len(part) for part in parts] == in_sizes
        incoming.copy_(torch.cat(parts))


@pytest.mark.parametrize("layout", [flat_partitions, sliced_parameters, replicas])
@pytest.mark.parametrize("num_ranks", [1, 2, 3, 5])
@pytest.mark.parametrize("bucket_elements", [1, 30, 10**6])
def test_every_matrix_is_worked_on_once_and_comes_back(monkeypatch, layout, num_ranks, bucket_elements):
    held, sizes = layout(num_ranks)
    whole = {name: torch.randn(numel) for name, numel in SIZES.items()}
    exchanges = [MatrixExchange(MATRICES, held, rank, bucket_elements) for rank in range(num_ranks)]
    assert len({tuple(bucket.travels for bucket in exchange.buckets) for exchange in exchanges}) == 1
    worked_on = []

    def work(batch):
        worked_on.extend(matrix.clone() for matrix in batch)
        return batch * batch + 1

    mail = Mail(num_ranks)
    monkeypatch.setattr(matrix_exchange, "dist", mail)
    num_passes = 2 * max(len(exchange.buckets) for exchange in exchanges) + 1
    for _ in range(num_passes):  # what is sent is right once all that it depends on was
        worked_on.clear()
        mail.calls = [0] * num_ranks
        results = []
        for rank, exchange in enumerate(exchanges):
            tensors = {number: torch.zeros(size) for number, size in enumerate(sizes[rank])}
            for piece in held[rank]:
                tensors[piece.tensor][piece.offset : piece.offset + piece.length] = whole[piece.parameter][
                    piece.start : piece.start + piece.length
                ]
            mail.rank = rank
            exchange.apply(tensors, work, torch.float32, torch.device("cpu"))
            results.append(tensors)
    assert len(set(mail.calls)) == 1  # the same number of collectives on every rank
    assert len(worked_on) == len(MATRICES)
    expected = {name: torch.empty(numel) for name, numel in SIZES.items()}
    for matrix in MATRICES:
        content = whole[matrix.parameter][matrix.start : matrix.start + matrix.numel]
        assert any(torch.equal(found.flatten(), content) for found in worked_on)
        expected[matrix.parameter][matrix.start : matrix.start + matrix.numel] = (content**2 + 1) * matrix.scale
    for pieces, tensors in zip(held, results, strict=True):
        for piece in pieces:
            found = tensors[piece.tensor][piece.offset : piece.offset + piece.length]
            torch.testing.assert_close(found, expected[piece.parameter][piece.start : piece.start + piece.length])


def test_work_is_balanced():
    matrices = [Matrix(f"m{number}", 0, 8, 8) for number in range(10)]
    owners = assign_owners(matrices, [{0}] * 2 + [{0, 1, 2, 3}] * 8, 4)
    assert sorted(owners.count(rank) for rank in range(4)) == [2, 2, 3, 3] and owners[:2] == [0, 0]


def test_a_rank_holds_one_bucket_of_whole_matrices_at_once():
    matrices = [Matrix(f"m{number}", 0, 4, 8) for number in range(12)] + [Matrix("large", 0, 10, 10)]
    held = [[Held(m.parameter, rank * m.numel // 2, m.numel // 2, 0, 0) for m in matrices] for rank in range(2)]
    batches = [
        [bucket.batches for bucket in plan_buckets(matrices, held, rank, bucket_elements=64)] for rank in range(2)
    ]
    # At most 100 elements, the largest matrix, at once; equal matrices lie side by side, and work is about equal.
    assert batches[0] == [[(1, 4, 8)], [(1, 10, 10)], [], []]
    assert batches[1] == [[(3, 4, 8)], [(3, 4, 8)], [(3, 4, 8)], [(2, 4, 8)]]


def test_only_what_is_divided_travels():
    held, _ = flat_partitions(2)  # 35 elements a rank: `a` (36) is cut, `b` and `c` are not
    buckets = plan_buckets(MATRICES, held, 0, bucket_elements=1)
    assert [bucket.travels for bucket in buckets] == [True, False]
    [move] = [move for bucket in buckets for move in bucket.moves if move.holder != move.owner]
    # all but the last element of the second matrix of `a` is on rank 0; rank 1 has `b` and `c`, so rank 0 works
    assert (move.holder, move.owner, move.place, move.length) == (1, 0, 11, 1)
    assert not any(bucket.travels for bucket in plan_buckets(MATRICES, flat_partitions(1)[0], 0, 100))
