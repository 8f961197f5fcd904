"""Counts of every n-gram in a sample that fits in memory: how many there are, and what share of other text they take.

The sample is cut into eighths by document, so that both can be seen growing: over an eighth, a quarter, a half and all
of it. Cutting by document matters: n-grams repeat inside one, which says little about the next.

Shapes: P positions of the sample, C counts in :data:`COUNTS`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from megatron_graft.building.coverage import Documents, sample_documents
from megatron_graft.errors import DataError

LEVELS = (8, 4, 2, 1)
"""The sample is looked at in so many pieces of equal size, one level after the other."""
COUNTS = np.unique(np.geomspace(1, 1 << 20, 81).astype(np.int64))
"""Thresholds: int64 ``[C]``, 1 to 2^20."""
_NUM_PARTS = LEVELS[0]
_BARRIER = -1
_ID_BITS = 32


@dataclass(frozen=True, kw_only=True)
class Sample:
    """Whole documents end to end, each followed by a barrier.

    Attributes:
        tokens: int64 ``[P]``, -1 at a barrier and at EOD.
        parts: uint8 ``[P]``, which eighth a position's document is in.
        positions: int64 ``[8]``, tokens of each eighth, EOD included and barriers not.
        documents: how many.
    """

    tokens: np.ndarray
    parts: np.ndarray
    positions: np.ndarray
    documents: int

    @property
    def num_tokens(self) -> int:
        """Of all of it."""
        return int(self.positions.sum())


@dataclass(frozen=True, kw_only=True)
class Growth:
    """The n-grams of one order in a sample, over pieces of growing size.

    Attributes:
        order: their length.
        tokens: float64 ``[4]``, mean tokens of a piece: of an eighth, a quarter, a half, all.
        numbers: float64 ``[4, C]``, mean distinct n-grams of a piece that occur at least so often in it.
        fresh: float64 ``[3, C]``, mean share of positions of the other half of the sample that they take; none for
            all of the sample, which has no other half.
        seen: float64 ``[4, C]``, mean share of a piece's own positions that its n-grams with such a count take.
        examples: int64 ``[E, order]``, token ids of n-grams that occur at least twice.
    """

    order: int
    tokens: np.ndarray
    numbers: np.ndarray
    fresh: np.ndarray
    seen: np.ndarray
    examples: np.ndarray


def draw_sample(documents: Documents, tokens: int, *, seed: int, eod: int | None) -> Sample:
    """Whole documents with about ``tokens`` tokens, evenly spread over all data sets.

    Args:
        documents: the data sets.
        tokens: about how many are wanted.
        seed: chooses the documents, and which eighth each one is in.
        eod: end-of-document token, which is in no n-gram.

    Raises:
        DataError: there are fewer than eight documents.
    """
    generator = np.random.default_rng(seed)
    phase = float(generator.random())
    chosen = [
        np.append(np.asarray(document, dtype=np.int64), _BARRIER)
        for document in sample_documents(documents, tokens, phase)
    ]
    if len(chosen) < _NUM_PARTS:
        raise DataError(
            "--estimate", "has too few documents to sample", got=f"{len(chosen)} with about {tokens:,} tokens",
            expected=f"at least {_NUM_PARTS}", remedy="Give more data, or a larger --estimate-tokens.",
        )  # fmt: skip
    lengths = np.array([len(document) for document in chosen])
    parts = _even_parts(lengths, generator)
    tokens_P = np.concatenate(chosen)
    if eod is not None:
        tokens_P[tokens_P == eod] = _BARRIER
    positions = np.bincount(parts, weights=lengths - 1, minlength=_NUM_PARTS).astype(np.int64)
    return Sample(tokens=tokens_P, parts=np.repeat(parts, lengths), positions=positions, documents=len(chosen))


def _even_parts(lengths: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """Part of every document, uint8: in a random order, each goes to the part that has the fewest tokens so far."""
    parts = np.zeros(len(lengths), dtype=np.uint8)
    sizes = np.zeros(_NUM_PARTS, dtype=np.int64)
    for document in generator.permutation(len(lengths)):
        part = int(sizes.argmin())
        parts[document] = part
        sizes[part] += lengths[document]
    return parts


def count_sample(sample: Sample, longest: int, *, num_examples: int = 0, seed: int = 0) -> Iterator[Growth]:
    """What grows in a sample, for orders 2 to ``longest``, one after the other.

    The key of an n-gram is the number of its first n - 1 tokens and its last token, so nothing collides.
    """
    tokens = nodes = sample.tokens
    for order in range(2, longest + 1):
        ends = np.flatnonzero((nodes[:-1] >= 0) & (tokens[1:] >= 0)) + 1
        keys = (nodes[ends - 1] << _ID_BITS) | tokens[ends]
        distinct, places, numbers = np.unique(keys, return_index=True, return_inverse=True)
        by_part = _counts_by_part(numbers, sample.parts[ends], len(distinct))
        repeated = ends[places[by_part.sum(axis=0) >= 2]]
        drawn = np.random.default_rng(seed).permutation(repeated)[:num_examples]
        examples = tokens[drawn[:, None] + np.arange(1 - order, 1)]
        yield _growth(order, by_part, sample.positions, examples)
        nodes = np.full(len(tokens), _BARRIER, dtype=np.int64)
        nodes[ends] = numbers


def _counts_by_part(numbers: np.ndarray, parts: np.ndarray, distinct: int) -> np.ndarray:
    """int32 ``[8, distinct]``: how often every n-gram occurs in each part."""
    counts = np.empty((_NUM_PARTS, distinct), dtype=np.int32)
    for part in range(_NUM_PARTS):
        counts[part] = np.bincount(numbers[parts == part], minlength=distinct)
    return counts


def _growth(order: int, by_part: np.ndarray, positions: np.ndarray, examples: np.ndarray) -> Growth:
    half = _NUM_PARTS // 2
    halves = (by_part[:half].sum(axis=0), by_part[half:].sum(axis=0))
    tokens, numbers, seen, fresh = [], [], [], []
    for pieces in LEVELS:
        size = _NUM_PARTS // pieces
        found, own, others = [], [], []
        for piece in range(pieces):
            places = slice(piece * size, (piece + 1) * size)
            counts = by_part[places].sum(axis=0)
            found.append(_at_least(counts, np.ones(1)))
            own.append(_at_least(counts, counts) / max(1, positions[places].sum()))
            if pieces > 1:
                other = int(piece < pieces // 2)
                read = positions[half:] if other else positions[:half]
                others.append(_at_least(counts, halves[other]) / max(1, read.sum()))
        tokens.append(positions.sum() / pieces)
        numbers.append(np.mean(found, axis=0))
        seen.append(np.mean(own, axis=0))
        if others:
            fresh.append(np.mean(others, axis=0))
    return Growth(
        order=order, tokens=np.array(tokens), numbers=np.array(numbers), fresh=np.array(fresh), seen=np.array(seen),
        examples=examples,
    )  # fmt: skip


def _at_least(counts: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """float64 ``[C]``: sum of the weights of what has at least such a count."""
    highest = int(COUNTS[-1])
    weights = np.broadcast_to(weights, counts.shape)
    sums = np.bincount(np.minimum(counts, highest), weights=weights, minlength=highest + 1)
    totals: np.ndarray = sums[::-1].cumsum()[::-1][COUNTS]
    return totals
