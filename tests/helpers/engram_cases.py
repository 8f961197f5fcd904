"""Random hashed tables for tests, each as our configuration and as the oracle of the same."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from megatron_graft.ngram.hashing import DIALECTS, EngramConfig, LayerHash, layer_hashes
from tests.helpers import engram_oracle

VOCAB_SIZE, COMPRESSED_SIZE = 12, 9
DEFAULTS: dict[str, Any] = {
    "dialect": DIALECTS["deepseek"],
    "max_order": 3,
    "heads": 2,
    "vocab_sizes": (10, 12),
    "dim": 8,
    "seed": 0,
    "pad_id": 2,
    "across_documents": True,
    "layer_ids": ((2, 1), (16, 15)),
}


def engram_config(**changes: Any) -> EngramConfig:
    """A small configuration with some of its values changed."""
    return EngramConfig(**{**DEFAULTS, **changes})


@dataclass
class Case:
    """A random configuration, its compression map and its tokens; and what the oracle makes of them."""

    config: EngramConfig
    hashes: dict[int, LayerHash]
    compressed_ids: np.ndarray
    tokens_BS: np.ndarray
    eod: int | None

    def multipliers(self, layer_id: int) -> list[int]:
        """The oracle's, by distance back."""
        return engram_oracle.multipliers(self.config.seed, layer_id, self.config.max_order, COMPRESSED_SIZE)

    def primes(self, layer_number: int) -> list[list[int]]:
        """The oracle's, by order and head."""
        config = self.config
        numbers = [number for number, _ in config.layer_ids]
        return engram_oracle.primes(len(numbers), config.vocab_sizes, config.heads)[numbers.index(layer_number)]

    def expected(self, layer_number: int) -> np.ndarray:
        """The oracle's rows, int64 ``[B, S, K]``."""
        rows = [
            engram_oracle.rows_of_sequence(
                sequence,
                self.compressed_ids.tolist(),
                factors=self.multipliers(dict(self.config.layer_ids)[layer_number]),
                moduli=self.primes(layer_number),
                pad_id=self.config.pad_id,
                eod=None if self.config.across_documents else self.eod,
            )
            for sequence in self.tokens_BS.tolist()
        ]
        return np.array(rows, dtype=np.int64).reshape(*self.tokens_BS.shape, self.config.num_heads)


def random_case(seed: int, *, max_order: int, across_documents: bool, eod: int | None = 1, length: int = 40) -> Case:
    """A case of three layers; ids repeat, every eighth token is negative and documents are short."""
    generator = np.random.default_rng(seed)
    compressed_ids = generator.integers(0, COMPRESSED_SIZE, VOCAB_SIZE).astype(np.int32)
    config = engram_config(
        max_order=max_order,
        heads=int(generator.integers(1, 5)),
        vocab_sizes=tuple(generator.integers(2, 300, max_order - 1).tolist()),
        dim=60,
        seed=int(generator.integers(0, 100)),
        pad_id=int(generator.integers(0, VOCAB_SIZE)),
        across_documents=across_documents,
        layer_ids=((1, 7), (4, 0), (9, int(generator.integers(20, 40)))),
    )
    tokens_BS = generator.integers(0, VOCAB_SIZE, (3, length))
    negative_BS = generator.random(tokens_BS.shape) < 1 / 8
    tokens_BS[negative_BS] = -generator.integers(1, 2**31, int(negative_BS.sum()))
    return Case(config, layer_hashes(config, COMPRESSED_SIZE), compressed_ids, tokens_BS, eod)
