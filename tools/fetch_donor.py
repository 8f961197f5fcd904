#!/usr/bin/env python3
"""Make a donor, a local Hugging Face directory: a pretrained one that Python packages carry, or a GGUF file's model.

Or one with random weights: the control for what a donor has learnt.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

if __package__ in (None, ""):  # run as a file from a checkout
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_graft.building.fetch import PACKAGED_DONORS, convert_donor, fetch_donor
from megatron_graft.building.random_donor import make_random_donor
from megatron_graft.commands import run_command
from megatron_graft.errors import ConfigError


def main(argv: list[str] | None = None) -> int:
    """Run the command; return its exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", metavar="NAME", nargs="?", help="donor: " + ", ".join(sorted(PACKAGED_DONORS)))
    parser.add_argument("directory", metavar="OUTDIR", type=Path, help="directory to create")
    parser.add_argument("--gguf", type=Path, metavar="FILE", help="convert this file, in place of NAME")
    parser.add_argument("--random-weights", type=int, metavar="SEED", help="random weights, in place of NAME's")
    parser.add_argument("--like", type=Path, metavar="DIR", help="the donor that --random-weights takes all else from")
    arguments = parser.parse_intermixed_args(argv)  # NAME may be left out before flags

    def body() -> None:
        given = [value for value in (arguments.name, arguments.gguf, arguments.random_weights) if value is not None]
        if len(given) != 1:
            raise ConfigError(
                "NAME", "or --gguf or --random-weights must be given, and one only", got=given or "none of them"
            )
        if (arguments.random_weights is None) != (arguments.like is None):
            raise ConfigError("--like", "goes with --random-weights, and it with --like", got=arguments.like)
        if arguments.random_weights is not None:
            made = make_random_donor(arguments.like, arguments.random_weights, arguments.directory)
        elif arguments.gguf is not None:
            made = convert_donor(arguments.gguf, arguments.directory)
        else:
            made = fetch_donor(arguments.name, arguments.directory)
        print(f"{arguments.directory}: {'ready' if made else 'complete already'}")

    return run_command(body)


if __name__ == "__main__":
    raise SystemExit(main())
