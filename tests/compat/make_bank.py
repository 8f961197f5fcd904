"""Makes ``bank-v2`` and ``bank-v2.expected.json``: a small bank of format version 2, and what it must answer for ever.

They are committed and never made again; this is how they came about. Answers come from the brute-force oracle and from
the arrays that were written, not from reading the bank.

    python -m tests.compat.make_bank <directory that has neither>
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np

from megatron_graft.bank.keys import UNUSED, BankKeys, canonical_order
from megatron_graft.bank.manifest import DonorIdentity, Processing, TokenizerIdentity
from megatron_graft.bank.writer import write_bank
from megatron_graft.ngram.oracle import brute_force_lookup

NAME = "bank-v2"
NUM_ROWS, FIRST_ROWS, VOCAB_SIZE, EOD, MAX_ORDER = 60, 25, 40, 7, 4
LAYERS, WIDTH, SHARD_ROWS = (20, 12), 6, 40


def make(directory: Path) -> None:
    """Write the bank and its expected answers."""
    generator = np.random.default_rng(20)
    keys = _keys(generator)
    layers = {layer: generator.integers(-127, 128, (NUM_ROWS, WIDTH)).astype(np.int8) for layer in LAYERS}
    scales = {layer: generator.uniform(0.01, 0.02, NUM_ROWS).astype(np.float32) for layer in LAYERS}
    manifest = write_bank(
        directory / NAME,
        keys=keys,
        layers=layers,
        scales=scales,
        row_dtype="int8",
        shard_rows=SHARD_ROWS,
        tokenizer=TokenizerIdentity(fingerprint="5e" * 32, vocab_size=VOCAB_SIZE, eod=EOD),
        donor=DonorIdentity(name="none", revision="d0" * 32, layers=LAYERS, hidden_size=WIDTH),
        processing=Processing(centred=False, normalised=False),
        control=None,
        provenance={"made_by": "tests/compat/make_bank.py"},
    )
    tokens = generator.integers(-1, VOCAB_SIZE + 2, (3, 30))
    for sequence in tokens[:2]:  # mostly text that the keys are made of
        for end in range(4, 30, 5):
            key = keys.key_ids[generator.integers(NUM_ROWS)]
            sequence[end - 4 : end] = np.where(key == UNUSED, sequence[end - 4 : end], key)
    values = np.concatenate([layers[layer] * scales[layer][:, None] for layer in LAYERS], axis=1)
    expected = {
        "digest": manifest.digest,
        "tokens": tokens.tolist(),
        "answers": {str(rows): _answers(keys, tokens, rows) for rows in (NUM_ROWS, FIRST_ROWS)},
        "values": {str(row): values[row].tolist() for row in (0, 1, 39, 40, 59)},
    }
    (directory / f"{NAME}.expected.json").write_text(json.dumps(expected) + "\n")


def _keys(generator: np.random.Generator) -> BankKeys:
    counts: dict[tuple[int, ...], int] = {}
    while len(counts) < NUM_ROWS:
        text = generator.integers(8, VOCAB_SIZE, MAX_ORDER).tolist()
        for order in range(int(generator.integers(1, MAX_ORDER + 1)), MAX_ORDER + 1):
            counts[tuple(text[-order:])] = int(generator.integers(1, 30))
    chosen = list(counts.items())[:NUM_ROWS]
    keys = BankKeys(
        key_ids=np.array([(UNUSED,) * (MAX_ORDER - len(key)) + key for key, _ in chosen], dtype=np.int32),
        key_orders=np.array([len(key) for key, _ in chosen], dtype=np.uint8),
        key_counts=np.array([count for _, count in chosen], dtype=np.int64),
    )
    order = canonical_order(keys)
    return BankKeys(key_ids=keys.key_ids[order], key_orders=keys.key_orders[order], key_counts=keys.key_counts[order])


def _answers(keys: BankKeys, tokens: np.ndarray, num_rows: int) -> dict[str, list[list[int]]]:
    """What the bank of the first ``num_rows`` keys answers."""
    rows_of_keys = {tuple(ids[ids != UNUSED].tolist()): row for row, ids in enumerate(keys.key_ids[:num_rows])}
    rows, orders = brute_force_lookup(rows_of_keys, tokens, EOD, 1, MAX_ORDER)
    return {"rows": rows.tolist(), "orders": orders.tolist()}


if __name__ == "__main__":
    make(Path(sys.argv[1]))
