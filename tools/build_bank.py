#!/usr/bin/env python3
"""Build a graft bank: count n-grams of data sets, keep the most frequent, run each through a donor."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import get_args

if __package__ in (None, ""):  # run as a file from a checkout
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_graft.bank.manifest import Control
from megatron_graft.bank.quantise import BUILD_DTYPES
from megatron_graft.bank.reader import open_bank
from megatron_graft.building.build import BankBuildConfig, build_bank, build_control
from megatron_graft.building.coverage import coverage_path, coverage_table, measure_coverage, write_coverage
from megatron_graft.building.documents import MegatronDocuments
from megatron_graft.building.donor import DonorDtype, HuggingFaceDonor
from megatron_graft.commands import run_command
from megatron_graft.data.sidecar import require_same_tokenizer, sidecar_path
from megatron_graft.data.tokenizer import TextTokenizer, load_tokenizer
from megatron_graft.errors import ConfigError
from megatron_graft.log import get_logger
from megatron_graft.lookup.index import open_index


def build_parser() -> argparse.ArgumentParser:
    """The command's flags."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False
    )
    data = parser.add_argument_group("what is counted")
    data.add_argument("--data-prefix", nargs="+", metavar="PREFIX", help="data sets, without .bin/.idx")
    data.add_argument("--split", help="--split of the training run: only its training share is counted")
    data.add_argument("--tokenizer-model", help="tokenizer that made the data: *.model or tokenizer.json")
    data.add_argument("--orders", nargs="+", type=int, default=[2, 3, 4], metavar="N", help="n-gram lengths")
    data.add_argument("--num-rows", type=int, default=50_000, help="n-grams to keep, over all orders")
    data.add_argument("--min-count", type=int, default=2, help="rarer n-grams are never kept")
    donor = parser.add_argument_group("the donor")
    donor.add_argument("--donor", type=Path, metavar="DIR", help="local Hugging Face causal-LM directory")
    donor.add_argument(
        "--donor-layers", nargs="+", type=int, default=[12], metavar="N", help="blocks, from 1; 0 = embedding"
    )
    donor.add_argument(
        "--donor-dtype", default="bfloat16", choices=get_args(DonorDtype), help="type of weights and states"
    )
    donor.add_argument("--batch-tokens", type=int, default=1024, help="most donor tokens of one forward pass")
    donor.add_argument("--threads", type=int, default=2, help="donor passes at a time, one CPU thread each")
    donor.add_argument("--raw", action="store_true", help="neither centre nor normalise the rows")
    donor.add_argument(
        "--row-dtype", default="bfloat16", choices=BUILD_DTYPES, help="what rows are stored as; int8 has a scale a row"
    )
    control = parser.add_argument_group("controls")
    control.add_argument("--control", choices=("shuffled", "random"), help="same keys, other rows")
    control.add_argument("--seed", type=int, default=0, help="seed of the control")
    control.add_argument("--from-bank", type=Path, metavar="DIR", help="take keys and rows from this bank")
    output = parser.add_argument_group("output")
    output.add_argument("--output", type=Path, required=True, metavar="DIR", help="the bank's directory")
    output.add_argument("--coverage", nargs="+", default=[], metavar="NAME=PREFIX", help="more data sets to report on")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the command; return its exit code."""
    arguments = build_parser().parse_args(argv)
    return run_command(lambda: _run(arguments))


def _run(arguments: argparse.Namespace) -> None:
    if arguments.seed < 0:
        raise ConfigError("--seed", "is negative", got=arguments.seed, expected="0 or more")
    control = Control(kind=arguments.control, seed=arguments.seed) if arguments.control else None
    if arguments.from_bank is not None:
        if control is None:
            raise ConfigError("--from-bank", "needs --control: it makes control banks only")
        build_control(arguments.from_bank, control, arguments.output)
        return
    for flag in ("--data-prefix", "--tokenizer-model", "--donor"):
        if not getattr(arguments, flag[2:].replace("-", "_")):
            raise ConfigError(flag, "is missing", remedy="It is needed unless --from-bank is given.")
    named = dict(_named_prefix(value) for value in arguments.coverage)
    tokenizer = load_tokenizer(arguments.tokenizer_model)
    sources = {"train": _open_documents(arguments.data_prefix, arguments.split, tokenizer)}
    # Opened before the donor runs, so that a wrong path shows now.
    sources |= {name: _open_documents([prefix], None, tokenizer) for name, prefix in named.items()}
    donor = HuggingFaceDonor(
        arguments.donor,
        dtype=arguments.donor_dtype,
        batch_tokens=arguments.batch_tokens,
        threads=arguments.threads,
    )
    config = BankBuildConfig(
        data_prefixes=tuple(arguments.data_prefix),
        split=arguments.split,
        orders=tuple(arguments.orders),
        num_rows=arguments.num_rows,
        min_count=arguments.min_count,
        donor_layers=tuple(arguments.donor_layers),
        raw=arguments.raw,
        control=control,
        row_dtype=arguments.row_dtype,
        output=arguments.output,
    )
    build_bank(config, tokenizer=tokenizer, encoder=donor)
    _report_coverage(arguments.output, sources)


def _named_prefix(value: str) -> tuple[str, str]:
    name, separator, prefix = value.partition("=")
    if not (name and separator and prefix):
        raise ConfigError("--coverage", "is malformed", got=value, expected="NAME=PREFIX")
    return name, prefix


def _open_documents(prefixes: Sequence[str], split: str | None, tokenizer: TextTokenizer) -> MegatronDocuments:
    documents = MegatronDocuments(prefixes, split=split, vocab_size=tokenizer.vocab_size)
    for prefix in prefixes:
        if not require_same_tokenizer(prefix, tokenizer):
            missing = sidecar_path(prefix)
            get_logger().warning("%s: no such file; trusting that --tokenizer-model made the data", missing)
    return documents


def _report_coverage(output: Path, sources: Mapping[str, MegatronDocuments]) -> None:
    bank = open_bank(output)
    index = open_index(bank)
    coverages = {
        name: measure_coverage(index, documents, orders=bank.orders, eod=bank.eod)
        for name, documents in sources.items()
    }
    print(coverage_table(coverages))
    write_coverage(bank, coverages)
    print(f"written to {coverage_path(output)}")


if __name__ == "__main__":
    raise SystemExit(main())
