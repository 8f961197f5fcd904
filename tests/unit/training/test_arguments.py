"""Our flags, the settings that they make, and values that are refused before training starts."""

import argparse
import dataclasses
from pathlib import Path
from typing import Any

import pytest

from megatron_graft.errors import ConfigError
from megatron_graft.training.arguments import add_graft_arguments, graft_settings
from megatron_graft.training.settings import EngramSettings, GraftSettings

FLAGS = {
    "--graft-bank", "--graft-layers", "--graft-donor-layers", "--graft-combine", "--graft-gate",
    "--graft-conv-kernel", "--graft-conv-dilation", "--graft-adopt-checkpoint", "--graft-lookup",
    "--graft-look-ahead", "--graft-verify", "--graft-run-dir", "--graft-allow-raw-bank", "--graft-verify-bank",
    "--graft-rows", "--graft-rows-lr-mult", "--graft-rows-wd-mult", "--graft-lr-mult",
    "--bank-rows", "--bank-node-copy", "--bank-lookup-threads", "--bank-huge-pages",
    "--engram-layers", "--engram-layer-ids", "--engram-dialect", "--engram-max-order", "--engram-heads",
    "--engram-vocab-size", "--engram-dim", "--engram-seed", "--engram-pad-id", "--engram-across-documents",
    "--engram-lr-mult", "--engram-wd-mult", "--engram-shard-over", "--engram-update",
}  # fmt: skip
WITH_BANK = ["--graft-bank", "bank", "--graft-layers", "3", "2"]
WITH_TABLES = ["--engram-layers", "3", "2"]
MEGATRON_DEFAULTS: dict[str, Any] = {
    "num_layers": 4, "dataloader_type": "external", "full_validation": False, "multiple_validation_sets": False,
    "phase_transition_iterations": None, "sft": False, "dataloader_inter_document_masking": False,
    "context_parallel_size": 1, "hybrid_context_parallel": False, "overlap_moe_expert_parallel_comm": False,
    "attention_dropout": 0.0, "apply_query_key_layer_scaling": False, "window_size": None, "softmax_type": "vanilla",
    "iterations_to_skip": [], "init_model_with_meta_device": False,
    "reset_attention_mask": False, "transformer_impl": "local",
    "tensor_model_parallel_size": 1, "sequence_parallel": False, "virtual_pipeline_model_parallel_size": None,
    "num_experts": None, "expert_tensor_parallel_size": None, "mtp_num_layers": None, "cuda_graph_impl": "none",
    "use_megatron_fsdp": False, "use_torch_fsdp2": False, "fp16": False, "ckpt_format": "torch_dist", "spec": None,
    "pipeline_model_parallel_size": 1, "micro_batch_size": 1, "eval_micro_batch_size": 1,
    "non_persistent_ckpt_type": None, "heterogeneous_layers_config_path": None,
    "heterogeneous_layers_config_encoded_json": None, "experimental_attention_variant": None,
    "attention_backend": "auto", "fim_data": False, "inprocess_restart": False,
    "optimizer": "adam", "use_mup": False, "optimizer_cpu_offload": False, "finetune": False, "no_load_optim": None,
}  # fmt: skip


def parser() -> argparse.ArgumentParser:
    return add_graft_arguments(argparse.ArgumentParser(allow_abbrev=False))


def namespace(argv: list[str], **megatron: Any) -> argparse.Namespace:
    args = parser().parse_args(argv)
    for name, value in (MEGATRON_DEFAULTS | megatron).items():
        setattr(args, name, value)
    return args


def settings_of(*argv: str) -> GraftSettings:
    return graft_settings(namespace(list(argv)))


def tables_of(*argv: str) -> EngramSettings:
    engram = settings_of(*WITH_TABLES, *argv).engram
    assert engram is not None
    return engram


def test_the_flag_set_is_frozen() -> None:
    """A new flag is a promise: it needs a line here, in the documentation and in the changelog."""
    found = {option for action in parser()._actions for option in action.option_strings} - {"-h", "--help"}
    assert found == FLAGS


def test_every_flag_has_help() -> None:
    assert all(action.help for action in parser()._actions)


def test_without_a_bank_or_a_table_the_stock_model_is_meant() -> None:
    settings = settings_of()
    assert (settings.banks, settings.layers, settings.engram) == ((), (), None)
    assert not settings.has_sites
    assert not settings_of("--graft-bank", "").has_sites  # as scripts pass on an empty variable


