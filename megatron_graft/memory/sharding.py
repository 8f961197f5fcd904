"""How the parameters of memory sites lie in a distributed checkpoint: whole, or as uneven slices along one axis.

A table of R rows over T tensor-parallel ranks is cut into T contiguous ranges, the first R % T of them one row longer,
and nothing is padded: the checkpoint holds exactly R rows whatever T was, and any other T can read it. Megatron's own
helper cuts into equal parts only. Here each shard says where it begins and how long it is (``axis_fragmentations`` is
None), and torch's checkpoint checks that the shards tile the tensor.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.utils import get_pg_rank, make_sharded_tensor_for_checkpoint

from megatron_graft.errors import ConfigError


def sharded_slice(
    key: str, tensor: torch.Tensor, *, axis: int, first: int, total: int, tp_group: Any, dp_cp_group: Any
) -> ShardedTensor:
    """A rank's uneven, unpadded slice of a tensor that the tensor-parallel group holds together.

    Args:
        key: name in the checkpoint.
        tensor: this rank's slice, any dtype; the parameter itself (not its data), so that the optimizer finds its
            state by it.
        axis: the one that is cut.
        first: place of the slice's first element along ``axis`` of the whole tensor.
        total: length of the whole tensor along ``axis``.
        tp_group: tensor-parallel group; together its ranks hold every element once.
        dp_cp_group: data- and context-parallel group; its ranks hold copies, of which the first is saved.

    Returns:
        An entry of a sharded state dict. Its slices need not tile a regular grid.

    Raises:
        ConfigError: the slice is empty or reaches beyond the whole tensor. torch's checkpoint takes two shards with
            one offset for copies of each other and would keep only one of them: possibly the empty one.
    """
    length = tensor.shape[axis]
    if length == 0 or not 0 <= first <= total - length:
        raise ConfigError(
            key, f"has an unusable slice on tensor-parallel rank {get_pg_rank(tp_group)}",
            got=f"elements {first} to {first + length} of {total} along axis {axis}",
            expected="at least one element on each rank",
            remedy="Use a smaller --tensor-model-parallel-size, or more rows (--engram-vocab-size, --bank-rows).",
        )  # fmt: skip
    offset, shape = [0] * tensor.dim(), list(tensor.shape)
    offset[axis], shape[axis] = first, total
    return ShardedTensor(
        key,
        tensor,
        tensor.dtype,
        tuple(tensor.shape),
        tuple(shape),
        tuple(offset),
        axis_fragmentations=None,
        replica_id=(0, 0, get_pg_rank(dp_cp_group)),
    )


def sharded_whole(key: str, tensor: torch.Tensor, *, tp_group: Any, dp_cp_group: Any) -> ShardedTensor:
    """A tensor of which every rank of both groups holds a copy; saved once.

    Args:
        key: name in the checkpoint.
        tensor: the parameter itself, see :func:`sharded_slice`.
        tp_group: tensor-parallel group.
        dp_cp_group: data- and context-parallel group.
    """
    return make_sharded_tensor_for_checkpoint(tensor, key, tp_group=tp_group, dp_cp_group=dp_cp_group)
