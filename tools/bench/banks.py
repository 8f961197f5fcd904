"""Bank directories over synthetic keys, made once and kept: what is measured from Python is what users open."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from programs import KeysOnDisk

from megatron_graft.bank.manifest import DonorIdentity, Processing, TokenizerIdentity
from megatron_graft.bank.reader import Bank, open_bank
from megatron_graft.bank.writer import write_bank

LAYER = 1


def bench_bank(data: Path, keys: KeysOnDisk, *, rows: int | None, width: int, threads: int) -> Bank:
    """The bank of the ``rows`` most frequent keys (default: all), with ``width`` random bfloat16 numbers a row."""
    path = data / f"{keys.directory.name}-bank-{rows or 'all'}x{width}"
    if not path.is_dir():
        chosen = keys.keys(rows)
        count = len(chosen.key_orders)
        # Any bits will do; a block of them again and again, since drawing gigabytes takes longer than writing them.
        block = np.random.default_rng(0).integers(0, 2**15, (min(count, 1 << 14), width)).astype(np.uint16)
        values = np.resize(block, (count, width))
        made = keys.made
        write_bank(
            path,
            keys=chosen,
            layers={LAYER: values},
            tokenizer=TokenizerIdentity(fingerprint="00" * 32, vocab_size=made["vocab_size"], eod=made["eod"]),
            donor=DonorIdentity(name="none", revision="00" * 32, layers=(LAYER,), hidden_size=width),
            processing=Processing(centred=False, normalised=False),
            control=None,
            provenance={"made_by": "the bench"},
            threads=threads,
        )
    return open_bank(path, threads=threads)
