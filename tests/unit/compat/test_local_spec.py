"""The modules put into Megatron's local layer spec compute what the stock ones do, or leave these in place."""

from __future__ import annotations

import contextlib
import types
from typing import Any

import pytest

from tests.helpers.isolated import run_isolated

LAYER = 3  # scaling by layer would divide by it
SPECIAL: list[dict[str, Any]] = [
    {"attention_dropout": 0.1},
    {"apply_query_key_layer_scaling": True},
    {"window_size": (2, 0)},
    {"softmax_type": "off-by-one"},
]


def config_of(**changes: Any) -> Any:
    from megatron.core.transformer.transformer_config import TransformerConfig

    flags = {"attention_dropout": 0.0, "masked_softmax_fusion": False, "persist_layer_norm": False} | changes
    return TransformerConfig(num_layers=4, hidden_size=16, num_attention_heads=2, **flags)


def core_attention_of(**changes: Any) -> tuple[Any, Any]:
    """The configuration, and the class of core attention in the completed spec."""
    from megatron_graft.compat import cpu

    cpu.install()
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec

    from megatron_graft.compat.local_spec import complete_local_spec

    config = config_of(**changes)
    spec = complete_local_spec(get_gpt_layer_local_spec(), config)
    return config, spec.submodules.self_attention.submodules.core_attention


def classes() -> list[str]:
    return [getattr(core_attention_of(**changes)[1], "__name__", "") for changes in [{}, *SPECIAL]]


def test_attention_that_is_more_than_causal_softmax_stays_stock() -> None:
    assert run_isolated(classes) == ["FusedCoreAttention", *["DotProductAttention"] * len(SPECIAL)]


def largest_difference(changes: dict[str, Any]) -> float:
    """Between what the completed spec's core attention and the stock one make of the same input."""
    config, chosen = core_attention_of(**changes)
    import torch
    from megatron.core import parallel_state, tensor_parallel
    from megatron.core.transformer.dot_product_attention import DotProductAttention
    from megatron.core.transformer.enums import AttnMaskType

    tensor_parallel.get_cuda_rng_tracker = lambda: types.SimpleNamespace(fork=contextlib.nullcontext)
    parallel_state._set_global_memory_buffer()
    one = types.SimpleNamespace(tp=types.SimpleNamespace(size=lambda: 1, rank=lambda: 0))
    query, key, value = (2 * torch.randn(8, 1, 2, 8) for _ in range(3))
    later = torch.triu(torch.ones(8, 8), 1).bool()[None, None]
    results = [
        module(
            config, layer_number=LAYER, attn_mask_type=AttnMaskType.causal, attention_type="self", pg_collection=one
        )(query, key, value, later)
        for module in (chosen, DotProductAttention)
    ]
    return float((results[0] - results[1]).abs().max())


@pytest.mark.parametrize("changes", [{}, {"apply_query_key_layer_scaling": True}, {"window_size": (2, 0)}])
def test_core_attention_gives_what_the_stock_one_gives(changes: dict[str, Any]) -> None:
    assert run_isolated(largest_difference, changes) < 2e-6


def refusal_of_centred_weights() -> str:
    try:
        config, _ = core_attention_of(layernorm_zero_centered_gamma=True)
        from megatron_graft.compat.local_spec import TaggedTorchNorm

        TaggedTorchNorm(config, 8)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "none"


def test_norms_whose_weights_are_kept_less_one_are_refused() -> None:
    assert run_isolated(refusal_of_centred_weights).startswith("ConfigError: --apply-layernorm-1p: is not known to")
