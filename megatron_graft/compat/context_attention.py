"""Core attention under context parallelism without Transformer Engine: Megatron's own refuses it.

A context-parallel rank has two chunks of every sequence, one from the front and its mirror image from the back
(``get_batch_on_this_cp_rank``). It gathers keys and values of all ranks and attends with its own queries, masked by
positions in the whole sequence. Memory and traffic grow with the whole sequence: for tests and small runs.

Shapes: S positions of the whole sequence, s of this rank, C context-parallel ranks.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer.dot_product_attention import DotProductAttention


class ContextParallelAttention(DotProductAttention):  # type: ignore[misc]
    """Causal attention of a rank's queries to all keys; same arguments and shapes as the class it replaces."""

    def __init__(self, config: Any, *args: Any, pg_collection: Any, **kwargs: Any) -> None:
        alone = copy.copy(config)
        alone.context_parallel_size = 1
        super().__init__(alone, *args, pg_collection=pg_collection, **kwargs)
        self.config, self.cp_group = config, pg_collection.cp

    def forward(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: Any, *_: Any, **__: Any
    ) -> torch.Tensor:
        """``[s, b, heads, d]`` each -> ``[s, b, heads * d]``; the mask is causal whatever is passed."""
        length = query.shape[0] * self.cp_group.size()
        order = torch.cat([positions_of(rank, self.cp_group.size(), length) for rank in range(self.cp_group.size())])
        keys, values = (gather_from_sequence_parallel_region(part, group=self.cp_group) for part in (key, value))
        mine = positions_of(self.cp_group.rank(), self.cp_group.size(), length)
        mask = (mine[:, None] >= order[None, :]).to(query.device)
        q, k, v = (part.permute(1, 2, 0, 3) for part in (query, keys, values))
        context = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, scale=self.softmax_scale, enable_gqa=q.shape[1] != k.shape[1]
        )
        return context.permute(2, 0, 1, 3).reshape(query.shape[0], query.shape[1], -1)


def positions_of(rank: int, ranks: int, length: int) -> torch.Tensor:
    """int64 ``[s]``, which of the ``length`` positions of a sequence a context-parallel rank has, in its order."""
    front, back = (torch.arange(length).chunk(2 * ranks)[chunk] for chunk in (rank, 2 * ranks - 1 - rank))
    return torch.cat([front, back])
