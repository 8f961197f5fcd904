"""Our command-line flags, the settings they make, and the combinations of Megatron's flags that sites cannot serve."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_graft.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class GraftSettings:
    """The ``--graft-*`` and ``--bank-*`` flags of a run.

    Attributes:
        bank: directory of the bank, or None for the stock model.
        layers: global, 1-based numbers of the layers with a memory site, ascending.
        conv_kernel: convolution taps per site; 0 leaves it out.
        conv_dilation: distance between taps, or None for the bank's longest order.
        lookup: implementation of the suffix index.
        look_ahead: micro-batches that may wait ready, or None for those of one step.
        allow_raw_bank: accept a bank whose rows were not normalised.
        verify_bank: how deeply to check the bank before training.
        bank_rows: use the bank's so many most frequent n-grams only, or None for all.
        bank_node_copy: directory of the node where the bank is copied to and read from, or None.
        bank_lookup_threads: threads of lookup and gather.
        bank_huge_pages: hold the index in memory of huge pages.
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
    bank_rows: int | None
    bank_node_copy: Path | None
    bank_lookup_threads: int
    bank_huge_pages: bool
    run_dir: Path | None


def add_graft_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add the ``--graft-*`` and ``--bank-*`` flags to Megatron's parser."""
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
        "--graft-verify-bank", choices=["header", "sample", "full"], default="header",
        help="Before training, check the bank's manifest, sizes and headers (header); a sample of its keys as well, "
        "and that the index finds them (sample); or every byte and every key (full).",
    )  # fmt: skip
    group.add_argument(
        "--graft-run-dir", metavar="DIR", help="Where the run's command line and metrics.jsonl are written."
    )
    _add_bank_arguments(group)
    return parser


def _add_bank_arguments(group: argparse._ArgumentGroup) -> None:
    """How the bank is opened and read."""
    group.add_argument(
        "--bank-rows", type=int, default=None, metavar="K",
        help="Use only the bank's K most frequent n-grams, as if it held no others. K is part of the identity that "
        "checkpoints keep. Default: all.",
    )  # fmt: skip
    group.add_argument(
        "--bank-node-copy", metavar="DIR", default=None,
        help="Copy the bank to DIR/<its digest> and read it there: a local disk, or a tmpfs such as /dev/shm. The "
        "first process of a node copies, the others wait and share the files; a complete copy serves later runs.",
    )  # fmt: skip
    group.add_argument(
        "--bank-lookup-threads", type=int, default=1, metavar="N",
        help="Threads of lookup and gather for the coming micro-batches, in each process that owns a memory site. "
        "Default: 1.",
    )  # fmt: skip
    group.add_argument(
        "--bank-huge-pages", action="store_true",
        help="Hold the index in huge pages: a private copy in every process, about 13 bytes for each n-gram, for "
        "faster lookup than from the mapped file.",
    )  # fmt: skip


def graft_settings(args: argparse.Namespace) -> GraftSettings:
    """Read and check our flags against the model and the parallel layout.

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
        bank_rows=args.bank_rows,
        bank_node_copy=Path(args.bank_node_copy) if args.bank_node_copy else None,
        bank_lookup_threads=args.bank_lookup_threads,
        bank_huge_pages=args.bank_huge_pages,
        run_dir=Path(args.graft_run_dir) if args.graft_run_dir else None,
    )
    _check_loader(args)
    if settings.bank is None:
        _check_no_bank(settings)
        return settings
    _check_layers(settings, args.num_layers)
    _check_numbers(settings)
    _check_layout(args)
    return settings


def _check_no_bank(settings: GraftSettings) -> None:
    """Refuse flags that would change what a bank is or how it is read, where there is none."""
    given = {
        "--graft-layers": list(settings.layers) or None,
        "--bank-rows": settings.bank_rows,
        "--bank-node-copy": settings.bank_node_copy,
        "--bank-huge-pages": settings.bank_huge_pages or None,
    }
    for flag, value in given.items():
        if value is not None:
            raise ConfigError(
                flag, "was given without a bank", got=value,
                remedy=f"Add --graft-bank DIR, or drop {flag} for the stock model.",
            )  # fmt: skip


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
        "--bank-rows": (settings.bank_rows, 1),
        "--bank-lookup-threads": (settings.bank_lookup_threads, 1),
    }
    for flag, (value, least) in limits.items():
        if value is not None and value < least:
            raise ConfigError(flag, "is too small", got=value, expected=f"at least {least}")
    if settings.bank_huge_pages and settings.lookup == "reference":
        raise ConfigError(
            "--bank-huge-pages", "has no use with --graft-lookup reference, which makes an index of its own",
            remedy="Drop one of them.",
        )  # fmt: skip


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
