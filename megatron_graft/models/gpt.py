"""GPT and GPT-MoE: the stock layer spec, completed where the local spec has gaps, with memory sites put in.

``GPTModel`` is named by Megatron's own builder only; this module hands that builder a layer spec, so a move to its
successor changes this file alone.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import (
    LayerNormImpl,
    TransformerBlockSubmodules,
    get_num_layers_to_build,
)
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset
from megatron.training.models.gpt import GPTModelConfig, default_layer_spec

from megatron_graft.compat.local_spec import complete_local_spec
from megatron_graft.data.memory_layout import MemoryLayout
from megatron_graft.memory.layer import MEMORY_ARGUMENTS, with_memory_site
from megatron_graft.memory.site import SiteConfig
from megatron_graft.models.stage import stage_layout, stage_sites

type LayerSpec = ModuleSpec | TransformerBlockSubmodules


def layer_spec_factory(sites: Mapping[int, SiteConfig]) -> Callable[..., LayerSpec]:
    """What to put into ``GPTModelConfig.transformer_layer_spec``.

    Args:
        sites: the run's memory sites by global, 1-based layer number; empty for the stock model.

    Returns:
        A function of ``(model_config, vp_stage)`` that Megatron's builder calls on each pipeline stage.
    """

    def build(config: GPTModelConfig, vp_stage: int | None = None) -> LayerSpec:
        if not sites:
            return _completed(default_layer_spec(config, vp_stage), config)
        block = _completed(_block_spec(config, vp_stage), config)
        return add_memory_sites(config.transformer, block, sites, vp_stage)

    return build


def keep_memory_from_mtp(chunks: list[Any]) -> list[Any]:
    """What to put into ``GPTModelConfig.pre_wrap_hooks``: multi-token-prediction layers get no memory.

    Megatron builds them from the stock layer spec, and hands them what it hands the decoder; they refuse a ``context``.
    """
    for chunk in chunks:
        prediction = getattr(chunk, "mtp", None)
        if prediction is not None:
            prediction.register_forward_pre_hook(_without_memory, with_kwargs=True)
    return chunks


def _without_memory(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return args, {name: value for name, value in kwargs.items() if name not in MEMORY_ARGUMENTS}


def _block_spec(config: GPTModelConfig, vp_stage: int | None) -> TransformerBlockSubmodules:
    """The stock spec, one per layer of this stage; that of a dense model is a single one, which its layers share."""
    spec = default_layer_spec(config, vp_stage)
    if isinstance(spec, TransformerBlockSubmodules):
        return spec
    layers = get_num_layers_to_build(config.transformer, vp_stage)
    return TransformerBlockSubmodules(layer_specs=[spec] * layers, layer_norm=LayerNormImpl)


def _completed(spec: LayerSpec, config: GPTModelConfig) -> LayerSpec:
    if config.transformer.transformer_impl != "local":
        return spec
    return complete_local_spec(spec, config.transformer)


def add_memory_sites(
    transformer_config: Any,
    block: TransformerBlockSubmodules,
    sites: Mapping[int, SiteConfig],
    vp_stage: int | None = None,
) -> TransformerBlockSubmodules:
    """A block spec of this pipeline stage with its share of the run's memory sites put in.

    Entries of a block spec are shared objects, so they are replaced, never changed in place.
    """
    here = stage_sites(sites, transformer_config, vp_stage)
    layout = stage_layout(here, transformer_config)
    first = get_transformer_layer_offset(transformer_config, vp_stage=vp_stage) + 1
    layers = [
        _with_site(spec, here[layer], layout) if layer in here else spec
        for layer, spec in enumerate(block.layer_specs, start=first)
    ]
    return dataclasses.replace(block, layer_specs=layers)


def _with_site(spec: ModuleSpec, site: SiteConfig, layout: MemoryLayout) -> ModuleSpec:
    params = {**(spec.params or {}), "site": site, "layout": layout}
    return ModuleSpec(module=with_memory_site(spec.module), submodules=spec.submodules, params=params)
