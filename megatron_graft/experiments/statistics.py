"""How two arms are compared. Fixed before any run was looked at; every page of a comparison is computed by it.

**Difference.** Of arms A and B on one text: in each seed that both have, the sum over documents of A's losses minus
B's, by the number of predicted tokens; the mean of that over the seeds. Nats per token; below zero, A is the better
one. Both arms of a seed share the backbone's initial values and the order of the data: differences are paired.

**Interval over documents.** What other documents of the same sources would have said: a bootstrap over documents,
stratified by source, :data:`RESAMPLES` resamples from a fixed seed, percentiles. Every resample draws the same
documents for all seeds, so what is resampled are the differences of documents, averaged over seeds. Few documents make
it somewhat too narrow, and fewer than two make none.

**Interval over seeds.** What other initial values and other orders of the data would have said: Student's interval over
the seeds' differences, where there are at least two.

**Levels.** 95 %; for n hypotheses 1 - 0.05/n (Bonferroni), both intervals.

**Verdict.** A hypothesis says that one arm's loss is lower than another's. It is *shown* if both intervals lie below
zero, *contradicted* if both lie above it, else *open*. Judged are hypotheses of at least :data:`LEAST_SEEDS` seeds, and
only when every seed that was planned for both arms has been run; until then they are open, whatever the numbers say.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

LEVEL = 0.95
RESAMPLES = 10_000
BOOTSTRAP_SEED = 20_260_101
LEAST_SEEDS = 3
SHOWN, CONTRADICTED, OPEN = "shown", "contradicted", "open"
_BLOCK = 1 << 21  # documents drawn at a time
_BISECTIONS = 100


@dataclass(frozen=True, kw_only=True)
class Interval:
    """An interval of a difference, nats per token, that covers it with probability ``level``."""

    low: float
    high: float
    level: float

    @property
    def side(self) -> int:
        """-1: all of it lies below zero; 1: above; 0: it holds zero, or is not finite."""
        return -1 if self.high < 0 else 1 if self.low > 0 else 0

    def as_json(self) -> dict[str, float]:
        """For a summary."""
        return {"low": self.low, "high": self.high, "level": self.level}


@dataclass(frozen=True, kw_only=True)
class Difference:
    """Loss of one arm minus another's, nats per token.

    Attributes:
        mean: over the seeds.
        by_seed: each seed's, ascending.
        sd: sample standard deviation over the seeds; None of one seed.
        documents: interval over documents; None of fewer than two documents.
        over_seeds: interval over seeds; None of one seed.
    """

    mean: float
    by_seed: dict[int, float]
    sd: float | None
    documents: Interval | None
    over_seeds: Interval | None

    def as_json(self) -> dict[str, Any]:
        """For a summary; seeds are words there, as keys of JSON are."""
        return {
            "mean": self.mean,
            "sd": self.sd,
            "by_seed": {str(seed): value for seed, value in self.by_seed.items()},
            "documents": self.documents and self.documents.as_json(),
            "over_seeds": self.over_seeds and self.over_seeds.as_json(),
        }


def paired_difference(
    first: Mapping[int, np.ndarray],
    second: Mapping[int, np.ndarray],
    tokens_D: np.ndarray,
    sources_D: Sequence[str],
    level: float = LEVEL,
) -> Difference | None:
    """Difference of two arms on the same documents; None if they have no seed in common.

    Args:
        first: by seed, the sum of each document's losses [D], float64, nats.
        second: the same of the other arm.
        tokens_D: predicted tokens of each document.
        sources_D: source of each document: the strata.
        level: of both intervals.
    """
    seeds = sorted(first.keys() & second.keys())
    if not seeds:
        return None
    differences_SD = np.stack([first[seed] - second[seed] for seed in seeds])
    by_seed = differences_SD.sum(axis=1) / tokens_D.sum()
    documents = None
    if tokens_D.size > 1:
        documents = percentile_interval(resampled_ratios(differences_SD.mean(axis=0), tokens_D, sources_D), level)
    return Difference(
        mean=float(by_seed.mean()),
        by_seed=dict(zip(seeds, by_seed.tolist(), strict=True)),
        sd=float(by_seed.std(ddof=1)) if len(seeds) > 1 else None,
        documents=documents,
        over_seeds=student_interval(by_seed, level) if len(seeds) > 1 else None,
    )


def resampled_ratios(
    numerators_D: np.ndarray,
    denominators_D: np.ndarray,
    strata_D: Sequence[str],
    resamples: int = RESAMPLES,
    seed: int = BOOTSTRAP_SEED,
) -> np.ndarray:
    """Sum of numerators by sum of denominators in each bootstrap resample of documents, float64 [resamples].

    Each stratum is drawn anew, with replacement, as often as it has documents. One seed draws the same documents
    whatever the numerators are.
    """
    names = sorted(set(strata_D))
    places = np.array([names.index(stratum) for stratum in strata_D])
    sums_2R = np.zeros((2, resamples))
    for place, stream in enumerate(np.random.SeedSequence(seed).spawn(len(names))):
        members = np.flatnonzero(places == place)
        draw = np.random.default_rng(stream)
        block = max(1, _BLOCK // members.size)
        for start in range(0, resamples, block):
            part = slice(start, min(start + block, resamples))
            drawn = members[draw.integers(members.size, size=(part.stop - part.start, members.size))]
            sums_2R[0, part] += numerators_D[drawn].sum(axis=1)
            sums_2R[1, part] += denominators_D[drawn].sum(axis=1)
    ratios: np.ndarray = sums_2R[0] / sums_2R[1]
    return ratios


def percentile_interval(values: np.ndarray, level: float) -> Interval:
    """The middle part of resampled values that holds a share ``level`` of them."""
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return Interval(low=float(low), high=float(high), level=level)


def student_interval(values: np.ndarray, level: float) -> Interval:
    """Student's interval of the mean of at least two values."""
    mean = float(values.mean())
    half = student_quantile(level, values.size - 1) * float(values.std(ddof=1)) / math.sqrt(values.size)
    return Interval(low=mean - half, high=mean + half, level=level)


