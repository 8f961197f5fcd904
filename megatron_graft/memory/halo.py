"""The few positions to the left of a rank's slice of the sequence, fetched from its neighbour with a gradient.

Only the halo travels, never the sequence: rank r sends the end of its slice to rank r + 1, and in the backward pass the
gradient of that halo travels back and is added where the values came from.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from megatron_graft.errors import ConfigError


def left_context(x_SBH: torch.Tensor, halo: int, group: dist.ProcessGroup | None) -> torch.Tensor:
    """The ``halo`` positions before this rank's slice; zeros before the sequence's beginning.

    Args:
        x_SBH: this rank's slice ``[S, B, H]`` of a sequence split evenly, in rank order, over ``group``.
        halo: number of positions wanted.
        group: the group, or None if ``x_SBH`` is the whole sequence.

    Returns:
        ``[halo, B, H]``.

    Raises:
        ConfigError: the slice is shorter than the halo, so that one neighbour does not have it all.
    """
    if group is None or group.size() == 1:
        return x_SBH.new_zeros(halo, *x_SBH.shape[1:])
    if x_SBH.shape[0] < halo:
        raise ConfigError(
            "--seq-length",
            "leaves a sequence-parallel rank fewer positions than the memory's convolution looks back",
            got=f"{x_SBH.shape[0]} positions per rank",
            expected=f"at least {halo}",
            remedy="Use a longer sequence, a smaller --tensor-model-parallel-size, or --graft-conv-kernel 0.",
        )
    return _LeftHalo.apply(x_SBH, halo, group)


def _exchange(
    outgoing: torch.Tensor | None, to: int | None, incoming: torch.Tensor | None, source: int | None, group: Any
) -> None:
    """Send and receive at once; either side may be absent at the ends of the group."""
    operations = []
    if outgoing is not None and to is not None:
        operations.append(dist.P2POp(dist.isend, outgoing, dist.get_global_rank(group, to), group))
    if incoming is not None and source is not None:
        operations.append(dist.P2POp(dist.irecv, incoming, dist.get_global_rank(group, source), group))
    if operations:
        for request in dist.batch_isend_irecv(operations):
            request.wait()


class _LeftHalo(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_SBH: torch.Tensor, halo: int, group: dist.ProcessGroup) -> torch.Tensor:
        rank, size = group.rank(), group.size()
        ctx.halo, ctx.group, ctx.length = halo, group, x_SBH.shape[0]
        received = x_SBH.new_zeros(halo, *x_SBH.shape[1:])
        last = rank == size - 1
        _exchange(
            None if last else x_SBH[-halo:].contiguous(),
            None if last else rank + 1,
            received if rank else None,
            rank - 1 if rank else None,
            group,
        )
        return received

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:  # type: ignore[override]
        rank, size = ctx.group.rank(), ctx.group.size()
        last = rank == size - 1
        returned = torch.zeros_like(grad)
        _exchange(
            grad.contiguous() if rank else None,
            rank - 1 if rank else None,
            None if last else returned,
            None if last else rank + 1,
            ctx.group,
        )
        grad_x = grad.new_zeros(ctx.length, *grad.shape[1:])
        if not last:
            grad_x[-ctx.halo :] = returned
        return grad_x, None, None
