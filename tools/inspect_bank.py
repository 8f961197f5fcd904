"""Show what a bank holds: identity, sizes, orders, counts and, with a tokenizer, keys as text."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable
from pathlib import Path

import numpy as np

if __package__ in (None, ""):  # run as a file from a checkout
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_graft.bank.reader import Bank, open_bank
from megatron_graft.commands import run_command
from megatron_graft.data.tokenizer import TextTokenizer, load_tokenizer
from megatron_graft.errors import IdentityError


def main(argv: list[str] | None = None) -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bank", type=Path, help="bank directory")
    parser.add_argument("--tokenizer", type=Path, help="the bank's tokenizer file: shows keys as text")
    parser.add_argument("--keys", type=int, default=20, help="how many keys to show of the top and at random")
    parser.add_argument("--seed", type=int, default=0, help="seed of the random choice")
    arguments = parser.parse_args(argv)

    def body() -> None:
        bank = open_bank(arguments.bank)
        print_identity(bank)
        print_orders(bank)
        tokenizer = load_matching_tokenizer(arguments.tokenizer, bank) if arguments.tokenizer else None
        shown = min(max(0, arguments.keys), bank.num_rows)
        print(f"\ntop {shown} keys")
        print_keys(bank, range(shown), tokenizer)
        print(f"\n{shown} keys at random (seed {arguments.seed})")
        chosen = np.random.default_rng(arguments.seed).choice(bank.num_rows, shown, replace=False)
        print_keys(bank, np.sort(chosen).tolist(), tokenizer)

    return run_command(body)


def load_matching_tokenizer(path: Path, bank: Bank) -> TextTokenizer:
    """Load a tokenizer, which must be the one the bank's keys are made of."""
    tokenizer = load_tokenizer(path)
    if tokenizer.fingerprint != bank.tokenizer_fingerprint:
        raise IdentityError(
            f"--tokenizer {path}",
            "is not the tokenizer of this bank",
            got=tokenizer.fingerprint,
            expected=bank.tokenizer_fingerprint,
        )
    return tokenizer


def print_identity(bank: Bank) -> None:
    """Print the manifest's identity and the sizes of the files."""
    identity = bank.manifest.identity
    donor, processing, control = identity.donor, identity.processing, identity.control
    layers = ", ".join(map(str, donor.layers))
    print(f"bank       {bank.path}")
    print(f"digest     {bank.digest}")
    print(f"rows       {bank.num_rows:,} x {bank.row_dim} {identity.row_dtype}")
    print(f"donor      {donor.name} ({donor.revision[:12]}), layers {layers}, hidden size {donor.hidden_size}")
    print(f"processing centred {processing.centred}, normalised {processing.normalised}")
    print(f"control    {f'{control.kind}, seed {control.seed}' if control else 'none'}")
    print(f"tokenizer  {bank.tokenizer_fingerprint[:12]}, vocabulary {bank.vocab_size:,}, EOD {bank.eod}")
    for file in identity.files:
        print(f"file       {file.name}  {file.bytes:,} bytes")
    for name, value in bank.manifest.provenance.items():
        print(f"provenance {name}: {value}")


def print_orders(bank: Bank) -> None:
    """Print, for each order, how many keys there are and how often they occur in the corpus."""
    names = ("keys", "share", "occurrences", "most", "median", "least")
    print("\norder " + " ".join(f"{name:>{width}}" for name, width in zip(names, (12, 7, 14, 10, 8, 8), strict=True)))
    for order in bank.orders:
        counts = bank.key_counts[bank.key_orders == order]
        print(
            f"{order:>5} {len(counts):>12,} {len(counts) / bank.num_rows:>7.1%} {counts.sum():>14,} "
            f"{counts.max():>10,} {np.median(counts):>8,.0f} {counts.min():>8,}"
        )


def print_keys(bank: Bank, rows: Iterable[int], tokenizer: TextTokenizer | None) -> None:
    """Print keys, one a line: row, count, order, then text or ids."""
    for row in rows:
        order = int(bank.key_orders[row])
        ids = bank.key_ids[row, bank.max_order - order :].tolist()
        text = tokenizer.ngram_text(ids) if tokenizer else None
        print(f"{row:>10,} {bank.key_counts[row]:>10,} {order:>2}  {ids if text is None else repr(text)}")


if __name__ == "__main__":
    raise SystemExit(main())
