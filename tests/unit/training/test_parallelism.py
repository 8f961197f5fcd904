"""The table of what sites serve and what is refused: its flags, its page and its layouts are all real."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pytest

from megatron_graft.errors import ConfigError
from megatron_graft.training import parallelism
from megatron_graft.training.arguments import graft_settings
from megatron_graft.training.parallelism import (
    ALL_REFUSED,
    REFUSED,
    REFUSED_DATA,
    REFUSED_WITH_OWN_RATES,
    REFUSED_WITH_TRAINED_ROWS,
    SERVED,
    Refused,
)
from tests.helpers.isolated import run_isolated
from tests.helpers.layouts import LAYOUTS
from tests.unit.training.test_arguments import MEGATRON_DEFAULTS, WITH_BANK, WITH_TABLES, namespace

PAGE = Path(__file__).resolve().parents[3] / "docs" / "parallelism.md"

# By flag: Megatron's validated arguments that ask for the dimension, each of them alone.
ASKED: dict[str, list[dict[str, Any]]] = {
    "--tensor-model-parallel-size": [{"tensor_model_parallel_size": 2, "num_experts": 4}],
    "--cuda-graph-impl": [{"cuda_graph_impl": "local"}, {"cuda_graph_impl": "transformer_engine"}],
    "--init-model-with-meta-device": [{"init_model_with_meta_device": True}],
    "--use-megatron-fsdp": [{"use_megatron_fsdp": True}],
    "--use-torch-fsdp2": [{"use_torch_fsdp2": True}],
    "--fp16": [{"fp16": True}],
    "--ckpt-format": [{"ckpt_format": "torch"}, {"ckpt_format": "fsdp_dtensor"}],
    "--non-persistent-ckpt-type": [{"non_persistent_ckpt_type": "global"}, {"non_persistent_ckpt_type": "local"}],
    "--heterogeneous-layers-config-path": [
        {"heterogeneous_layers_config_path": "layers.json"}, {"heterogeneous_layers_config_encoded_json": "{}"},
    ],
    "--experimental-attention-variant": [{"experimental_attention_variant": "dsa"}],
    "--attention-backend": [{"attention_backend": "local", "transformer_impl": "transformer_engine"}],
    "--tensor-parallel-num-weight-shards": [{"gtp_weight_remat_size": 2}, {"expert_gtp_weight_remat_size": 2}],
    "--fim-data": [{"fim_data": True}],
    "--inprocess-restart": [{"inprocess_restart": True}],
    "--spec": [{"spec": ["module", "name"]}],
    "--optimizer": [{"optimizer": "sgd"}, {"optimizer": "muon"}],
    "--use-mup": [{"use_mup": True}],
    "--optimizer-cpu-offload": [{"optimizer_cpu_offload": True}],
    "--attention-dropout": [
        {"attention_dropout": 0.1, "context_parallel_size": 2, "transformer_impl": "local"},
        {"attention_dropout": 0.1, "dataloader_inter_document_masking": True, "transformer_impl": "local"},
    ],
    "--transformer-impl": [
        {"apply_query_key_layer_scaling": True, "context_parallel_size": 2},
        {"window_size": (8, 0), "dataloader_inter_document_masking": True},
        {"softmax_type": "learnable", "context_parallel_size": 2},
    ],
    "--iterations-to-skip": [
        {"iterations_to_skip": [3], "tensor_model_parallel_size": 2, "sequence_parallel": True},
        {"iterations_to_skip": [3], "context_parallel_size": 2},
        {"iterations_to_skip": [3], "virtual_pipeline_model_parallel_size": 2},
    ],
    "--mtp-num-layers": [
        {"mtp_num_layers": 1, "tensor_model_parallel_size": 2, "sequence_parallel": True},
        {"mtp_num_layers": 1, "context_parallel_size": 2},
        {"mtp_num_layers": 1, "dataloader_inter_document_masking": True},
    ],
    "--hybrid-context-parallel": [{"hybrid_context_parallel": True}],
    "--overlap-moe-expert-parallel-comm": [{"overlap_moe_expert_parallel_comm": True}],
    "--dataloader-type": [{"dataloader_type": "single"}, {"dataloader_type": "cyclic"}],
    "--full-validation": [{"full_validation": True}],
    "--multiple-validation-sets": [{"multiple_validation_sets": True}],
    "--phase-transition-iterations": [{"phase_transition_iterations": [5]}],
    "--sft": [{"sft": True}],
    "--dataloader-inter-document-masking": [
        {"dataloader_inter_document_masking": True, "tensor_model_parallel_size": 2, "sequence_parallel": True},
        {"dataloader_inter_document_masking": True, "context_parallel_size": 2},
        {"dataloader_inter_document_masking": True, "pipeline_model_parallel_size": 2, "micro_batch_size": 2},
        {"dataloader_inter_document_masking": True, "pipeline_model_parallel_size": 2, "eval_micro_batch_size": 2},
    ],
    "--reset-attention-mask": [{"reset_attention_mask": True}],
    "--graft-rows": [{"tensor_model_parallel_size": 2}],  # a dense model
}  # fmt: skip
OURS = {"--graft-rows"}
TRAINED_ROWS = [[*WITH_BANK, "--graft-rows", rows] for rows in ("trained", "fresh")]


def asked(*tables: tuple[Refused, ...]) -> list[tuple[Refused, dict[str, Any]]]:
    """Every row of some tables with each of the arguments that ask for it."""
    return [(row, megatron) for table in tables for row in table for megatron in ASKED[row.flag]]


def refusal(argv: list[str], megatron: dict[str, Any]) -> ConfigError | None:
    try:
        graft_settings(namespace(argv, **megatron))
    except ConfigError as error:
        return error
    return None


def require_refused(row: Refused, argv: list[str], megatron: dict[str, Any]) -> None:
    error = refusal(argv, megatron)
    assert error is not None and error.subject == row.flag
    value = vars(namespace(argv, **megatron)).get(row.flag.removeprefix("--").replace("-", "_"))
    got = "" if value is None else f" (got {value})"  # another argument asks for it
    assert str(error) == f"{row.flag}: is not supported here: {row.why}{got}. {row.remedy}"


def test_every_refused_row_is_tried() -> None:
    flags = [row.flag for row in ALL_REFUSED]
    assert sorted(flags) == sorted(ASKED), "each flag has one row"


@pytest.mark.parametrize(("row", "megatron"), asked(REFUSED))
def test_what_sites_cannot_serve_is_refused_by_its_flag_and_runs_without_sites(
    row: Refused, megatron: dict[str, Any]
) -> None:
    require_refused(row, WITH_BANK, megatron)
    require_refused(row, WITH_TABLES, megatron)
    assert refusal([], megatron) is None


@pytest.mark.parametrize(("row", "megatron"), asked(REFUSED_WITH_OWN_RATES))
def test_what_rates_of_its_own_forbid_is_refused_by_its_flag_and_runs_with_a_bank(
    row: Refused, megatron: dict[str, Any]
) -> None:
    require_refused(row, WITH_TABLES, megatron)
    require_refused(row, [*WITH_BANK, *WITH_TABLES], megatron)
    require_refused(row, [*WITH_BANK, "--graft-lr-mult", "2"], megatron)
    for argv in TRAINED_ROWS:
        require_refused(row, argv, megatron)
    assert refusal(WITH_BANK, megatron) is None
    assert refusal([], megatron) is None


@pytest.mark.parametrize(("row", "megatron"), asked(REFUSED_WITH_TRAINED_ROWS))
def test_what_trained_rows_forbid_is_refused_by_its_flag_and_runs_with_frozen_ones(
    row: Refused, megatron: dict[str, Any]
) -> None:
    for argv in TRAINED_ROWS:
        require_refused(row, argv, megatron)
        require_refused(row, [*argv, *WITH_TABLES], megatron)
        assert refusal(argv, megatron | {"sequence_parallel": True}) is None
    for argv in ([], WITH_BANK, WITH_TABLES, [*WITH_BANK, *WITH_TABLES]):
        assert refusal(argv, megatron) is None


@pytest.mark.parametrize(("row", "megatron"), asked(REFUSED_DATA))
def test_what_the_data_iterator_cannot_serve_is_refused_even_without_a_memory(
    row: Refused, megatron: dict[str, Any]
) -> None:
    for argv in ([], WITH_BANK, WITH_TABLES, *TRAINED_ROWS):
        require_refused(row, argv, megatron)


@pytest.mark.parametrize(
    "megatron",
    [
        {},
        {"tensor_model_parallel_size": 2, "sequence_parallel": True},
        {"tensor_model_parallel_size": 2, "sequence_parallel": True, "num_experts": 4},
        {"tensor_model_parallel_size": 2},  # a dense model
        {"num_experts": 4},
        {"num_experts": 4, "expert_tensor_parallel_size": 1},
        {
            "num_experts": 4,
            "expert_tensor_parallel_size": 1,
            "tensor_model_parallel_size": 2,
            "sequence_parallel": True,
        },
        {"virtual_pipeline_model_parallel_size": 2},
        {"mtp_num_layers": 1},
        {"mtp_num_layers": 1, "context_parallel_size": 2, "transformer_impl": "transformer_engine"},
        {"dataloader_inter_document_masking": True, "micro_batch_size": 2},
        {"dataloader_inter_document_masking": True, "pipeline_model_parallel_size": 2},
        {"context_parallel_size": 2},
        {"context_parallel_size": 2, "attention_dropout": 0.1, "transformer_impl": "transformer_engine"},
        {"attention_dropout": 0.1, "transformer_impl": "local"},
        {"apply_query_key_layer_scaling": True, "window_size": (8, 0), "softmax_type": "off-by-one"},
        {"window_size": (8, 0), "context_parallel_size": 2, "transformer_impl": "transformer_engine"},
        {"iterations_to_skip": [1, 3], "num_experts": 4},
        {"reset_attention_mask": True, "transformer_impl": "transformer_engine"},
        {"tensor_model_parallel_size": 2, "expert_tensor_parallel_size": 1},  # dense: there is no expert
    ],
)
@pytest.mark.parametrize("argv", [[], WITH_BANK, WITH_TABLES, [*WITH_BANK, *WITH_TABLES]])
def test_what_is_served_is_not_refused(argv: list[str], megatron: dict[str, Any]) -> None:
    assert refusal(argv, megatron) is None


def test_served_layouts_are_among_those_that_tests_train() -> None:
    named = {layout for row in SERVED for layout in row.layouts}
    assert named <= LAYOUTS.keys(), named - LAYOUTS.keys()


def test_every_trained_layout_of_several_processes_is_served_under_some_dimension() -> None:
    """A layout that is only tested beside another model or memory stands under that one's plain name."""
    named = {layout for row in SERVED for layout in row.layouts}
    unnamed = {
        name for name, layout in LAYOUTS.items() if layout.processes > 1 and layout.reference == "single"
    } - named
    assert not unnamed


