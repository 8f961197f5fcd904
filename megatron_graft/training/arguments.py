"""Our command-line flags, the settings they make, and the combinations of Megatron's flags that sites cannot serve."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_graft.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class GraftSettings:
    """The ``--graft-*`` flags of a run.

    Attributes:
        bank: directory of the bank, or None for the stock model.
        layers: global, 1-based numbers of the layers with a memory site, ascending.
        conv_kernel: convolution taps per site; 0 leaves it out.
        conv_dilation: distance between taps, or None for the bank's longest order.
        lookup: implementation of the suffix index.
        look_ahead: micro-batches that may wait ready, or None for those of one step.
        allow_raw_bank: accept a bank whose rows were not normalised.
        verify_bank: how deeply to check the bank before training.
        run_dir: where metrics and the command line of the run go, or None.
    """

    bank: Path | None
    layers: tuple[int, ...]
    conv_kernel: int
    conv_dilation: int | None
    lookup: str
    look_ahead: int | None
    allow_raw_bank: bool
    verify_bank: str
    run_dir: Path | None


def add_graft_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add the ``--graft-*`` flags to Megatron's parser."""
    group = parser.add_argument_group("memory grafting")
    group.add_argument("--graft-bank", metavar="DIR", help="Bank directory. Without it the model is the stock one.")
    group.add_argument(
        "--graft-layers", type=int, nargs="+", default=[], metavar="N",
        help="Layers that get a memory site before their attention: Megatron's global layer numbers, from 1.",
    )  # fmt: skip
    group.add_argument(
        "--graft-conv-kernel", type=int, default=4, help="Taps of each site's causal convolution; 0 leaves it out."
    )
    group.add_argument(
        "--graft-conv-dilation", type=int, default=None,
        help="Positions between two taps. Default: the bank's longest n-gram.",
    )  # fmt: skip
    group.add_argument(
        "--graft-lookup", choices=["auto", "native", "reference"], default="auto",
        help="Suffix lookup: the compiled extension (auto, native) or NumPy (reference).",
    )  # fmt: skip
    group.add_argument(
        "--graft-look-ahead", type=int, default=None,
        help="Micro-batches whose memory may be fetched in advance. Default: those of one step, at least 2.",
    )  # fmt: skip
    group.add_argument(
        "--graft-allow-raw-bank", action="store_true", help="Accept a bank whose rows were not centred and normalised."
    )
    group.add_argument(
        "--graft-verify-bank", choices=["header", "full"], default="header",
        help="Check sizes and headers of the bank before training, or every byte of it.",
    )  # fmt: skip
    group.add_argument(
        "--graft-run-dir", metavar="DIR", help="Where the run's command line and metrics.jsonl are written."
    )
    return parser


def graft_settings(args: argparse.Namespace) -> GraftSettings:
    """Read and check the ``--graft-*`` flags against the model and the parallel layout.

    Raises:
        ConfigError: a value or a combination that cannot be honoured.
    """
    settings = GraftSettings(
        bank=Path(args.graft_bank) if args.graft_bank else None,
        layers=tuple(sorted(args.graft_layers)),
        conv_kernel=args.graft_conv_kernel,
        conv_dilation=args.graft_conv_dilation,
        lookup=args.graft_lookup,
        look_ahead=args.graft_look_ahead,
        allow_raw_bank=args.graft_allow_raw_bank,
        verify_bank=args.graft_verify_bank,
        run_dir=Path(args.graft_run_dir) if args.graft_run_dir else None,
    )
    _check_loader(args)
    if settings.bank is None:
        if settings.layers:
            raise ConfigError(
                "--graft-layers", "was given without a bank", got=list(settings.layers),
                remedy="Add --graft-bank DIR, or drop --graft-layers for the stock model.",
            )  # fmt: skip
        return settings
    _check_layers(settings, args.num_layers)
    _check_numbers(settings)
    _check_layout(args)
    return settings


