"""A small GPT-MoE with memory sites in one process, and what it does under changes of its input."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

SITE_LAYERS, VOCAB, POSITIONS = (1, 3, 4), 32, 24


def observe(bank_path: Path) -> dict[str, Any]:
    """Everything the tests assert on, from one process start."""
    from megatron_graft.compat import cpu

    cpu.install()
    import torch

    _start_megatron()
    from megatron_graft.bank.reader import open_bank
    from megatron_graft.training.evaluation import bypassed
    from tests.helpers.memories import layout_of

    memory = memory_of(open_bank(bank_path))
    fetcher = memory.fetcher(layout_of(memory))
    stock, grafted = build({}), build(memory.sites)
    tokens = torch.randint(1, VOCAB, (2, POSITIONS), generator=torch.Generator().manual_seed(0))
    fetched = fetcher.fetch(tokens, 0).memory
    seen: dict[str, Any] = {
        "hits": int((fetched.order_BS(0) > 0).sum()),
        "table_rows": {
            layer: site.reading.engram.num_rows for layer, site in memory.sites.items() if site.reading.engram
        },
        "stock": _logits(stock, tokens, None),
        "fresh": _logits(grafted, tokens, fetcher),
        "stock_keys": _checkpoint_keys(stock),
        "grafted_keys": _checkpoint_keys(grafted),
        "stock_parameters": {name: p.detach().clone() for name, p in stock.named_parameters()},
        "grafted_parameters": {name: p.detach().clone() for name, p in grafted.named_parameters()},
    }
    randomise(grafted)
    seen["grafted"] = _logits(grafted, tokens, fetcher)
    changed = tokens.clone()
    changed[:, 15] = tokens[:, 15] % (VOCAB - 1) + 1
    seen["changed_at_15"] = _logits(grafted, changed, fetcher)
    with bypassed(grafted):
        seen["bypassed"] = _logits(grafted, tokens, None)
    for layer in SITE_LAYERS:
        with bypassed(grafted):
            _site_of(grafted, layer).bypassed = False
            seen[f"layer_{layer}_alone"] = _logits(grafted, tokens, fetcher)
    seen["without_memory"] = _error(lambda: _logits(grafted, tokens, None))
    seen["without_exchange"] = _error(lambda: _logits(grafted, tokens, None, {"context": fetched.packed}))
    seen["in_another_layer"] = _error(lambda: build({3: memory.sites[1]}))
    seen["dense_stock"] = _logits(build({}, num_experts=None), tokens, None)
    dense = build(memory.sites, num_experts=None)
    seen["dense_fresh"] = _logits(dense, tokens, fetcher)
    randomise(dense)
    seen["dense_grafted"] = _logits(dense, tokens, fetcher)
    return seen


def memory_of(bank: Any) -> Any:
    """A run's memory: layer 1 reads the bank, layer 3 the bank and a table, layer 4 a table."""
    import numpy as np

    from megatron_graft.data.memory_layout import SiteReading
    from megatron_graft.data.token_compression import CompressedVocabulary
    from megatron_graft.ngram.hashing import layer_hashes
    from megatron_graft.training.memory_setup import RunEngram
    from tests.helpers.memories import engram_reading, graft_reading, small_memory, small_tables

    config = small_tables((3, 4)).config
    vocabulary = CompressedVocabulary(ids=np.arange(VOCAB, dtype=np.int32), size=VOCAB)
    engram = RunEngram(config=config, vocabulary=vocabulary, hashes=layer_hashes(config, VOCAB))
    readings = [
        SiteReading(layer_number=1, graft=graft_reading(bank)),
        SiteReading(layer_number=3, graft=graft_reading(bank), engram=engram_reading(engram, 3), exclusive=True),
        SiteReading(layer_number=4, engram=engram_reading(engram, 4)),
    ]
    return small_memory(*readings, banks=[bank], engram=engram, conv_dilation=bank.max_order)


def _site_of(model: Any, layer: int) -> Any:
    from megatron_graft.memory.site import MemorySite

    (site,) = (m for m in model.modules() if isinstance(m, MemorySite) and m.layer_number == layer)
    return site


def _error(action: Callable[[], Any]) -> str:
    try:
        action()
    except RuntimeError as error:
        return str(error)
    return "ran"


def _start_megatron() -> None:
    import torch
    from megatron.core import parallel_state, tensor_parallel

    os.environ.update(RANK="0", WORLD_SIZE="1", MASTER_ADDR="localhost", MASTER_PORT="0")  # any that is free
    torch.distributed.init_process_group("gloo")
    parallel_state.initialize_model_parallel()
    tensor_parallel.model_parallel_cuda_manual_seed(1234)


def build(sites: Mapping[int, Any], num_experts: int | None = 4) -> Any:
    """A fresh model; the same seed gives the same backbone."""
    import torch
    from megatron.core import tensor_parallel
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.transformer.transformer_config import TransformerConfig
    from megatron.training.models.gpt import GPTModelConfig

    from megatron_graft.models.gpt import layer_spec_factory

    tensor_parallel.model_parallel_cuda_manual_seed(1234, force_reset_rng=True)
    experts: dict[str, Any] = {}
    if num_experts:
        experts = {
            "num_moe_experts": num_experts, "moe_router_topk": 2, "moe_aux_loss_coeff": 1e-2,
            "moe_router_load_balancing_type": "aux_loss", "moe_token_dispatcher_type": "alltoall",
        }  # fmt: skip
    transformer = TransformerConfig(
        num_layers=4, hidden_size=32, num_attention_heads=4, ffn_hidden_size=48, **experts,
        add_bias_linear=False, gated_linear_unit=True, activation_func=torch.nn.functional.silu,
        normalization="RMSNorm", hidden_dropout=0.0, attention_dropout=0.0, gradient_accumulation_fusion=False,
        bias_dropout_fusion=False, masked_softmax_fusion=False, bias_activation_fusion=False, apply_rope_fusion=False,
        persist_layer_norm=False, transformer_impl="local",
    )  # fmt: skip
    config = GPTModelConfig(
        transformer=transformer, vocab_size=VOCAB, seq_length=POSITIONS, position_embedding_type="rope",
        transformer_layer_spec=layer_spec_factory(sites),
    )  # fmt: skip
    return config.get_builder_cls()(config).build_model(ProcessGroupCollection.use_mpu_process_groups())


def randomise(model: Any) -> None:
    """Give every parameter of every site a value that matters; a fresh site would hide any fault."""
    import torch

    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".memory." in name:
                parameter += 0.5 * torch.randn(parameter.shape, generator=generator)


def _logits(model: Any, tokens: Any, fetcher: Any, carried: dict[str, Any] | None = None) -> Any:
    import torch

    if fetcher is not None:
        memory = fetcher.fetch(tokens, 0).memory
        carried = {"context": memory.packed, "context_mask": memory.exchange}
    positions = torch.arange(tokens.shape[1]).expand_as(tokens)
    with torch.no_grad():
        return model(tokens, positions, None, extra_block_kwargs=carried)


def _checkpoint_keys(model: Any) -> dict[str, tuple[int, ...]]:
    """Checkpoint key -> global shape."""
    from megatron.core import parallel_state
    from megatron.core.dist_checkpointing.mapping import ShardedTensor

    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    entries = model.sharded_state_dict(metadata={"dp_cp_group": group, "chained_optim_avoid_prefix": True})
    return {entry.key: entry.global_shape for entry in entries.values() if isinstance(entry, ShardedTensor)}
