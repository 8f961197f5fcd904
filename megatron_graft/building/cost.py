"""What a bank costs before it is built: bytes, core-seconds, donor tokens and wall time, from formulas alone.

The formulas stand in ``docs/building-cost.md`` too. Everything here is arithmetic on numbers that are given, so that
the same formulas serve the estimate from a sample, a plan on paper and the check of a finished build's log.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from megatron_graft.bank.row_layout import ROW_DTYPES
from megatron_graft.building.bank_size import BankBytes, bank_bytes
from megatron_graft.errors import ConfigError

RECORD_BYTES = 8
"""Of a spilled record: a mixed key and a number of occurrences in one word."""
NODE_BYTES = 4
"""Of one position in a file of nodes."""
KEPT_BYTES = 16
"""Of one kept n-gram: key and count, both uint64."""
MAX_NODES = 2**32 - 2
"""Most n-grams of one order that a node id can number."""
REFERENCE_CHUNK = 45e6
"""Tokens of the chunk that the default combine factors were measured on."""


@dataclass(frozen=True, kw_only=True)
class OrderShape:
    """What counting meets at one order.

    Attributes:
        candidates: share of the tokens where an n-gram of this order is formed (both its shorter ones were kept).
        distinct: distinct n-grams over candidates in a chunk of :data:`REFERENCE_CHUNK` tokens.
        growth: exponent b of ``distinct n-grams ~ tokens^b``; a smaller chunk combines less because of it.
        kept_scale: a in ``kept = a * tokens^b / min_count^e``.
        rarity: e.
    """

    candidates: float
    distinct: float
    growth: float
    kept_scale: float
    rarity: float


DEFAULT_ORDERS: Mapping[int, OrderShape] = {
    2: OrderShape(candidates=1.00, distinct=0.098, growth=0.65, kept_scale=43.1, rarity=0.96),
    3: OrderShape(candidates=0.90, distinct=0.298, growth=0.77, kept_scale=14.5, rarity=1.31),
    4: OrderShape(candidates=0.62, distinct=0.346, growth=0.77, kept_scale=15.9, rarity=1.48),
    5: OrderShape(candidates=0.40, distinct=0.321, growth=0.77, kept_scale=14.6, rarity=1.59),
}
"""English text of 45 million tokens under a vocabulary of 49,152; a longer n-gram counts as one of 5 tokens."""


@dataclass(frozen=True, kw_only=True)
class BuildShape:
    """What is to be built.

    Attributes:
        tokens: of the corpus, T.
        rows: of the bank, N.
        hidden_size: D, of the donor.
        layers: donor layers of a row.
        orders: lengths of the n-grams, ascending.
        row_dtype: one of ``bank.row_layout.ROW_DTYPES``.
        min_count: rarer n-grams are never kept.
        vocab_size: V, of the recipient.
        workers: processes that count at a time.
        chunk_ngrams: n-grams that a map task collects before it combines and spills them.
        slice_tokens: of a map task.
        token_bytes: of a token in the data sets.
        donor_tokens_per_row: donor tokens that run for a row, prefixes shared, BOS included.
        by_order: order -> what counting meets there; an order that is missing counts as the longest one given.
        phantoms: nodes of the index that are no key; a selection that keeps every suffix has none.
    """

    tokens: float
    rows: int
    hidden_size: int
    layers: int = 1
    orders: tuple[int, ...] = (2, 3, 4)
    row_dtype: str = "bfloat16"
    min_count: float = 2
    vocab_size: int = 49_152
    workers: int = 1
    chunk_ngrams: float = 64e6
    slice_tokens: float = 268e6
    token_bytes: int = 2
    donor_tokens_per_row: float = 1.15
    by_order: Mapping[int, OrderShape] = field(default_factory=lambda: DEFAULT_ORDERS)
    phantoms: int = 0

    def __post_init__(self) -> None:
        for flag, value in (("tokens", self.tokens), ("rows", self.rows), ("hidden_size", self.hidden_size),
                            ("layers", self.layers), ("min_count", self.min_count),
                            ("chunk_ngrams", self.chunk_ngrams), ("slice_tokens", self.slice_tokens)):  # fmt: skip
            if not value > 0:
                raise ConfigError(f"--{flag.replace('_', '-')}", "is too small", got=value, expected="above 0")
        if self.row_dtype not in ROW_DTYPES:
            raise ConfigError("--row-dtype", "is unknown", got=self.row_dtype, expected=", ".join(ROW_DTYPES))

    def of_order(self, order: int) -> OrderShape:
        """What counting meets at ``order``."""
        return self.by_order[max((known for known in self.by_order if known <= order), default=min(self.by_order))]


@dataclass(frozen=True, kw_only=True)
class Rates:
    """What machines do in a second; every one is an assumption until it is measured.

    Attributes:
        count_tokens: tokens that a core counts for orders 2 to 5 together; other ranges in proportion to their number.
        reduce_share: part of that time which the reduce stages take.
        select_rows: rows that one core selects and turns into text.
        pack_rows: rows that one core packs.
        assemble_bytes: bytes of float32 states that one core processes into rows.
        report_rows: rows that one core reports on.
        spill_bytes: bytes that a node writes or reads in the work directory.
        donor_tokens: donor tokens of one device or, without one, of one core; None to follow from FLOPs.
        donor_flops: peak FLOP/s of a device.
        mfu: part of the peak that a donor's pass reaches.
    """

    count_tokens: float = 3.6e6
    reduce_share: float = 0.2
    select_rows: float = 250e3
    pack_rows: float = 43e3
    assemble_bytes: float = 150e6
    report_rows: float = 250e3
    spill_bytes: float = 1e9
    donor_tokens: float | None = None
    donor_flops: float = 400e12
    mfu: float = 0.3


@dataclass(frozen=True, kw_only=True)
class Fleet:
    """The machines: ``devices`` a node run the donor, or its cores where there are none."""

    nodes: int = 1
    cores: int = 1
    devices: int = 0


@dataclass(frozen=True, kw_only=True)
class StageCost:
    """One stage: bytes it writes to the work directory and reads, core- and device-seconds, wall seconds."""

    name: str
    bytes_written: float
    bytes_read: float
    core_seconds: float
    device_seconds: float
    wall_seconds: float


@dataclass(frozen=True, kw_only=True)
class BuildCost:
    """What a build costs.

    Attributes:
        stages: in the order in which they run.
        bank: sizes of its files.
        peak_work_bytes: of the work directory when it is largest.
        donor_tokens: that run through the donor.
        kept: order -> n-grams that are frequent enough.
        warnings: what will not work, in words.
    """

    stages: tuple[StageCost, ...]
    bank: BankBytes
    peak_work_bytes: float
    donor_tokens: float
    kept: Mapping[int, float]
    warnings: tuple[str, ...]

    @property
    def spilled_bytes(self) -> float:
        """All bytes that stages write to the work directory."""
        return sum(stage.bytes_written for stage in self.stages)

    @property
    def core_seconds(self) -> float:
        """Over all stages."""
        return sum(stage.core_seconds for stage in self.stages)

    @property
    def device_seconds(self) -> float:
        """Over all stages."""
        return sum(stage.device_seconds for stage in self.stages)

    @property
    def wall_seconds(self) -> float:
        """Stages one after the other."""
        return sum(stage.wall_seconds for stage in self.stages)

    def to_json(self) -> dict[str, Any]:
        """The JSON object of this cost, with its totals."""
        totals = {
            name: getattr(self, name) for name in ("spilled_bytes", "core_seconds", "device_seconds", "wall_seconds")
        }
        return {
            "stages": [asdict(stage) for stage in self.stages],
            "bank_bytes": asdict(self.bank) | {"total": self.bank.total},
            "peak_work_bytes": self.peak_work_bytes,
            "donor_tokens": self.donor_tokens,
            "kept_by_order": {str(order): number for order, number in self.kept.items()},
            "warnings": list(self.warnings),
            **totals,
        }


def bank_size(shape: BuildShape) -> BankBytes:
    """Sizes of the bank's files, its n-grams divided evenly over the orders."""
    nodes = shape.rows + shape.phantoms
    return bank_bytes(
        num_rows=shape.rows,
        entries=dict.fromkeys(shape.orders, math.ceil(nodes / len(shape.orders))),
        nodes=nodes,
        vocab_size=shape.vocab_size,
        widths=[shape.hidden_size] * shape.layers,
        row_dtype=shape.row_dtype,
    )