def test_the_page_is_written_from_the_table() -> None:
    assert PAGE.read_text(encoding="utf-8") == parallelism.page()


def test_the_page_has_a_line_for_every_row() -> None:
    lines = parallelism.page().splitlines()
    for served in SERVED:
        assert [line for line in lines if line.startswith(f"| {served.dimension} | ")], served.dimension
    for refused in ALL_REFUSED:
        assert f"| {refused.dimension} | `{refused.flag}` | {refused.why} |" in lines
    assert all(line.count(" | ") in (2, 3) for line in lines if line.startswith("| ") and "---" not in line)


def megatron_defaults(names: list[str]) -> tuple[list[str], dict[str, Any]]:
    """All flags of Megatron's own parser; and what some of its arguments are by default."""
    from megatron_graft.compat import cpu

    cpu.install()
    from megatron.training.arguments import add_megatron_arguments

    parser = add_megatron_arguments(argparse.ArgumentParser())
    flags = [option for action in parser._actions for option in action.option_strings]
    defaults = vars(parser.parse_args([]))
    found = {name: defaults[name] for name in names if name in defaults}
    return flags, {name: getattr(value, "name", value) for name, value in found.items()}  # an enumeration is Megatron's


def test_refused_flags_are_megatrons_and_not_asked_for_by_default() -> None:
    """Against the installed Megatron: a flag that it renames would no longer be refused."""
    flags, defaults = run_isolated(megatron_defaults, sorted(MEGATRON_DEFAULTS))
    assert set(ASKED) - OURS <= set(flags)
    assert set(MEGATRON_DEFAULTS) - set(defaults) <= {"virtual_pipeline_model_parallel_size"}
    defaults |= {"num_layers": 4, "dataloader_type": "external"}  # the run's own, and what the entry point sets
    for argv in ([], WITH_BANK, WITH_TABLES, *TRAINED_ROWS):
        assert refusal(argv, {**defaults, "virtual_pipeline_model_parallel_size": None}) is None
