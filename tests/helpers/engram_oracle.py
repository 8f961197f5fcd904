"""Engram's hashing (arXiv 2601.07372, section 2.2) written from the paper, token by token and head by head, on its own.

It shares nothing with the package. Integers are Python's, cut to 64 bits where the paper's are; primes are found by
trial division.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

LARGEST = 2**63 - 1


def multipliers(seed: int, layer_id: int, max_order: int, vocab_size: int) -> list[int]:
    """Odd factors of a layer, by distance back."""
    draw = np.random.default_rng(seed + 10007 * layer_id)
    return [int(number) * 2 + 1 for number in draw.integers(0, max(1, LARGEST // vocab_size // 2), size=max_order)]


def primes(layers: int, vocab_sizes: Sequence[int], heads: int) -> list[list[list[int]]]:
    """Moduli by layer (in order), order and head: always the next prime that nobody has."""
    used: set[int] = set()
    found: list[list[list[int]]] = []
    for _ in range(layers):
        found.append([])
        for size in vocab_sizes:
            found[-1].append([])
            number = size - 1
            while len(found[-1][-1]) < heads:
                number += 1
                if number not in used and all(number % divisor for divisor in range(2, int(number**0.5) + 1)):
                    used.add(number)
                    found[-1][-1].append(number)
    return found


def as_int64(number: int) -> int:
    """What is left of a number in two's complement of 64 bits."""
    return (number + 2**63) % 2**64 - 2**63


def rows_of_sequence(
    tokens: Sequence[int],
    compressed: Sequence[int],
    *,
    factors: Sequence[int],
    moduli: Sequence[Sequence[int]],
    pad_id: int,
    eod: int | None,
) -> list[list[int]]:
    """Table rows of every position of one sequence, orders then heads.

    Args:
        tokens: token ids.
        compressed: compressed id of each token id.
        factors: see :func:`multipliers`.
        moduli: by order and head.
        pad_id: token id in place of what lies before the document.
        eod: ends a document; None if n-grams reach across documents.
    """
    starts: list[int] = []
    for position in range(len(tokens)):
        first = position == 0 or tokens[position - 1] == eod
        starts.append(position if first else starts[-1])
    rows = []
    for position, start in enumerate(starts):
        rows.append([])
        first_row = 0
        for order, of_order in enumerate(moduli, start=2):
            mixed = 0
            for back in range(order):
                token = tokens[position - back] if position - back >= start else pad_id
                mixed ^= as_int64((compressed[token] if token >= 0 else token) * factors[back])
            for modulus in of_order:
                rows[-1].append(first_row + mixed % modulus)
                first_row += modulus
    return rows
