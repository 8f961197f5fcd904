#!/usr/bin/env python3
"""Report a finished bank: coverage by order and by size, norms, keys, bytes, times; report.json, report.md, a plot."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a file from a checkout
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_graft.bank.reader import open_bank
from megatron_graft.building.coverage import MOST_POSITIONS, write_coverage
from megatron_graft.building.log_summary import build_log_path, read_build_log
from megatron_graft.building.report import coverages_of, kept_report, report_bank, write_report
from megatron_graft.commands import run_command
from megatron_graft.data.tokenizer import load_tokenizer
from megatron_graft.errors import ConfigError, IdentityError
from megatron_graft.files import beside
from megatron_graft.jobs.bank_data import named_prefixes, open_documents
from megatron_graft.reporting.bank_page import coverage_table, curve_table, stage_table, write_bank_page


def build_parser() -> argparse.ArgumentParser:
    """The command's flags."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("bank", type=Path, metavar="BANK", help="the bank's directory")
    parser.add_argument("--data", nargs="+", default=[], metavar="NAME=PREFIX", help="data sets to measure coverage on")
    parser.add_argument("--split", help="--split of the training run: its training share of every data set")
    parser.add_argument("--tokenizer-model", help="the bank's tokenizer; needed for --data and for keys as text")
    parser.add_argument("--log", type=Path, metavar="FILE", help="the build's log (default: the one beside the bank)")
    parser.add_argument("--most-positions", type=int, default=MOST_POSITIONS, help="of a data set, looked up at most")
    parser.add_argument("--seed", type=int, default=0, help="of the random keys")
    parser.add_argument("--threads", type=int, default=1, help="of the lookups")
    parser.add_argument("--output", type=Path, metavar="DIR", help="for report.json, report.md and "
                        "coverage.png (default: BANK.report; then BANK.{report,coverage}.json, too)")  # fmt: skip
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the command; return its exit code."""
    arguments = build_parser().parse_args(argv)
    return run_command(lambda: _run(arguments))


def _run(arguments: argparse.Namespace) -> None:
    for flag in ("most_positions", "threads"):
        if getattr(arguments, flag) < 1:
            name = f"--{flag.replace('_', '-')}"
            raise ConfigError(name, "is too small", got=getattr(arguments, flag), expected="at least 1")
    if arguments.seed < 0:
        raise ConfigError("--seed", "is negative", got=arguments.seed, expected="0 or more")
    report = _measured(arguments)
    if arguments.output is None:  # beside the bank, where other commands look for them
        write_report(arguments.bank, report)
        if report["coverage"]:
            write_coverage(open_bank(arguments.bank), coverages_of(report))
    output = arguments.output or beside(arguments.bank, ".report")
    write_bank_page(output, report)
    for table in (coverage_table(report), curve_table(report), stage_table(report)):
        if table:
            print(table, end="\n\n")
    print(f"written to {output}")


def _measured(arguments: argparse.Namespace) -> dict[str, Any]:
    bank = open_bank(arguments.bank)
    prefixes = named_prefixes(arguments.data, "--data")
    if prefixes and not arguments.tokenizer_model:
        raise ConfigError("--tokenizer-model", "is missing", remedy="--data needs the tokenizer that made the bank.")
    tokenizer = load_tokenizer(arguments.tokenizer_model) if arguments.tokenizer_model else None
    sources = {}
    if tokenizer is not None:
        if tokenizer.fingerprint != bank.tokenizer_fingerprint:
            raise IdentityError(
                arguments.bank, "was made with another tokenizer than --tokenizer-model",
                got=tokenizer.fingerprint, expected=bank.tokenizer_fingerprint, remedy="Give the bank's tokenizer.",
            )  # fmt: skip
        sources = {name: open_documents([prefix], arguments.split, tokenizer) for name, prefix in prefixes.items()}
    log = arguments.log or build_log_path(arguments.bank)
    records = read_build_log(log) if arguments.log or log.is_file() else []
    return report_bank(
        arguments.bank,
        sources,
        log_records=records,
        earlier=kept_report(arguments.bank, bank.digest),
        text_of=tokenizer.ngram_text if tokenizer else None,
        most_positions=arguments.most_positions,
        seed=arguments.seed,
        threads=arguments.threads,
    )


if __name__ == "__main__":
    raise SystemExit(main())
