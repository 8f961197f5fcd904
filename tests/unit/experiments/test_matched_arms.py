"""The experiment that this project ships is matched as it says: trained parameters, and operations."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pytest

from megatron_graft.experiments.cost import backbone_flops, fetched_per_token, site_flops
from megatron_graft.experiments.experiment import Experiment, load_experiment
from megatron_graft.experiments.runs import flag_list
from megatron_graft.ngram.hashing import DIALECTS, EngramConfig, layer_hashes
from megatron_graft.training.arguments import add_graft_arguments

YAML = Path(__file__).resolve().parents[3] / "examples" / "arms" / "matched_arms.yaml"
BANK_WIDTH, VOCAB_SIZE = 576, 8192
SCRIPT = {"num_heads": 4, "seq_length": 256, "moe_router_topk": 2}  # defaults of the example script


@pytest.fixture(scope="module")
def experiment() -> Experiment:
    return load_experiment(YAML)


def identity(experiment: Experiment, arm: str) -> dict[str, Any] | None:
    """The memory of an arm with one site, as checkpoints would keep it."""
    flags = experiment.arms[arm].flags
    has_table, has_bank = "engram-layers" in flags, experiment.arms[arm].bank is not None
    if not has_table and not has_bank:
        return None
    site = {
        "columns": [0, BANK_WIDTH] if has_bank else None,
        "engram_rows": table_rows(flags) if has_table else None,
        "combine": flags.get("graft-combine") if has_table and has_bank else None,
        "conv_kernel": 4,
    }
    return {"engram": {"dim": flags.get("engram-dim", 0), "max_order": 3}, "sites": {"2": site}}


def table_rows(flags: Any) -> int:
    config = EngramConfig(
        dialect=DIALECTS["deepseek"], max_order=3, heads=8, vocab_sizes=(flags["engram-vocab-size"],) * 2,
        dim=flags["engram-dim"], seed=0, pad_id=2, across_documents=False, layer_ids=((2, 1),),
    )  # fmt: skip
    return layer_hashes(config, VOCAB_SIZE)[2].num_rows


def trained_in_memory(experiment: Experiment, arm: str) -> int:
    memory, hidden = identity(experiment, arm), experiment.recipient["hidden-size"]
    if memory is None:
        return 0
    site = memory["sites"]["2"]
    width = (BANK_WIDTH if site["columns"] else 0) + (2 * memory["engram"]["dim"] if site["engram_rows"] else 0)
    head_dim = memory["engram"]["dim"] // 8
    return (site["engram_rows"] or 0) * head_dim + 2 * hidden * width


def backbone(experiment: Experiment, arm: str) -> int:
    flags = {**experiment.recipient, **experiment.arms[arm].flags}
    named = {name.replace("-", "_"): value for name, value in flags.items()} | SCRIPT
    return backbone_flops(named, VOCAB_SIZE, gated=True)


@pytest.mark.parametrize("arm", ["exclusive", "sum_shuffled", "sum_random", "engram"])
def test_core_memories_train_as_many_parameters_as_the_sum(experiment: Experiment, arm: str) -> None:
    wanted = trained_in_memory(experiment, "sum")
    assert abs(trained_in_memory(experiment, arm) - wanted) <= 1e-3 * wanted


def test_the_widened_arm_adds_the_operations_of_the_site(experiment: Experiment) -> None:
    added = backbone(experiment, "wide") - backbone(experiment, "none")
    wanted = site_flops(identity(experiment, "sum"), experiment.recipient["hidden-size"])
    assert abs(added - wanted) <= 0.01 * wanted


def test_seeds_and_bank_of_the_core_are_the_same(experiment: Experiment) -> None:
    core = [arm for arm in experiment.arms.values() if arm.group == "core"]
    assert len(core) == 7
    assert {arm.seeds for arm in core} == {(1, 2, 3)}
    assert all(experiment.same_keys(arm.bank, "real") for arm in core if arm.bank)


def test_flags_of_memory_are_ones_that_there_are(experiment: Experiment) -> None:
    parser = add_graft_arguments(argparse.ArgumentParser(allow_abbrev=False))
    for arm in experiment.arms.values():
        ours = {name: value for name, value in arm.flags.items() if name.startswith(("graft", "engram", "bank"))}
        _, unknown = parser.parse_known_args(flag_list(ours))
        assert not unknown, arm.name


def test_arms_of_other_steps_are_shown_against_arms_of_their_steps(experiment: Experiment) -> None:
    for arm in experiment.arms.values():
        for other in arm.against.values():
            assert experiment.arms[other].steps == arm.steps
        assert arm.group != "sweep" or set(arm.against) == {"none", "engram"}


def test_arms_of_a_sweep_vary_an_arm_of_their_steps_and_seeds(experiment: Experiment) -> None:
    crossings = {"short_none", "short_engram", "short_sum"}
    for arm in experiment.arms.values():
        assert (arm.varies in crossings) == (arm.group == "sweep" and arm.name not in crossings), arm.name
        if arm.varies:
            varied = experiment.arms[arm.varies]
            assert (arm.steps, arm.seeds) == (varied.steps, varied.seeds)
            assert set(arm.sweeps) <= set(varied.sweeps)


def test_every_hypothesis_is_about_core_arms(experiment: Experiment) -> None:
    for hypothesis in experiment.hypotheses:
        assert {experiment.arms[name].group for name in (hypothesis.better, hypothesis.worse)} == {"core"}


def test_exclusive_sites_fetch_one_memory_at_a_time(experiment: Experiment) -> None:
    assert fetched_per_token(identity(experiment, "exclusive")) == 576
    assert fetched_per_token(identity(experiment, "sum")) == 1152
    assert fetched_per_token(None) == site_flops(None, 192) == 0


def test_operations_of_a_dense_layer_by_hand() -> None:
    flags = {
        "num_layers": 1, "hidden_size": 8, "ffn_hidden_size": 16, "seq_length": 4, "num_experts": None,
        "moe_router_topk": None,
    }  # fmt: skip
    qkv, out, scores_and_values, up_and_down, logits = (
        2 * 8 * 24,
        2 * 8 * 8,
        2 * (2 * 2 * 8),
        2 * 2 * 8 * 16,
        2 * 8 * 10,
    )
    assert backbone_flops(flags, 10, gated=False) == qkv + out + scores_and_values + up_and_down + logits
