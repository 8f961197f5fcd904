"""Our command-line flags, and the settings that they make."""

from __future__ import annotations

import argparse
from pathlib import Path

from megatron_graft.errors import ConfigError
from megatron_graft.ngram.hashing import DIALECTS
from megatron_graft.training.parallelism import check_data_flags, check_site_flags
from megatron_graft.training.settings import DEFAULT_FACTORS, FROZEN, EngramSettings, GraftSettings, check_settings

TABLES_PAGE = "docs/engram-tables.md"


def add_graft_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add the ``--graft-*``, ``--bank-*`` and ``--engram-*`` flags to Megatron's parser."""
    _add_site_arguments(parser.add_argument_group("memory sites"))
    _add_rate_arguments(parser.add_argument_group("training of memory sites"))
    _add_running_arguments(parser.add_argument_group("fetching of memory"))
    _add_bank_arguments(parser.add_argument_group("memory banks"))
    _add_engram_arguments(parser.add_argument_group("hashed n-gram tables (Engram)"))
    return parser


def _add_site_arguments(group: argparse._ArgumentGroup) -> None:
    """What the sites are."""
    group.add_argument(
        "--graft-bank", nargs="+", default=[], metavar="DIR",
        help="Bank directory: one for all of --graft-layers, or one for each. Without --graft-bank and "
        "--engram-layers the model is the stock one.",
    )  # fmt: skip
    group.add_argument(
        "--graft-layers", type=int, nargs="+", default=[], metavar="N",
        help="Layers whose memory site, before their attention, reads a bank: Megatron's global layer numbers, from 1.",
    )  # fmt: skip
    group.add_argument(
        "--graft-donor-layers", nargs="+", default=[], metavar="N[,N...]",
        help="Donor layers that the sites read of their bank's, side by side: one list for all of --graft-layers, or "
        "one for each ('8 24': the first site reads donor layer 8, the second 24). Default: all that the bank has.",
    )  # fmt: skip
    group.add_argument(
        "--graft-combine", choices=["exclusive", "sum"], default="sum",
        help="Where a layer is named by --graft-layers and --engram-layers: read the table everywhere, with the bank's "
        "part added at a match (sum), or only where the bank has no match (exclusive, the rule of Memory Grafting). "
        "Each has projections of its own. Default: sum.",
    )  # fmt: skip
    group.add_argument(
        "--graft-gate", choices=["plain", "signed-sqrt"], default="plain",
        help="The gate's logit as it is, as in the Engram paper, or its signed square root, as in the published code. "
        "Default: plain.",
    )  # fmt: skip
    group.add_argument(
        "--graft-conv-kernel", type=int, default=4,
        help="Taps of each site's causal convolution; 0 leaves it out. Default: 4.",
    )  # fmt: skip
    group.add_argument(
        "--graft-conv-dilation", type=int, default=None,
        help="Positions between two taps. Default: the longest n-gram that the site reads.",
    )  # fmt: skip
    group.add_argument(
        "--graft-adopt-checkpoint", action="store_true",
        help="Begin from a model trained without memory, or with another of the same sizes: what the run has and the "
        "checkpoint lacks starts fresh, what only the checkpoint has is left. Needs one of --pretrained-checkpoint "
        "(which a run that has saved no longer reads), --finetune and --no-load-optim.",
    )  # fmt: skip


def _add_rate_arguments(group: argparse._ArgumentGroup) -> None:
    """Which rows are trained under a bank's keys, and how fast sites learn."""
    group.add_argument(
        "--graft-rows", choices=[FROZEN, "trained", "fresh"], default=FROZEN,
        help="What sites read under a bank's keys: the bank's rows, which stay as they are (frozen); a trainable table "
        "of their own that starts as the bank's rows (trained); the same table started at random with "
        "--init-method-std (fresh). Default: frozen.",
    )  # fmt: skip
    factors = {
        "--graft-rows-lr-mult": "Learning rate of rows that are trained, as a multiple of --lr.",
        "--graft-rows-wd-mult": "Their weight decay, as a multiple of --weight-decay.",
        "--graft-lr-mult": "Learning rate of the sites' projections, norms and convolutions, as a multiple of --lr.",
    }
    for flag, told in factors.items():
        group.add_argument(
            flag, type=float, default=DEFAULT_FACTORS[flag], help=f"{told} Default: {DEFAULT_FACTORS[flag]}."
        )


