"""Whole matrices out of divided tensors: which rank works on which matrix, and its elements there and back.

ZeRO keeps a parameter as flat ranges on one or all ranks; to orthogonalise a matrix, one rank needs all of it. A
matrix that lies wholly on one rank is worked on there. The others are given to the ranks so that all have about the
same work, and travel in buckets, so that a rank never holds more whole matrices than one bucket.

The plan is a function of who holds what, which all ranks know: every rank takes part in the same collectives in the
same order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from pretrain.optimizers.matrix_owners import Matrix, assign_owners

BUCKET_ELEMENTS = 2**25  # of whole matrices on one rank at once; one larger matrix is a bucket of its own


@dataclass(frozen=True)
class Held:
    """Flat elements [start, start + length) of a parameter lie at `offset` of a rank's tensor number `tensor`."""

    parameter: str
    start: int
    length: int
    tensor: int
    offset: int


@dataclass(frozen=True)
class _Move:
    """Elements of a matrix: where they are held, and their place among the whole matrices of the rank that works.

    Where all ranks hold all of it, they need not be brought there (`is_brought`), but the result comes back to all.
    """

    holder: int
    tensor: int
    offset: int
    owner: int
    place: int
    length: int
    scale: float
    is_brought: bool


@dataclass
class Bucket:
    """What is worked on at once.

    Args:
        batches: of this rank: (number, rows, cols) of equal matrices that lie one after the other.
        moves: those that begin or end here, in the order that all ranks have them in.
        travels: whether any rank sends anything.
    """

    batches: list[tuple[int, int, int]] = field(default_factory=list)
    moves: list[_Move] = field(default_factory=list)
    travels: bool = False


def plan_buckets(
    matrices: Sequence[Matrix], held: Sequence[Sequence[Held]], rank: int, bucket_elements: int
) -> list[Bucket]:
    """Divide the work over the ranks and into buckets.

    Args:
        matrices: all of them, the same on every rank.
        held: what each rank holds. Either every element of a matrix is on one rank, or all ranks hold all of it.
        rank: whose part is returned.
        bucket_elements: of whole matrices on one rank at once.
    """
    by_name: dict[str, list[tuple[int, Held]]] = {}
    for holder, pieces in enumerate(held):
        for piece in pieces:
            by_name.setdefault(piece.parameter, []).append((holder, piece))
    parts = [_parts_of(matrix, by_name.get(matrix.parameter, [])) for matrix in matrices]
    owners = assign_owners(matrices, [{holder for holder, *_ in part} for part in parts], len(held))
    travelling = [any(holder != owner for holder, *_ in part) for part, owner in zip(parts, owners, strict=True)]
    limit = max([bucket_elements, *(matrix.numel for matrix in matrices)])
    used = [(0, 0)] * len(held)  # of each rank: the bucket that is being filled, and the elements in it
    buckets: list[Bucket] = []
    # What travels goes into the first buckets, so that the others need no collective; equal shapes lie side by side.
    order = sorted(range(len(matrices)), key=lambda i: (not travelling[i], matrices[i].rows, matrices[i].cols, i))
    for index in order:
        matrix, owner = matrices[index], owners[index]
        number, place = used[owner]
        if place and place + matrix.numel > limit:
            number, place = number + 1, 0
        used[owner] = (number, place + matrix.numel)
        buckets += [Bucket() for _ in range(number + 1 - len(buckets))]
        bucket = buckets[number]
        bucket.travels |= travelling[index]
        if owner == rank:
            same = bool(bucket.batches) and bucket.batches[-1][1:] == (matrix.rows, matrix.cols)
            count = bucket.batches.pop()[0] if same else 0
            bucket.batches.append((count + 1, matrix.rows, matrix.cols))
        for holder, tensor, offset, at, length in parts[index]:
            if rank in (holder, owner):
                is_brought = holder != owner and length < matrix.numel
                bucket.moves.append(_Move(holder, tensor, offset, owner, place + at, length, matrix.scale, is_brought))
    return buckets


def _parts_of(matrix: Matrix, pieces: Sequence[tuple[int, Held]]) -> list[tuple[int, int, int, int, int]]:
    """Return (holder, tensor, offset, position in the matrix, length) of each part of a matrix."""
    parts = []
    for holder, piece in pieces:
        first = max(matrix.start, piece.start)
        last = min(matrix.start + matrix.numel, piece.start + piece.length)
        if first < last:
            offset = piece.offset + first - piece.start
            parts.append((holder, piece.tensor, offset, first - matrix.start, last - first))
    num_found, num_holders = sum(part[-1] for part in parts), len({part[0] for part in parts})
    assert num_found == matrix.numel or num_found == num_holders * matrix.numel, f"{matrix} is held in {parts}"
    return parts