def test_settings_of_a_run_with_a_bank() -> None:
    settings = settings_of(*WITH_BANK)
    assert settings.has_sites
    assert settings.banks == (Path("bank"),)
    assert settings.layers == (3, 2)
    assert settings.donor_layers == (None, None)
    assert (settings.rows, settings.trains_rows) == ("frozen", False)
    assert (settings.rows_lr_mult, settings.rows_wd_mult, settings.lr_mult) == (1, 0, 1)
    assert (settings.combine, settings.gate) == ("sum", "plain")
    assert (settings.conv_kernel, settings.conv_dilation) == (4, None)
    assert (settings.bank_rows, settings.bank_node_copy) == (None, None)
    assert (settings.bank_lookup_threads, settings.bank_huge_pages) == (1, False)
    assert (settings.verify_every, settings.adopt_checkpoint, settings.run_dir) == (0, False, None)
    assert settings.engram is None


def test_settings_of_how_the_bank_is_opened_and_read() -> None:
    flags = ["--bank-rows", "1000", "--bank-node-copy", "local", "--bank-lookup-threads", "3", "--bank-huge-pages"]
    settings = settings_of(*WITH_BANK, *flags, "--graft-verify-bank", "sample")
    assert (settings.bank_rows, settings.bank_node_copy) == (1000, Path("local"))
    assert (settings.bank_lookup_threads, settings.bank_huge_pages) == (3, True)
    assert settings.verify_bank == "sample"


def test_settings_of_what_sites_are_and_how_they_are_checked() -> None:
    flags = [
        "--graft-combine",
        "exclusive",
        "--graft-gate",
        "signed-sqrt",
        "--graft-conv-kernel",
        "0",
        "--graft-verify",
        "7",
    ]
    settings = settings_of(*WITH_BANK, *flags, "--graft-run-dir", "runs/x", "--graft-conv-dilation", "2")
    assert (settings.combine, settings.gate) == ("exclusive", "signed-sqrt")
    assert (settings.conv_kernel, settings.conv_dilation, settings.verify_every) == (0, 2, 7)
    assert settings.run_dir == Path("runs/x")


@pytest.mark.parametrize("rows", ["trained", "fresh"])
def test_settings_of_rows_that_are_trained(rows: str) -> None:
    settings = settings_of(*WITH_BANK, "--graft-rows", rows, "--graft-rows-lr-mult", "5", "--graft-rows-wd-mult", "0.5")
    assert (settings.rows, settings.trains_rows) == (rows, True)
    assert (settings.rows_lr_mult, settings.rows_wd_mult) == (5, 0.5)


def test_one_bank_serves_all_layers_and_several_one_each_in_the_order_given() -> None:
    one, two = settings_of(*WITH_BANK), settings_of("--graft-bank", "a", "b", "--graft-layers", "3", "2")
    assert [one.bank_of_site(site) for site in range(2)] == [0, 0]
    assert [two.bank_of_site(site) for site in range(2)] == [0, 1]
    assert two.banks == (Path("a"), Path("b"))


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        (["8"], ((8,), (8,))),
        (["8,24"], ((8, 24), (8, 24))),
        (["8", "24"], ((8,), (24,))),
        (["8,16", "24"], ((8, 16), (24,))),
    ],
)
def test_donor_layers_are_one_list_for_all_sites_or_one_for_each(given: list[str], wanted: tuple[Any, ...]) -> None:
    assert settings_of(*WITH_BANK, "--graft-donor-layers", *given).donor_layers == wanted


def test_settings_of_a_run_with_tables() -> None:
    settings = settings_of(*WITH_TABLES)
    assert settings.has_sites and settings.banks == ()
    assert settings.engram == EngramSettings(
        layers=(3, 2), layer_ids=(2, 1), dialect="deepseek", max_order=3, heads=8, vocab_sizes=(646400, 646400),
        dim=512, seed=0, pad_id=None, across_documents=False, lr_mult=5.0, wd_mult=0.0,
    )  # fmt: skip


def test_every_table_flag_has_its_place_in_the_settings() -> None:
    flags = {
        "layer_ids": ("7", "9"), "max_order": ("4",), "heads": ("2",), "vocab_size": ("11", "12", "13"), "dim": ("6",),
        "seed": ("5",), "pad_id": ("3",), "lr_mult": ("2.5",), "wd_mult": ("0.5",),
    }  # fmt: skip
    argv = [part for name, values in flags.items() for part in (f"--engram-{name.replace('_', '-')}", *values)]
    assert tables_of(*argv, "--engram-across-documents") == EngramSettings(
        layers=(3, 2), layer_ids=(7, 9), dialect="deepseek", max_order=4, heads=2, vocab_sizes=(11, 12, 13), dim=6,
        seed=5, pad_id=3, across_documents=True, lr_mult=2.5, wd_mult=0.5,
    )  # fmt: skip


