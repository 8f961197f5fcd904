"""Differences of arms and their intervals: exact where the answer is known, and right as often as they promise."""

from __future__ import annotations

import math

import numpy as np
import pytest

from megatron_graft.experiments import statistics
from megatron_graft.experiments.statistics import (
    CONTRADICTED,
    OPEN,
    SHOWN,
    Difference,
    Interval,
    judge,
    mean_and_sd,
    paired_difference,
    percentile_interval,
    resampled_ratios,
    student_interval,
    student_quantile,
)

TOKENS = np.array([10, 20, 30, 40])
SOURCES = ("a", "a", "b", "b")


# Two-sided quantiles as printed in tables of Student's distribution.
@pytest.mark.parametrize(
    ("level", "degrees", "quantile"),
    [
        (0.95, 1, 12.7062), (0.95, 2, 4.3027), (0.95, 3, 3.1824), (0.95, 4, 2.7764), (0.95, 9, 2.2622),
        (0.95, 10, 2.2281), (0.95, 29, 2.0452), (0.95, 30, 2.0423), (0.99, 2, 9.9248), (0.99, 5, 4.0321),
        (0.90, 7, 1.8946), (0.999, 10, 4.5869),
    ],
)  # fmt: skip
def test_quantiles_are_those_of_the_tables(level: float, degrees: int, quantile: float) -> None:
    assert student_quantile(level, degrees) == pytest.approx(quantile, abs=6e-5)


def test_quantiles_of_any_level_meet_the_closed_forms() -> None:
    for level in (0.5, 0.95, 1 - 0.05 / 6, 0.9999):
        assert student_quantile(level, 1) == pytest.approx(math.tan(math.pi * level / 2), rel=1e-9)
        assert student_quantile(level, 2) == pytest.approx(level * math.sqrt(2 / (1 - level**2)), rel=1e-9)


def test_a_difference_is_the_sum_over_documents_by_the_tokens_averaged_over_common_seeds() -> None:
    first = {1: np.array([1.0, 2.0, 3.0, 4.0]), 2: np.array([2.0, 2.0, 2.0, 2.0]), 7: np.zeros(4)}
    second = {1: np.array([2.0, 2.0, 5.0, 6.0]), 2: np.array([3.0, 3.0, 3.0, 2.0]), 9: np.ones(4)}
    found = paired_difference(first, second, TOKENS, SOURCES)
    assert found is not None
    assert found.by_seed == {1: pytest.approx(-0.05), 2: pytest.approx(-0.03)}
    assert found.mean == pytest.approx(-0.04)
    assert found.sd == pytest.approx(0.02 / math.sqrt(2))
    assert found.over_seeds is not None and found.documents is not None
    half = 12.7062 * found.sd / math.sqrt(2)
    assert (found.over_seeds.low, found.over_seeds.high) == pytest.approx((-0.04 - half, -0.04 + half), abs=1e-5)
    assert found.documents.low < -0.04 < found.documents.high


def test_what_cannot_be_estimated_is_not_there() -> None:
    one = {1: np.array([1.0])}
    found = paired_difference(one, {1: np.array([2.0])}, np.array([10]), ("a",))
    assert found == Difference(mean=-0.1, by_seed={1: -0.1}, sd=None, documents=None, over_seeds=None)
    assert paired_difference(one, {2: np.array([2.0])}, np.array([10]), ("a",)) is None
    assert mean_and_sd([3.0]) == {"mean": 3.0, "sd": None}
    assert mean_and_sd([1.0, 3.0]) == {"mean": 2.0, "sd": pytest.approx(math.sqrt(2))}


def test_the_same_documents_are_drawn_for_all_seeds() -> None:
    # Seeds differ in opposite ways on every document, so their mean difference is the same on each: no spread is left.
    swing = np.array([5.0, -3.0, 8.0, -2.0])
    other = np.zeros(4)
    found = paired_difference({1: -TOKENS + swing, 2: -TOKENS - swing}, {1: other, 2: other}, TOKENS, SOURCES)
    assert found is not None and found.documents is not None
    assert (found.documents.low, found.documents.high) == pytest.approx((-1.0, -1.0))


def test_each_source_is_drawn_as_often_as_it_has_documents() -> None:
    # Documents differ between the sources only: stratified, every resample has the same sums.
    ratios = resampled_ratios(np.array([1.0, 1.0, 9.0, 9.0]), np.array([10, 10, 10, 10]), SOURCES, resamples=200)
    assert ratios == pytest.approx(np.full(200, 0.5))
    loose = resampled_ratios(np.array([1.0, 1.0, 9.0, 9.0]), np.array([10, 10, 10, 10]), ("a",) * 4, resamples=200)
    assert np.ptp(loose) > 0.3