def _add_running_arguments(group: argparse._ArgumentGroup) -> None:
    """How memory is fetched, checked and reported."""
    group.add_argument(
        "--graft-lookup", choices=["auto", "native", "reference"], default="auto",
        help="Suffix lookup and hashing: the compiled extension (auto, native) or NumPy (reference).",
    )  # fmt: skip
    group.add_argument(
        "--graft-look-ahead", type=int, default=None,
        help="Micro-batches whose memory may be fetched in advance, for each model chunk. It waits on the device. "
        "Default: those of one step, at least 2 and at most 4.",
    )  # fmt: skip
    group.add_argument(
        "--graft-verify", type=int, default=0, metavar="N",
        help="In every N-th step find and read each position's rows and hash ids again by the reference path, and stop "
        "the run if they differ. Holds the keys of every bank in memory. Default: 0, never.",
    )  # fmt: skip
    group.add_argument(
        "--graft-run-dir", metavar="DIR", help="Where the run's command line and metrics.jsonl are written."
    )


def _add_bank_arguments(group: argparse._ArgumentGroup) -> None:
    """How banks are opened and read."""
    group.add_argument(
        "--graft-allow-raw-bank", action="store_true", help="Accept a bank whose rows were not centred and normalised."
    )
    group.add_argument(
        "--graft-verify-bank", choices=["header", "sample", "full"], default="header",
        help="Before training, check each bank's manifest, sizes and headers (header); a sample of its keys as well, "
        "and that the index finds them (sample); or every byte and every key (full).",
    )  # fmt: skip
    group.add_argument(
        "--bank-rows", type=int, default=None, metavar="K",
        help="Use only a bank's K most frequent n-grams, as if it held no others. K is part of the identity that "
        "checkpoints keep. Default: all.",
    )  # fmt: skip
    group.add_argument(
        "--bank-node-copy", metavar="DIR", default=None,
        help="Copy each bank to DIR/<its digest> and read it there: a local disk, or a tmpfs such as /dev/shm. The "
        "first process of a node copies, the others wait and share the files; a complete copy serves later runs.",
    )  # fmt: skip
    group.add_argument(
        "--bank-lookup-threads", type=int, default=1, metavar="N",
        help="Threads of lookup, hashing and gather for the coming micro-batches, in each process that owns a memory "
        "site. Default: 1.",
    )  # fmt: skip
    group.add_argument(
        "--bank-huge-pages", action="store_true",
        help="Hold the index in huge pages: a private copy in every process, about 13 bytes for each n-gram, for "
        "faster lookup than from the mapped file.",
    )  # fmt: skip


def _add_engram_arguments(group: argparse._ArgumentGroup) -> None:
    """What the hashed tables are and how they are trained."""
    group.add_argument(
        "--engram-layers", type=int, nargs="+", default=[], metavar="N",
        help="Layers whose memory site reads a trainable table of hashed n-grams, one table for each: Megatron's "
        "global layer numbers, from 1.",
    )  # fmt: skip
    group.add_argument(
        "--engram-layer-ids", type=int, nargs="+", default=None, metavar="ID",
        help="The hash dialect's own id of each of --engram-layers. Default: its number less one, since the published "
        "code counts layers from 0.",
    )  # fmt: skip
    group.add_argument(
        "--engram-dialect", choices=sorted(DIALECTS), default="deepseek",
        help="How n-grams are hashed. Default: deepseek.",
    )  # fmt: skip
    group.add_argument(
        "--engram-max-order", type=int, default=3,
        help="Longest n-gram; the shortest has 2 tokens. Default: 3.",
    )  # fmt: skip
    group.add_argument(
        "--engram-heads", type=int, default=8,
        help="Rows read for each order at each position. Default: 8.",
    )  # fmt: skip
    group.add_argument(
        "--engram-vocab-size", type=int, nargs="+", default=[646400], metavar="N",
        help="Least rows of a head; each takes the next prime that no other head has. One number, or one per order. "
        "Default: 646400, the published size; with all defaults a layer's table has 662 million parameters.",
    )  # fmt: skip
    group.add_argument(
        "--engram-dim", type=int, default=512,
        help="Elements read for each order; a row has this divided by the heads. Default: 512.",
    )  # fmt: skip
    group.add_argument("--engram-seed", type=int, default=0, help="Seed of the hash constants. Default: 0.")
    group.add_argument(
        "--engram-pad-id", type=int, default=None,
        help="Token id that stands where an n-gram reaches before its document. Default: the tokenizer's EOD.",
    )  # fmt: skip
    group.add_argument(
        "--engram-across-documents", action="store_true",
        help="Let hashed n-grams reach across document starts, as the published code does.",
    )  # fmt: skip
    group.add_argument(
        "--engram-lr-mult", type=float, default=5.0,
        help="Learning rate of the tables, as a multiple of --lr. Default: 5.",
    )  # fmt: skip
    group.add_argument(
        "--engram-wd-mult", type=float, default=0.0,
        help="Their weight decay, as a multiple of --weight-decay. Default: 0.",
    )  # fmt: skip
    group.add_argument(
        "--engram-shard-over", choices=["tensor", "expert", "data"], default="tensor",
        help=f"Ranks over which a table's rows are split. Only 'tensor' is there yet; {TABLES_PAGE} says why.",
    )  # fmt: skip
    group.add_argument(
        "--engram-update", choices=["dense", "touched-rows"], default="dense",
        help=f"Rows that a step updates. Only 'dense' (Megatron's own Adam) is there yet; {TABLES_PAGE} says why.",
    )  # fmt: skip


