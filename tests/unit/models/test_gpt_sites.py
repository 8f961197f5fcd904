"""The memory in a whole model: what it may change, and when."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_graft.bank.bf16 import bf16_from_float32
from megatron_graft.bank.writer import write_bank
from tests.helpers.banks import bank_arguments
from tests.helpers.isolated import run_isolated
from tests.helpers.site_model import SITE_LAYERS, VOCAB, observe

OF_ALL = {"key_norm", "query_norm", "conv_norm", "conv_kernel"}
OF_GRAFT = {"graft.key_weight", "graft.value_weight"}
OF_ENGRAM = {"engram.key_weight", "engram.value_weight", "engram.table"}
SITE_PARAMETERS = {1: OF_ALL | OF_GRAFT, 3: OF_ALL | OF_GRAFT | OF_ENGRAM, 4: OF_ALL | OF_ENGRAM}


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    generator = np.random.default_rng(0)
    counts = {tuple(map(int, generator.integers(1, VOCAB, order))): 5 for order in (2, 3) for _ in range(700)}
    path: Path = tmp_path_factory.mktemp("sites") / "bank"
    arguments = bank_arguments(counts, vocab_size=VOCAB, width=8)
    arguments["layers"] = {12: bf16_from_float32(generator.standard_normal((len(counts), 8), dtype=np.float32))}
    write_bank(path, **arguments)  # type: ignore[arg-type]
    return run_isolated(observe, path)


def test_a_fresh_model_with_sites_equals_the_stock_model_bit_for_bit(seen: dict[str, Any]) -> None:
    assert seen["hits"] > 10, "the memory must have something to say"
    assert torch.equal(seen["fresh"], seen["stock"])


def test_a_dense_model_takes_sites_as_a_mixture_of_experts_does(seen: dict[str, Any]) -> None:
    assert torch.equal(seen["dense_fresh"], seen["dense_stock"])
    assert (seen["dense_grafted"] - seen["dense_stock"]).abs().max() > 1e-2


def test_sites_change_no_other_parameters_initial_value(seen: dict[str, Any]) -> None:
    stock, grafted = seen["stock_parameters"], seen["grafted_parameters"]
    assert all(torch.equal(grafted[name], value) for name, value in stock.items())
    extra = {name for name in grafted if name not in stock}
    assert extra == {
        f"decoder.layers.{layer - 1}.memory.{name}" for layer in SITE_LAYERS for name in SITE_PARAMETERS[layer]
    }


def test_randomised_sites_matter_and_bypassing_them_gives_the_stock_model_back(seen: dict[str, Any]) -> None:
    assert (seen["grafted"] - seen["stock"]).abs().max() > 1e-2
    assert torch.equal(seen["bypassed"], seen["stock"])


@pytest.mark.parametrize("layer", SITE_LAYERS)
def test_each_site_matters_on_its_own(seen: dict[str, Any], layer: int) -> None:
    alone = seen[f"layer_{layer}_alone"]
    assert (alone - seen["stock"]).abs().max() > 1e-2
    assert (alone - seen["grafted"]).abs().max() > 1e-2


def test_changing_a_token_changes_nothing_before_it(seen: dict[str, Any]) -> None:
    assert torch.equal(seen["grafted"][:, :15], seen["changed_at_15"][:, :15])
    assert (seen["grafted"][:, 15:] - seen["changed_at_15"][:, 15:]).abs().amax(dim=(0, 2)).min() > 0


def test_a_site_without_memory_is_an_error_not_a_silent_miss(seen: dict[str, Any]) -> None:
    assert "brought no memory" in seen["without_memory"]
    assert "brought no memory" in seen["without_exchange"]


def test_a_site_can_be_put_into_its_own_layer_only(seen: dict[str, Any]) -> None:
    assert "site of layer 1 was put into another layer" in seen["in_another_layer"]


def test_the_backbone_keeps_the_stock_checkpoint_keys_and_sites_have_their_own(seen: dict[str, Any]) -> None:
    stock, grafted = seen["stock_keys"], seen["grafted_keys"]
    assert {key: grafted[key] for key in stock} == stock
    extra = {key for key in grafted if key not in stock}
    assert extra == {
        f"decoder.layers.memory_{layer}.{name}" for layer in SITE_LAYERS for name in SITE_PARAMETERS[layer]
    }
    assert grafted["decoder.layers.memory_1.graft.key_weight"] == (32, 8)
    assert grafted["decoder.layers.memory_4.engram.key_weight"] == (32, 12)
    for layer, rows in seen["table_rows"].items():
        assert grafted[f"decoder.layers.memory_{layer}.engram.table"] == (rows, 2)