def test_tokens_are_drawn_with_their_documents() -> None:
    ratios = resampled_ratios(np.array([3.0, 30.0, 300.0]), np.array([1, 10, 100]), ("a",) * 3, resamples=100)
    assert ratios == pytest.approx(np.full(100, 3.0))


def test_the_spread_of_resamples_is_the_standard_error() -> None:
    values = np.random.default_rng(1).normal(0, 1, 400)
    spread = resampled_ratios(values, np.ones(400), ("a",) * 400, resamples=3000).std()
    assert spread == pytest.approx(values.std() / 20, rel=0.05)


def test_resamples_depend_on_the_seed_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    values, strata = np.arange(9.0), ("a",) * 4 + ("b",) * 5
    whole = resampled_ratios(values, np.ones(9), strata, resamples=101)
    monkeypatch.setattr(statistics, "_BLOCK", 12)
    assert np.array_equal(whole, resampled_ratios(values, np.ones(9), strata, resamples=101))
    assert not np.array_equal(whole, resampled_ratios(values, np.ones(9), strata, resamples=101, seed=1))


@pytest.mark.parametrize("effect", [0.0, -0.05])
def test_intervals_over_documents_cover_the_true_difference_as_often_as_they_say(effect: float) -> None:
    draws, covered, trials = np.random.default_rng(5), 0, 400
    strata = ("novel",) * 20 + ("press",) * 45
    means = np.array([0.03] * 20 + [-0.02] * 45)  # of the two sources; weighted by tokens they cancel below
    tokens = np.array([90] * 20 + [60] * 45)
    truth = effect + float((means * tokens).sum() / tokens.sum())
    for _ in range(trials):
        numerators = tokens * (effect + means + draws.normal(0, 0.05, tokens.size))
        interval = percentile_interval(resampled_ratios(numerators, tokens, strata, resamples=400), 0.95)
        covered += interval.low <= truth <= interval.high
    assert 0.90 <= covered / trials <= 0.98


def test_intervals_over_seeds_cover_the_true_difference_as_often_as_they_say() -> None:
    samples = np.random.default_rng(6).normal(-0.1, 0.01, (2000, 3))
    for level in (0.95, 1 - 0.05 / 6):
        intervals = [student_interval(sample, level) for sample in samples]
        covered = np.mean([one.low <= -0.1 <= one.high for one in intervals])
        assert covered == pytest.approx(level, abs=0.012)


def interval(low: float, high: float) -> Interval:
    return Interval(low=low, high=high, level=0.95)


def difference(documents: tuple[float, float] | None, seeds: tuple[float, float] | None, number: int = 3) -> Difference:
    return Difference(
        mean=-0.1, by_seed={seed: -0.1 for seed in range(number)}, sd=0.0,
        documents=documents and interval(*documents), over_seeds=seeds and interval(*seeds),
    )  # fmt: skip


BELOW, ABOVE, AROUND = (-0.2, -0.1), (0.1, 0.2), (-0.1, 0.1)


@pytest.mark.parametrize(
    ("documents", "seeds", "state", "reason"),
    [
        (BELOW, BELOW, SHOWN, ""),
        (ABOVE, ABOVE, CONTRADICTED, ""),
        (BELOW, AROUND, OPEN, "only the interval over documents excludes zero"),
        (AROUND, ABOVE, OPEN, "only the interval over seeds excludes zero"),
        (AROUND, AROUND, OPEN, "both intervals hold zero"),
        (BELOW, ABOVE, OPEN, "the two intervals lie on different sides of zero"),
        ((math.nan, math.nan), BELOW, OPEN, "only the interval over seeds excludes zero"),
        (None, BELOW, OPEN, "the text has fewer than two documents"),
    ],
)
def test_verdicts_need_both_intervals(
    documents: tuple[float, float] | None, seeds: tuple[float, float], state: str, reason: str
) -> None:
    assert judge(difference(documents, seeds), 3) == (state, reason)


def test_nothing_is_shown_before_all_planned_seeds_or_by_few() -> None:
    assert judge(None, 3) == (OPEN, "not run yet")
    assert judge(difference(BELOW, BELOW, 2), 3) == (OPEN, "2 of 3 seeds have been run")
    assert judge(difference(BELOW, BELOW, 3), 5) == (OPEN, "3 of 5 seeds have been run")
    assert judge(difference(BELOW, None, 1), 1) == (OPEN, "one seed")
    assert judge(difference(BELOW, BELOW, 2), 2) == (OPEN, "2 seeds")
    diverged = paired_difference(
        {seed: np.array([math.nan, 1.0]) for seed in (1, 2, 3)}, {seed: np.ones(2) for seed in (1, 2, 3)},
        np.array([1, 1]), ("a", "a"),
    )  # fmt: skip
    assert judge(diverged, 3) == (OPEN, "a loss is not finite")
