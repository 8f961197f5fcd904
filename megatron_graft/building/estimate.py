"""Before a bank is built: how many n-grams will qualify, what it will know, how large it is and how long it takes.

All of it from a sample of whole documents; see ``extrapolate`` for how a sample speaks for the corpus, and ``cost`` for
the formulas.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from megatron_graft.building.cost import BuildCost, BuildShape, Fleet, OrderShape, Rates, build_cost
from megatron_graft.building.count import count_ngrams
from megatron_graft.building.coverage import Documents, bank_sizes
from megatron_graft.building.encode import Encoder
from megatron_graft.building.extrapolate import OrderForecast, coverage_of_rows, forecast, growth_error
from megatron_graft.building.packs import flat_token_lists, plan_packs
from megatron_graft.building.sample_counts import Growth, Sample, count_sample, draw_sample
from megatron_graft.errors import ConfigError

SAMPLE_TOKENS = 4_000_000
TEXTS_PER_ORDER = 1000
MOST_TEXTS = 2000
"""That the donor is timed with."""
_LEAST_DISTINCT = 0.02

TextOf = Callable[[Sequence[int]], str | None]
MeasureDonor = Callable[[Sequence[str]], float]
"""Runs the donor over texts; returns donor tokens a second."""


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """What a build is expected to give and to cost.

    Attributes:
        sample: ``tokens``, ``documents``, ``of_tokens``, ``of_documents`` and ``seed``.
        numbers: order -> n-grams with at least ``min_count``.
        text_share: order -> part of them that have a text of their own; None without a tokenizer.
        growth_errors: order -> predicted over counted, where a half and less of the sample predict all of it.
        coverage: for growing numbers of ``rows``: ``smallest_count``, and on fresh text ``hit_rate`` and
            ``share_by_order``.
        rates: what was measured, and what had to be assumed.
        measured: names of the rates that were measured.
        shape: what is to be built, as the sample shows it.
        cost: bytes and seconds.
    """

    sample: Mapping[str, int]
    numbers: Mapping[int, float]
    text_share: Mapping[int, float] | None
    growth_errors: Mapping[int, float | None]
    coverage: Sequence[Mapping[str, Any]]
    rates: Rates
    measured: tuple[str, ...]
    shape: BuildShape
    cost: BuildCost

    @property
    def qualifying(self) -> float:
        """N-grams that are frequent enough and, as far as that is known, have a text."""
        shares = self.text_share or {}
        return sum(number * shares.get(order, 1.0) for order, number in self.numbers.items())

    def to_json(self) -> dict[str, Any]:
        """The JSON object of this estimate."""
        return {
            "sample": dict(self.sample),
            "ngrams_by_order": {str(order): number for order, number in self.numbers.items()},
            "text_share_by_order": self.text_share and {str(order): part for order, part in self.text_share.items()},
            "qualifying": self.qualifying,
            "growth_errors": {str(order): error for order, error in self.growth_errors.items()},
            "coverage": list(self.coverage),
            "rates": asdict(self.rates),
            "measured": list(self.measured),
            "cost": self.cost.to_json(),
        }


def estimate_build(
    documents: Documents,
    shape: BuildShape,
    *,
    eod: int | None,
    sample_tokens: int = SAMPLE_TOKENS,
    seed: int = 0,
    rates: Rates | None = None,
    fleet: Fleet | None = None,
    text_of: TextOf | None = None,
    measure_donor: MeasureDonor | None = None,
    donor_params: float = 0.0,
) -> Estimate:
    """Estimate a build from a sample of its corpus.

    Needs some 150 bytes of memory for every token of the sample.

    Args:
        documents: the data sets. Only the sampled documents' tokens count, but all are iterated over.
        shape: what is to be built; its ``tokens`` and ``by_order`` are replaced by what the sample says.
        eod: end-of-document token.
        sample_tokens: about how many tokens to sample.
        seed: of the sample.
        rates: assumed where nothing is measured; default: those of :class:`~megatron_graft.building.cost.Rates`.
        fleet: the machines; default: one that counts with ``shape.workers`` cores and, where the donor is measured,
            has one device: all that the donor was measured on.
        text_of: ``ngram_text`` of the tokenizer, to see how many n-grams have a text.
        measure_donor: runs texts through the donor (see :data:`MeasureDonor`); needs ``text_of``.
        donor_params: of the donor, where it is not measured.

    Raises:
        ConfigError: the sample is too small, or neither the donor nor its parameters are given.
        DataError: the data cannot be sampled.
    """
    if sample_tokens < 1:
        raise ConfigError("--estimate-tokens", "is too small", got=sample_tokens, expected="at least 1")
    sample = draw_sample(documents, sample_tokens, seed=seed, eod=eod)
    longest = shape.orders[-1]
    growths = list(count_sample(sample, longest, num_examples=TEXTS_PER_ORDER, seed=seed))
    tokens = float(max(documents.num_tokens, sample.num_tokens))
    forecasts = [forecast(growth, tokens) for growth in growths]
    rates = replace(rates or Rates(), count_tokens=_count_rate(sample, shape, eod))
    measured = ["count_tokens"]
    texts, shares = _texts(growths, shape.orders, text_of)
    if measure_donor is not None and texts:
        rates = replace(rates, donor_tokens=measure_donor(texts[:: 1 + len(texts) // MOST_TEXTS]))
        measured.append("donor_tokens")
    sampled = replace(shape, tokens=tokens, by_order=_order_shapes(growths, forecasts, shape, tokens))
    wanted = [one for one in forecasts if one.order in shape.orders]
    return Estimate(
        sample={
            "tokens": sample.num_tokens, "documents": sample.documents, "of_tokens": documents.num_tokens,
            "of_documents": documents.num_documents, "seed": seed,
        },
        numbers={one.order: float(one.number(shape.min_count)) for one in wanted},
        text_share=shares if text_of is not None else None,
        growth_errors={growth.order: growth_error(growth, round(max(1, shape.min_count))) for growth in growths},
        coverage=[_point(wanted, sampled, rows) for rows in bank_sizes(shape.rows)],
        rates=rates,
        measured=tuple(measured),
        shape=sampled,
        cost=build_cost(sampled, rates, fleet or _this_machine(shape, measured), donor_params=donor_params),
    )  # fmt: skip


def _this_machine(shape: BuildShape, measured: Sequence[str]) -> Fleet:
    return Fleet(cores=shape.workers, devices=int("donor_tokens" in measured))


def donor_speed(encoder: Encoder, texts: Sequence[str], layers: Sequence[int], pack_tokens: int) -> float:
    """Donor tokens a second, with everything the donor runs on; its model is loaded before the clock starts.

    Args:
        encoder: the donor.
        texts: to run; some hundreds are enough.
        layers: donor layers.
        pack_tokens: of one pass.

    Raises:
        DonorError: the donor cannot be run.
    """
    encoder.encode(texts[:1], layers)
    packs = plan_packs(*flat_token_lists(encoder.token_lists(texts)), pack_tokens)
    started = time.perf_counter()
    for _ in encoder.states(packs, 0, len(packs), layers):
        pass
    return len(packs.tokens) / (time.perf_counter() - started)


def _count_rate(sample: Sample, shape: BuildShape, eod: int | None) -> float:
    """Tokens a second of one core, for orders 2 to 5 together, from counting the sample once."""
    pieces = np.split(sample.tokens, np.flatnonzero(sample.tokens < 0))
    documents = [piece[piece >= 0] for piece in pieces]  # also cut at EOD, which no n-gram crosses either
    started = time.process_time()
    count_ngrams(documents, orders=tuple(range(2, shape.orders[-1] + 1)), eod=eod, min_count=round(shape.min_count))
    seconds = max(time.process_time() - started, 1e-3)
    return sample.num_tokens / seconds * (shape.orders[-1] - 1) / 4


def _texts(
    growths: Sequence[Growth], orders: Sequence[int], text_of: TextOf | None
) -> tuple[list[str], dict[int, float]]:
    """Texts of some repeated n-grams, and order -> the part that has one."""
    texts: list[str] = []
    shares: dict[int, float] = {}
    for growth in growths:
        if text_of is None or growth.order not in orders or not len(growth.examples):
            continue
        found = [text_of(ids) for ids in growth.examples.tolist()]
        usable = [text for text in found if text is not None and text.strip()]
        texts += usable
        shares[growth.order] = len(usable) / len(found)
    return texts, shares


def _order_shapes(
    growths: Sequence[Growth], forecasts: Sequence[OrderForecast], shape: BuildShape, tokens: float
) -> dict[int, OrderShape]:
    """What counting will meet at every order.

    An n-gram is formed where both shorter ones were kept. With s the share of places where one was, both were at s^2
    of them if that were chance, at s if they went together; the mean of the two is taken. In a chunk, what is not
    formed would have been distinct nearly everywhere.
    """
    shapes: dict[int, OrderShape] = {}
    candidates = 1.0
    for growth, whole in zip(growths, forecasts, strict=True):
        chunk = min(shape.chunk_ngrams / candidates, shape.slice_tokens, tokens)
        distinct = float(forecast(growth, chunk).number(1.0)) if chunk > growth.tokens[-1] else _inside(growth, chunk)
        formed = (distinct - (1 - candidates) * chunk) / (candidates * chunk)
        kept = float(whole.number(shape.min_count))
        shapes[growth.order] = OrderShape(
            candidates=candidates, distinct=min(1.0, max(_LEAST_DISTINCT, formed)), growth=1.0,
            kept_scale=kept / tokens, rarity=0.0,
        )  # fmt: skip
        one_kept = float(whole.seen_share(shape.min_count))
        candidates = min(candidates, max(_LEAST_DISTINCT, one_kept * (1 + one_kept) / 2))
    return shapes


def _inside(growth: Growth, chunk: float) -> float:
    """Distinct n-grams of a chunk no larger than the sample."""
    return float(np.exp(np.interp(np.log(chunk), np.log(growth.tokens), np.log(growth.numbers[:, 0]))))


def _point(forecasts: Sequence[OrderForecast], shape: BuildShape, rows: int) -> dict[str, Any]:
    count, shares = coverage_of_rows(forecasts, shape.orders, rows, shape.min_count)
    return {
        "rows": rows,
        "smallest_count": count,
        "hit_rate": sum(shares.values()),
        "share_by_order": {str(order): share for order, share in shares.items()},
    }
