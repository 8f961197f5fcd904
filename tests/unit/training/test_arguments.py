"""Our flags and the combinations that are refused before training starts."""

import argparse
from pathlib import Path
from typing import Any

import pytest

from megatron_graft.errors import ConfigError
from megatron_graft.training.arguments import add_graft_arguments, graft_settings

FLAGS = {
    "--graft-bank", "--graft-layers", "--graft-conv-kernel", "--graft-conv-dilation", "--graft-lookup",
    "--graft-look-ahead", "--graft-allow-raw-bank", "--graft-verify-bank", "--graft-run-dir",
    "--bank-rows", "--bank-node-copy", "--bank-lookup-threads", "--bank-huge-pages",
}  # fmt: skip
WITH_BANK = ["--graft-bank", "bank", "--graft-layers", "3", "2"]
MEGATRON_DEFAULTS: dict[str, Any] = {
    "num_layers": 4,
    "dataloader_type": "external",
    "full_validation": False,
    "multiple_validation_sets": False,
    "phase_transition_iterations": None,
    "sft": False,
    "dataloader_inter_document_masking": False,
    "context_parallel_size": 1,
    "reset_attention_mask": False,
    "transformer_impl": "local",
    "tensor_model_parallel_size": 1,
    "sequence_parallel": False,
    "virtual_pipeline_model_parallel_size": None,
    "mtp_num_layers": None,
    "cuda_graph_impl": "none",
    "use_megatron_fsdp": False,
    "use_torch_fsdp2": False,
    "ckpt_format": "torch_dist",
    "spec": None,
}


def parser() -> argparse.ArgumentParser:
    return add_graft_arguments(argparse.ArgumentParser(allow_abbrev=False))


def namespace(argv: list[str], **megatron: Any) -> argparse.Namespace:
    args = parser().parse_args(argv)
    for name, value in (MEGATRON_DEFAULTS | megatron).items():
        setattr(args, name, value)
    return args


def test_the_flag_set_is_frozen() -> None:
    """A new flag is a promise: it needs a line here, in the documentation and in the changelog."""
    found = {option for action in parser()._actions for option in action.option_strings} - {"-h", "--help"}
    assert found == FLAGS


def test_every_flag_has_help() -> None:
    assert all(action.help for action in parser()._actions)


def test_without_a_bank_the_stock_model_is_meant() -> None:
    settings = graft_settings(namespace([]))
    assert settings.bank is None
    assert settings.layers == ()


def test_settings_of_a_run_with_memory() -> None:
    settings = graft_settings(namespace(WITH_BANK))
    assert settings.bank == Path("bank")
    assert settings.layers == (2, 3)
    assert settings.conv_kernel == 4
    assert (settings.bank_rows, settings.bank_node_copy) == (None, None)
    assert (settings.bank_lookup_threads, settings.bank_huge_pages) == (1, False)


def test_settings_of_how_the_bank_is_opened_and_read() -> None:
    flags = ["--bank-rows", "1000", "--bank-node-copy", "local", "--bank-lookup-threads", "3", "--bank-huge-pages"]
    settings = graft_settings(namespace([*WITH_BANK, *flags, "--graft-verify-bank", "sample"]))
    assert (settings.bank_rows, settings.bank_node_copy) == (1000, Path("local"))
    assert (settings.bank_lookup_threads, settings.bank_huge_pages) == (3, True)
    assert settings.verify_bank == "sample"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--graft-layers", "2"], r"--graft-layers: was given without a bank \(got \[2\]\)"),
        (["--graft-bank", "bank"], r"--graft-layers: is required .*1 to 4"),
        (["--graft-bank", "bank", "--graft-layers", "5"], r"--graft-layers: .*got \[5\]; expected .*--num-layers 4"),
        (["--graft-bank", "bank", "--graft-layers", "0"], r"--graft-layers: .*got \[0\]"),
        (["--graft-bank", "bank", "--graft-layers", "2", "2"], r"--graft-layers: .*one twice"),
        ([*WITH_BANK, "--graft-conv-kernel", "-1"], r"--graft-conv-kernel: is too small \(got -1"),
        ([*WITH_BANK, "--graft-conv-dilation", "0"], r"--graft-conv-dilation: is too small"),
        ([*WITH_BANK, "--graft-look-ahead", "0"], r"--graft-look-ahead: is too small"),
        ([*WITH_BANK, "--bank-rows", "0"], r"--bank-rows: is too small \(got 0; expected at least 1"),
        ([*WITH_BANK, "--bank-lookup-threads", "0"], r"--bank-lookup-threads: is too small"),
        ([*WITH_BANK, "--bank-huge-pages", "--graft-lookup", "reference"], r"--bank-huge-pages: has no use with"),
        (["--bank-rows", "5"], r"--bank-rows: was given without a bank \(got 5\)"),
        (["--bank-node-copy", "local"], r"--bank-node-copy: was given without a bank \(got local\)"),
        (["--bank-huge-pages"], r"--bank-huge-pages: was given without a bank"),
    ],
)
def test_a_bad_value_is_refused_with_flag_and_expectation(argv: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        graft_settings(namespace(argv))


@pytest.mark.parametrize(
    ("megatron", "flag"),
    [
        ({"tensor_model_parallel_size": 2}, "--tensor-model-parallel-size"),
        ({"virtual_pipeline_model_parallel_size": 2}, "--virtual-pipeline-model-parallel-size"),
        ({"mtp_num_layers": 1}, "--mtp-num-layers"),
        ({"cuda_graph_impl": "local"}, "--cuda-graph-impl"),
        ({"use_megatron_fsdp": True}, "--use-megatron-fsdp"),
        ({"use_torch_fsdp2": True}, "--use-torch-fsdp2"),
        ({"ckpt_format": "torch"}, "--ckpt-format"),
        ({"spec": ["module", "name"]}, "--spec"),
    ],
)
def test_what_sites_cannot_serve_is_refused_with_a_bank_and_runs_without(megatron: dict[str, Any], flag: str) -> None:
    with pytest.raises(ConfigError, match=rf"^{flag}: is not supported here"):
        graft_settings(namespace(WITH_BANK, **megatron))
    graft_settings(namespace([], **megatron))


def test_tensor_parallelism_with_sequence_parallelism_is_served() -> None:
    graft_settings(namespace(WITH_BANK, tensor_model_parallel_size=2, sequence_parallel=True))


@pytest.mark.parametrize(
    "megatron",
    [
        {"dataloader_type": "cyclic"},
        {"full_validation": True},
        {"multiple_validation_sets": True},
        {"phase_transition_iterations": [5]},
        {"sft": True},
        {"dataloader_inter_document_masking": True},
        {"context_parallel_size": 2},
        {"reset_attention_mask": True},
    ],
)
def test_what_the_data_iterator_cannot_serve_is_refused_even_without_a_bank(megatron: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="is not supported here"):
        graft_settings(namespace([], **megatron))