def _check_layers(settings: GraftSettings, num_layers: int) -> None:
    if not settings.layers:
        raise ConfigError(
            "--graft-layers", "is required with --graft-bank", expected=f"layer numbers from 1 to {num_layers}",
            remedy="For example --graft-layers 2.",
        )  # fmt: skip
    outside = [layer for layer in settings.layers if not 1 <= layer <= num_layers]
    if outside or len(set(settings.layers)) != len(settings.layers):
        raise ConfigError(
            "--graft-layers", "names a layer that the model does not have, or one twice", got=list(settings.layers),
            expected=f"distinct numbers from 1 to --num-layers {num_layers}",
            remedy="Choose layers of this model, or give it more of them.",
        )  # fmt: skip


def _check_numbers(settings: GraftSettings) -> None:
    limits = {
        "--graft-conv-kernel": (settings.conv_kernel, 0),
        "--graft-conv-dilation": (settings.conv_dilation, 1),
        "--graft-look-ahead": (settings.look_ahead, 1),
    }
    for flag, (value, least) in limits.items():
        if value is not None and value < least:
            raise ConfigError(flag, "is too small", got=value, expected=f"at least {least}")


def _check_loader(args: argparse.Namespace) -> None:
    """What our data iterator cannot serve, with or without a bank."""
    _refuse(
        args,
        (
            ("--dataloader-type", args.dataloader_type != "external", "the iterator is megatron-graft's own"),
            ("--full-validation", args.full_validation, "use tools/evaluate.py for a whole held-out set"),
            ("--multiple-validation-sets", args.multiple_validation_sets, "use tools/evaluate.py, once per set"),
            ("--phase-transition-iterations", args.phase_transition_iterations, "data phases are not supported"),
            ("--sft", args.sft, "packed fine-tuning data is not supported"),
            ("--dataloader-inter-document-masking", args.dataloader_inter_document_masking, "packed sequences"),
            ("--context-parallel-size", args.context_parallel_size > 1, "the sequence is not split for it yet"),
            (
                "--reset-attention-mask",
                args.reset_attention_mask and args.transformer_impl == "local",
                "the local attention is causal over the whole sequence",
            ),
        ),
    )


def _check_layout(args: argparse.Namespace) -> None:
    """What memory sites cannot serve yet; the stock model of the same flags runs."""
    tensor_parallel = args.tensor_model_parallel_size > 1
    _refuse(
        args,
        (
            (
                "--tensor-model-parallel-size",
                tensor_parallel and not args.sequence_parallel,
                "memory sites need --sequence-parallel with it",
            ),
            (
                "--virtual-pipeline-model-parallel-size",
                args.virtual_pipeline_model_parallel_size is not None,
                "interleaved pipelines (--num-layers-per-virtual-pipeline-stage or "
                "--num-virtual-stages-per-pipeline-rank) have no memory sites yet",
            ),
            ("--mtp-num-layers", args.mtp_num_layers is not None, "multi-token prediction beside sites is not tested"),
            ("--cuda-graph-impl", args.cuda_graph_impl != "none", "a captured graph would replay one micro-batch"),
            ("--use-megatron-fsdp", args.use_megatron_fsdp, "sites are not sharded for it"),
            ("--use-torch-fsdp2", args.use_torch_fsdp2, "sites are not sharded for it"),
            ("--ckpt-format", args.ckpt_format != "torch_dist", "only torch_dist carries the bank's identity"),
            ("--spec", args.spec is not None, "sites are put into Megatron's default layer spec"),
        ),
    )


def _refuse(args: argparse.Namespace, rules: tuple[tuple[str, Any, str], ...]) -> None:
    for flag, refused, reason in rules:
        if refused:
            value = getattr(args, flag.removeprefix("--").replace("-", "_"))
            raise ConfigError(flag, f"is not supported here: {reason}", got=value, remedy="Leave it out.")
