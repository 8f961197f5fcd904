"""The few positions to the left of a rank's own, fetched from the ranks that have them, with a gradient.

Only the halo travels, never the sequence; in the backward pass the gradient of the halo travels back and is added where
the values came from. Who sends what to whom follows from the partition alone, so no rank asks another.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from megatron_graft.data.partition import Partition


@dataclass(frozen=True)
class SequenceSplit:
    """How a sequence is split over ranks, and the group that they form; one process by default.

    Attributes:
        partition: this rank's place.
        group: the ranks of :meth:`Partition.others`, in that order; None if the sequence is not split.
    """

    partition: Partition = Partition()
    group: dist.ProcessGroup | None = None

    def lengths(self, positions: int) -> list[int]:
        """Lengths of the runs that this rank's positions consist of."""
        return [run.stop - run.start for run in self.partition.runs(self.whole_length(positions))]

    def whole_length(self, positions: int) -> int:
        """S, length of a sequence of which each rank has ``positions``."""
        return positions * len(self.partition.others())


@dataclass(frozen=True)
class Move:
    """Positions that one rank has and another one wants as left context.

    Attributes:
        source: the rank that has them, as its place in the group.
        first, count: which of the source's positions.
        target: the rank that wants them.
        place: where in the target's left contexts, end to end, the first of them belongs.
    """

    source: int
    first: int
    count: int
    target: int
    place: int


@functools.lru_cache(maxsize=64)
def moves(partition: Partition, length: int, halo: int) -> tuple[Move, ...]:
    """All moves that bring every rank the ``halo`` positions before each of its runs, by target and place."""
    held = [member.runs(length) for member in partition.others()]
    found = []
    for target, runs in enumerate(held):
        for number, run in enumerate(runs):
            for source, theirs in enumerate(held):
                before = 0
                for their in theirs:
                    first, end = max(run.start - halo, their.start), min(run.start, their.stop)
                    if first < end:
                        place = (number + 1) * halo - (run.start - first)
                        found.append(Move(source, before + first - their.start, end - first, target, place))
                    before += their.stop - their.start
    return tuple(sorted(found, key=lambda move: (move.target, move.place)))


def left_context(x_SBH: torch.Tensor, halo: int, split: SequenceSplit) -> tuple[torch.Tensor, ...]:
    """The ``halo`` positions before each run of this rank's positions; zeros before the sequence's beginning.

    Args:
        x_SBH: this rank's positions ``[S, B, H]``.
        halo: number of positions wanted.
        split: how the sequence is split over ranks.

    Returns:
        ``[halo, B, H]`` for each run.
    """
    runs = len(split.lengths(x_SBH.shape[0]))
    if split.group is None:
        context = x_SBH.new_zeros(runs * halo, *x_SBH.shape[1:])
    else:
        context = _LeftContext.apply(x_SBH, runs * halo, halo, split)
    return context.chunk(runs)


class _LeftContext(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_SBH: torch.Tensor, size: int, halo: int, split: SequenceSplit) -> torch.Tensor:
        ctx.length, ctx.group = x_SBH.shape[0], split.group
        ctx.moves = moves(split.partition, split.whole_length(x_SBH.shape[0]), halo)
        context = x_SBH.new_zeros(size, *x_SBH.shape[1:])
        for move, piece in _exchanged(x_SBH, ctx.moves, ctx.group, back=False):
            context[move.place : move.place + move.count] = piece
        return context

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:  # type: ignore[override]
        grad_x = grad.new_zeros(ctx.length, *grad.shape[1:])
        for move, piece in _exchanged(grad, ctx.moves, ctx.group, back=True):
            grad_x[move.first : move.first + move.count] += piece
        return grad_x, None, None, None


def _exchanged(
    held: torch.Tensor, plan: tuple[Move, ...], group: Any, *, back: bool
) -> list[tuple[Move, torch.Tensor]]:
    """What this rank receives, in the order of the moves, when they are made; or, ``back``, when they are undone.

    All pieces for one rank travel as one message.
    """
    rank = group.rank()
    if back:
        going = [
            (move.source, move, held[move.place : move.place + move.count]) for move in plan if move.target == rank
        ]
        coming = [(move.target, move) for move in plan if move.source == rank]
    else:
        going = [
            (move.target, move, held[move.first : move.first + move.count]) for move in plan if move.source == rank
        ]
        coming = [(move.source, move) for move in plan if move.target == rank]
    received = {rank: _joined([piece for to, _, piece in going if to == rank], held)}
    operations = []
    for other in range(group.size()):
        sent = [piece for to, _, piece in going if to == other]
        count = sum(move.count for source, move in coming if source == other)
        if other == rank or not (sent or count):
            continue
        peer = dist.get_global_rank(group, other)
        received[other] = held.new_empty(count, *held.shape[1:])
        operations += [dist.P2POp(dist.isend, _joined(sent, held), peer, group)] if sent else []
        operations += [dist.P2POp(dist.irecv, received[other], peer, group)] if count else []
    for request in dist.batch_isend_irecv(operations) if operations else []:
        request.wait()
    pieces, taken = [], dict.fromkeys(received, 0)
    for source, move in coming:
        pieces.append((move, received[source][taken[source] : taken[source] + move.count]))
        taken[source] += move.count
    return pieces


def _joined(pieces: list[torch.Tensor], like: torch.Tensor) -> torch.Tensor:
    return torch.cat(pieces) if pieces else like.new_empty(0, *like.shape[1:])