def test_one_vocabulary_size_is_that_of_every_order() -> None:
    assert tables_of("--engram-max-order", "5", "--engram-vocab-size", "11").vocab_sizes == (11, 11, 11, 11)


def test_a_run_may_have_banks_and_tables_in_the_same_layers_or_in_others() -> None:
    settings = settings_of(*WITH_BANK, "--engram-layers", "1", "2")
    assert settings.layers == (3, 2)
    assert settings.engram is not None and settings.engram.layers == (1, 2)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--graft-layers", "2"], r"--graft-layers: was given without a bank \(got \[2\]\)"),
        (["--graft-bank", "bank"], r"--graft-layers: is required .*1 to 4"),
        (["--graft-bank", "bank", "--graft-layers", "5"], r"--graft-layers: .*got \[5\]; expected .*--num-layers 4"),
        (["--graft-bank", "bank", "--graft-layers", "0"], r"--graft-layers: .*got \[0\]"),
        (["--graft-bank", "bank", "--graft-layers", "2", "2"], r"--graft-layers: .*one twice"),
        (["--graft-bank", "a", "b", "--graft-layers", "2"], r"--graft-bank: does not fit .*\(got 2 for 1 layers"),
        (
            ["--graft-bank", "a", "b", "--graft-layers", "1", "2", "3"],
            r"--graft-bank: .*expected one .*, or 3 in their",
        ),
        ([*WITH_BANK, "--graft-donor-layers", "1", "2", "3"], r"--graft-donor-layers: does not .*\(got 3 for 2 layers"),
        ([*WITH_BANK, "--graft-donor-layers", "8;9"], r"--graft-donor-layers: is no list .*got 8;9; expected .*: 8,24"),
        ([*WITH_BANK, "--graft-donor-layers", "8,"], r"--graft-donor-layers: is no list of layers \(got 8,;"),
        ([*WITH_BANK, "--graft-donor-layers", "-8"], r"--graft-donor-layers: is no list of layers \(got -8;"),
        (["--graft-donor-layers", "8"], r"--graft-donor-layers: was given without a bank \(got \[\(8,\)\]\)"),
        ([*WITH_BANK, "--graft-conv-kernel", "-1"], r"--graft-conv-kernel: is too small \(got -1"),
        ([*WITH_BANK, "--graft-conv-dilation", "0"], r"--graft-conv-dilation: is too small"),
        ([*WITH_BANK, "--graft-look-ahead", "0"], r"--graft-look-ahead: is too small"),
        ([*WITH_BANK, "--graft-verify", "-1"], r"--graft-verify: is too small \(got -1; expected at least 0"),
        ([*WITH_BANK, "--bank-rows", "0"], r"--bank-rows: is too small \(got 0; expected at least 1"),
        ([*WITH_BANK, "--bank-lookup-threads", "0"], r"--bank-lookup-threads: is too small"),
        ([*WITH_BANK, "--bank-huge-pages", "--graft-lookup", "reference"], r"--bank-huge-pages: has no use with"),
        (["--bank-rows", "5"], r"--bank-rows: was given without a bank \(got 5\)"),
        (["--bank-node-copy", "local"], r"--bank-node-copy: was given without a bank \(got local\)"),
        (["--bank-huge-pages"], r"--bank-huge-pages: was given without a bank"),
        (["--graft-rows", "fresh"], r"--graft-rows: was given without a bank \(got fresh\). Add --graft-bank"),
        ([*WITH_TABLES, "--graft-rows", "trained"], r"--graft-rows: was given without a bank"),
        ([*WITH_BANK, "--graft-rows-lr-mult", "2"], r"--graft-rows-lr-mult: was given without rows .*got 2.*fresh, or"),
        ([*WITH_BANK, "--graft-rows-wd-mult", "1"], r"--graft-rows-wd-mult: was given without rows that are trained"),
        (["--graft-lr-mult", "2"], r"--graft-lr-mult: was given without a memory \(got 2"),
        ([*WITH_BANK, "--graft-lr-mult", "-1"], r"--graft-lr-mult: is not a usable factor \(got -1"),
        (
            [*WITH_BANK, "--graft-rows", "fresh", "--graft-rows-lr-mult", "inf"],
            r"--graft-rows-lr-mult: is not a usable factor \(got inf",
        ),
        (["--engram-layers", "5"], r"--engram-layers: .*got \[5\]; expected .*--num-layers 4"),
        (["--engram-layers", "0"], r"--engram-layers: .*got \[0\]"),
        (["--engram-layers", "2", "2"], r"--engram-layers: .*one twice"),
        ([*WITH_TABLES, "--engram-layer-ids", "1"], r"--engram-layer-ids: does not give one .*\(got \[1\]; expected 2"),
        ([*WITH_TABLES, "--engram-layer-ids", "1", "1"], r"--engram-layer-ids: gives two layers one id"),
        ([*WITH_TABLES, "--engram-layer-ids", "1", "-2"], r"--engram-layer-ids: .*negative one \(got \[1, -2\]"),
        ([*WITH_TABLES, "--engram-lr-mult", "-1"], r"--engram-lr-mult: is not a usable factor \(got -1"),
        ([*WITH_TABLES, "--engram-lr-mult", "inf"], r"--engram-lr-mult: .*\(got inf; expected a finite"),
        ([*WITH_TABLES, "--engram-wd-mult", "nan"], r"--engram-wd-mult: is not a usable factor \(got nan"),
        (
            [*WITH_TABLES, "--engram-shard-over", "expert"],
            r"--engram-shard-over: .*expected tensor\)\. See docs/engram",
        ),
        ([*WITH_TABLES, "--engram-shard-over", "data"], r"--engram-shard-over: is not supported yet \(got data"),
        ([*WITH_TABLES, "--engram-update", "touched-rows"], r"--engram-update: .*expected dense\)\. See docs/engram"),
        (["--engram-dim", "64"], r"--engram-dim: was given without a table \(got 64\)\. Add --engram-layers N"),
        (["--engram-layer-ids", "1"], r"--engram-layer-ids: was given without a table"),
        ([*WITH_BANK, "--engram-across-documents"], r"--engram-across-documents: was given without a table"),
        ([*WITH_BANK, "--engram-update", "touched-rows"], r"--engram-update: was given without a table"),
    ],
)
def test_a_bad_value_is_refused_with_flag_and_expectation(argv: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=f"^{message}"):
        graft_settings(namespace(argv))


