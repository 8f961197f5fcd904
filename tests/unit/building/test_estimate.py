from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from megatron_graft.building.cost import BuildShape, Rates
from megatron_graft.building.donor import HuggingFaceDonor
from megatron_graft.building.estimate import donor_speed, estimate_build
from megatron_graft.building.extrapolate import coverage_of_rows, forecast, growth_error
from megatron_graft.building.sample_counts import COUNTS, LEVELS, count_sample, draw_sample
from megatron_graft.errors import ConfigError, DataError
from megatron_graft.reporting.cost_page import estimate_page

EOD = 0
ORDERS = (2, 3, 4)


class Documents:
    """Documents of words with Zipf's frequencies, each document with some favourites of its own."""

    def __init__(self, number: int, seed: int = 0, length: int = 200, vocab_size: int = 2000) -> None:
        generator = np.random.default_rng(seed)
        frequencies = 1 / (2.7 + np.arange(1, vocab_size))
        self.documents = []
        for size in generator.integers(length // 4, 2 * length, number):
            words = generator.choice(vocab_size - 1, size=size, p=frequencies / frequencies.sum()) + 1
            favourites = generator.integers(1, vocab_size, 3)
            favoured = generator.random(size) < 0.05
            words[favoured] = generator.choice(favourites, size=favoured.sum())
            self.documents.append(np.append(words, EOD).astype(np.uint16))
        self.num_documents, self.num_tokens = number, sum(map(len, self.documents))

    def __iter__(self) -> Iterator[np.ndarray]:
        return iter(self.documents)

    def chosen(self, wanted: Callable[[np.ndarray], np.ndarray]) -> Iterator[np.ndarray]:
        picked = wanted(np.arange(self.num_documents))
        return (document for document, taken in zip(self.documents, picked, strict=True) if taken)


@pytest.fixture(scope="module")
def corpus() -> Documents:
    return Documents(500)


def counted(documents: Sequence[np.ndarray], order: int) -> Counter[tuple[int, ...]]:
    numbers: Counter[tuple[int, ...]] = Counter()
    for document in documents:
        ids = document.tolist()
        grams = (tuple(ids[start : start + order]) for start in range(len(ids) - order + 1))
        numbers.update(gram for gram in grams if EOD not in gram)
    return numbers


def fresh_coverage(known: Counter[tuple[int, ...]], least: int, documents: Sequence[np.ndarray]) -> float:
    order = len(next(iter(known)))
    found = counted(documents, order)
    hits = sum(number for gram, number in found.items() if known[gram] >= least)
    return hits / sum(map(len, documents))


def pieces_of(documents: Documents, seed: int) -> tuple[list[list[np.ndarray]], int]:
    """The documents of every eighth of a sample of everything, found by their places in it."""
    sample = draw_sample(documents, documents.num_tokens, seed=seed, eod=EOD)
    pieces: list[list[np.ndarray]] = [[] for _ in range(8)]
    start = 0
    for document in documents:
        pieces[sample.parts[start]].append(document)
        start += len(document) + 1
    return pieces, sample.num_tokens


@pytest.mark.parametrize("seed", [0, 1])
def test_a_sample_is_counted_exactly_at_every_level(seed: int) -> None:
    documents = Documents(60, seed=seed, length=60)
    pieces, tokens = pieces_of(documents, seed)
    sample = draw_sample(documents, documents.num_tokens, seed=seed, eod=EOD)
    assert tokens == documents.num_tokens
    assert sample.positions.tolist() == [sum(map(len, piece)) for piece in pieces]
    halves = [sum(pieces[:4], []), sum(pieces[4:], [])]
    for growth in count_sample(sample, 4):
        for level, number in enumerate(LEVELS):
            size = 8 // number
            groups = [sum(pieces[place * size : (place + 1) * size], []) for place in range(number)]
            counts = [counted(group, growth.order) for group in groups]
            for column in (0, 1, 3):
                least = int(COUNTS[column])
                sizes = [sum(count >= least for count in one.values()) for one in counts]
                assert growth.numbers[level, column] == pytest.approx(np.mean(sizes))
                shares = [
                    sum(count for count in one.values() if count >= least) / sum(map(len, group))
                    for one, group in zip(counts, groups, strict=True)
                ]
                assert growth.seen[level, column] == pytest.approx(np.mean(shares))
                if number > 1:
                    fresh = [
                        fresh_coverage(one, least, halves[int(place < number // 2)]) for place, one in enumerate(counts)
                    ]
                    assert growth.fresh[level, column] == pytest.approx(np.mean(fresh))


def test_eighths_are_even_and_follow_from_the_seed(corpus: Documents) -> None:
    first, again, other = (draw_sample(corpus, 50_000, seed=seed, eod=EOD) for seed in (3, 3, 4))
    assert first.num_tokens == pytest.approx(50_000, rel=0.1)
    assert np.array_equal(first.tokens, again.tokens) and np.array_equal(first.parts, again.parts)
    assert not np.array_equal(first.tokens[:1000], other.tokens[:1000])
    assert first.positions.max() - first.positions.min() < 500
    assert EOD not in first.tokens


def test_examples_are_ngrams_that_repeat(corpus: Documents) -> None:
    sample = draw_sample(corpus, corpus.num_tokens, seed=0, eod=EOD)
    for growth in count_sample(sample, 3, num_examples=25):
        known = counted(corpus.documents, growth.order)
        assert growth.examples.shape == (25, growth.order)
        assert all(known[tuple(ids)] >= 2 for ids in growth.examples.tolist())


def test_a_sample_of_everything_forecasts_what_is_there(corpus: Documents) -> None:
    sample = draw_sample(corpus, corpus.num_tokens, seed=0, eod=EOD)
    for growth in count_sample(sample, 4):
        known = np.array(list(counted(corpus.documents, growth.order).values()))
        found = forecast(growth, corpus.num_tokens)
        for count in COUNTS[known.max() >= COUNTS]:
            assert found.number(float(count)) == pytest.approx((known >= count).sum(), rel=1e-6)


@pytest.mark.parametrize("seed", [0, 1])
def test_a_third_forecasts_the_corpus_about_right(seed: int) -> None:
    corpus, fresh = Documents(1000), Documents(100, seed=7).documents
    sample = draw_sample(corpus, corpus.num_tokens // 3, seed=seed, eod=EOD)
    forecasts = [forecast(growth, corpus.num_tokens) for growth in count_sample(sample, 4)]
    known = {order: counted(corpus.documents, order) for order in ORDERS}
    for one in forecasts[:2]:  # too few 4-grams repeat
        counts = np.array(list(known[one.order].values()))
        assert one.number(2) == pytest.approx((counts >= 2).sum(), rel=0.2), one.order
    merged = np.sort(np.concatenate([list(numbers.values()) for numbers in known.values()]))[::-1]
    for rows in (100, 1000, 10_000):
        least, shares = coverage_of_rows(forecasts, ORDERS, rows, 2)
        assert least == pytest.approx(merged[rows], rel=0.25), rows
        expected = fresh_coverage(known[2], int(merged[rows]), fresh)
        assert sum(shares.values()) == pytest.approx(expected, abs=0.03), rows


def test_more_rows_cover_more_until_rare_ngrams_end_it(corpus: Documents) -> None:
    sample = draw_sample(corpus, corpus.num_tokens // 2, seed=0, eod=EOD)
    forecasts = [forecast(growth, corpus.num_tokens) for growth in count_sample(sample, 4)]
    points = [coverage_of_rows(forecasts, ORDERS, rows, 2) for rows in (10, 100, 1000, 10**4, 10**6, 10**7)]
    rates = [sum(shares.values()) for _, shares in points]
    assert all(before <= after for before, after in pairwise(rates))
    assert rates[-1] == rates[-2] < 1 and points[-1][0] == pytest.approx(2)
    stricter = coverage_of_rows(forecasts, ORDERS, 10**7, 10)
    assert stricter[0] == pytest.approx(10) and sum(stricter[1].values()) < rates[-1]


def test_halves_of_a_sample_foretell_its_whole(corpus: Documents) -> None:
    sample = draw_sample(corpus, corpus.num_tokens, seed=0, eod=EOD)
    for growth in count_sample(sample, 3):
        assert growth_error(growth, 2) == pytest.approx(1, abs=0.15)
        assert growth_error(growth, 1 << 19) is None


def test_an_estimate_speaks_of_the_whole_corpus(corpus: Documents) -> None:
    def text_of(ids: Sequence[int]) -> str | None:
        return None if ids[-1] % 2 else " ".join(map(str, ids))

    heard: list[str] = []

    def measure_donor(texts: Sequence[str]) -> float:
        heard.extend(texts)
        return 500.0

    shape = BuildShape(tokens=1, rows=2000, hidden_size=32, orders=(2, 3), vocab_size=2000)
    estimate = estimate_build(
        corpus, shape, eod=EOD, sample_tokens=60_000, text_of=text_of, measure_donor=measure_donor
    )  # fmt: skip
    value = json.loads(json.dumps(estimate.to_json(), allow_nan=False))
    assert value["sample"]["of_tokens"] == corpus.num_tokens > value["sample"]["tokens"]
    assert estimate.shape.tokens == corpus.num_tokens and estimate.shape.rows == 2000
    assert estimate.measured == ("count_tokens", "donor_tokens") and estimate.rates.donor_tokens == 500
    assert all(int(text.split()[-1]) % 2 == 0 for text in heard)
    for order in (2, 3):
        counts = np.array(list(counted(corpus.documents, order).values()))
        assert estimate.numbers[order] == pytest.approx((counts >= 2).sum(), rel=0.3)
        assert estimate.cost.kept[order] == pytest.approx(estimate.numbers[order])
        assert 0.2 < value["text_share_by_order"][str(order)] < 0.8
    assert value["qualifying"] < sum(value["ngrams_by_order"].values())
    encode = next(stage for stage in estimate.cost.stages if stage.name == "encode")
    assert encode.device_seconds == encode.wall_seconds == pytest.approx(2000 * shape.donor_tokens_per_row / 500)
    assert len(heard) <= 2000
    assert [point["rows"] for point in value["coverage"]][-1] == 2000
    assert f"| 2,000 | {value['coverage'][-1]['smallest_count']:,.0f} |" in estimate_page(value)


def test_spilled_records_are_foreseen(corpus: Documents) -> None:
    shape = BuildShape(tokens=1, rows=100, hidden_size=8, orders=(2, 3))
    estimate = estimate_build(corpus, shape, eod=EOD, sample_tokens=corpus.num_tokens // 2, donor_params=1e6)
    kept: set[tuple[int, ...]] = set()
    for order in (2, 3):
        known = counted(corpus.documents, order)
        formed = {gram: n for gram, n in known.items() if order == 2 or {gram[1:], gram[:-1]} <= kept}
        kept = {gram for gram, number in known.items() if number >= 2}
        stage = next(stage for stage in estimate.cost.stages if stage.name == f"count-{order}-map")
        assert stage.bytes_written / 8 == pytest.approx(len(formed), rel=0.25)


def test_the_donors_speed_is_in_its_own_tokens(donor_directory: Path) -> None:
    texts = [f" the {word}" for word in ("whale", "sea", "ship", "sea was near")]
    assert 1 < donor_speed(HuggingFaceDonor(donor_directory), texts, [1], 256) < 1e7


@pytest.mark.parametrize(
    ("documents", "tokens", "error", "message"),
    [
        (Documents(7), 10**6, DataError, "has too few documents"),
        (Documents(200), 200, DataError, "has too few documents"),
        (Documents(20), 0, ConfigError, "--estimate-tokens"),
    ],
)
def test_a_sample_that_is_too_small_is_refused(
    documents: Documents, tokens: int, error: type[Exception], message: str
) -> None:
    shape = BuildShape(tokens=1, rows=10, hidden_size=8)
    with pytest.raises(error, match=message):
        estimate_build(documents, shape, eod=EOD, sample_tokens=tokens, rates=Rates(donor_tokens=1))