def graft_settings(args: argparse.Namespace) -> GraftSettings:
    """Read and check our flags against the model and the parallel layout.

    Raises:
        ConfigError: a value or a combination that cannot be honoured.
    """
    settings = GraftSettings(
        banks=tuple(Path(bank) for bank in args.graft_bank if bank),
        layers=tuple(args.graft_layers),
        donor_layers=_donor_layers(args),
        engram=_engram_settings(args) if args.engram_layers else None,
        rows=args.graft_rows,
        rows_lr_mult=args.graft_rows_lr_mult,
        rows_wd_mult=args.graft_rows_wd_mult,
        lr_mult=args.graft_lr_mult,
        combine=args.graft_combine,
        gate=args.graft_gate,
        conv_kernel=args.graft_conv_kernel,
        conv_dilation=args.graft_conv_dilation,
        lookup=args.graft_lookup,
        look_ahead=args.graft_look_ahead,
        verify_every=args.graft_verify,
        adopt_checkpoint=args.graft_adopt_checkpoint,
        allow_raw_bank=args.graft_allow_raw_bank,
        verify_bank=args.graft_verify_bank,
        bank_rows=args.bank_rows,
        bank_node_copy=Path(args.bank_node_copy) if args.bank_node_copy else None,
        bank_lookup_threads=args.bank_lookup_threads,
        bank_huge_pages=args.bank_huge_pages,
        run_dir=Path(args.graft_run_dir) if args.graft_run_dir else None,
    )
    check_data_flags(args)
    if not args.engram_layers:
        _refuse_table_flags(args)
    check_settings(settings, args.num_layers)
    if settings.has_sites:
        check_site_flags(args)
    return settings


def _donor_layers(args: argparse.Namespace) -> tuple[tuple[int, ...] | None, ...]:
    if not args.graft_donor_layers:
        return (None,) * len(args.graft_layers)
    lists = []
    for text in args.graft_donor_layers:
        if not all(number.isdecimal() for number in text.split(",")):
            raise ConfigError(
                "--graft-donor-layers", "is no list of layers", got=text, expected="numbers joined by commas: 8,24"
            )
        lists.append(tuple(int(number) for number in text.split(",")))
    return tuple(lists) * (len(args.graft_layers) if len(lists) == 1 and args.graft_layers else 1)


def _refuse_table_flags(args: argparse.Namespace) -> None:
    """Refuse flags of hashed tables where there is none: they would be of no effect."""
    defaults = vars(add_graft_arguments(argparse.ArgumentParser()).parse_args([]))
    for name, default in defaults.items():
        value = getattr(args, name)
        if name.startswith("engram_") and value != default:
            flag = f"--{name.replace('_', '-')}"
            raise ConfigError(
                flag, "was given without a table", got=value, remedy=f"Add --engram-layers N, or drop {flag}."
            )


def _engram_settings(args: argparse.Namespace) -> EngramSettings:
    for flag, value, only in (
        ("--engram-shard-over", args.engram_shard_over, "tensor"),
        ("--engram-update", args.engram_update, "dense"),
    ):
        if value != only:
            raise ConfigError(flag, "is not supported yet", got=value, expected=only, remedy=f"See {TABLES_PAGE}.")
    sizes = tuple(args.engram_vocab_size)
    layers = tuple(args.engram_layers)
    ids = tuple(layer - 1 for layer in layers) if args.engram_layer_ids is None else tuple(args.engram_layer_ids)
    return EngramSettings(
        layers=layers,
        layer_ids=ids,
        dialect=args.engram_dialect,
        max_order=args.engram_max_order,
        heads=args.engram_heads,
        vocab_sizes=sizes * (args.engram_max_order - 1) if len(sizes) == 1 else sizes,
        dim=args.engram_dim,
        seed=args.engram_seed,
        pad_id=args.engram_pad_id,
        across_documents=args.engram_across_documents,
        lr_mult=args.engram_lr_mult,
        wd_mult=args.engram_wd_mult,
    )