def kept_ngrams(shape: BuildShape) -> dict[int, float]:
    """Order -> n-grams that occur often enough: ``a * T^b / min_count^e``, at most one for ``min_count`` tokens."""
    kept = {}
    for order in range(2, shape.orders[-1] + 1):
        span = shape.of_order(order)
        number = span.kept_scale * shape.tokens**span.growth / shape.min_count**span.rarity
        kept[order] = min(number, shape.tokens * span.candidates / shape.min_count)
    return kept


def combined(shape: BuildShape, order: int) -> float:
    """Records a candidate once a chunk of c tokens is combined: ``distinct * (c / REFERENCE_CHUNK)^(growth - 1)``.

    Never above 1: a smaller chunk holds fewer repetitions. c is what a map task collects, at most its whole slice.
    """
    span = shape.of_order(order)
    chunk = min(shape.chunk_ngrams / span.candidates, shape.slice_tokens, shape.tokens)
    return min(1.0, span.distinct * (chunk / REFERENCE_CHUNK) ** (span.growth - 1))


def records(shape: BuildShape, order: int) -> float:
    """Records that the map stage of ``order`` spills: its candidates, combined inside each chunk."""
    return shape.tokens * shape.of_order(order).candidates * combined(shape, order)


def build_cost(shape: BuildShape, rates: Rates, fleet: Fleet, *, donor_params: float = 0.0) -> BuildCost:
    """Cost of a build.

    Args:
        shape: what is built.
        rates: what the machines do in a second.
        fleet: the machines.
        donor_params: parameters that a donor token passes through; needed unless ``rates.donor_tokens`` is set.

    Raises:
        ConfigError: the donor's speed follows from neither.
    """
    kept = kept_ngrams(shape)
    counting = _counting(shape, rates, fleet, kept)
    return BuildCost(
        stages=(*counting, *_after_counting(shape, rates, fleet, _donor_seconds(shape, rates, donor_params))),
        bank=bank_size(shape),
        peak_work_bytes=peak_work_bytes(shape),
        donor_tokens=shape.rows * shape.donor_tokens_per_row,
        kept=kept,
        warnings=_warnings(shape, kept),
    )