class MatrixExchange:
    """Carries out the plan on this rank's tensors."""

    def __init__(
        self,
        matrices: Sequence[Matrix],
        held: Sequence[Sequence[Held]],
        rank: int,
        bucket_elements: int = BUCKET_ELEMENTS,
    ) -> None:
        """Plan; see `plan_buckets`."""
        self.rank, self.num_ranks = rank, len(held)
        self.buckets = plan_buckets(matrices, held, rank, bucket_elements)

    def apply(
        self, tensors: dict[int, Tensor], work: Callable[[Tensor], Tensor], dtype: torch.dtype, device: torch.device
    ) -> None:
        """Replace each matrix in the tensors by `scale` times what `work` makes of it.

        Args:
            tensors: flat, by number; changed in place.
            work: takes and returns equal matrices `[count, rows, cols]`.
            dtype: that matrices travel and are worked on in.
            device: likewise; the tensors may be elsewhere.
        """
        for bucket in self.buckets:
            size = sum(count * rows * cols for count, rows, cols in bucket.batches)
            whole = torch.empty(size, dtype=dtype, device=device)
            self._bring(bucket, tensors, whole)
            start = 0
            for count, rows, cols in bucket.batches:
                batch = whole[start : start + count * rows * cols].view(count, rows, cols)
                batch.copy_(work(batch))
                start += batch.numel()
            self._return(bucket, tensors, whole)

    def _bring(self, bucket: Bucket, tensors: dict[int, Tensor], whole: Tensor) -> None:
        """Copy what is held here, and what others send, to its place among the whole matrices."""
        here = [move for move in bucket.moves if move.holder == move.owner == self.rank]
        _copy([_placed(move, whole) for move in here], [_held(move, tensors) for move in here])
        if bucket.travels:
            sent, taken = self._sides(), self._sides()
            for move in bucket.moves:
                if move.is_brought and move.holder == self.rank:
                    sent[move.owner].append(_held(move, tensors))
                elif move.is_brought:
                    taken[move.holder].append(_placed(move, whole))
            self._swap(sent, taken, whole)

    def _return(self, bucket: Bucket, tensors: dict[int, Tensor], whole: Tensor) -> None:
        """Bring results to everyone who holds the matrix, and scale them."""
        here = [move for move in bucket.moves if move.holder == move.owner == self.rank]
        _copy([_held(move, tensors) for move in here], [_placed(move, whole) for move in here])
        if bucket.travels:
            sent, taken = self._sides(), self._sides()
            for move in bucket.moves:
                if move.holder != move.owner == self.rank:
                    sent[move.holder].append(_placed(move, whole))
                elif move.holder != move.owner:
                    taken[move.owner].append(_held(move, tensors))
            self._swap(sent, taken, whole)
        own = [move for move in bucket.moves if move.holder == self.rank]
        if own:
            torch._foreach_mul_([_held(move, tensors) for move in own], [move.scale for move in own])

    def _sides(self) -> list[list[Tensor]]:
        return [[] for _ in range(self.num_ranks)]

    @staticmethod
    def _swap(sent: list[list[Tensor]], taken: list[list[Tensor]], like: Tensor) -> None:
        """Send each rank its segments, and fill the segments that each rank sends here."""
        out_sizes, in_sizes = ([sum(map(len, segments)) for segments in side] for side in (sent, taken))
        outgoing, incoming = like.new_empty(sum(out_sizes)), like.new_empty(sum(in_sizes))
        flat_sent, flat_taken = ([segment for segments in side for segment in segments] for side in (sent, taken))
        _copy(list(outgoing.split([len(segment) for segment in flat_sent])), flat_sent)
        dist.all_to_all_single(incoming, outgoing, in_sizes, out_sizes)
        _copy(flat_taken, list(incoming.split([len(segment) for segment in flat_taken])))


def _held(move: _Move, tensors: dict[int, Tensor]) -> Tensor:
    return tensors[move.tensor].narrow(0, move.offset, move.length)


def _placed(move: _Move, whole: Tensor) -> Tensor:
    return whole.narrow(0, move.place, move.length)


def _copy(targets: list[Tensor], sources: list[Tensor]) -> None:
    if targets:
        torch._foreach_copy_(targets, sources)
