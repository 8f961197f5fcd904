"""GPT and GPT-MoE: the stock layer spec, completed where the local spec has gaps, with memory sites put in.

``GPTModel`` is named by Megatron's own builder only; this module hands that builder a layer spec, so a move to its
successor changes this file alone.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset
from megatron.training.models.gpt import GPTModelConfig, default_layer_spec

from megatron_graft.compat.local_spec import complete_local_spec
from megatron_graft.memory.layer import with_memory_site
from megatron_graft.memory.site import SiteConfig

type LayerSpec = ModuleSpec | TransformerBlockSubmodules


def layer_spec_factory(site_layers: Sequence[int], site: SiteConfig | None) -> Callable[..., LayerSpec]:
    """What to put into ``GPTModelConfig.transformer_layer_spec``.

    Args:
        site_layers: global, 1-based numbers of the layers that get a memory site; empty for the stock model.
        site: configuration of those sites; required where there are any.

    Returns:
        A function of ``(model_config, vp_stage)`` that Megatron's builder calls on each pipeline stage.
    """

    def build(config: GPTModelConfig, vp_stage: int | None = None) -> LayerSpec:
        if not site_layers or site is None:
            return _completed(default_layer_spec(config, vp_stage), config)
        block = _completed(_block_spec(config, vp_stage), config)
        return add_memory_sites(config.transformer, block, site_layers, site, vp_stage)

    return build


def _block_spec(config: GPTModelConfig, vp_stage: int | None) -> TransformerBlockSubmodules:
    """One spec per layer of this stage, also for dense models, whose default is a single shared spec."""
    transformer = config.transformer
    return get_gpt_decoder_block_spec(
        transformer,
        use_transformer_engine=transformer.transformer_impl == "transformer_engine",
        normalization=transformer.normalization,
        qk_l2_norm=transformer.qk_l2_norm,
        vp_stage=vp_stage,
    )


def _completed(spec: LayerSpec, config: GPTModelConfig) -> LayerSpec:
    if config.transformer.transformer_impl != "local":
        return spec
    return complete_local_spec(spec, attention_dropout=config.transformer.attention_dropout)


def add_memory_sites(
    transformer_config: Any,
    block: TransformerBlockSubmodules,
    site_layers: Sequence[int],
    site: SiteConfig,
    vp_stage: int | None = None,
) -> TransformerBlockSubmodules:
    """A block spec of this pipeline stage with memory sites in the chosen layers.

    Entries of a block spec are shared objects, so they are replaced, never changed in place.
    """
    offset = get_transformer_layer_offset(transformer_config, vp_stage=vp_stage)
    layers = [
        _with_site(spec, site) if offset + local in site_layers else spec
        for local, spec in enumerate(block.layer_specs, start=1)
    ]
    return dataclasses.replace(block, layer_specs=layers)


def _with_site(spec: ModuleSpec, site: SiteConfig) -> ModuleSpec:
    return ModuleSpec(
        module=with_memory_site(spec.module), submodules=spec.submodules, params={**(spec.params or {}), "site": site}
    )