def peak_work_bytes(shape: BuildShape, *, counting: bool = True) -> float:
    """Bytes of the work directory when it is largest; without ``counting``, when it is largest after that.

    What counting left is removed once the selection is there, all else when the bank is.
    """
    later = _after_counting(shape, Rates(), Fleet(), 0.0)
    peak = sum(stage.bytes_written for stage in later)
    if counting:
        counted = _counting(shape, Rates(), Fleet(), kept_ngrams(shape))
        peak = max(peak, sum(stage.bytes_written for stage in (*counted, later[0])))
    return peak


def _counting(shape: BuildShape, rates: Rates, fleet: Fleet, kept: Mapping[int, float]) -> list[StageCost]:
    """Two stages an order. Counting of one order costs a quarter of the measured orders 2 to 5.

    The table of the order below is read by every map task; a node's page cache serves all but the first of its own.
    """
    seconds = shape.tokens / rates.count_tokens / 4
    stages = []
    for order in range(2, shape.orders[-1] + 1):
        runs = records(shape, order) * RECORD_BYTES
        per_file = shape.tokens * NODE_BYTES
        nodes = per_file if 2 < order < shape.orders[-1] else 0.0  # nobody reads those of the last order
        tables = fleet.nodes * kept[order - 1] * KEPT_BYTES if order > 2 else 0.0
        earlier = shape.tokens * shape.token_bytes + (per_file if order > 3 else 0.0) + tables
        table = kept[order] * KEPT_BYTES
        parts = (
            ("map", runs + nodes, earlier, seconds * (1 - rates.reduce_share)),
            ("reduce", table, runs, seconds * rates.reduce_share),
        )
        for part, written, read, core_seconds in parts:
            wall = _wall(core_seconds, written + read, rates, fleet)
            stages.append(_stage(f"count-{order}-{part}", written, read, core_seconds, wall))
    return stages


