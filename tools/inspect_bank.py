"""Show what a bank holds: identity, sizes, orders, its index, counts and, with a tokenizer, keys as text."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable
from pathlib import Path

import numpy as np

if __package__ in (None, ""):  # run as a file from a checkout
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_graft.bank.index_file import read_index_header
from megatron_graft.bank.keys import check_key_range
from megatron_graft.bank.manifest import KEYS_NAME
from megatron_graft.bank.reader import Bank, open_bank
from megatron_graft.commands import run_command
from megatron_graft.data.tokenizer import TextTokenizer, load_tokenizer
from megatron_graft.errors import ConfigError, IdentityError

LANES = 8  # places for entries in one bucket of the index


def main(argv: list[str] | None = None) -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bank", type=Path, help="bank directory")
    parser.add_argument("--rows", type=int, metavar="K", help="look at the bank of its K most frequent keys")
    parser.add_argument("--tokenizer", type=Path, help="the bank's tokenizer file: shows keys as text")
    parser.add_argument("--keys", type=int, default=20, help="how many keys to show of the top and at random")
    parser.add_argument("--seed", type=int, default=0, help="seed of the random choice")
    parser.add_argument("--norms", action="store_true", help="show the root mean square of each shown key's row")
    arguments = parser.parse_args(argv)

    def body() -> None:
        if arguments.seed < 0:
            raise ConfigError("--seed", "is negative", got=arguments.seed, expected="0 or more")
        bank = open_bank(arguments.bank, rows=arguments.rows)
        tokenizer = load_matching_tokenizer(arguments.tokenizer, bank) if arguments.tokenizer else None
        print_identity(bank)
        print_sizes(bank)
        print_orders(bank)
        print_index(bank)
        shown = min(max(0, arguments.keys), bank.num_rows)
        print(f"\ntop {shown} keys")
        print_keys(bank, range(shown), tokenizer, norms=arguments.norms)
        print(f"\n{shown} keys at random (seed {arguments.seed})")
        chosen = np.random.default_rng(arguments.seed).choice(bank.num_rows, shown, replace=False)
        print_keys(bank, np.sort(chosen).tolist(), tokenizer, norms=arguments.norms)

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
    """Print what the bank is, and what its manifest tells of where it came from."""
    identity = bank.manifest.identity
    donor, processing, control = identity.donor, identity.processing, identity.control
    layers = ", ".join(map(str, donor.layers))
    print(f"bank       {bank.path}")
    print(f"digest     {bank.digest}")
    if bank.num_rows < identity.num_rows:
        print(f"part of    {bank.manifest.digest}, {bank.num_rows:,} of {identity.num_rows:,} rows")
    print(f"rows       {bank.num_rows:,} x {bank.row_dim} {identity.row_dtype}")
    print(f"donor      {donor.name} ({donor.revision[:12]}), layers {layers}, hidden size {donor.hidden_size}")
    print(f"processing centred {processing.centred}, normalised {processing.normalised}")
    print(f"control    {f'{control.kind}, seed {control.seed}' if control else 'none'}")
    print(f"tokenizer  {bank.tokenizer_fingerprint[:12]}, vocabulary {bank.vocab_size:,}, EOD {bank.eod}")
    for name, value in bank.manifest.provenance.items():
        print(f"provenance {name}: {value}")


def print_sizes(bank: Bank) -> None:
    """Print the files of the whole bank, and what a key, a row and an entry of the index take."""
    manifest = bank.manifest
    keys, *rows = manifest.identity.files
    num_rows = manifest.identity.num_rows
    entries = num_rows + manifest.index.phantoms
    sizes = (
        ("keys", keys.bytes, 1, num_rows, "key"),
        ("rows", sum(file.bytes for file in rows), len(rows), num_rows, "row"),
        ("index", manifest.index.bytes, 1, entries, "entry"),
    )
    print()
    for name, size, files, count, unit in sizes:
        print(f"{name:<10} {size:>18,} bytes in {files} file{'s' * (files > 1)}, {size / count:,.1f} for each {unit}")
    for file in (*manifest.identity.files, manifest.index):
        print(f"file       {file.bytes:>18,} bytes  {file.sha256[:12]}  {file.name}")


def print_orders(bank: Bank) -> None:
    """Print, for each order, how many keys there are and how often they occur in the corpus."""
    names = ("keys", "share", "occurrences", "most", "median", "least")
    print("\norder " + " ".join(f"{name:>{width}}" for name, width in zip(names, (12, 7, 14, 10, 8, 8), strict=True)))
    for order in bank.orders:
        counts = bank.key_counts[bank.key_orders == order]
        share = f"{len(counts) / bank.num_rows:>7.1%}"
        if not len(counts):  # a bank cut to its first rows may have lost an order
            print(f"{order:>5} {0:>12} {share} {0:>14} {'-':>10} {'-':>8} {'-':>8}")
            continue
        print(
            f"{order:>5} {len(counts):>12,} {share} {counts.sum():>14,} "
            f"{counts.max():>10,} {np.median(counts):>8,.0f} {counts.min():>8,}"
        )


def print_index(bank: Bank) -> None:
    """Print what the index was made from and, for each order of the whole bank, what its table holds."""
    header = read_index_header(bank.index_path)
    keys, tokenizer = header["keys_sha256"].hex(), header["tokenizer_sha256"].hex()
    print(f"\nindex      version {header['version']}, of keys {keys[:12]} and tokenizer {tokenizer[:12]}")
    print(
        f"entries    {header['rows'] + header['phantoms']:,}: rows {header['rows']:,}, phantoms {header['phantoms']:,}"
    )
    names = ("entries", "phantoms", "buckets", "filled")
    print("order " + " ".join(f"{name:>{width}}" for name, width in zip(names, (14, 14, 14, 7), strict=True)))
    keys_by_order = np.bincount(open_bank(bank.path).key_orders, minlength=bank.max_order + 1)
    if keys_by_order[1]:  # a plain array over the vocabulary: a token has a row or none
        print(f"    1 {keys_by_order[1]:>14,} {0:>14} {'-':>14} {'-':>7}")
    for level in header["levels"]:
        order, entries, buckets = level["order"], level["entries"], level["buckets"]
        phantoms = entries - int(keys_by_order[order])
        filled = f"{entries / (buckets * LANES):>7.1%}"
        print(f"{order:>5} {entries:>14,} {phantoms:>14,} {buckets:>14,} {filled}")


def print_keys(bank: Bank, rows: Iterable[int], tokenizer: TextTokenizer | None, *, norms: bool) -> None:
    """Print keys, one a line: row, count, order, root mean square of the row if wanted, then text or ids."""
    identity = bank.manifest.identity
    for row in rows:
        check_key_range(bank.keys, (row, row + 1), identity.tokenizer, bank.orders, bank.path / KEYS_NAME)
        order = int(bank.key_orders[row])
        ids = bank.key_ids[row, bank.max_order - order :].tolist()
        text = tokenizer.ngram_text(ids) if tokenizer else None
        norm = f" {np.sqrt(np.mean(np.square(bank.float_rows(np.array([row]))))):>8.4f}" if norms else ""
        print(f"{row:>10,} {bank.key_counts[row]:>10,} {order:>2}{norm}  {ids if text is None else repr(text)}")


if __name__ == "__main__":
    raise SystemExit(main())
