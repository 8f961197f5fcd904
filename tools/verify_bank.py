"""Check a bank directory and print its digest."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

if __package__ in (None, ""):  # run as a file from a checkout
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_graft.bank.reader import open_bank
from megatron_graft.commands import run_command


def main(argv: list[str] | None = None) -> int:
    """Run the command; exit code 0 means that the bank is sound."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bank", type=Path, help="bank directory")
    parser.add_argument(
        "--depth",
        choices=("header", "sample", "full"),
        default="full",
        help="header: manifest, sizes and headers, and that the index was made from these keys; sample: also some "
        "thousand keys, looked up in the index; full: every byte and every key (default)",
    )
    parser.add_argument("--threads", type=int, default=1, help="threads that look the keys up")
    arguments = parser.parse_args(argv)

    def body() -> None:
        bank = open_bank(arguments.bank, verify=arguments.depth, threads=arguments.threads)
        rows = f"{bank.num_rows:,} rows x {bank.row_dim} {bank.row_layout.dtype.name}"
        print(f"{bank.path}: {arguments.depth} check passed, {rows}")
        print(f"digest {bank.digest}")

    return run_command(body)


if __name__ == "__main__":
    raise SystemExit(main())
