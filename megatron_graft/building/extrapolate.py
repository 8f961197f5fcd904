"""From a sample to a corpus: how many n-grams there will be, and what share of fresh text they will take.

Two things are known of the corpus. N-grams that are frequent in the sample are as frequent in the corpus, so what has
count k in a sample of t tokens has about k T / t in a corpus of T. And rare n-grams grow with the text in a way that
can be seen inside the sample, from an eighth to all of it. So counts of 1 to 4 are carried forward along the growth,
counts that the sample resolves are scaled, and counts between are read off a line between the two, on logarithmic
axes. Text repeats itself more inside a document than Poisson's law allows; only growth by document shows that.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_graft.building.sample_counts import COUNTS, Growth

_GROWN = 4
"""Counts up to this one are carried forward along the growth."""
_LEAST_RESOLVED, _SURELY_RESOLVED = 8, 32
"""Counts in the sample above the second are taken to be resolved, in a small sample lower ones, but above the first."""
_ENOUGH = 500
"""n-grams that a small sample has to have above the count that is taken to be resolved."""
_LEAST_DECAY = 0.9
"""A doubling of the text adds at least so much of what the doubling before it added, on the axis of the curve."""
_TINY = 1e-9


@dataclass(frozen=True, kw_only=True)
class OrderForecast:
    """One order in the whole corpus, by count.

    Attributes:
        order: length of the n-grams.
        log_counts: float64 ``[K]``, ascending natural logarithms of counts in the corpus.
        log_numbers: float64 ``[K]``, of the n-grams with at least such a count.
        fresh: float64 ``[K]``, share of the positions of other text of the same kind that they take.
        seen: float64 ``[K]``, share of the corpus's own positions that they take.
    """

    order: int
    log_counts: np.ndarray
    log_numbers: np.ndarray
    fresh: np.ndarray
    seen: np.ndarray

    def number(self, count: np.ndarray | float) -> np.ndarray:
        """N-grams with at least ``count``."""
        return np.exp(np.interp(np.log(count), self.log_counts, self.log_numbers))

    def fresh_share(self, count: np.ndarray | float) -> np.ndarray:
        """Share of fresh positions that n-grams with at least ``count`` take."""
        return np.interp(np.log(count), self.log_counts, self.fresh)

    def seen_share(self, count: np.ndarray | float) -> np.ndarray:
        """Share of the corpus's positions that n-grams with at least ``count`` take."""
        return np.interp(np.log(count), self.log_counts, self.seen)


def forecast(growth: Growth, tokens: float) -> OrderForecast:
    """What to expect of a corpus of ``tokens`` tokens, of which ``growth`` is a sample.

    Where the sample is the corpus, this is what was counted, but for ``fresh``: that was seen over a half at most.
    """
    ratio = max(1.0, tokens / growth.tokens[-1])
    doublings = math.log2(ratio)
    if growth.numbers[-1, 0] < 1:
        return _nothing(growth.order)
    numbers = np.log(np.maximum(growth.numbers, _TINY))
    fresh, seen = _complementary(growth.fresh), _complementary(growth.seen)
    columns = np.flatnonzero(COUNTS <= _GROWN)
    grown = [_carried(curve[:, columns], steps) for curve, steps in
             ((numbers, doublings), (fresh, doublings + 1), (seen, doublings))]  # fmt: skip
    present = np.flatnonzero((growth.numbers[-1] >= 1) & (COUNTS > _GROWN))
    kept = present[COUNTS[present] > (_resolved(growth) if ratio > 1 else _GROWN)]
    # A half of the sample has half the counts of all of it.
    half = np.interp(np.log(COUNTS[kept] / 2), np.log(COUNTS), fresh[-1])
    scaled = [numbers[-1, kept], half, seen[-1, kept]]
    # Beyond the most frequent one there is nothing.
    end = 2 * COUNTS[max(present.max(initial=0), columns[-1])] * ratio
    log_counts = np.log(np.concatenate([COUNTS[columns], COUNTS[kept] * ratio, [end]]))
    log_numbers, fresh_all, seen_all = (
        np.minimum.accumulate(np.concatenate([*both, [math.log(_TINY)]])) for both in zip(grown, scaled, strict=True)
    )
    return OrderForecast(
        order=growth.order, log_counts=log_counts, log_numbers=log_numbers, fresh=_share(fresh_all),
        seen=_share(seen_all),
    )  # fmt: skip