def student_quantile(level: float, degrees: int) -> float:
    """The t for which Student's distribution of ``degrees`` degrees of freedom has ``level`` within -t and t."""
    low, high = 0.0, math.pi / 2
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        low, high = (middle, high) if _student_within(middle, degrees) < level else (low, middle)
    return math.sqrt(degrees) * math.tan((low + high) / 2)


def _student_within(angle: float, degrees: int) -> float:
    """P(abs(T) <= sqrt(degrees) tan(angle)), by the finite series for whole degrees of freedom (A&S 26.7.3, 26.7.4)."""
    sine, cosine = math.sin(angle), math.cos(angle)
    odd = degrees % 2
    term = cosine if odd else 1.0
    total = 0.0 if degrees == 1 else term
    for power in range(2 + odd, degrees - 1, 2):
        term *= cosine * cosine * (power - 1) / power
        total += term
    return 2 / math.pi * (angle + sine * total) if odd else sine * total


def mean_and_sd(values: Sequence[float]) -> dict[str, float | None]:
    """Mean and sample standard deviation; the latter is None of one value."""
    array = np.array(values, dtype=np.float64)
    return {"mean": float(array.mean()), "sd": float(array.std(ddof=1)) if array.size > 1 else None}


def judge(difference: Difference | None, planned_seeds: int) -> tuple[str, str]:
    """Verdict on the hypothesis that a difference is below zero, and the reason if it is open (else empty).

    Args:
        difference: the better arm's loss minus the worse one's; None if they have no run of a common seed.
        planned_seeds: how many seeds both arms are to have in common.
    """
    if difference is None:
        return OPEN, "not run yet"
    seeds = len(difference.by_seed)
    if seeds < planned_seeds:
        return OPEN, f"{seeds} of {planned_seeds} seeds have been run"
    if seeds < LEAST_SEEDS:
        return OPEN, "one seed" if seeds == 1 else f"{seeds} seeds"
    if not math.isfinite(difference.mean):
        return OPEN, "a loss is not finite"
    if difference.documents is None or difference.over_seeds is None:
        return OPEN, "the text has fewer than two documents"
    documents, over_seeds = difference.documents.side, difference.over_seeds.side
    if documents == over_seeds != 0:
        return (SHOWN if documents < 0 else CONTRADICTED), ""
    if documents and over_seeds:
        return OPEN, "the two intervals lie on different sides of zero"
    if documents:
        return OPEN, "only the interval over documents excludes zero"
    if over_seeds:
        return OPEN, "only the interval over seeds excludes zero"
    return OPEN, "both intervals hold zero"
