"""Collectives that Megatron uses as NCCL has them, on gloo. Used by :mod:`megatron_graft.compat.cpu` only.

* ``all_to_all_single`` accepts split sizes given as tensors (Megatron converts them only on CUDA).
* ``all_gather`` and ``reduce_scatter`` accept lists of tensors of different sizes, as experts that are split over
  tensor-parallel *and* expert-parallel ranks need; gloo refuses them. The sums are those of one ``reduce`` per rank.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist


def rebind_collectives() -> None:
    """Replace the three functions in ``torch.distributed``."""
    dist.all_to_all_single = _with_sizes_as_lists(dist.all_to_all_single)
    dist.all_gather = _with_uneven_parts(dist.all_gather)
    dist.reduce_scatter = _with_uneven_sums(dist.reduce_scatter)


def _with_sizes_as_lists(original: Callable[..., Any]) -> Callable[..., Any]:
    def as_list(sizes: Any) -> Any:
        return sizes.tolist() if hasattr(sizes, "tolist") else sizes

    @functools.wraps(original)
    def all_to_all_single(
        output: torch.Tensor,
        input: torch.Tensor,
        output_split_sizes: Any = None,
        input_split_sizes: Any = None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        return original(output, input, as_list(output_split_sizes), as_list(input_split_sizes), *args, **kwargs)

    return all_to_all_single


def _with_uneven_parts(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def all_gather(
        tensor_list: list[torch.Tensor], tensor: torch.Tensor, group: Any = None, async_op: bool = False
    ) -> Any:
        if async_op or _even(tensor_list):
            return original(tensor_list, tensor, group=group, async_op=async_op)
        tensor_list[dist.get_rank(group)].copy_(tensor)
        for source, part in enumerate(tensor_list):
            dist.broadcast(part, _global_rank(group, source), group=group)
        return None

    return all_gather


def _with_uneven_sums(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def reduce_scatter(
        output: torch.Tensor, input_list: list[torch.Tensor], op: Any = dist.ReduceOp.SUM, group: Any = None,
        async_op: bool = False,
    ) -> Any:  # fmt: skip
        if async_op or _even(input_list):
            return original(output, input_list, op=op, group=group, async_op=async_op)
        own = dist.get_rank(group)
        for target, part in enumerate(input_list):
            summed = part.clone()  # a reduce may write into the inputs of ranks that do not get the sum
            dist.reduce(summed, _global_rank(group, target), op=op, group=group)
            if target == own:
                output.copy_(summed)
        return None

    return reduce_scatter


def _even(parts: Sequence[torch.Tensor]) -> bool:
    return len({part.shape for part in parts}) <= 1


def _global_rank(group: Any, rank: int) -> int:
    return rank if group is None else dist.get_global_rank(group, rank)
