"""Tokenise JSON lines into Megatron's .bin/.idx, with the flags of Megatron's own tool.

Writes <output prefix>_<key>_document.bin, .idx and .tokenizer.json for each key.
Unlike in Megatron's tool --append-eod is the default, since n-grams stop at document borders.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

if __package__ in (None, ""):  # run as a file from a checkout
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_graft.commands import run_command
from megatron_graft.data.preprocess import dataset_prefix, preprocess
from megatron_graft.data.tokenizer import MEGATRON_TYPES, load_tokenizer
from megatron_graft.data.user_files import DEFAULT_JSON_KEY
from megatron_graft.errors import ConfigError
from megatron_graft.processes import available_processors


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", type=Path, nargs="+", required=True, metavar="JSONL")
    parser.add_argument("--output-prefix", type=Path, required=True, metavar="PATH",
                        help="path and start of the name of the files to write")  # fmt: skip
    parser.add_argument("--tokenizer-model", type=Path, required=True, metavar="FILE",
                        help="SentencePiece .model, or a tokenizer.json or its directory")  # fmt: skip
    parser.add_argument("--tokenizer-type", choices=sorted(MEGATRON_TYPES.values()),
                        help="Megatron's name for it; checked if given")  # fmt: skip
    parser.add_argument("--json-keys", nargs="+", default=[DEFAULT_JSON_KEY], metavar="KEY",
                        help="members to tokenise, one data set each (default: text)")  # fmt: skip
    parser.add_argument("--append-eod", action=argparse.BooleanOptionalAction, default=True,
                        help="end every document with the EOD token")  # fmt: skip
    parser.add_argument("--workers", type=int, default=available_processors(), metavar="N",
                        help="processes; the output is the same for any (default: %(default)s)")  # fmt: skip
    parser.add_argument("--log-interval", type=int, metavar="N",
                        help="documents between progress lines (default: every five seconds)")  # fmt: skip
    return parser.parse_args(argv)


def _run(arguments: argparse.Namespace) -> None:
    tokenizer = load_tokenizer(arguments.tokenizer_model)
    megatron_type = MEGATRON_TYPES[tokenizer.kind]
    if arguments.tokenizer_type not in (None, megatron_type):
        raise ConfigError(
            f"--tokenizer-type {arguments.tokenizer_type}",
            f"does not fit --tokenizer-model {arguments.tokenizer_model}",
            expected=megatron_type,
        )
    for key in arguments.json_keys:
        counts = preprocess(
            arguments.input,
            arguments.output_prefix,
            tokenizer,
            json_key=key,
            workers=arguments.workers,
            append_eod=arguments.append_eod,
            log_interval=arguments.log_interval,
        )
        print(
            f"{dataset_prefix(arguments.output_prefix, key)}: {counts.documents:,} documents, "
            f"{counts.tokens:,} tokens, {counts.text_bytes:,} bytes of text, {counts.seconds:.1f} s"
        )


def main(argv: list[str] | None = None) -> int:
    """Run the command; return its exit code."""
    arguments = parse_arguments(argv)
    return run_command(lambda: _run(arguments))


if __name__ == "__main__":
    raise SystemExit(main())
