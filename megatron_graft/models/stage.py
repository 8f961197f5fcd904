"""Which memory sites lie on this rank's pipeline stage, and what a micro-batch must bring them.

The model and the look-ahead ask the same functions, so what arrives is what is read. Process groups must exist.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron.core import parallel_state
from megatron.core.transformer.transformer_block import get_num_layers_to_build
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

from megatron_graft.data.memory_layout import MemoryLayout
from megatron_graft.data.partition import Partition
from megatron_graft.memory.site import SiteConfig


def stage_sites(
    sites: Mapping[int, SiteConfig], transformer_config: Any, vp_stage: int | None = None
) -> dict[int, SiteConfig]:
    """Those of the run's sites, by global layer number, that this pipeline stage holds."""
    first = get_transformer_layer_offset(transformer_config, vp_stage=vp_stage) + 1
    end = first + get_num_layers_to_build(transformer_config, vp_stage=vp_stage)
    return {layer: site for layer, site in sites.items() if first <= layer < end}


def stage_layout(sites: Mapping[int, SiteConfig], transformer_config: Any) -> MemoryLayout:
    """What one micro-batch brings to the given sites of this stage, on this rank."""
    partition = Partition(
        rank=parallel_state.get_tensor_model_parallel_rank(),
        size=parallel_state.get_tensor_model_parallel_world_size(),
        sequence_parallel=transformer_config.sequence_parallel,
        context_rank=parallel_state.get_context_parallel_rank(),
        context_size=parallel_state.get_context_parallel_world_size(),
    )
    return MemoryLayout.of((site.reading for site in sites.values()), partition)
