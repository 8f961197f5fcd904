"""Copy a bank to a node's own disk, once whatever number of processes asks, and print the copy's path.

Under Slurm, one process a node: srun --ntasks-per-node=1 python tools/stage_bank.py BANK DIRECTORY
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import get_args

if __package__ in (None, ""):  # run as a file from a checkout
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_graft.bank.node_copy import node_copy
from megatron_graft.bank.verify import Depth
from megatron_graft.commands import run_command


def main(argv: list[str] | None = None) -> int:
    """Run the command; exit code 0 means that a sound copy is there."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("bank", type=Path, help="bank directory")
    parser.add_argument("directory", type=Path, help="on the node's own storage; the copy is DIRECTORY/<digest>")
    parser.add_argument(
        "--verify",
        choices=get_args(Depth),
        default="header",
        help="header: manifest, sizes and headers of the copy (default); sample: also some thousand keys; full: every "
        "byte of the copy is read back and compared with the bank's digests",
    )
    arguments = parser.parse_args(argv)
    return run_command(lambda: print(node_copy(arguments.bank, arguments.directory, verify=arguments.verify)))


if __name__ == "__main__":
    raise SystemExit(main())