@pytest.mark.parametrize(
    "argv",
    [
        ["--graft-rows", "melted"], ["--graft-combine", "both"], ["--graft-gate", "sqrt"], ["--graft-lookup", "fast"],
        ["--graft-verify-bank", "deep"], ["--engram-dialect", "none"], ["--engram-shard-over", "pipeline"],
        ["--engram-update", "none"], ["--graft-layers", "two"], ["--engram-layers"], ["--engram-lr-mult", "x"],
        ["--graft-verify"],
    ],
)  # fmt: skip
def test_a_word_that_is_no_choice_is_refused_by_the_parser(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parser().parse_args(argv)
    assert argv[0] in capsys.readouterr().err


def test_settings_say_all_that_the_flags_do() -> None:
    """Each flag changes the settings, so none can be read and forgotten."""
    base = [*WITH_BANK, *WITH_TABLES, "--graft-rows", "fresh"]
    samples = {
        "--graft-rows": ["trained"], "--graft-rows-lr-mult": ["3"], "--graft-rows-wd-mult": ["1"],
        "--graft-lr-mult": ["2"], "--graft-bank": ["other"],
        "--graft-layers": ["1"], "--graft-donor-layers": ["8"], "--graft-combine": ["exclusive"],
        "--graft-gate": ["signed-sqrt"], "--graft-conv-kernel": ["3"], "--graft-conv-dilation": ["2"],
        "--graft-adopt-checkpoint": [], "--graft-lookup": ["native"], "--graft-look-ahead": ["3"],
        "--graft-verify": ["5"], "--graft-run-dir": ["dir"], "--graft-allow-raw-bank": [],
        "--graft-verify-bank": ["full"], "--bank-rows": ["9"], "--bank-node-copy": ["dir"],
        "--bank-lookup-threads": ["2"], "--bank-huge-pages": [], "--engram-layers": ["1", "4"],
        "--engram-layer-ids": ["4", "5"], "--engram-max-order": ["2"], "--engram-heads": ["4"],
        "--engram-vocab-size": ["99"], "--engram-dim": ["64"], "--engram-seed": ["1"], "--engram-pad-id": ["1"],
        "--engram-across-documents": [], "--engram-lr-mult": ["1"], "--engram-wd-mult": ["1"],
    }  # fmt: skip
    single_valued = {"--engram-dialect", "--engram-shard-over", "--engram-update"}
    assert samples.keys() | single_valued == FLAGS
    plain = dataclasses.asdict(graft_settings(namespace(base)))
    for flag, values in samples.items():
        changed = graft_settings(namespace([*base, flag, *values], finetune=True))
        assert dataclasses.asdict(changed) != plain, flag