def _after_counting(shape: BuildShape, rates: Rates, fleet: Fleet, encoding: float) -> list[StageCost]:
    """The stages from the selection on; ``encoding`` is the donor's time on one device, in seconds."""
    donor_tokens = shape.rows * shape.donor_tokens_per_row
    states = 4.0 * shape.rows * shape.layers * shape.hidden_size
    texts = shape.rows * (24.0 + 4 * shape.orders[-1] + 9)
    packs = donor_tokens * 12 + shape.rows * 20.0
    processed = 2.0 * shape.rows * shape.layers * shape.hidden_size
    per_node = fleet.devices or fleet.cores
    encode_wall = max(encoding / (fleet.nodes * per_node), states / (fleet.nodes * rates.spill_bytes))
    one = Fleet()
    select, pack = shape.rows / rates.select_rows, shape.rows / rates.pack_rows
    assemble, report = states / rates.assemble_bytes, shape.rows / rates.report_rows
    return [
        _stage("select", texts, 0.0, select, _wall(select, texts, rates, one)),
        _stage("pack", packs, texts, pack, _wall(pack, packs + texts, rates, one)),
        StageCost(
            name="encode", bytes_written=states, bytes_read=packs, wall_seconds=encode_wall,
            core_seconds=0.0 if fleet.devices else encoding, device_seconds=encoding if fleet.devices else 0.0,
        ),
        _stage("assemble", processed, 2 * states, assemble, _wall(assemble, processed + 2 * states, rates, one)),
        _stage("report", 0.0, 0.0, report, report),
    ]  # fmt: skip


def _stage(name: str, written: float, read: float, core_seconds: float, wall: float) -> StageCost:
    return StageCost(
        name=name, bytes_written=written, bytes_read=read, core_seconds=core_seconds, device_seconds=0.0,
        wall_seconds=wall,
    )  # fmt: skip


def _wall(core_seconds: float, moved_bytes: float, rates: Rates, fleet: Fleet) -> float:
    """Cores and disks do not wait for each other at their best; the slower of the two is the wall time."""
    return max(core_seconds / (fleet.nodes * fleet.cores), moved_bytes / (fleet.nodes * rates.spill_bytes))


def _donor_seconds(shape: BuildShape, rates: Rates, donor_params: float) -> float:
    """Seconds of one device (or core): two FLOPs a parameter and token."""
    donor_tokens = shape.rows * shape.donor_tokens_per_row
    if rates.donor_tokens:
        return donor_tokens / rates.donor_tokens
    if donor_params <= 0:
        raise ConfigError("--donor-params", "is missing", remedy="Give it, or the donor's measured tokens a second.")
    return 2 * donor_params * donor_tokens / (rates.donor_flops * rates.mfu)


def _warnings(shape: BuildShape, kept: Mapping[int, float]) -> tuple[str, ...]:
    lines = []
    for order, number in kept.items():
        if number > MAX_NODES:
            lines.append(f"order {order}: {number:.3g} n-grams are kept, more than node ids of 32 bits can number")
    available = sum(kept[order] for order in shape.orders)
    if available < shape.rows:
        lines.append(f"only {available:.3g} n-grams qualify for the {shape.rows:.3g} rows asked for")
    if lines:
        lines.append(f"--min-count {shape.min_count:g} is what the n-grams kept depend on")
    return tuple(lines)
