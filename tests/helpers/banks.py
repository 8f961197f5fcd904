"""Small banks for tests: keys given as plain tuples, rows drawn from a seed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from megatron_graft.bank.keys import UNUSED, BankKeys, canonical_order
from megatron_graft.bank.manifest import Control, DonorIdentity, Processing, TokenizerIdentity
from megatron_graft.bank.reader import Bank, open_bank
from megatron_graft.bank.writer import write_bank

Key = tuple[int, ...]
EOD = 0


def keys_of(counts: Mapping[Key, int]) -> BankKeys:
    """Keys (oldest token first) with their counts, in a bank's order."""
    width = max(map(len, counts))
    ids = np.full((len(counts), width), UNUSED, dtype=np.int32)
    for row, key in enumerate(counts):
        ids[row, width - len(key) :] = key
    orders = np.array([len(key) for key in counts], dtype=np.uint8)
    keys = BankKeys(key_ids=ids, key_orders=orders, key_counts=np.array(list(counts.values()), dtype=np.int64))
    order = canonical_order(keys)
    return BankKeys(key_ids=ids[order], key_orders=orders[order], key_counts=keys.key_counts[order])


def tokenizer_identity(vocab_size: int = 50, eod: int = EOD) -> TokenizerIdentity:
    return TokenizerIdentity(fingerprint="f0" * 32, vocab_size=vocab_size, eod=eod)


def donor_identity(layers: Sequence[int] = (12,), hidden_size: int = 4) -> DonorIdentity:
    return DonorIdentity(name="donor", revision="d0" * 32, layers=tuple(layers), hidden_size=hidden_size)


def random_rows(num_rows: int, width: int, seed: int = 0) -> np.ndarray:
    """uint16 ``[N, D]``: any bits at all."""
    return np.random.default_rng(seed).integers(0, 2**16, (num_rows, width)).astype(np.uint16)


def bank_arguments(
    counts: Mapping[Key, int],
    *,
    vocab_size: int = 50,
    eod: int = EOD,
    layers: Sequence[int] = (12,),
    width: int = 4,
    control: Control | None = None,
    seed: int = 0,
) -> dict[str, object]:
    """The keyword arguments of ``write_bank`` for a small bank."""
    return {
        "keys": keys_of(counts),
        "layers": {layer: random_rows(len(counts), width, seed + layer) for layer in layers},
        "tokenizer": tokenizer_identity(vocab_size, eod),
        "donor": donor_identity(layers, width),
        "processing": Processing(centred=True, normalised=True),
        "control": control,
        "provenance": {"made_by": "a test"},
    }


def make_bank(path: Path, counts: Mapping[Key, int], **settings: object) -> Bank:
    """Write a small bank and open it; ``settings`` as :func:`bank_arguments`."""
    write_bank(path, **bank_arguments(counts, **settings))  # type: ignore[arg-type]
    return open_bank(path)