def coverage_of_rows(
    forecasts: Sequence[OrderForecast], orders: Sequence[int], rows: int, min_count: float
) -> tuple[float, dict[int, float]]:
    """Expected coverage of the bank of the ``rows`` most frequent n-grams.

    Args:
        forecasts: orders 2 to the longest.
        orders: of the bank.
        rows: at most so many.
        min_count: rarer n-grams are never kept, so that the bank may be smaller.

    Returns:
        the smallest count of a row, and order -> share of fresh positions whose longest match has it.
    """
    wanted = [one for one in forecasts if one.order in orders]
    highest = max(one.log_counts[-1] for one in wanted)
    log_counts = np.linspace(math.log(min_count), max(highest, math.log(min_count)), 2001)
    totals = np.sum([one.number(np.exp(log_counts)) for one in wanted], axis=0)
    fits = np.flatnonzero(totals <= rows)
    count = float(np.exp(log_counts[fits[0] if len(fits) else -1]))
    at_least = [float(one.fresh_share(count)) for one in wanted]
    longer = [*at_least[1:], 0.0]
    return count, {one.order: max(0.0, share - more) for one, share, more in zip(wanted, at_least, longer, strict=True)}


def growth_error(growth: Growth, count: int) -> float | None:
    """Predicted over counted: n-grams with at least ``count`` in the sample, predicted from its halves and less."""
    column = int(np.searchsorted(COUNTS, count))
    counted = growth.numbers[-1, column]
    if counted < 1:
        return None
    curve = np.log(np.maximum(growth.numbers[:-1, column : column + 1], _TINY))
    return float(np.exp(_carried(curve, 1.0)[0]) / counted)


def _resolved(growth: Growth) -> int:
    common = COUNTS[growth.numbers[-1] >= _ENOUGH]
    most = int(common[-1]) if len(common) else 0
    return min(_SURELY_RESOLVED, max(_LEAST_RESOLVED, most))


def _carried(curve: np.ndarray, doublings: float) -> np.ndarray:
    """A curve ``[levels, C]``, one level a doubling, carried on: each doubling adds a steady part of the last step."""
    steps = np.diff(curve, axis=0)
    span = len(steps) - 1
    decay = np.ones(curve.shape[1])
    if span:
        ratio = np.clip(steps[-1] / np.maximum(steps[0], _TINY), _TINY, 1 / _TINY)
        decay = np.clip(ratio ** (1 / span), _LEAST_DECAY, 1.0)
    falling = decay < 1
    sums = np.where(falling, decay * (1 - decay**doublings) / np.where(falling, 1 - decay, 1.0), doublings)
    carried: np.ndarray = curve[-1] + steps[-1] * sums
    return carried


def _complementary(shares: np.ndarray) -> np.ndarray:
    """``ln(-ln(1 - share))``: nearly a line over the logarithm of the text, and never above a share of 1."""
    curve: np.ndarray = np.log(-np.log1p(-np.clip(shares, _TINY, 1 - _TINY)))
    return curve


def _share(curve: np.ndarray) -> np.ndarray:
    share: np.ndarray = -np.expm1(-np.exp(curve))
    return share


def _nothing(order: int) -> OrderForecast:
    none = np.zeros(1)
    return OrderForecast(order=order, log_counts=none, log_numbers=none + math.log(_TINY), fresh=none, seen=none)
