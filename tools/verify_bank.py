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
        choices=("header", "full"),
        default="full",
        help="header: manifest, sizes, headers and keys; full: every byte as well (default)",
    )
    arguments = parser.parse_args(argv)

    def body() -> None:
        bank = open_bank(arguments.bank, verify=arguments.depth)
        print(f"{bank.path}: {arguments.depth} check passed, {bank.num_rows:,} rows x {bank.row_dim}")
        print(f"digest {bank.digest}")

    return run_command(body)


if __name__ == "__main__":
    raise SystemExit(main())
