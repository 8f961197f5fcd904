"""A transformer layer with a memory site before its attention.

The micro-batch's memory arrives through ``context`` and, what stays on the host, ``context_mask``: the arguments that
Megatron's block hands unchanged to every layer of a decoder-only model, saves as inputs of recomputed blocks, and
otherwise uses for cross-attention alone.

Checkpoint keys: the backbone keeps the stock keys, in which all layers share one name and are told apart by an offset.
A site belongs to one layer, so it is saved without that offset as ``...memory_<layer_number>.<parameter>``; a stock
checkpoint and one with sites then differ by whole keys only.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.transformer.transformer_layer import TransformerLayer

from megatron_graft.data.memory_layout import MemoryLayout
from megatron_graft.data.partition import Partition
from megatron_graft.memory.site import MemorySite, SiteConfig

MEMORY_ARGUMENTS = ("context", "context_mask")
_NAME = "memory"


class MemoryLayerMixin:
    """Adds a site to a ``TransformerLayer`` class; see :func:`with_memory_site`."""

    memory: MemorySite

    def __init__(self, *args: Any, site: SiteConfig, layout: MemoryLayout, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.layer_number != site.reading.layer_number:  # type: ignore[attr-defined]
            raise RuntimeError(f"the site of layer {site.reading.layer_number} was put into another layer")
        groups = self.pg_collection  # type: ignore[attr-defined]
        self.memory = MemorySite(self.config, site, layout, groups.tp, sequence_group(layout.partition, groups))  # type: ignore[attr-defined]

    def forward(
        self,
        hidden_states: torch.Tensor,
        *args: Any,
        context: torch.Tensor | None = None,
        context_mask: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The stock layer on hidden states ``[s, b, h]`` to which the site has added the micro-batch's memory.

        ``context`` and ``context_mask`` are ``packed`` and ``exchange`` of a
        :class:`~megatron_graft.data.microbatch.MicroBatchMemory`.
        """
        if context is not None and context_mask is not None:
            hidden_states = self.memory(hidden_states, context, context_mask)
        elif not self.memory.bypassed:
            raise RuntimeError(
                f"layer {self.memory.layer_number} has a memory site but the micro-batch brought no memory; pass "
                "extra_block_kwargs={'context': memory.packed, 'context_mask': memory.exchange} or bypass the site"
            )
        output, _ = super().forward(hidden_states, *args, context=None, **kwargs)  # type: ignore[misc]
        return output, context

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """The stock layer's keys, and the site's under its own, offset-free prefix."""
        site = self._modules.pop(_NAME)  # type: ignore[attr-defined]
        try:
            sharded = super().sharded_state_dict(prefix, sharded_offsets, metadata)  # type: ignore[misc]
        finally:
            self._modules[_NAME] = site  # type: ignore[attr-defined]
        for name, entry in self.memory.sharded_state_dict(f"{prefix}{_NAME}.", (), metadata).items():
            if isinstance(entry, ShardedTensor):
                entry.key = f"{prefix}{_NAME}_{self.memory.layer_number}.{name.removeprefix(f'{prefix}{_NAME}.')}"
            sharded[name] = entry
        return sharded


def sequence_group(partition: Partition, groups: Any) -> Any:
    """The group of the ranks over which a sequence is split, of Megatron's ``ProcessGroupCollection``; or None."""
    if partition.context_size == 1:
        return groups.tp if partition.sequence_parts > 1 else None
    return groups.tp_cp if partition.sequence_parts > 1 else groups.cp


@functools.cache
def with_memory_site(layer_class: type[TransformerLayer]) -> type[TransformerLayer]:
    """The given layer class with a memory site; its constructor takes two more keywords, ``site`` and ``layout``."""
    return type(f"Memory{layer_class.__name__}", (MemoryLayerMixin, layer_class), {})
