"""Train a SentencePiece tokenizer on the training split: <output>/tokenizer.model."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

if __package__ in (None, ""):  # run as a file from a checkout
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_graft.commands import run_command
from megatron_graft.data.tokenizer import load_tokenizer
from megatron_graft.data.tokenizer_training import MAX_BYTES, VOCAB_SIZE, train_tokenizer
from megatron_graft.data.user_files import DEFAULT_JSON_KEY


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--input", type=Path, nargs="+", required=True, metavar="JSONL",
                        help="the training split, never the held-out text")  # fmt: skip
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="directory for the model")
    parser.add_argument("--vocab-size", type=int, default=VOCAB_SIZE, metavar="N",
                        help="number of ids (default: %(default)s)")  # fmt: skip
    parser.add_argument("--json-keys", "--json-key", default=DEFAULT_JSON_KEY, metavar="KEY", dest="json_key",
                        help="member that holds the text (default: %(default)s)")  # fmt: skip
    parser.add_argument("--max-bytes", type=int, default=MAX_BYTES, metavar="N",
                        help="sample documents above this much input (default: %(default)s)")  # fmt: skip
    return parser.parse_args(argv)


def _run(arguments: argparse.Namespace) -> None:
    model = train_tokenizer(
        arguments.input,
        arguments.output,
        vocab_size=arguments.vocab_size,
        json_key=arguments.json_key,
        max_bytes=arguments.max_bytes,
    )
    tokenizer = load_tokenizer(model)
    print(f"{model}: {tokenizer.vocab_size:,} ids, EOD {tokenizer.eod}, fingerprint {tokenizer.fingerprint}")


def main(argv: list[str] | None = None) -> int:
    """Run the command; return its exit code."""
    arguments = parse_arguments(argv)
    return run_command(lambda: _run(arguments))


if __name__ == "__main__":
    raise SystemExit(main())
